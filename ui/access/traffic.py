"""The server's metrics for Prometheus: request counters, and the state of the atlas."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, get_args

from ...errors import need
from ..session.addition import Addition, State
from ..session.session import Session

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Traffic:
    """Counts requests by route, method and status, and measures seconds by route."""

    def __init__(self) -> None:
        """Start all counters at 0.

        Raises:
            MissingPart: prometheus-client is not installed.
        """
        prometheus = need("prometheus_client", "ui")
        self._requests = prometheus.Counter(
            "histoseek_requests", "Requests answered", ["route", "method", "status"], registry=None
        )
        self._seconds = prometheus.Histogram(
            "histoseek_request_seconds", "Seconds from request to answer", ["route"],
            buckets=BUCKETS, registry=None,
        )  # fmt: skip

    def count(self, scope: Any, method: str, status: int, seconds: float) -> None:
        """Count a request; its route is the URL template, which keeps the number of routes small."""
        route = getattr(scope.get("route"), "path", None)
        name = str(route) if route and route != "/" else "page"
        if status in {401, 421}:
            name = "refused"
        self._requests.labels(name, method if method in METHODS else "other", status).inc()
        self._seconds.labels(name).observe(seconds)

    def collect(self) -> Iterator[Any]:
        """Yield the metric families, without the times at which the counters were created."""
        for family in (*self._requests.collect(), *self._seconds.collect()):
            family.samples = [s for s in family.samples if not s.name.endswith("_created")]
            yield family


class AtlasState:
    """Measures the atlas, the queue before the encoder and the slides being added."""

    def __init__(self, session: Session, additions: Callable[[], Iterable[Addition]]) -> None:
        """Store the sources; they are read when Prometheus asks for the metrics."""
        self._session, self._additions = session, additions

    def collect(self) -> Iterator[Any]:
        """Yield the metric families."""
        gauge = need("prometheus_client.core", "ui").GaugeMetricFamily
        view = self._session.atlas.view()
        batching = self._session.batching
        slides = sum(bool(slide["name"]) for slide in view.columns.slides)
        waiting = batching.waiting if batching else 0
        yield gauge("histoseek_tiles", "Tiles of the atlas", len(view.index))
        yield gauge("histoseek_slides", "Slides and tile sets of the atlas", slides)
        yield gauge("histoseek_revision", "Revision of the atlas", view.revision)
        yield gauge("histoseek_images_waiting", "Images before the encoder", waiting)
        family = gauge("histoseek_additions", "Slides being added", labels=["state"])
        states = Counter(job.state for job in self._additions())
        for state in get_args(State):
            family.add_metric([state], states[state])
        yield family


def metrics_text(*collectors: Any) -> bytes:
    """Return the collectors' metrics in the text format of Prometheus."""
    prometheus = need("prometheus_client", "ui")
    registry = prometheus.CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    text: bytes = prometheus.generate_latest(registry)
    return text
