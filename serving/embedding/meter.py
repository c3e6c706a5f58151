"""Live counters of an embedding run: tiles, seconds, and the share of time the encoder is busy."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from ...console import Progress

Stage = Literal["open", "read", "encode"]
STAGES: tuple[Stage, ...] = ("open", "read", "encode")


class Meter:
    """Counts over all slides and threads; thread-safe."""

    def __init__(self, jobs: int = 0) -> None:
        """Start the clock.

        Args:
            jobs: number of slides and tile sets.
        """
        self.jobs = jobs
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._items = dict.fromkeys(STAGES, 0)
        self._encoding = 0
        self._since = 0.0
        self._busy = 0.0
        self._first: float | None = None
        self._last: float | None = None
        self._states: Counter[str] = Counter()
        self._known = self._dealt = self._opened = self._unopened = self._unreadable = 0

    @contextmanager
    def stage(self, name: Stage, items: int) -> Iterator[None]:
        """Time a piece of work on this thread; ``items`` counts slides (open) or tiles (read, encode)."""
        started = time.monotonic()
        if name == "encode":
            with self._lock:
                self._first = started if self._first is None else self._first
                if self._encoding == 0:
                    self._since = started
                self._encoding += 1
        try:
            yield
        finally:
            ended = time.monotonic()
            with self._lock:
                self._seconds[name] += ended - started
                self._items[name] += items
                if name == "encode":
                    self._last = ended
                    self._encoding -= 1
                    if self._encoding == 0:
                        self._busy += ended - self._since

    def expect(self, tiles: int) -> None:
        """Count an opened slide and the tiles to embed in it."""
        with self._lock:
            self._opened += 1
            self._known += tiles

    def deal(self, tiles: int, unreadable: int = 0) -> None:
        """Count finished tiles; ``unreadable`` of them could not be read."""
        with self._lock:
            self._dealt += tiles
            self._unreadable += unreadable

    def end(self, state: str, opened: bool) -> None:
        """Count a finished slide or tile set by its state; ``opened``: its tiles were counted before."""
        with self._lock:
            self._states[state] += 1
            self._unopened += not opened

    def read(self) -> dict[str, Any]:
        """Return all counters.

        ``encoder_busy`` is the share of the time between the first and the last encoder call during
        which at least one call was running; ``tiles_per_s`` of a stage is per active worker.
        """
        with self._lock:
            now = time.monotonic()
            busy = self._busy + (now - self._since if self._encoding else 0.0)
            first = self._first if self._first is not None else now
            last = now if self._encoding or self._last is None else self._last
            seconds = now - self._started
            stages = {
                name: {"items": self._items[name], "seconds": round(self._seconds[name], 3)}
                for name in STAGES
            }
            for name in ("read", "encode"):
                spent = self._seconds[name]
                stages[name]["tiles_per_s"] = (
                    round(stages[name]["items"] / spent, 1) if spent else 0
                )
            return {
                "seconds": round(seconds, 3),
                "jobs": self.jobs,
                "states": dict(self._states),
                "opened": self._opened,
                "tiles_known": self._known,
                "tiles_done": self._dealt,
                "tiles_unreadable": self._unreadable,
                "tiles_per_s": round(self._dealt / seconds, 1) if seconds else 0,
                "encoder_busy": round(busy / (last - first), 4) if last > first else 0.0,
                "stages": stages,
            }

    def tell(self, report: Progress, name: str) -> None:
        """Report progress in tiles; unopened slides count with the mean number of tiles of opened ones."""
        now = self.read()
        opened = now["opened"]
        waiting = max(0, self.jobs - opened - self._unopened)
        total = now["tiles_known"] + (round(now["tiles_known"] / opened * waiting) if opened else 0)
        text = (
            f"{sum(now['states'].values())}/{self.jobs} slides, {now['tiles_per_s']:.0f} tiles/s, "
            f"encoder {now['encoder_busy']:.0%} busy, {name}"
        )
        report(now["tiles_done"], total, text)
