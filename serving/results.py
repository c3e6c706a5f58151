"""What a run of embedding is asked, and what becomes of each slide."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..errors import BadInput

State = Literal["done", "partial", "empty", "skipped", "failed"]


@dataclass(frozen=True)
class EmbedOptions:
    """How slides are cut into tiles.

    Attributes:
        mpp: micrometres per pixel of the tiles; None takes the encoder's.
        assume_mpp: micrometres per pixel of slides whose file does not say.
        overlap_px: overlap of neighbouring tiles.
        min_tissue: least share of tissue in a tile.
        batch: tiles per call of the encoder.
        manifest: CSV of the inputs; for tile sets their labels and groups.
    """

    mpp: float | None = None
    assume_mpp: float | None = None
    overlap_px: int = 0
    min_tissue: float = 0.25
    batch: int = 32
    manifest: Path | None = None

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            BadInput: naming the option, its value and what was expected.
        """
        for name in ("mpp", "assume_mpp"):
            value = getattr(self, name)
            if value is not None and not 0.01 <= value <= 100:
                raise BadInput(f"--{name.replace('_', '-')} is {value}; expected 0.01 to 100 µm")
        if self.batch < 1:
            raise BadInput(f"--batch is {self.batch}; expected 1 or more tiles")
        if self.overlap_px < 0:
            raise BadInput(f"--overlap is {self.overlap_px}; expected 0 or more pixels")
        if not 0 <= self.min_tissue <= 1:
            raise BadInput(f"--min-tissue is {self.min_tissue}; expected a share from 0 to 1")


@dataclass(frozen=True)
class Result:
    """What became of one job.

    Attributes:
        name: of the slide or tile set.
        source: the file or folder.
        state: done, partial (some tiles unreadable), empty (no tissue), skipped (was done before)
            or failed.
        reason: why, unless done.
        tiles: how many were embedded.
        unreadable: tiles that could not be read, with place and reason.
        seconds: it took.
        features: the feature file, if there is one.
    """

    name: str
    source: str
    state: State
    reason: str = ""
    tiles: int = 0
    unreadable: list[str] = field(default_factory=list)
    seconds: float = 0.0
    features: str | None = None

    @property
    def ok(self) -> bool:
        """Whether everything that was asked for of this job is done."""
        return self.state in {"done", "empty", "skipped"}
