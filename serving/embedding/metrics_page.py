"""The run's counters as Prometheus metrics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...errors import BadInput, Busy, need
from .meter import ClusterMeter, Meter


@contextmanager
def metrics_page(address: str | None, meter: Meter | ClusterMeter) -> Iterator[None]:
    """Serve ``/metrics`` at ``PORT`` (of 127.0.0.1) or ``HOST:PORT`` during the ``with`` block, if given.

    Raises:
        BadInput: the address is invalid.
        Busy: the port is in use.
    """
    if address is None:
        yield
        return
    host, _, port = address.rpartition(":")
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise BadInput(f"--metrics is {address!r}; expected PORT or HOST:PORT")
    prometheus = need("prometheus_client", "metrics")
    registry = prometheus.CollectorRegistry()
    registry.register(_Collector(meter))
    try:
        server, thread = prometheus.start_http_server(int(port), host or "127.0.0.1", registry)
    except OSError as error:
        raise Busy(
            f"--metrics {address} is not available ({error}); choose another port"
        ) from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Collector:
    """Reads the meter only when Prometheus asks."""

    def __init__(self, meter: Meter | ClusterMeter) -> None:
        self._meter = meter

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily as Counter
        from prometheus_client.core import GaugeMetricFamily as Gauge

        now = self._meter.read()
        slides = Counter("histoseek_slides", "Finished slides and tile sets", labels=["state"])
        for state, count in now["states"].items():
            slides.add_metric([state], count)
        yield slides
        yield Gauge("histoseek_slides_total_known", "Slides of the run", now["jobs"])
        yield Gauge("histoseek_tiles_known", "Tiles found", now["tiles_known"])
        yield Counter("histoseek_tiles", "Finished tiles", now["tiles_done"])
        yield Counter("histoseek_tiles_unreadable", "Unreadable tiles", now["tiles_unreadable"])
        seconds = Counter("histoseek_stage_seconds", "Seconds of all workers", labels=["stage"])
        items = Counter(
            "histoseek_stage_items", "Slides (open) or tiles (read, encode)", labels=["stage"]
        )
        for name, stage in now["stages"].items():
            seconds.add_metric([name], stage["seconds"])
            items.add_metric([name], stage["items"])
        yield seconds
        yield items
        yield Gauge(
            "histoseek_encoder_busy_ratio",
            "Share of time the encoder had work",
            now["encoder_busy"],
        )
