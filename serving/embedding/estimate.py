"""How long a run will take with a slow encoder: measured and counted before it starts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..encoders.protocol import Encoder
from ..encoders.stain_normalisation import graph_of
from .job import Job
from .results import EmbedOptions, Result
from .work import prepare

SLOW = 100.0
"""Encoders that embed more tiles per second than this get no estimate: counting would cost more."""
COUNTED = 4
"""Maximum number of slides whose tiles are counted."""
LONG_S = 600.0
"""An estimate above this suggests a faster machine."""


@dataclass(frozen=True)
class Estimate:
    """The expected size and duration of a run.

    Attributes:
        tiles: expected number of tiles to embed.
        counted: inputs of which the tiles were counted.
        inputs: number of inputs.
        tiles_per_s: measured speed of the encoder alone.
        seconds: expected duration.
    """

    tiles: int
    counted: int
    inputs: int
    tiles_per_s: float
    seconds: float

    @property
    def text(self) -> str:
        """The estimate as a sentence, with a suggestion if it is long."""
        how = "" if self.counted == self.inputs else f", counted on {self.counted} of {self.inputs}"
        text = (
            f"estimate: about {self.tiles:,} tiles{how}, at {_rounded(self.tiles_per_s)} tiles/s here: "
            f"about {_duration(self.seconds)}"
        )
        if self.seconds > LONG_S:
            text += "; a GPU server (--encoder triton://…) or a cluster (--ray) is faster"
        return text


def estimate(
    jobs: Sequence[Job], encoder: Encoder, out: Path, options: EmbedOptions
) -> Estimate | None:
    """Estimate a run; None if nothing is to do, or the encoder is not slow, or runs on a server or a GPU.

    Args:
        jobs: of the run.
        encoder: embeds two batches for the measurement.
        out: folder of the features; what is there already does not count.
        options: of the run.
    """
    if encoder.offloads or not jobs:
        return None
    if _speed(encoder, 1) > SLOW:
        return None
    some = [jobs[n] for n in np.unique(np.linspace(0, len(jobs) - 1, COUNTED).astype(int))]
    quiet = replace(options, overlays=False, geojson=False)
    precision = str(encoder.describe().get("precision", "f32"))
    counts = [_count(job, encoder, precision, out, quiet) for job in some]
    tiles = round(sum(counts) / len(counts) * len(jobs))
    if not tiles:
        return None
    speed = _speed(encoder, encoder.batch)
    if speed > SLOW:  # the first measurement was disturbed
        return None
    return Estimate(tiles, len(some), len(jobs), round(speed, 2), round(tiles / speed, 1))


def _speed(encoder: Encoder, batch: int) -> float:
    """Return tiles per second with all parallel calls busy."""
    size = encoder.manifest.size_px
    tiles = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), np.uint8)
    encoder = graph_of(encoder)
    encoder.embed(tiles[:1])  # the first call prepares memory
    started = time.perf_counter()
    with ThreadPoolExecutor(encoder.parallel) as pool:
        list(pool.map(lambda _: encoder.embed(tiles), range(encoder.parallel)))
    return len(tiles) * encoder.parallel / max(time.perf_counter() - started, 1e-9)


def _count(job: Job, encoder: Encoder, precision: str, out: Path, options: EmbedOptions) -> int:
    try:
        work = prepare(job, encoder.manifest, precision, out, options, look_only=True)
    except Exception:  # whatever it is, the run itself reports it
        return 0
    if isinstance(work, Result):
        return 0
    work.close()
    return work.count


def _rounded(speed: float) -> str:
    return f"{speed:.2g}" if speed < 10 else f"{speed:,.0f}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"
