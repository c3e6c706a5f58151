"""Asks several shards at the same time and waits for none longer than a timeout."""

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

from ...errors import Damaged, HistoseekError, MissingPart, StorageFailed, Unavailable
from .shards import Shard

T = TypeVar("T")
SLOW_S = 0.1
AWAY = (Unavailable, Damaged, StorageFailed, MissingPart, OSError)
"""Errors that mean that a shard is away. Others, such as a wrong filter, are the caller's."""


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
    the rest. Servers are asked at once, each in its own thread. A shard that has not answered an earlier
    question yet is not asked again: it is away until its answer comes.
    """

    def __init__(self, timeout_s: float) -> None:
        """Wait at most ``timeout_s`` for the answers to a question."""
        self.timeout_s = timeout_s
        self._lock = threading.Lock()
        self._busy: set[str] = set()
        self._threads = _Threads()
        weakref.finalize(self, self._threads.end)

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
        with self._lock:
            free = [shard for shard in shards if shard.name not in self._busy]
            self._busy |= {shard.name for shard in free}
        expected = {shard.name for shard in free}
        for shard in shards:
            if shard.name not in expected:
                answers.away[shard.name] = "it has not answered an earlier question yet"
        waiting = deque(shard for shard in free if not shard.is_server)

        def work(queue: deque[Shard]) -> None:
            while queue:
                try:
                    shard = queue.popleft()
                except IndexError:  # another thread took the last one
                    return
                try:
                    answer, error = question(shard), None
                except Exception as raised:
                    answer, error = None, raised
                with self._lock:
                    self._busy.discard(shard.name)
                coming.put((shard.name, answer, error))

        for shard in free:
            if shard.is_server:
                self._threads.run(partial(work, deque([shard])))
        self._threads.run(partial(work, waiting))
        until = time.monotonic() + self.timeout_s
        failed: Exception | None = None
        while expected and (left := until - time.monotonic()) > 0:
            try:
                name, answer, error = coming.get(timeout=min(left, SLOW_S) if waiting else left)
            except Empty:
                if waiting:
                    self._threads.run(partial(work, waiting))
                continue
            expected.remove(name)
            if error is None:
                answers.of[name] = answer  # type: ignore[assignment]
            elif isinstance(error, away):
                answers.away[name] = str(error)
            else:
                failed = failed or error
        while waiting:  # what no thread has begun is not asked any more
            try:
                left_out = waiting.popleft()
            except IndexError:
                break
            with self._lock:
                self._busy.discard(left_out.name)
        if failed is not None:
            raise failed
        for name in expected:
            answers.away[name] = f"no answer within {self.timeout_s:g} s"
        return answers


ANY = (HistoseekError, OSError)
"""Errors of a shard that could not even be opened; all of them mean that it is away."""
