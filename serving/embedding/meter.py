"""Live counters of an embedding run: tiles, seconds, and the share of time the encoder is busy."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from ...console import Progress

Stage = Literal["open", "read", "encode"]
STAGES: tuple[Stage, ...] = ("open", "read", "encode")


class Meter:
    """Counts over all slides and threads; thread-safe."""

    def __init__(self) -> None:
        """Start the clock."""
        self.jobs = 0  # number of slides and tile sets
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._items = dict.fromkeys(STAGES, 0)
        self._encoding = 0  # running encoder calls
        self._busy_since = 0.0
        self._busy = 0.0
        self._first_call: float | None = None
        self._last_call: float | None = None
        self._states: Counter[str] = Counter()
        self._tiles_found = self._tiles_done = self._tiles_unreadable = 0
        self._opened = self._ended_unopened = 0

    @contextmanager
    def stage(self, name: Stage, items: int) -> Iterator[None]:
        """Time a piece of work on this thread; ``items`` counts slides (open) or tiles (read, encode)."""
        started = time.monotonic()
        if name == "encode":
            with self._lock:
                self._first_call = started if self._first_call is None else self._first_call
                if self._encoding == 0:
                    self._busy_since = started
                self._encoding += 1
        try:
            yield
        finally:
            ended = time.monotonic()
            with self._lock:
                self._seconds[name] += ended - started
                self._items[name] += items
                if name == "encode":
                    self._last_call = ended
                    self._encoding -= 1
                    if self._encoding == 0:
                        self._busy += ended - self._busy_since

    def slide_opened(self, tiles: int) -> None:
        """Count an opened slide and the tiles to embed in it."""
        with self._lock:
            self._opened += 1
            self._tiles_found += tiles

    def tiles_ended(self, tiles: int, unreadable: int = 0) -> None:
        """Count finished tiles; ``unreadable`` of them could not be read."""
        with self._lock:
            self._tiles_done += tiles
            self._tiles_unreadable += unreadable

    def slide_ended(self, state: str, opened: bool) -> None:
        """Count a finished slide or tile set by its state; ``opened``: its tiles were counted before."""
        with self._lock:
            self._states[state] += 1
            self._ended_unopened += not opened

    def read(self) -> dict[str, Any]:
        """Return all counters.

        ``encoder_busy`` is the share of the time between the first and the last encoder call during
        which at least one call was running; ``tiles_per_s`` of a stage is per active worker.
        """
        with self._lock:
            now = time.monotonic()
            busy = self._busy + (now - self._busy_since if self._encoding else 0.0)
            first = self._first_call if self._first_call is not None else now
            last = now if self._encoding or self._last_call is None else self._last_call
            seconds = now - self._started
            return {
                "seconds": round(seconds, 3),
                "jobs": self.jobs,
                "states": dict(self._states),
                "opened": self._opened,
                "tiles_known": self._tiles_found,
                "tiles_done": self._tiles_done,
                "tiles_unreadable": self._tiles_unreadable,
                "tiles_per_s": _rate(self._tiles_done, seconds),
                "encoder_busy": round(busy / (last - first), 4) if last > first else 0.0,
                "stages": _by_stage(self._items, self._seconds),
            }

    def report(self, progress: Progress, name: str) -> None:
        """Report progress in tiles; unopened slides count with the mean number of tiles of opened ones."""
        now = self.read()
        opened = now["opened"]
        waiting = max(0, self.jobs - opened - self._ended_unopened)
        total = now["tiles_known"] + (round(now["tiles_known"] / opened * waiting) if opened else 0)
        text = (
            f"{sum(now['states'].values())}/{self.jobs} slides, {now['tiles_per_s']:.0f} tiles/s, "
            f"encoder {now['encoder_busy']:.0%} busy, {name}"
        )
        progress(now["tiles_done"], total, text)


def added_up(counts: Sequence[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Add up what the meters of several processes returned by :meth:`Meter.read`."""
    tiles = sum(count["tiles_done"] for count in counts)
    states: Counter[str] = Counter()
    for count in counts:
        states.update(count["states"])
    items, spent = (
        {name: sum(count["stages"][name][key] for count in counts) for name in STAGES}
        for key in ("items", "seconds")
    )
    return {
        "seconds": round(seconds, 3),
        "jobs": len(counts),
        "states": dict(states),
        "tiles_done": tiles,
        "tiles_unreadable": sum(count["tiles_unreadable"] for count in counts),
        "tiles_per_s": _rate(tiles, seconds),
        "stages": _by_stage(items, spent),
    }


def _rate(tiles: int, seconds: float) -> float:
    return round(tiles / seconds, 1) if seconds else 0


def _by_stage(
    items: Mapping[Stage, int], seconds: Mapping[Stage, float]
) -> dict[str, dict[str, float]]:
    stages: dict[str, dict[str, float]] = {}
    for name in STAGES:
        stages[name] = {"items": items[name], "seconds": round(seconds[name], 3)}
        if name != "open":  # that counts slides
            stages[name]["tiles_per_s"] = _rate(items[name], seconds[name])
    return stages
