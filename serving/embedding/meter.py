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
ADDED = (
    "opened", "unopened", "tiles_known", "tiles_done", "tiles_unreadable", "fetched_bytes", "fetch_s",
)  # fmt: skip
"""Counters whose sum over processes means the same."""


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
        self._fetched_bytes, self._fetch_s = 0, 0.0

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

    @contextmanager
    def fetching(self, size: int) -> Iterator[None]:
        """Time the copying of ``size`` bytes from a URL."""
        started = time.monotonic()
        yield
        with self._lock:
            self._fetched_bytes += size
            self._fetch_s += time.monotonic() - started

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
                "unopened": self._ended_unopened,
                "tiles_known": self._tiles_found,
                "tiles_done": self._tiles_done,
                "tiles_unreadable": self._tiles_unreadable,
                "fetched_bytes": self._fetched_bytes,
                "fetch_s": round(self._fetch_s, 3),
                "tiles_per_s": _rate(self._tiles_done, seconds),
                "encoder_busy": round(busy / (last - first), 4) if last > first else 0.0,
                "stages": _by_stage(self._items, self._seconds),
            }

    def report(self, progress: Progress, name: str) -> None:
        """Report progress in tiles."""
        now = self.read()
        progress(now["tiles_done"], _expected(now), _line(now, name))


class ClusterMeter:
    """Counters of a run whose slides are embedded by other processes, each with its own :class:`Meter`."""

    def __init__(self, jobs: int) -> None:
        """Start the clock for a run of ``jobs`` slides and tile sets."""
        self.jobs = jobs
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._ended = added_up([], 0.0)
        self._running: dict[int, dict[str, Any]] = {}

    def running(self, counts: Mapping[int, dict[str, Any]]) -> None:
        """Take over what the meters of the running slides return, by slide."""
        with self._lock:
            self._running = dict(counts)

    def ended(self, number: int, counts: dict[str, Any]) -> None:
        """Add the last counters of a slide that ended."""
        with self._lock:
            self._running.pop(number, None)
            self._ended = added_up([self._ended, counts], 0.0)

    def read(self) -> dict[str, Any]:
        """Return all counters, with the names of :meth:`Meter.read`.

        ``encoder_busy`` is the mean over the slides, weighted by their seconds.
        """
        with self._lock:
            counts = [self._ended, *self._running.values()]
        return {**added_up(counts, time.monotonic() - self._started), "jobs": self.jobs}

    def report(self, progress: Progress, name: str) -> None:
        """Report progress in tiles."""
        now = self.read()
        progress(now["tiles_done"], _expected(now), _line(now, name))


def added_up(counts: Sequence[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Add up what the meters of several processes returned by :meth:`Meter.read`.

    ``slide_s`` is the sum of their seconds, and weighs their ``encoder_busy``.
    """
    spans = [count.get("slide_s", count["seconds"]) for count in counts]
    busy = sum(count["encoder_busy"] * span for count, span in zip(counts, spans, strict=True))
    states: Counter[str] = Counter()
    for count in counts:
        states.update(count["states"])
    items, spent = (
        {name: sum(count["stages"][name][key] for count in counts) for name in STAGES}
        for key in ("items", "seconds")
    )
    added = {key: sum(count[key] for count in counts) for key in ADDED}
    return {
        "seconds": round(seconds, 3),
        "states": dict(states),
        **added,
        "tiles_per_s": _rate(added["tiles_done"], seconds),
        "encoder_busy": round(busy / sum(spans), 4) if sum(spans) else 0.0,
        "slide_s": round(sum(spans), 3),
        "stages": _by_stage(items, spent),
    }


def _expected(now: Mapping[str, Any]) -> int:
    """Return the number of tiles of the run; slides that are not open yet count with the others' mean."""
    known, opened = int(now["tiles_known"]), int(now["opened"])
    waiting = max(0, now["jobs"] - opened - now["unopened"])
    return known + (round(known / opened * waiting) if opened else 0)


def _line(now: Mapping[str, Any], name: str) -> str:
    return (
        f"{sum(now['states'].values())}/{now['jobs']} slides, {now['tiles_per_s']:.0f} tiles/s, "
        f"encoder {now['encoder_busy']:.0%} busy, {name}"
    )


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
