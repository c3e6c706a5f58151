"""A tile set prepared for embedding: read piece by piece, then described."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...artifacts.feature_files import Features
from ...artifacts.images import Rgb, square
from ...artifacts.manifest import Manifest
from ...artifacts.tilesets import TileSet
from ...errors import BadInput
from ..encoders.stain_normalisation import Table, fitted, normalised, sampled
from ..slides.quality import Limits
from .job import Job
from .measured import Measured

FITTED = 16
"""Maximum number of tiles of a group to which stain normalisation is fitted."""
TABLES = 128
"""Number of groups whose tables of colours are kept; each takes 0.4 MB."""


def spread(count: int) -> list[int]:
    """Return the numbers 0 to ``count`` - 1, of which the first :data:`FITTED` are spread evenly."""
    some = np.unique(np.linspace(0, count - 1, min(count, FITTED)).astype(int)).tolist()
    return [*some, *sorted(set(range(count)) - set(some))]


@dataclass
class TilesWork:
    """A tile set; see :class:`Work`."""

    job: Job
    tileset: TileSet
    manifest: Manifest
    name: str
    path: Path
    key: dict[str, Any]
    tissue: float | None = None
    limits: Limits = field(default_factory=Limits)
    seconds: float = 0.0
    closing: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        """Count the tiles, and collect what the result states."""
        self.count = len(self.tileset)
        self.notes = [*self.tileset.notes, *self._not_stored()]
        self.left_out: Sequence[dict[str, str]] = [t._asdict() for t in self.tileset.left_out]
        self._groups: dict[str, list[int]] = defaultdict(list)
        for number, tile in enumerate(self.tileset.tiles):
            if tile.group:
                self._groups[tile.group].append(number)
        self._not_fitted: dict[str | int, str] = {}
        self._lock = threading.Lock()
        self._of_group = lru_cache(maxsize=TABLES)(self._fit_group)

    def _not_stored(self) -> list[str]:
        """Return a note on columns of the manifest that have no place in a feature file."""
        columns = {
            column
            for tile in self.tileset.tiles
            for column, value in tile.extra.items()
            if value and (column, value) != ("patient", tile.group)  # that is stored as the group
        }
        names = ", ".join(sorted(columns))
        return [f"columns of the manifest that are not stored per tile: {names}"] if names else []

    def read(self, start: int, out: NDArray[np.uint8]) -> dict[int, BadInput]:
        """See :class:`Work`."""
        failed = {}
        for number in range(len(out)):
            try:
                out[number] = square(self.tileset.read(start + number), self.manifest.size_px)
            except BadInput as error:
                failed[number] = error
        return failed

    def normalised(self, numbers: Sequence[int], tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """See :class:`Work`."""
        if self.manifest.stain_normalise is None:
            return tiles
        rows = []
        for number, tile in zip(numbers, tiles, strict=True):
            group = self.tileset.tiles[number].group
            table = self._of_group(group) if group else self._fit(number, [tile])
            rows.append(tile[None] if table is None else normalised(tile[None], table))
        return np.concatenate(rows)

    def _fit_group(self, group: str) -> Table | None:
        """Fit stain normalisation to at most :data:`FITTED` tiles of a group; None if that fails."""
        rows, tiles = self._groups[group], []
        for n in spread(len(rows)):
            with suppress(BadInput):  # it is counted when it is read to be embedded
                tiles.append(square(self.tileset.read(rows[n]), self.manifest.size_px))
            if len(tiles) == FITTED:
                break
        return self._fit(group, tiles)

    def _fit(self, of: str | int, tiles: list[Rgb]) -> Table | None:
        """Fit stain normalisation to tiles of a group, or to a tile (by number) that has no group."""
        method = self.manifest.stain_normalise
        try:
            if not tiles or method is None:
                raise BadInput("none of its tiles can be read")
            return fitted(sampled(np.stack(tiles)), method)
        except BadInput as error:
            with self._lock:
                self._not_fitted[of] = str(error)
            return None

    def _told(self) -> list[str]:
        """Return notes about the tiles whose stain was not normalised."""
        if not self._not_fitted:
            return []
        rows = {of: self._groups[of] if isinstance(of, str) else [of] for of in self._not_fitted}
        first = min(rows, key=lambda of: rows[of][0])
        tiles, reason = sum(map(len, rows.values())), self._not_fitted[first]
        what = f"of {first}" if isinstance(first, str) else self.tileset.tiles[first].file
        noun = "tile" if tiles == 1 else "tiles"
        return [f"the stain of {tiles} {noun} was not normalised, first {what}: {reason}"]

    def draw(self, faults: NDArray[np.int8]) -> None:
        """A tile set has no overlay."""

    def describe(self, measured: Measured, unreadable: list[str]) -> Features:
        """See :class:`Work`."""
        embedded = measured.embedded()
        self.notes += self._told()
        tiles = [self.tileset.tiles[row] for row in embedded.tolist()]
        return Features(
            name=self.name,
            encoder=self.manifest.name,
            encoder_sha256=self.manifest.sha256,
            features=np.zeros((0, self.manifest.dim), dtype=np.float32),
            coords=np.zeros((len(tiles), 2), dtype=np.int64),
            files=tuple(t.file for t in tiles),
            kind="tiles",
            source=self.job.location,
            size_px=self.manifest.size_px,
            labels=tuple(t.label or "" for t in tiles),
            groups=tuple(t.group or "" for t in tiles),
            quality=measured.quality(embedded),
            about={
                "key": self.key,
                "source": self.job.location,
                "unreadable": unreadable,
                "tiles": len(tiles),
                "reason": "",
                "notes": self.notes,
            },
        )

    def close(self) -> None:
        """No file is held open."""
        self.closing.close()
