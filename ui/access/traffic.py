"""Request counters for Prometheus."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

from ..session.session import Session

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Traffic:
    """Counts requests by route, method and status, and measures seconds by route."""

    def __init__(self) -> None:
        """Start all counters at 0."""
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, str, int]] = Counter()
        self._seconds: dict[str, list[float]] = {}
        self._buckets: dict[str, list[int]] = {}

    def count(self, scope: Any, method: str, status: int, seconds: float) -> None:
        """Count a request; its route is the URL template, which keeps the number of routes small."""
        route = getattr(scope.get("route"), "path", None)
        name = str(route) if route and route != "/" else "page"
        if status in {401, 421}:
            name = "refused"
        method = method if method in METHODS else "other"
        with self._lock:
            self._requests[name, method, status] += 1
            sums = self._seconds.setdefault(name, [0.0, 0.0])
            sums[0] += seconds
            sums[1] += 1
            buckets = self._buckets.setdefault(name, [0] * len(BUCKETS))
            for n, limit in enumerate(BUCKETS):
                buckets[n] += seconds <= limit

    def read(
        self,
    ) -> tuple[dict[tuple[str, str, int], int], dict[str, tuple[float, int, list[int]]]]:
        """Return requests by route, method and status; by route seconds, count and buckets."""
        with self._lock:
            seconds = {
                name: (sums[0], int(sums[1]), list(self._buckets[name]))
                for name, sums in self._seconds.items()
            }
            return dict(self._requests), seconds


class Collector:
    """Collects the server's metrics when Prometheus requests them."""

    def __init__(self, session: Session, traffic: Traffic, jobs: Any) -> None:
        """Store the sources of the metrics.

        Args:
            session: the open atlas.
            traffic: the request counters.
            jobs: returns the slides being added.
        """
        self._session, self._traffic, self._jobs = session, traffic, jobs

    def collect(self) -> Iterator[Any]:
        """Yield the metric families."""
        from prometheus_client.core import (
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
        )

        requests, seconds = self._traffic.read()
        asked = CounterMetricFamily(
            "histoseek_requests", "Requests answered", labels=["route", "method", "status"]
        )
        for (route, method, status), count in requests.items():
            asked.add_metric([route, method, str(status)], count)
        yield asked
        took = HistogramMetricFamily(
            "histoseek_request_seconds", "Seconds from request to answer", labels=["route"]
        )
        for route, (total, count, buckets) in seconds.items():
            steps = [(str(limit), n) for limit, n in zip(BUCKETS, buckets, strict=True)]
            took.add_metric([route], [*steps, ("+Inf", count)], total)
        yield took
        view = self._session.atlas.view()
        yield GaugeMetricFamily("histoseek_tiles", "Tiles of the atlas", len(view.index))
        there = sum(bool(slide["name"]) for slide in view.columns.slides)
        yield GaugeMetricFamily("histoseek_slides", "Slides and tile sets of the atlas", there)
        yield GaugeMetricFamily("histoseek_revision", "Revision of the atlas", view.revision)
        batching = self._session.batching
        waiting = batching.waiting if batching else 0
        yield GaugeMetricFamily("histoseek_images_waiting", "Images before the encoder", waiting)
        jobs = GaugeMetricFamily("histoseek_additions", "Slides being added", labels=["state"])
        states = Counter(job.state for job in self._jobs())
        for state in ("waiting", "embedding", "adding", "done", "failed"):
            jobs.add_metric([state], states[state])
        yield jobs
