"""One run of embedding in this process: the encoder opened, the jobs done, everything counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...artifacts.manifest import Manifest, read_manifest
from ...console import Report
from ..encoders.open import open_encoder
from ..encoders.protocol import Encoder
from .jobs import Job
from .meter import Meter
from .metrics_page import metrics_page
from .pipeline import embed_jobs
from .results import EmbedOptions, Result


@dataclass(frozen=True)
class EncoderChoice:
    """Which encoder, and how it is to run; small enough to be sent to other machines.

    Attributes:
        spec: ``default``, a bundle's folder, or ``triton://…``.
        bundle: that the encoder must be equal to, or None.
        engine: of an encoder in this process.
        precision: of an encoder in this process.
        batch: tiles per run, or None for the best.
        streams: of an encoder in this process; one per core when None.
    """

    spec: str
    bundle: Path | None = None
    engine: str = "auto"
    precision: str = "f32"
    batch: int | None = None
    streams: int | None = None

    def open(self) -> Encoder:
        """Open the encoder."""
        expect = read_manifest(self.bundle) if self.bundle is not None else None
        return open_encoder(
            self.spec, expect, self.engine, self.precision, self.batch, self.streams
        )


@dataclass(frozen=True)
class Ran:
    """What became of a run.

    Attributes:
        results: of every job, in order.
        manifest: of the encoder.
        encoder: how it ran.
        speed: what the meter counted.
    """

    results: list[Result]
    manifest: Manifest
    encoder: dict[str, Any]
    speed: dict[str, Any]


def run_here(
    jobs: Sequence[Job],
    choice: EncoderChoice,
    out: Path,
    options: EmbedOptions,
    progress: Report,
    metrics: str | None = None,
    results: list[Result] | None = None,
) -> Ran:
    """Embed jobs in this process; see :func:`~histoseek.serving.embedding.pipeline.embed_jobs`.

    Args:
        jobs: from :func:`~histoseek.serving.embedding.jobs.find_jobs`.
        choice: of the encoder.
        out: the folder of features.
        options: how to cut tiles.
        progress: draws progress.
        metrics: ``[HOST:]PORT`` of a Prometheus page while it runs.
        results: filled with the result of each job as it ends.
    """
    encoder, meter = choice.open(), Meter()
    try:
        with metrics_page(metrics, meter):
            found = embed_jobs(jobs, encoder, out, options, progress, meter, results)
        return Ran(found, encoder.manifest, encoder.describe(), meter.read())
    finally:
        encoder.close()
