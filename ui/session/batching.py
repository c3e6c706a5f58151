"""The gate before the encoder: a bounded queue whose waiting images are embedded together.

Nobody waits for a batch to fill: whenever the encoder is free, whatever waits goes in one run, up to a
number that was measured to pay. Alone, an image goes at once.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as WaitedTooLong
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ...artifacts.images import Rgb
from ...errors import Busy, Unavailable
from ...serving.encoders.protocol import Encoder

MAX_WAITING = 256
"""Images that may wait; more are turned away at once."""
PATIENCE_S = 30.0
PAYS = 1.2
"""A batch pays if it takes an image through in less than the time alone divided by this."""
TRIED = 8


@dataclass
class _Request:
    tiles: NDArray[np.uint8]
    answer: Future[NDArray[np.float32]] = field(default_factory=Future)


class Batcher:
    """Lets images through to an encoder, a bounded number at a time; safe to use from any thread."""

    def __init__(self, encoder: Encoder, max_waiting: int = MAX_WAITING) -> None:
        """Start as many workers as the encoder works best with.

        Args:
            encoder: any; it is not closed with the gate.
            max_waiting: images that may wait.
        """
        self._encoder = encoder
        self._max = max_waiting
        self._waiting: deque[_Request] = deque()
        self._count = 0
        self._changed = threading.Condition()
        self._closed = False
        self.batch = 1
        """Images that go in one run."""
        self._workers = [
            threading.Thread(target=self._work, name=f"gate-{n}", daemon=True)
            for n in range(max(1, encoder.parallel))
        ]
        for worker in self._workers:
            worker.start()

    @property
    def waiting(self) -> int:
        """Images that wait now."""
        return self._count

    def measure(self) -> dict[str, float]:
        """Find out whether images are faster together, and set :attr:`batch` by it.

        Returns:
            Milliseconds per image alone and in a batch of eight, each the best of three.
        """
        size = self._encoder.manifest.size_px
        tiles = np.full((TRIED, size, size, 3), 128, dtype=np.uint8)

        def best(part: NDArray[np.uint8]) -> float:
            times = []
            for _ in range(4):  # the first one warms up
                if self._closed:
                    break
                started = time.perf_counter()
                self._encoder.embed(part)
                times.append(time.perf_counter() - started)
            return 1000 * min(times[1:], default=0.0) / len(part)

        alone, together = best(tiles[:1]), best(tiles)
        self.batch = max(TRIED, self._encoder.batch) if alone > PAYS * together else 1
        return {"alone_ms": round(alone, 2), "together_ms": round(together, 2)}

    def embed(
        self, tiles: list[Rgb] | NDArray[np.uint8], patience_s: float = PATIENCE_S
    ) -> NDArray[np.float32]:
        """Embed tiles, uint8 (N, S, S, 3) -> float32 (N, D), when their turn comes.

        Raises:
            Busy: too many wait already.
            Unavailable: the encoder did not answer in time.
        """
        request = _Request(np.asarray(tiles))
        count = len(request.tiles)
        with self._changed:
            if self._closed:
                raise Unavailable("the server is shutting down; ask again when it is back")
            # A request that is alone always gets in, however large.
            if self._count and self._count + count > self._max:
                raise Busy(
                    f"{self._count} images wait for the encoder already; at most {self._max} may: "
                    "ask again in a moment"
                )
            self._waiting.append(request)
            self._count += count
            self._changed.notify()
        try:
            return request.answer.result(patience_s)
        except WaitedTooLong as error:
            request.answer.cancel()
            raise Unavailable(
                f"the encoder did not answer within {patience_s:.0f} s; ask again later"
            ) from error
        except CancelledError as error:
            raise Unavailable("the server is shutting down; ask again when it is back") from error

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                taken = self._take()
            if not taken:
                continue
            try:
                found = self._encoder.embed(np.concatenate([r.tiles for r in taken]))
            except BaseException as error:  # each who asked hears of it, and nobody waits for ever
                for request in taken:
                    request.answer.set_exception(error)
                continue
            start = 0
            for request in taken:
                request.answer.set_result(found[start : start + len(request.tiles)])
                start += len(request.tiles)

    def _take(self) -> list[_Request]:
        """Take what goes in the next run; the lock is held."""
        taken: list[_Request] = []
        size = 0
        while self._waiting:
            request = self._waiting[0]
            if taken and size + len(request.tiles) > self.batch:
                break
            self._waiting.popleft()
            self._count -= len(request.tiles)
            if request.answer.set_running_or_notify_cancel():  # else nobody waits for it any more
                taken.append(request)
                size += len(request.tiles)
        return taken

    def close(self) -> None:
        """Turn away who waits, and end the workers."""
        with self._changed:
            self._closed = True
            for request in self._waiting:
                request.answer.cancel()
            self._waiting.clear()
            self._count = 0
            self._changed.notify_all()
        for worker in self._workers:
            worker.join(10)
