"""One embedding run in this process: opens the encoder, runs the jobs, and counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...artifacts.manifest import Manifest, read_manifest
from ...console import Progress
from ..encoders.open import open_encoder
from ..encoders.protocol import Encoder
from .estimate import Estimate, estimate
from .job import Job
from .meter import Meter
from .metrics_page import metrics_page
from .pipeline import check_options, embed_jobs
from .remote_out import features_at
from .results import EmbedOptions, EncoderChoice, Result


@dataclass(frozen=True)
class Ran:
    """The outcome of a run: every job's result in order, the encoder, its settings, and the counters."""

    results: list[Result]
    manifest: Manifest
    encoder: dict[str, Any]
    speed: dict[str, Any]


def open_chosen(choice: EncoderChoice) -> Encoder:
    """Open the chosen encoder."""
    expect = read_manifest(choice.bundle) if choice.bundle is not None else None
    return open_encoder(
        choice.spec, expect, choice.engine, choice.precision, choice.batch, choice.streams
    )


def run_here(
    jobs: Sequence[Job],
    choice: EncoderChoice,
    out: Path | str,
    options: EmbedOptions,
    progress: Progress,
    metrics: str | None = None,
    results: list[Result] | None = None,
    tell: Callable[[Estimate], None] | None = None,
) -> Ran:
    """Embed jobs in this process; see :func:`~histoseek.serving.embedding.pipeline.embed_jobs`.

    ``out`` may be a URL. With ``metrics`` (``[HOST:]PORT``), Prometheus metrics are served during the run.
    With ``tell``, it is called with an estimate before the run starts, if the encoder is slow and nothing
    is behind a URL.
    """
    encoder, meter = open_chosen(choice), Meter()
    try:
        check_options(options, encoder)
        with features_at(out) as (folder, remote):
            if tell is not None and remote is None and not any(job.url for job in jobs):
                found = estimate(jobs, encoder, folder, options)
                if found is not None:
                    tell(found)
            with metrics_page(metrics, meter):
                ended = embed_jobs(jobs, encoder, folder, options, progress, meter, results, remote)
        return Ran(ended, encoder.manifest, encoder.describe(), meter.read())
    finally:
        encoder.close()
