"""What a run of embedding is asked, and what becomes of each slide."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ...errors import BadInput

State = Literal["done", "partial", "empty", "skipped", "failed"]


@dataclass(frozen=True)
class EmbedOptions:
    """How slides are cut into tiles, and what is written beside the features.

    Attributes:
        mpp: micrometres per pixel of the tiles; None takes the encoder's.
        assume_mpp: micrometres per pixel of slides whose file and manifest do not say.
        override_mpp: micrometres per pixel of every slide of the run, whatever file and manifest say.
        series: number of the picture that is the slide, in TIFF files that hold several.
        overlap_px: overlap of neighbouring tiles.
        min_tissue: least share of tissue in a tile.
        manifest: CSV of the inputs; for tile sets their labels and groups.
        regions: GeoJSON file of the one slide, or a folder of them, each named after its slide:
            polygons in QuPath's frame that count as tissue, instead of what is found.
        region_classes: take only annotations classified so.
        overlays: write ``overlays/<slide>.jpg``.
        geojson: write ``geojson/<slide>.tissue.geojson`` and ``.tiles.geojson``.
        jobs: decoder workers; one per core when None. Results do not depend on it.
    """

    mpp: float | None = None
    assume_mpp: float | None = None
    override_mpp: float | None = None
    series: int | None = None
    overlap_px: int = 0
    min_tissue: float = 0.25
    manifest: Path | None = None
    regions: Path | None = None
    region_classes: tuple[str, ...] = ()
    overlays: bool = True
    geojson: bool = False
    jobs: int | None = None

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            BadInput: naming the option, its value and what was expected.
        """
        for name in ("mpp", "assume_mpp", "override_mpp"):
            value = getattr(self, name)
            if value is not None and not 0.01 <= value <= 100:
                raise BadInput(f"--{name.replace('_', '-')} is {value}; expected 0.01 to 100 µm")
        if self.series is not None and self.series < 0:
            raise BadInput(f"--series is {self.series}; expected 0 or more")
        if self.override_mpp is not None and self.assume_mpp is not None:
            raise BadInput("--override-mpp and --assume-mpp say the same thing; pass one of them")
        if self.jobs is not None and not 1 <= self.jobs <= 512:
            raise BadInput(f"--jobs is {self.jobs}; expected 1 to 512 decoder workers")
        if self.overlap_px < 0:
            raise BadInput(f"--overlap is {self.overlap_px}; expected 0 or more pixels")
        if not 0 <= self.min_tissue <= 1:
            raise BadInput(f"--min-tissue is {self.min_tissue}; expected a share from 0 to 1")
        if self.region_classes and self.regions is None:
            raise BadInput("--region-class goes with --regions")
        if self.regions is not None and not self.regions.exists():
            raise BadInput(f"--regions {self.regions} does not exist; check the path")


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
        seconds: from opening to writing; slides overlap in time.
        features: the feature file, if there is one.
        tissue: share of the slide that is tissue; None for tile sets and what was not opened.
        notes: what was guessed, overruled or taken over, one sentence each.
        left_out: of a tile set, the files that were not taken, each with the reason.
        icc_profile: name of the slide's colour profile; None without one.
        icc_applied: whether its pixels were converted by it to sRGB; those of slides are not.
    """

    name: str
    source: str
    state: State
    reason: str = ""
    tiles: int = 0
    unreadable: list[str] = field(default_factory=list)
    seconds: float = 0.0
    features: str | None = None
    tissue: float | None = None
    notes: list[str] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)
    icc_profile: str | None = None
    icc_applied: bool = False

    @property
    def ok(self) -> bool:
        """Whether everything that was asked for of this job is done."""
        return self.state in {"done", "empty", "skipped"}
