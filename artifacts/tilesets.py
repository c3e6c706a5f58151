"""Tile sets: collections of ready tiles, one image each, with labels and groups.

A tile set is read from a folder (sub-folders are classes), a CSV manifest (``file,label,group,…``), a
``.tar`` pack (with a ``manifest.csv`` inside, or sub-folders as classes) or an ``.npz`` pack
(``images`` with ``labels``, ``class_names``, ``group`` and ``ids``; further arrays with a value per image
are columns). Tiles of one group come from one source image or patient, and must never be split between
training and validation.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ..errors import BadInput
from .images import Rgb, decode, square
from .walking import LeftOut

MANIFEST = "manifest.csv"
MAX_UNPACKED = 4 * 2**30
SAMPLE = 64


@dataclass(frozen=True)
class Tile:
    """One ready tile: its path inside the set, and its row of the manifest."""

    file: str
    label: str | None = None
    group: str | None = None
    extra: dict[str, str] = field(default_factory=dict)

    def column(self, name: str) -> str:
        """Return the value of a manifest column; empty if there is none."""
        fixed = {"file": self.file, "label": self.label, "group": self.group}
        return fixed.get(name, self.extra.get(name)) or ""


@dataclass(frozen=True)
class TileSet:
    """Tiles to read by number; a tile is decoded only when it is read.

    Attributes:
        name: of the set.
        source: the folder or file.
        tiles: in the order of their numbers.
        fingerprint: of the content.
        notes: what was detected while reading its table.
        left_out: files and folders that were found but not used, with the reason.
    """

    name: str
    source: str
    tiles: tuple[Tile, ...]
    fingerprint: str
    _load: Callable[[int], bytes | Rgb] = field(repr=False, compare=False)
    notes: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    def __len__(self) -> int:
        return len(self.tiles)

    def read(self, number: int) -> Rgb:
        """Decode tile ``number`` to uint8 RGB (H, W, 3).

        Raises:
            BadInput: the tile is missing or cannot be decoded; the message names it.
        """
        label = f"{self.source}: {self.tiles[number].file}"
        return decode(self._load(number), name=label)

    def identity(self) -> str:
        """Return a hash of the content with its labels and groups."""
        return _rows_fingerprint(self.tiles, self.fingerprint)

    def take(self, numbers: Sequence[int]) -> TileSet:
        """Return the tile set of the given tiles, in that order."""
        chosen = [int(n) for n in numbers]
        load = self._load
        return replace(
            self,
            tiles=tuple(self.tiles[n] for n in chosen),
            fingerprint=content_hash([self.fingerprint, *map(str, chosen)]),
            _load=lambda n: load(chosen[n]),
        )

    def without(self, column: str, values: Iterable[str]) -> TileSet:
        """Return the tile set without the tiles whose ``column`` has one of ``values``."""
        excluded = set(values)
        return self.take([n for n, t in enumerate(self.tiles) if t.column(column) not in excluded])

    def relabelled(self, columns: Sequence[str]) -> TileSet:
        """Return the tile set with labels joined from several manifest columns by ``/``."""

        def label_of(tile: Tile) -> str | None:
            parts = [tile.column(column) for column in columns]
            return "/".join(parts) if any(parts) else None

        tiles = (replace(tile, label=label_of(tile)) for tile in self.tiles)
        return replace(self, tiles=tuple(tiles))


def sample_tiles(tileset: TileSet, size_px: int, count: int = SAMPLE) -> NDArray[np.uint8]:
    """Decode ``count`` tiles spread evenly over a tile set; unreadable tiles are skipped.

    Raises:
        BadInput: no tile could be read.
    """
    chosen = np.unique(np.linspace(0, len(tileset) - 1, min(count, len(tileset))).astype(int))
    tiles: list[NDArray[np.uint8]] = []
    reason = "the tile set is empty"
    for number in chosen:
        try:
            tiles.append(square(tileset.read(int(number)), size_px))
        except BadInput as error:
            reason = str(error)
    if not tiles:
        raise BadInput(f"no tile for the parity test could be read: {reason}")
    return np.stack(tiles)


def concatenate(sets: Sequence[TileSet], shared_groups: bool = False) -> TileSet:
    """Join tile sets; labels and groups are prefixed by each set's name, so that sets share none.

    Args:
        sets: tile sets, of which each may have its own manifest columns.
        shared_groups: groups keep their names, so that tiles of several sets may be of one group. Without
            it, a note counts the names of groups that occur in several sets.
    """
    if len(sets) == 1:
        return sets[0]
    named = Counter(name for part in sets for name in {tile.group for tile in part.tiles} - {None})
    same = sum(count > 1 for count in named.values())
    notes = [note for part in sets for note in part.notes]
    if same and not shared_groups:
        notes.append(
            f"{same} names of groups occur in several data sets and were taken for different groups; if "
            "they are the same source images or patients, pass --shared-groups"
        )
    tiles: list[Tile] = []
    origins: list[tuple[TileSet, int]] = []
    seen: Counter[str] = Counter()
    for part in sets:
        seen[part.name] += 1
        name = part.name if seen[part.name] == 1 else f"{part.name}-{seen[part.name]}"
        for number, tile in enumerate(part.tiles):
            label = f"{name}/{tile.label}" if tile.label is not None else None
            group = tile.group
            if group is not None and not shared_groups:
                group = f"{name}/{group}"
            tiles.append(replace(tile, file=f"{name}/{tile.file}", label=label, group=group))
            origins.append((part, number))
    return TileSet(
        name="+".join(part.name for part in sets),
        source="+".join(part.source for part in sets),
        tiles=tuple(tiles),
        fingerprint=content_hash([part.fingerprint for part in sets]),
        _load=lambda n: origins[n][0]._load(origins[n][1]),
        notes=tuple(notes),
        left_out=tuple(left for part in sets for left in part.left_out),
    )


def content_hash(parts: Iterable[str]) -> str:
    """Return one SHA-256 of texts, in order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode())
        digest.update(b"\0")
    return digest.hexdigest()


def _rows_fingerprint(tiles: Sequence[Tile], content: str) -> str:
    return content_hash([content, *(f"{t.file}|{t.label}|{t.group}" for t in tiles)])
