"""Asks several shards the same question and waits for none longer than a timeout."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from ...errors import BadInput, Damaged, HistoseekError, MissingPart, StorageFailed, Unavailable
from .shards import Shard

T = TypeVar("T")
SLOW_S = 0.1
LONGEST_S = 3600.0
AWAY = (Unavailable, Damaged, StorageFailed, MissingPart, OSError)
"""Errors that mean that a shard is away. Others, such as a wrong filter, are the caller's."""
ANY = (HistoseekError, OSError)
"""Errors of a shard that could not even be opened; all of them mean that it is away."""


@dataclass(frozen=True)
class Answers(Generic[T]):
    """The answers of those shards that gave one in time, and why the others did not, by name."""

    of: dict[str, T] = field(default_factory=dict)
    away: dict[str, str] = field(default_factory=dict)


class _Threads:
    """Threads that stay: a library makes threads and memory of its own for every new thread that calls it.

    They are daemons, so that one that hangs does not keep the process from ending.
    """

    def __init__(self) -> None:
        """Start none yet."""
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._idle = self._count = 0

    def run(self, job: Callable[[], None]) -> None:
        """Run a job in an idle thread, or in a new one."""
        with self._lock:
            idle = self._idle > 0
            if idle:
                self._idle -= 1
            else:
                self._count += 1
        self._jobs.put(job)
        if not idle:
            threading.Thread(target=self._work, name="shards", daemon=True).start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # it holds the question
            with self._lock:
                self._idle += 1

    def end(self) -> None:
        """Let every thread end after its job."""
        for _ in range(self._count):
            self._jobs.put(None)


class Asking:
    """Questions to shards, in threads, because a shard that keeps a thread waiting cannot be stopped.

    Shards on this machine compute, and several at once only get in each other's way. So one thread asks
    them one after another; whenever :data:`SLOW_S` pass without an answer, another thread goes on with
    the rest. Servers are asked at once, each in its own thread. A shard that has missed the timeout of a
    question is not asked again until it has answered that question.
    """

    def __init__(self, timeout_s: float) -> None:
        """Wait at most ``timeout_s`` for the answer of each shard.

        Raises:
            BadInput: the timeout is not above 0 and at most :data:`LONGEST_S`.
        """
        if not 0 < timeout_s <= LONGEST_S:
            raise BadInput(
                f"the timeout is {timeout_s:g} s; expected more than 0 and at most {LONGEST_S:g}"
            )
        self.timeout_s = timeout_s
        self._lock = threading.Lock()
        self._late: dict[str, int] = {}
        self._threads = _Threads()
        weakref.finalize(self, self._threads.end)

    def ask(
        self,
        shards: Sequence[Shard],
        question: Callable[[Shard], T],
        away: tuple[type[Exception], ...] = AWAY,
        timeout_s: float | None = None,
    ) -> Answers[T]:
        """Ask shards the same question.

        Args:
            shards: the shards.
            question: called once for each, in a thread.
            away: errors that mean that a shard is away.
            timeout_s: time to wait for each; None for that of all questions.

        Raises:
            Exception: the first other error of a shard.
        """
        coming: SimpleQueue[tuple[str, T | None, Exception | None]] = SimpleQueue()
        answers = Answers[T]()
        limit = self.timeout_s if timeout_s is None else timeout_s
        late = f"no answer within {limit:g} s"
        with self._lock:
            free = [shard for shard in shards if not self._late.get(shard.name)]
        expected = {shard.name for shard in free}
        for shard in shards:
            if shard.name not in expected:
                answers.away[shard.name] = f"{late} to an earlier question"
        waiting = deque(shard for shard in free if not shard.is_server)
        began: dict[str, float] = {}
        given_up: set[str] = set()
        finished: set[str] = set()

        def work(queue: deque[Shard]) -> None:
            while queue:
                try:
                    shard = queue.popleft()
                except IndexError:  # another thread took the last one
                    return
                began[shard.name] = time.monotonic()
                try:
                    answer, error = question(shard), None
                except Exception as raised:
                    answer, error = None, raised
                with self._lock:
                    finished.add(shard.name)
                    if shard.name in given_up:
                        self._late[shard.name] -= 1
                coming.put((shard.name, answer, error))

        for shard in free:
            if shard.is_server:
                self._threads.run(partial(work, deque([shard])))
        if waiting:
            self._threads.run(partial(work, waiting))
        failed: Exception | None = None
        while expected:
            now = time.monotonic()
            ends = [began.get(name, now) + limit for name in expected]
            left = max(0.0, min(ends) - now)
            try:
                name, answer, error = coming.get(timeout=min(left, SLOW_S) if waiting else left)
            except Empty:
                if waiting:
                    self._threads.run(partial(work, waiting))
                for name in self._missed(expected, began, finished, given_up, limit):
                    answers.away[name] = late
                    expected.remove(name)
                continue
            if name not in expected:
                continue
            expected.remove(name)
            if error is None:
                answers.of[name] = answer  # type: ignore[assignment]
            elif isinstance(error, away):
                answers.away[name] = str(error)
            else:
                failed = failed or error
        if failed is not None:
            raise failed
        return answers

    def _missed(
        self,
        expected: set[str],
        began: dict[str, float],
        finished: set[str],
        given_up: set[str],
        limit: float,
    ) -> list[str]:
        """Return the shards whose time is up, and note that they are late."""
        now = time.monotonic()
        with self._lock:
            missed = [
                name for name in expected - finished if name in began and now - began[name] >= limit
            ]
            for name in missed:
                given_up.add(name)
                self._late[name] = self._late.get(name, 0) + 1
        return missed
