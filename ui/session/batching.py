"""The batching queue before the encoder: a bounded queue; waiting images are embedded together.

No image waits for a batch to fill: whenever the encoder is free, the waiting images are embedded in one
batch, up to a batch size that was measured to be faster. A single image is embedded at once.
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
"""Maximum number of waiting images; more are refused at once."""
PATIENCE_S = 30.0
PAYS = 1.2
"""Use batches only if they are at least this many times faster per image."""
TRIED = 8
SHUTTING_DOWN = "the server is shutting down; try again when it is back"


@dataclass
class _Request:
    tiles: NDArray[np.uint8]
    answer: Future[NDArray[np.float32]] = field(default_factory=Future)


class Batcher:
    """Passes images of all threads to an encoder in batches; thread-safe."""

    def __init__(self, encoder: Encoder, max_waiting: int = MAX_WAITING) -> None:
        """Start as many workers as parallel calls give the encoder's best throughput.

        Args:
            encoder: any encoder; :meth:`close` does not close it.
            max_waiting: maximum number of waiting images.
        """
        self._encoder = encoder
        self._max = max_waiting
        self._waiting: deque[_Request] = deque()
        self._count = 0
        self._changed = threading.Condition()
        self._closed = False
        self.batch = 1
        """Maximum number of images per batch."""
        self._workers = [
            threading.Thread(target=self._work, name=f"batching-{n}", daemon=True)
            for n in range(max(1, encoder.parallel))
        ]
        for worker in self._workers:
            worker.start()

    @property
    def waiting(self) -> int:
        """Number of waiting images."""
        return self._count

    def measure(self) -> dict[str, float]:
        """Measure whether batches are faster, and set :attr:`batch` accordingly.

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
        """Embed tiles, uint8 (N, S, S, 3) -> float32 (N, D), in the order of the queue.

        Raises:
            Busy: too many images are waiting.
            Unavailable: the encoder did not answer in time.
        """
        request = _Request(np.asarray(tiles))
        count = len(request.tiles)
        with self._changed:
            if self._closed:
                raise Unavailable(SHUTTING_DOWN)
            # If the queue is empty, a request of any size is accepted.
            if self._count and self._count + count > self._max:
                raise Busy(
                    f"{self._count} images are waiting for the encoder already; at most {self._max} may "
                    "wait; try again in a moment"
                )
            self._waiting.append(request)
            self._count += count
            self._changed.notify()
        try:
            return request.answer.result(patience_s)
        except WaitedTooLong as error:
            request.answer.cancel()
            raise Unavailable(
                f"the encoder did not answer within {patience_s:.0f} s; try again later"
            ) from error
        except CancelledError as error:
            raise Unavailable(SHUTTING_DOWN) from error

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
                vectors = self._encoder.embed(np.concatenate([r.tiles for r in taken]))
            except BaseException as error:  # every request gets the error; none waits for ever
                for request in taken:
                    request.answer.set_exception(error)
                continue
            start = 0
            for request in taken:
                request.answer.set_result(vectors[start : start + len(request.tiles)])
                start += len(request.tiles)

    def _take(self) -> list[_Request]:
        """Take the next batch from the queue; the lock is held."""
        taken: list[_Request] = []
        size = 0
        while self._waiting:
            request = self._waiting[0]
            if taken and size + len(request.tiles) > self.batch:
                break
            self._waiting.popleft()
            self._count -= len(request.tiles)
            if request.answer.set_running_or_notify_cancel():  # else the request was cancelled
                taken.append(request)
                size += len(request.tiles)
        return taken

    def close(self) -> None:
        """Cancel waiting requests, and end the workers."""
        with self._changed:
            self._closed = True
            for request in self._waiting:
                request.answer.cancel()
            self._waiting.clear()
            self._count = 0
            self._changed.notify_all()
        for worker in self._workers:
            worker.join(10)
