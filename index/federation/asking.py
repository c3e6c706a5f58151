"""Asks several shards at the same time and waits for none longer than a timeout."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from ...errors import Damaged, HistoseekError, MissingPart, StorageFailed, Unavailable
from .shards import Shard

T = TypeVar("T")
AWAY = (Unavailable, Damaged, StorageFailed, MissingPart, OSError)
"""Errors that mean that a shard is away. Others, such as a wrong filter, are the caller's."""


@dataclass(frozen=True)
class Answers(Generic[T]):
    """The answers of those shards that gave one in time, and why the others did not, by name."""

    of: dict[str, T] = field(default_factory=dict)
    away: dict[str, str] = field(default_factory=dict)


class Asking:
    """Questions to shards, each in its own thread.

    A thread that a shard keeps waiting cannot be stopped. So a shard that has not answered yet is not asked
    again: it is away until its answer comes.
    """

    def __init__(self, timeout_s: float) -> None:
        """Wait at most ``timeout_s`` for the answers to a question."""
        self.timeout_s = timeout_s
        self._lock = threading.Lock()
        self._waiting: dict[str, threading.Thread] = {}

    def ask(
        self,
        shards: Sequence[Shard],
        question: Callable[[Shard], T],
        away: tuple[type[Exception], ...] = AWAY,
    ) -> Answers[T]:
        """Ask shards the same question.

        Args:
            shards: the shards.
            question: called once for each, in a thread.
            away: errors that mean that a shard is away.

        Raises:
            Exception: the first other error of a shard.
        """
        coming: SimpleQueue[tuple[str, T | None, Exception | None]] = SimpleQueue()
        answers = Answers[T]()
        expected: list[str] = []

        def run(shard: Shard) -> None:
            try:
                coming.put((shard.name, question(shard), None))
            except Exception as error:
                coming.put((shard.name, None, error))

        for shard in shards:
            with self._lock:
                before = self._waiting.get(shard.name)
                if before is not None and before.is_alive():
                    answers.away[shard.name] = "it has not answered an earlier question yet"
                    continue
                thread = threading.Thread(
                    target=run, args=(shard,), name=f"shard {shard.name}", daemon=True
                )
                self._waiting[shard.name] = thread
                thread.start()
            expected.append(shard.name)
        until = time.monotonic() + self.timeout_s
        failed: Exception | None = None
        while expected:
            try:
                name, answer, error = coming.get(timeout=max(0.0, until - time.monotonic()))
            except Empty:
                break
            expected.remove(name)
            if error is None:
                answers.of[name] = answer  # type: ignore[assignment]
            elif isinstance(error, away):
                answers.away[name] = str(error)
            else:
                failed = failed or error
        if failed is not None:
            raise failed
        for name in expected:
            answers.away[name] = f"no answer within {self.timeout_s:g} s"
        return answers


ANY = (HistoseekError, OSError)
"""Errors of a shard that could not even be opened; all of them mean that it is away."""
