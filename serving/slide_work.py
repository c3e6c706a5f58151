"""A slide made ready: its tiles found, its pictures written; read piece by piece, then described."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BadInput
from ..feature_files import Features
from ..files import write_atomic
from ..images import encode_jpeg
from ..manifest import Manifest
from .geojson import outlines, write_tiles, write_tissue
from .jobs import Job
from .overlay import draw_overlay
from .results import EmbedOptions
from .slides import Grid, Slide


class SlideWork:
    """A slide; see :class:`Work`."""

    seconds = 0.0

    def __init__(
        self,
        job: Job,
        slide: Slide,
        grid: Grid,
        manifest: Manifest,
        name: str,
        path: Path,
        key: dict[str, Any],
    ) -> None:
        """Keep what is needed to read and describe the slide's tiles; the pictures are not kept."""
        self.job, self.name, self.path, self.count = job, name, path, len(grid.coords)
        self.tissue: float | None = round(grid.tissue, 4)
        self._slide, self._manifest, self._key = slide, manifest, key
        self._coords, self._side, self._size = grid.coords, grid.size_px_level0, grid.size_px
        self._grid = (grid.overlap_px, grid.mpp, grid.target_mpp, grid.candidates)

    def read(self, start: int, out: NDArray[np.uint8]) -> dict[int, BadInput]:
        """See :class:`Work`."""
        places = [(int(x), int(y)) for x, y in self._coords[start : start + len(out)]]
        return self._slide.read_tiles(places, self._side, out)

    def describe(self, kept: Sequence[int], unreadable: list[str]) -> Features:
        """See :class:`Work`."""
        overlap_px, mpp, target_mpp, candidates = self._grid
        reason = ""
        if not self.count and not candidates:
            reason = (
                f"no tile: {self._slide.width} x {self._slide.height} pixels are smaller than one "
                f"tile of {self._side}"
            )
        elif not self.count:
            share = self._key["min_tissue"]
            where = "the regions given" if self._key.get("regions") else "tissue"
            reason = f"no tissue: none of {candidates} tiles reaches {share:.0%} of {where}"
        return Features(
            name=self.name,
            encoder=self._manifest.name,
            encoder_sha256=self._manifest.sha256,
            features=np.zeros((0, self._manifest.dim), dtype=np.float32),
            coords=self._coords[np.asarray(kept, dtype=np.int64)],
            source=str(self.job.source.resolve()),
            size_px=self._size,
            size_px_level0=self._side,
            overlap_px=overlap_px,
            mpp=mpp,
            target_mpp=target_mpp,
            width=self._slide.width,
            height=self._slide.height,
            about={
                "key": self._key,
                "source": str(self.job.source.resolve()),
                "reason": reason,
                "unreadable": unreadable,
                "tiles": len(kept),
                "tissue_share": self.tissue,
                "mpp_from": self._mpp_from(),
                **self._slide.colour_profile,
                "row": self._key["row"],
            },
        )

    def _mpp_from(self) -> str | None:
        """``file``, ``manifest``, ``assumed`` or None."""
        by_row = self._slide.mpp_from == "assumed" and self.job.row.get("mpp")
        return "manifest" if by_row else self._slide.mpp_from

    def close(self) -> None:
        """Close the slide."""
        self._slide.close()


def regions_of(job: Job, options: EmbedOptions) -> Path | None:
    """Return the GeoJSON file of a slide.

    Raises:
        BadInput: the folder of regions has none for it.
    """
    if options.regions is None or options.regions.is_file():
        return options.regions
    names = [f"{job.source.stem}.geojson", f"{job.source.name}.geojson"]
    for name in names:
        if (options.regions / name).is_file():
            return options.regions / name
    raise BadInput(
        f"{options.regions} holds no regions of {job.source.name}; expected {' or '.join(names)}"
    )


def pictures(name: str, out: Path, options: EmbedOptions) -> list[Path]:
    """Return what is written beside the features: the overlay, tissue and tiles, as asked for."""
    found = [out / "overlays" / f"{name}.jpg"] if options.overlays else []
    if options.geojson:
        found += [out / "geojson" / f"{name}.{part}.geojson" for part in ("tissue", "tiles")]
    return found


def write_pictures(grid: Grid, name: str, out: Path, options: EmbedOptions) -> None:
    """Write what :func:`pictures` names."""
    if not (options.overlays or options.geojson):
        return
    polygons = outlines(grid.mask, grid.down)
    if options.overlays:
        caption = (
            f"{name}: {len(grid.coords)} tiles at mpp {grid.target_mpp:g}, {grid.tissue:.0%} tissue"
        )
        picture = draw_overlay(grid, polygons, caption)
        write_atomic(out / "overlays" / f"{name}.jpg", encode_jpeg(picture, 85))
    if options.geojson:
        write_tissue(out / "geojson" / f"{name}.tissue.geojson", polygons)
        write_tiles(out / "geojson" / f"{name}.tiles.geojson", grid.coords, grid.size_px_level0)
