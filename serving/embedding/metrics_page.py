"""The run's counters as Prometheus metrics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...errors import BadInput, Busy, MissingPart
from .meter import Meter


@contextmanager
def metrics_page(address: str | None, meter: Meter) -> Iterator[None]:
    """Serve ``/metrics`` during the ``with`` block; do nothing without an address.

    Args:
        address: ``PORT``, on 127.0.0.1, or ``HOST:PORT``.
        meter: the counters.

    Raises:
        BadInput: the address is invalid.
        Busy: the port is in use.
        MissingPart: prometheus-client is not installed.
    """
    if address is None:
        yield
        return
    host, _, port = address.rpartition(":")
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise BadInput(f"--metrics is {address!r}; expected PORT or HOST:PORT")
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError as error:
        raise MissingPart(
            "--metrics needs prometheus-client: pip install 'histoseek[metrics]'"
        ) from error
    registry = CollectorRegistry()
    registry.register(_Collector(meter))
    try:
        server, thread = start_http_server(int(port), host or "127.0.0.1", registry)
    except OSError as error:
        raise Busy(
            f"--metrics {address} cannot be listened on ({error}); choose another"
        ) from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Collector:
    """Reads the meter only when Prometheus asks."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        now = self._meter.read()
        slides = CounterMetricFamily(
            "histoseek_slides", "Slides and tile sets through, by state", labels=["state"]
        )
        for state, count in now["states"].items():
            slides.add_metric([state], count)
        yield slides
        yield GaugeMetricFamily("histoseek_slides_total_known", "Slides of the run", now["jobs"])
        yield GaugeMetricFamily("histoseek_tiles_known", "Tiles found", now["tiles_known"])
        yield CounterMetricFamily("histoseek_tiles", "Tiles dealt with", now["tiles_done"])
        yield CounterMetricFamily(
            "histoseek_tiles_unreadable", "Tiles that could not be read", now["tiles_unreadable"]
        )
        seconds = CounterMetricFamily(
            "histoseek_stage_seconds", "Seconds of all workers, by stage", labels=["stage"]
        )
        items = CounterMetricFamily(
            "histoseek_stage_items", "Slides (open) or tiles (read, encode)", labels=["stage"]
        )
        for name, stage in now["stages"].items():
            seconds.add_metric([name], stage["seconds"])
            items.add_metric([name], stage["items"])
        yield seconds
        yield items
        yield GaugeMetricFamily(
            "histoseek_encoder_busy_ratio",
            "Share of time the encoder had work",
            now["encoder_busy"],
        )
