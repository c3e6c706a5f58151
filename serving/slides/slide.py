"""Slides: whole-slide files and plain images, read as tiles at a requested mpp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...artifacts.geojson import Ring
from ...artifacts.images import Rgb, resample
from ...errors import BadInput, HistoseekError
from .geojson import draw_mask
from .overview import overview
from .profiles import about_profile
from .scale import choose_mpp, is_of_a_print, sides_of
from .scale_guess import estimate, proposed, squares
from .sources import open_source
from .tiff_depth import check_source
from .tiff_source import SERIES
from .tissue import Mask, tissue_mask, tissue_share

THUMBNAIL_PX = 2048
MIN_SCALE = 0.4
"""Minimum ratio of requested to available µm per pixel; allows 20x tiles from a 10x slide (ratio 0.5)."""

MAX_SIDE = 32_768
MAX_CANDIDATES = 20_000_000
BLOCK_TILES = (8, 8)
MAX_READ = 64 * 2**20
"""Maximum bytes read at once before resampling."""


@dataclass(frozen=True)
class Grid:
    """The tiles of a slide that contain tissue.

    Attributes:
        coords: (N, 2) int64, top-left x, y of each tile in level-0 pixels, ordered in blocks of 8 x 8
            tiles, so that tiles read together are neighbours.
        width: width of the slide in level-0 pixels.
        size_px_level0: side of a tile in level-0 pixels; ``size_px``: in pixels of the tile.
        bounds: left, top, width and height of the scanned area; None if the file does not state it.
        mpp: micrometres per pixel of level 0.
        target_mpp: micrometres per pixel of the tiles.
        overlap_px: overlap of neighbours in tile pixels.
        candidates: number of tiles before the tissue mask is applied.
        tissue: share of the slide that is tissue according to the mask.
        thumbnail: (H, W, 3), of the whole slide.
        mask: (H, W), True where the thumbnail shows tissue.
    """

    coords: NDArray[np.int64]
    width: int
    size_px_level0: int
    bounds: tuple[int, int, int, int] | None
    mpp: float
    target_mpp: float
    size_px: int
    overlap_px: int
    candidates: int
    tissue: float
    thumbnail: Rgb
    mask: Mask

    @property
    def down(self) -> float:
        """Level-0 pixels per pixel of the mask."""
        return self.width / int(self.mask.shape[1])

    @property
    def origin(self) -> tuple[int, int]:
        """Left and top of the area that QuPath shows, in level-0 pixels."""
        return self.bounds[:2] if self.bounds is not None else (0, 0)


class Slide:
    """An open slide.

    Attributes:
        width: width of level 0, in pixels; ``height`` likewise.
        mpp: micrometres per pixel of level 0, or None if unknown.
        mpp_from: ``file``, ``stated``, ``assumed`` or None.
        bounds: left, top, width and height of the scanned area, in level-0 pixels, if the file states it
            (.mrxs, .scn, .bif); QuPath shows only this area, with (0, 0) at its corner.
        objective: nominal magnification, or None.
        notes: which value overrode which: the user's or the file's.
    """

    def __init__(
        self,
        path: Path,
        assume_mpp: float | None = None,
        stated_mpp: float | None = None,
        series: int | None = None,
    ) -> None:
        """Open a slide; see :func:`open_slide`.

        Raises:
            BadInput: the file is missing, empty or unreadable, or its pixels are not square.
        """
        if not path.exists():
            raise BadInput(f"{path} does not exist; check the path")
        if path.is_file() and path.stat().st_size == 0:
            raise BadInput(f"{path} is empty (0 bytes); copy it again")
        self.path = path
        self.notes: list[str] = []
        self._source = open_source(path, series)
        try:
            check_source(path, self._source)
            self._read_properties(self._source.properties, assume_mpp, stated_mpp)
        except BadInput:
            self._source.close()
            raise

    def _read_properties(
        self, properties: dict[str, str], assume_mpp: float | None, stated_mpp: float | None
    ) -> None:
        self.width, self.height = self._source.levels[0][1]
        if SERIES in properties:
            self.notes.append(
                f"the file contains several images; the slide is series {properties[SERIES]}"
            )
        sides = sides_of(properties)
        self._of_a_print = is_of_a_print(sides, properties)
        chosen = choose_mpp(self.path, sides, self._of_a_print, assume_mpp, stated_mpp)
        self.mpp, self.mpp_from = chosen.mpp, chosen.origin
        self.notes += chosen.notes
        self.bounds = _bounds(properties, self.width, self.height)
        power = properties.get("openslide.objective-power", "")
        self.objective = float(power) if power.replace(".", "", 1).isdigit() else None

    def forget(self) -> None:
        """Free the pixels that are cached for neighbouring tiles."""
        self._source.forget()

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._source.close()

    @property
    def colour_profile(self) -> dict[str, Any]:
        """``icc_profile`` (its name or None) and ``icc_applied``."""
        return about_profile(self._source.properties)

    def require_mpp(self) -> float:
        """Return the slide's mpp; raise BadInput if the file has none and none was assumed.

        The message proposes a value if the size of the nuclei suggests one; it is never used by itself.
        """
        if self.mpp is None:
            guess, hint = proposed(self.estimated_mpp()), ""
            if guess is not None:
                hint = (
                    f". Its nuclei look as at {guess:g} µm per pixel ({10 / guess:g}x): check the slide, "
                    f"then pass --assume-mpp {guess:g}"
                )
            raise BadInput(
                f"{self.path} does not state its micrometres per pixel, so tiles cannot be cut at the "
                "encoder's scale; if you know it, pass --assume-mpp or a manifest with a column mpp "
                f"(about 0.25 at 40x, 0.5 at 20x){hint}"
            )
        return self.mpp

    def estimated_mpp(self) -> float | None:
        """Return an estimate of the slide's mpp from its nuclei; None without enough of them."""
        try:
            corners, side = squares(self.thumbnail(), self.width, self.height)
            return estimate([self.read_tile(x, y, side, side) for x, y in corners])
        except BadInput:  # unreadable
            return None

    def thumbnail(self, longest: int = THUMBNAIL_PX) -> Rgb:
        """Return the whole slide, at most ``longest`` pixels on its longer side, (H, W, 3)."""
        return np.asarray(overview(self._source, longest, self.path))

    def grid(
        self,
        size_px: int,
        target_mpp: float,
        overlap_px: int = 0,
        min_tissue: float = 0.25,
        regions: Sequence[Sequence[Ring]] | None = None,
        find: Callable[[Slide, Rgb], Mask] | None = None,
    ) -> Grid:
        """Lay tiles over the slide and keep those with enough tissue.

        Tiles that cross the right or bottom border are left out, and so are tiles that lie wholly
        outside the scanned area; a slide smaller than one tile gives none.

        Args:
            size_px: side of a tile.
            target_mpp: micrometres per pixel of the tiles.
            overlap_px: overlap of neighbours, in tile pixels.
            min_tissue: minimum share of tissue in a tile.
            regions: polygons in level-0 pixels that replace tissue detection.
            find: finds tissue on this slide and its thumbnail (H, W, 3), instead of by absorbance.

        Raises:
            BadInput: the mpp is unknown, the slide is too coarse, there are too many tiles, or pixels
                cannot be read.
        """
        mpp = self.require_mpp()
        scale = target_mpp / mpp
        self._check_scale(size_px, mpp, target_mpp)
        side = round(size_px * scale)
        step = max(1, round((size_px - overlap_px) * scale))
        candidates = (self.width // step + 1) * (self.height // step + 1)
        if candidates > MAX_CANDIDATES:
            raise BadInput(
                f"{self.path} has {candidates:,} tiles; expected at most {MAX_CANDIDATES:,}: pass a larger "
                "--mpp or a smaller --overlap"
            )
        thumbnail = self.thumbnail()
        size = thumbnail.shape[1], thumbnail.shape[0]
        if regions is not None:
            mask = draw_mask(regions, size, self.width / size[0])
        elif find is not None:
            mask = find(self, thumbnail)
        else:
            mask = tissue_mask(thumbnail, mpp * self.width / size[0])
        coords = self._scanned(_corners(self.width, self.height, side, step), side)
        to_mask = mask.shape[1] / self.width, mask.shape[0] / self.height
        boxes = np.concatenate([coords, coords + side], axis=1) * np.tile(to_mask, 2)
        with_tissue = coords[tissue_share(mask, boxes) >= min_tissue]
        return Grid(
            coords=np.ascontiguousarray(with_tissue),
            width=self.width,
            size_px_level0=side,
            bounds=self.bounds,
            mpp=mpp,
            target_mpp=target_mpp,
            size_px=size_px,
            overlap_px=overlap_px,
            candidates=len(coords),
            tissue=float(mask.mean()),
            thumbnail=thumbnail,
            mask=mask,
        )

    def _check_scale(self, size_px: int, mpp: float, target_mpp: float) -> None:
        """Refuse tiles that would be enlarged much, or that cover too many pixels."""
        scale = target_mpp / mpp
        if scale < MIN_SCALE:
            options = "--assume-mpp, --override-mpp" if self._of_a_print else "--override-mpp"
            raise BadInput(
                f"{self.path} has {mpp:g} µm per pixel; for tiles at {target_mpp:g} it would be enlarged "
                f"{1 / scale:.3g} times, expected at most {1 / MIN_SCALE:g}: pass a larger --mpp; if the "
                f"slide's own value is wrong, state the correct one with {options} or in the manifest's "
                "column mpp"
            )
        if scale * size_px > MAX_SIDE:
            raise BadInput(
                f"{self.path}: a tile at {target_mpp:g} µm per pixel is {scale * size_px:,.0f} of its "
                f"pixels wide; expected at most {MAX_SIDE:,}: pass a smaller --mpp"
            )

    def _scanned(self, coords: NDArray[np.int64], side: int) -> NDArray[np.int64]:
        """Return the coordinates, (N, 2), of tiles that overlap the scanned area."""
        if self.bounds is None or not len(coords):
            return coords
        left, top, width, height = self.bounds
        offsets = coords - (left, top)
        coords = coords[((offsets > -side) & (offsets < (width, height))).all(axis=1)]
        scanned = self._source.scanned()
        if scanned is None or not len(coords):
            return coords
        to_mask = np.array([scanned.shape[1] / self.width, scanned.shape[0] / self.height])
        corners = coords * to_mask
        boxes = np.concatenate([corners - 1, corners + side * to_mask + 1], axis=1)
        return coords[tissue_share(scanned, boxes) > 0]

    def read_tile(self, x: int, y: int, size_px_level0: int, size_px: int) -> Rgb:
        """Read one tile, or raise BadInput if it cannot be decoded; see :meth:`read_tiles`."""
        tile = np.empty((1, size_px, size_px, 3), dtype=np.uint8)
        failed = self.read_tiles([(x, y)], size_px_level0, tile)
        if failed:
            raise failed[0]
        only: Rgb = tile[0]
        return only

    def level_for(self, size_px_level0: int, size_px: int) -> tuple[int, int]:
        """Return the level from which a tile is read, and the tile's side in pixels of that level."""
        most = size_px_level0 / size_px * 1.01
        levels = enumerate(self._source.levels)
        level = max((n for n, (downsample, _) in levels if downsample <= most), default=0)
        return level, max(1, round(size_px_level0 / self._source.levels[level][0]))

    def read_tiles(
        self, corners: Sequence[tuple[int, int]], size_px_level0: int, out: NDArray[np.uint8]
    ) -> dict[int, BadInput]:
        """Read squares at level-0 coordinates and resample them to the size of ``out``.

        Pixels outside the slide get the slide's background colour. The level used is the coarsest one
        that is still at least as fine as requested, so pixels are downsampled; they are upsampled only
        if the slide itself is coarser. Neighbouring tiles in one call share decoded segments.

        Args:
            corners: left and top of each tile in level-0 pixels.
            size_px_level0: side of a tile in level-0 pixels.
            out: (N, size_px, size_px, 3), filled.

        Returns:
            The error of each unreadable tile, by its index in ``corners``; empty if all were read.
        """
        size_px = out.shape[1]
        level, side = self.level_for(size_px_level0, size_px)
        if side == size_px:
            return self._source.regions(corners, level, out)
        failed: dict[int, BadInput] = {}
        step = max(1, MAX_READ // (side * side * 3))
        for start in range(0, len(corners), step):
            part = corners[start : start + step]
            large = np.empty((len(part), side, side, 3), dtype=np.uint8)
            errors = self._source.regions(part, level, large)
            failed.update({start + number: error for number, error in errors.items()})
            for number in range(len(part)):
                out[start + number] = resample(large[number], size_px)
        return failed


def _corners(width: int, height: int, side: int, step: int) -> NDArray[np.int64]:
    """Return top-left x, y of every whole tile, block by block, row by row inside a block."""
    xs = np.arange(max(0, (width - side) // step + 1), dtype=np.int64)
    ys = np.arange(max(0, (height - side) // step + 1), dtype=np.int64)
    x, y = (part.ravel() for part in np.meshgrid(xs, ys))
    order = np.lexsort((x, y, x // BLOCK_TILES[0], y // BLOCK_TILES[1]))
    return np.stack([x[order], y[order]], axis=1) * step


def _bounds(
    properties: dict[str, str], width: int, height: int
) -> tuple[int, int, int, int] | None:
    """Return left, top, width and height of the scanned area, clipped to the slide."""
    try:
        left, top, across, down = (
            int(properties[f"openslide.bounds-{key}"]) for key in ("x", "y", "width", "height")
        )
    except (KeyError, ValueError):
        return None
    left, top = max(0, left), max(0, top)
    across, down = min(across, width - left), min(down, height - top)
    return (left, top, across, down) if across > 0 and down > 0 else None


def open_slide(
    path: Path | str,
    assume_mpp: float | None = None,
    stated_mpp: float | None = None,
    series: int | None = None,
) -> Slide:
    """Open a slide; every failure becomes a HistoseekError that names the file.

    Args:
        path: the file.
        assume_mpp: micrometres per pixel for files without a scale.
        stated_mpp: micrometres per pixel that the user supplied for this slide; overrides the file.
        series: index of the TIFF image that is the slide; detected when None.
    """
    try:
        return Slide(Path(path), assume_mpp, stated_mpp, series)
    except HistoseekError:
        raise
    except Exception as error:
        raise BadInput(f"{path} cannot be opened ({type(error).__name__}: {error})") from error
