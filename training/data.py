"""Labelled tiles for training, in memory or streamed, and splits that keep groups together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..artifacts.images import Rgb, square
from ..artifacts.tilesets import TileSet
from ..console import Progress
from ..errors import BadInput
from ..metrics import Ints, codes

MAX_BYTES = 16 * 2**30
BLANK = 12.0
"""Cut-outs whose pixel values have a standard deviation below this are left out as blank."""


@dataclass(frozen=True)
class LabelledTiles:
    """Tiles with their labels, groups and file names; :meth:`read` returns their pixels.

    Attributes:
        tiles: uint8 (N, S, S, 3); (0, S, S, 3) if the tiles are streamed.
        labels: (N,) class numbers; -1 means unlabelled.
        groups: (N,) group numbers; a tile without a group forms a group by itself.
        places: (N,) numbers of locations in the tissue: group and offset for a cut-out of a larger image,
            the group alone for any other tile.
        label_names: class names, in the order of their numbers.
        files: (N,) names.
        unreadable: reason for each file that was left out; streaming adds to it while reading.
        grouped: whether the data names any group.
        stream: source of the pixels if they are not in memory.
    """

    tiles: NDArray[np.uint8]
    labels: Ints
    groups: Ints
    places: Ints
    label_names: tuple[str, ...]
    files: tuple[str, ...]
    unreadable: dict[str, str]
    grouped: bool
    stream: TileSet | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size_px(self) -> int:
        """S, the side of a tile."""
        return int(self.tiles.shape[1])

    def read(self, numbers: Ints) -> tuple[NDArray[np.uint8], Ints]:
        """Return tiles (M, S, S, 3) and their indices (M,), in order.

        A streamed tile that cannot be read is left out and recorded in ``unreadable``.
        """
        if self.stream is None:
            return self.tiles[numbers], numbers
        tiles, kept = [], []
        for number, tile in zip(numbers, self._decode(numbers), strict=True):
            if isinstance(tile, BadInput):
                self.unreadable[self.files[number]] = str(tile)
            else:
                tiles.append(tile)
                kept.append(number)
        none = np.zeros((0, *self.tiles.shape[1:]), dtype=np.uint8)
        return np.stack(tiles) if tiles else none, np.array(kept, dtype=np.int64)

    def _decode(self, numbers: Ints) -> Iterator[Rgb | BadInput]:
        source, side = self.stream, self.size_px
        assert source is not None

        def one(number: int) -> Rgb | BadInput:
            try:
                return square(source.read(int(number)), side)
            except BadInput as error:
                return error

        return _POOL.map(one, numbers)


_POOL = ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="decode")


def load(
    tileset: TileSet, size_px: int, progress: Progress, cut: int = 0, stream: bool = False
) -> LabelledTiles:
    """Decode a tile set; a tile that cannot be read is left out and recorded in ``unreadable``.

    Args:
        tileset: tiles to read.
        size_px: S, side of every tile after resizing.
        progress: called after each tile.
        cut: cut images with sides of at least this many times S into tiles, instead of shrinking them;
            0 shrinks all.
        stream: decode tiles on demand; always done when they exceed 16 GiB, unless images are cut.

    Raises:
        BadInput: no tile could be read, or cut tiles exceed 16 GiB.
    """
    bytes_per_tile = size_px * size_px * 3
    if not cut and (stream or len(tileset) * bytes_per_tile > MAX_BYTES):
        rows = [(number, "") for number in range(len(tileset))]
        empty = np.zeros((0, size_px, size_px, 3), dtype=np.uint8)
        return _labelled(tileset, empty, rows, {}, stream=True)

    def one(number: int) -> dict[str, Rgb] | BadInput:
        try:
            picture = tileset.read(number)
            return cut_up(picture, size_px, cut) if cut else {"": square(picture, size_px)}
        except BadInput as error:
            return error

    tiles: list[Rgb] = []
    rows = []
    unreadable: dict[str, str] = {}
    for number, pieces in enumerate(_POOL.map(one, range(len(tileset)))):
        if isinstance(pieces, BadInput):
            unreadable[tileset.tiles[number].file] = str(pieces)
        else:
            tiles += pieces.values()
            rows += [(number, place) for place in pieces]
        if len(tiles) * bytes_per_tile > MAX_BYTES:
            raise BadInput(
                f"{tileset.source}: more than {len(tiles):,} tiles of {size_px} px do not fit into "
                f"{MAX_BYTES >> 30} GiB; lower --size-px or train on a part"
            )
        progress(number + 1, len(tileset), "reading tiles")
    if not rows:
        reason = next(iter(unreadable.values()), "it is empty")
        raise BadInput(f"{tileset.source}: no tile could be read; first reason: {reason}")
    return _labelled(tileset, np.stack(tiles), rows, unreadable, stream=False)


def _labelled(
    tileset: TileSet,
    tiles: NDArray[np.uint8],
    rows: list[tuple[int, str]],
    unreadable: dict[str, str],
    stream: bool,
) -> LabelledTiles:
    """Join pixels with the labels, groups and names; ``rows`` holds (tile index, cut-out suffix)."""
    known = [tileset.tiles[number] for number, _ in rows]
    groups = [tile.group or f"\0{number}" for tile, (number, _) in zip(known, rows, strict=True)]
    places = [f"{group}\0{place}" for group, (_, place) in zip(groups, rows, strict=True)]
    return LabelledTiles(
        tiles=tiles,
        labels=codes([tile.label for tile in known]),
        groups=codes(groups),
        places=codes(places),
        label_names=tuple(sorted({tile.label for tile in known if tile.label is not None})),
        files=tuple(tile.file + place for tile, (_, place) in zip(known, rows, strict=True)),
        unreadable=unreadable,
        grouped=any(tile.group for tile in known),
        stream=tileset if stream else None,
    )


def cut_up(picture: Rgb, size_px: int, least: int = 2) -> dict[str, Rgb]:
    """Cut an image into tiles on a centred grid; returns the tiles by name ``@x,y``, without blank ones.

    An image with fewer than ``least`` tiles along either side is not cut but resized; its name is ''.
    """
    down, across = picture.shape[0] // size_px, picture.shape[1] // size_px
    if min(down, across) < least:
        return {"": square(picture, size_px)}
    top = (picture.shape[0] - down * size_px) // 2
    left = (picture.shape[1] - across * size_px) // 2
    pieces: dict[str, Rgb] = {}
    for y in range(top, top + down * size_px, size_px):
        for x in range(left, left + across * size_px, size_px):
            piece = picture[y : y + size_px, x : x + size_px]
            if piece.std() >= BLANK:
                pieces[f"@{x},{y}"] = piece
    return pieces


@dataclass(frozen=True)
class Split:
    """Tile indices of the training, validation and test parts.

    Attributes:
        train: (N,).
        validate: (M,), to choose epochs and learning rates; empty if no option needs it.
        test: (K,); empty if nothing is held out.
        by: unit of the split, as text for the record.
    """

    train: Ints
    validate: Ints
    test: Ints
    by: str


def split(
    data: LabelledTiles, folds: int, fold: int, seed: int, by: str = "group", validate: bool = False
) -> Split:
    """Split tiles into folds: one for testing, optionally the next one for validation, the rest to train.

    Args:
        data: labelled tiles.
        folds: number of folds; 0 holds nothing out.
        fold: number of the test fold.
        seed: seed of the shuffle.
        by: ``group`` keeps each group in one part; ``tile`` does not, so tiles of one group may be in the
            test part and in the training part.
        validate: set a fold aside for validation.

    Raises:
        BadInput: there are fewer groups than folds.
    """
    told = "group" if data.grouped else "tile (the data names no groups)"
    if by == "tile" and data.grouped:
        told = "tile, ACROSS groups (leaky: tiles of one source are in several parts)"
    everything = np.arange(len(data.labels))
    if folds == 0:
        return Split(everything, everything[:0], everything[:0], told)
    parts = _folds(data, folds, seed, by)
    after = (fold + 1) % folds
    chosen = {fold, after} if validate else {fold}
    train = np.concatenate([part for n, part in enumerate(parts) if n not in chosen])
    return Split(np.sort(train), parts[after] if validate else everything[:0], parts[fold], told)


def _folds(data: LabelledTiles, folds: int, seed: int, by: str) -> list[Ints]:
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

    groups = data.groups if by == "group" else np.arange(len(data.labels))
    found = len(np.unique(groups))
    if found < folds:
        raise BadInput(
            f"the data has {found} {by}(s); {folds} folds need at least {folds}: lower --folds, or pass "
            "--folds 0 to train on all tiles without a measurement"
        )
    counts = np.bincount(data.labels[data.labels >= 0], minlength=1)
    by_class = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    plain = GroupKFold(folds, shuffle=True, random_state=seed)
    splitter = by_class if counts.min() >= folds else plain
    return [
        held_out.astype(np.int64)
        for _, held_out in splitter.split(np.arange(len(groups)), data.labels, groups)
    ]


def describe(data: LabelledTiles, tileset: TileSet) -> dict[str, Any]:
    """Return the description of the data for a run's record."""
    return {
        "name": tileset.name,
        "fingerprint": tileset.fingerprint,
        "tiles": len(data.labels),
        "classes": list(data.label_names),
        "groups": int(data.groups.max()) + 1 if data.grouped else None,
        "unreadable": list(data.unreadable.values()),
    }


def describe_split(parts: Split) -> dict[str, Any]:
    """Return the description of the split for a run's record."""
    return {
        "by": parts.by,
        "train_tiles": len(parts.train),
        "validation_tiles": len(parts.validate),
        "held_out_tiles": len(parts.test),
    }
