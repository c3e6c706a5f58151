"""A slide prepared for embedding: its tiles are found, then read piece by piece, then described."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...artifacts.feature_files import STAIN, Features, LeftOutTiles
from ...artifacts.files import write_atomic
from ...artifacts.geojson import moved
from ...artifacts.images import encode_jpeg
from ...artifacts.manifest import Manifest
from ...artifacts.tables import number_of
from ...errors import BadInput
from ..encoders.stain_normalisation import Table, fitted, normalised, sampled
from ..slides.geojson import outlines, write_tiles, write_tissue
from ..slides.overlay import Backdrop, backdrop, draw_overlay
from ..slides.quality import DARK, FAULTS, PEN, Limits, counted, is_stain, listed, measure
from ..slides.slide import Grid, Slide
from ..slides.stain import stain_of, tally
from .job import Job
from .measured import Measured
from .results import EmbedOptions

FITTED = 48
"""Maximum number of tiles of a slide to which stain normalisation is fitted."""
MAX_INK, MAX_DARK = 0.05, 0.5
"""Tiles with a larger share of ink, or of nearly black pixels, are not among them if there are others."""
ENLARGED = 1.2
"""Tiles that are enlarged by more are not called blurred."""


@dataclass(frozen=True)
class StatedScale:
    """The mpp and the TIFF series that the options and the manifest state for one slide.

    Attributes:
        by: source of the mpp: ``override`` or ``manifest``.
        series: index of the TIFF image that is the slide.
        notes: values that were overridden.
    """

    mpp: float | None = None
    by: str = ""
    series: int | None = None
    notes: tuple[str, ...] = ()


def stated_scale(job: Job, options: EmbedOptions) -> StatedScale:
    """Return the mpp and the TIFF series that the options and the manifest state for a slide.

    Raises:
        BadInput: the manifest's mpp or series is not a number in range.
    """
    notes = []
    series, text = options.series, job.row.get("series", "")
    if text and not (text.isdecimal() and len(text) < 10):
        raise BadInput(
            f"the manifest's series of {job.source.name} is {text!r}; expected the number of "
            "an image in the TIFF"
        )
    if text and series is None:
        series = int(text)
    elif text and series != int(text):
        notes.append(f"series is {series} (from --series); the manifest's {text} was overridden")
    stated = job.row.get("mpp", "")
    value = number_of(stated) if stated else None
    if stated and (value is None or not 0.01 <= value <= 100):
        raise BadInput(
            f"the manifest's mpp of {job.source.name} is {stated!r}; expected 0.01 to 100"
        )
    chosen, by = value, "manifest" if stated else ""
    if options.override_mpp is not None:
        chosen, by = options.override_mpp, "override"
        if value is not None and value != chosen:
            notes.append(
                f"µm per pixel is {chosen:g} (from --override-mpp); the manifest's {value:g} was overridden"
            )
    elif value is not None and options.assume_mpp not in {None, value}:
        notes.append(
            f"µm per pixel is {value:g} (from the manifest); --assume-mpp {options.assume_mpp:g} was not "
            "used: it is only for slides whose value is unknown"
        )
    return StatedScale(chosen, by, series, tuple(notes))


@dataclass
class SlideWork:
    """A slide; see :class:`Work`."""

    job: Job
    slide: Slide
    grid: Grid
    manifest: Manifest
    name: str
    path: Path
    key: dict[str, Any]
    stated: StatedScale
    limits: Limits
    drawing: Drawing | None = None
    seconds: float = 0.0
    left_out: Sequence[dict[str, str]] = ()
    stain: Table | None = None
    closing: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        """Count the tiles, collect what the result states, and free the grid's images."""
        self.count = len(self.grid.coords)
        self.tissue: float | None = round(self.grid.tissue, 4)
        self.notes = [*self.stated.notes, *self.slide.notes]
        if self.limits.max_pen < 1 and is_stain(self.grid.thumbnail, self.grid.mask):
            self.limits = replace(self.limits, max_pen=1.0)
            self.notes.append(
                "much of the tissue has the colours of pen ink, as with a blue or green stain, so no tile "
                "was left out as pen"
            )
        enlarged = self.grid.mpp / self.grid.target_mpp
        if enlarged > ENLARGED and self.limits.min_sharpness:
            self.limits = replace(self.limits, min_sharpness=0.0)
            self.notes.append(
                f"the slide is coarser than its tiles, which are enlarged {enlarged:.2g} times, so none "
                "was left out as blurred"
            )
        nothing = np.zeros((0, 0, 3), dtype=np.uint8)
        self.grid = replace(self.grid, thumbnail=nothing, mask=nothing[..., 0] > 0)

    def read(self, start: int, out: NDArray[np.uint8]) -> dict[int, BadInput]:
        """See :class:`Work`."""
        corners = [(int(x), int(y)) for x, y in self.grid.coords[start : start + len(out)]]
        return self.slide.read_tiles(corners, self.grid.size_px_level0, out)

    def fit_stain(self) -> None:
        """Fit the encoder's stain normalisation, if it has one, to tiles from all over the slide."""
        method, count = self.manifest.stain_normalise, self.count
        if method is None or not count:
            return
        rows = np.unique(np.linspace(0, count - 1, min(count, FITTED)).astype(int))
        size = self.manifest.size_px
        tiles = np.empty((len(rows), size, size, 3), np.uint8)
        corners = [(int(x), int(y)) for x, y in self.grid.coords[rows]]
        unreadable = self.slide.read_tiles(corners, self.grid.size_px_level0, tiles)
        tiles = np.delete(tiles, list(unreadable), axis=0)
        if not len(tiles):
            self.notes.append("the stain was not normalised: none of the sampled tiles can be read")
            return
        measures = measure(tiles)
        clean = (measures[:, PEN] <= MAX_INK) & (measures[:, DARK] <= MAX_DARK)
        if clean.any():  # else it is a blue or green stain
            tiles = tiles[clean]
        told = stain_of(tally(tiles))
        try:
            self.stain = fitted(sampled(tiles), method)
        except BadInput as error:
            self.notes.append(f"the stain was not normalised: {error}")
            return
        if told in {"IHC", "other"}:
            kind = "looks like immunohistochemistry" if told == "IHC" else "does not look like H&E"
            self.notes.append(
                f"the slide {kind}; its stain was normalised, which gives it colours of H&E"
            )

    def normalised(self, numbers: Sequence[int], tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """See :class:`Work`."""
        return tiles if self.stain is None else normalised(tiles, self.stain)

    def draw(self, faults: NDArray[np.int8]) -> None:
        """See :class:`Work`."""
        if self.drawing is not None:
            self.drawing.write(faults)

    def describe(self, measured: Measured, unreadable: list[str]) -> Features:
        """See :class:`Work`."""
        grid, slide, reason = self.grid, self.slide, ""
        embedded, left_out = measured.embedded(), measured.left_out()
        if not self.count and not grid.candidates:
            reason = (
                f"no tile: the slide has {slide.width} x {slide.height} pixels, less than one tile of "
                f"{grid.size_px_level0} x {grid.size_px_level0}"
            )
        elif not self.count:
            share = self.key["min_tissue"]
            where = "the regions given" if self.key.get("regions") else "tissue"
            reason = f"no tissue: none of {grid.candidates} tiles reaches {share:.0%} of {where}"
        elif len(left_out) and not len(embedded):
            reason = (
                f"{listed(measured.counts)} of {self.count} tiles were left out, and no other could be "
                "embedded; `histoseek embed --min-sharpness 0 --max-pen 1` embeds them"
            )
        return Features(
            name=self.name,
            encoder=self.manifest.name,
            encoder_sha256=self.manifest.sha256,
            features=np.zeros((0, self.manifest.dim), dtype=np.float32),
            coords=grid.coords[embedded],
            source=self.job.location,
            size_px=grid.size_px,
            size_px_level0=grid.size_px_level0,
            overlap_px=grid.overlap_px,
            mpp=grid.mpp,
            target_mpp=grid.target_mpp,
            width=slide.width,
            height=slide.height,
            quality=measured.quality(embedded),
            left_out=LeftOutTiles(
                grid.coords[left_out],
                measured.quality(left_out),
                tuple(FAULTS[code] for code in measured.codes(left_out)),
            )
            if len(left_out)
            else None,
            about={
                "key": self.key,
                "source": self.job.location,
                "reason": reason,
                "unreadable": unreadable,
                "tiles": len(embedded),
                "left_out_tiles": measured.counts,
                "tissue_share": self.tissue,
                "mpp_from": self.stated.by if slide.mpp_from == "stated" else slide.mpp_from,
                "bounds": None if grid.bounds is None else list(grid.bounds),
                "notes": self.notes,
                **slide.colour_profile,
                STAIN: measured.stain,
                "row": self.key["row"],
            },
        )

    def close(self) -> None:
        """Close the slide."""
        self.slide.close()
        self.closing.close()


def overlay_files(name: str, out: Path, options: EmbedOptions) -> list[Path]:
    """Return the paths of the requested extra files: overlay, tissue and tiles."""
    paths = [out / "overlays" / f"{name}.jpg"] if options.overlays else []
    if options.geojson:
        paths += [out / "geojson" / f"{name}.{part}.geojson" for part in ("tissue", "tiles")]
    return paths


@dataclass(frozen=True)
class Drawing:
    """What the overlay files of a slide show but for its left-out tiles; written when these are known."""

    name: str
    out: Path
    options: EmbedOptions
    behind: Backdrop
    coords: NDArray[np.int64]
    side: int
    origin: tuple[int, int]
    target_mpp: float

    def write(self, faults: NDArray[np.int8]) -> None:
        """Write the files of :func:`overlay_files`.

        ``faults`` (N,): why each tile of the grid was left out, as indices into ``FAULTS``.
        """
        if self.options.overlays:
            counts = counted(faults)
            tiles = len(self.coords) - sum(counts.values())
            caption = (
                f"{self.name}: {tiles} tiles at mpp {self.target_mpp:g}, "
                f"{self.behind.tissue:.0%} tissue"
            )
            if counts:
                caption += f"; left out: {listed(counts)}"
            overlay = draw_overlay(self.behind, self.coords, self.side, faults, caption)
            write_atomic(self.out / "overlays" / f"{self.name}.jpg", encode_jpeg(overlay, 85))
        if self.options.geojson:
            left, top = self.origin
            folder = self.out / "geojson"
            write_tissue(
                folder / f"{self.name}.tissue.geojson", moved(self.behind.polygons, -left, -top)
            )
            texts = [FAULTS[code] for code in faults.tolist()]
            corners = self.coords - (left, top)
            write_tiles(folder / f"{self.name}.tiles.geojson", corners, self.side, texts)


def drawing_of(grid: Grid, name: str, out: Path, options: EmbedOptions) -> Drawing | None:
    """Return what to draw for a slide; None if no overlay files are wanted."""
    if not (options.overlays or options.geojson):
        return None
    behind = backdrop(grid, outlines(grid.mask, grid.down))
    return Drawing(
        name, out, options, behind, grid.coords, grid.size_px_level0, grid.origin, grid.target_mpp
    )
