"""Labelled tiles as arrays for training, and splits that never cut a group in two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..console import Report
from ..errors import BadInput
from ..images import Rgb, square
from ..metrics import Ints, codes
from ..tilesets import TileSet

MAX_BYTES = 16 * 2**30
BLANK = 12.0
"""Cut-outs of a larger picture whose pixels vary less than this (standard deviation) are left out."""


@dataclass(frozen=True)
class LabelledTiles:
    """Decoded tiles with what is known of each.

    Attributes:
        tiles: uint8 (N, S, S, 3).
        labels: (N,) class numbers, -1 is unlabelled.
        groups: (N,) group numbers; a tile without a group is a group of its own.
        places: (N,) numbers of places in the tissue: a cut-out of a larger picture is a place of its
            own, any other tile is at the place of its group.
        label_names: the classes in order of their number.
        files: (N,) names.
        unreadable: what was left out, with the reason.
        grouped: whether the data named any group.
    """

    tiles: NDArray[np.uint8]
    labels: Ints
    groups: Ints
    places: Ints
    label_names: tuple[str, ...]
    files: tuple[str, ...]
    unreadable: tuple[str, ...]
    grouped: bool


def load(tileset: TileSet, size_px: int, progress: Report, cut: bool = False) -> LabelledTiles:
    """Decode a tile set; an unreadable tile is left out, counted and named.

    Args:
        tileset: what to read.
        size_px: S, the side that every tile is brought to.
        progress: called after each tile.
        cut: cut pictures of at least 2 S x 2 S into tiles at their own scale, instead of shrinking.

    Raises:
        BadInput: no tile could be read, or more than fit into 16 GiB.
    """
    tiles: list[Rgb] = []
    rows: list[tuple[int, str]] = []
    unreadable: list[str] = []
    for number in range(len(tileset)):
        try:
            picture = tileset.read(number)
            pieces = cut_up(picture, size_px) if cut else {"": square(picture, size_px)}
            tiles += pieces.values()
            rows += [(number, place) for place in pieces]
        except BadInput as error:
            unreadable.append(str(error))
        if len(tiles) * size_px * size_px * 3 > MAX_BYTES:
            raise BadInput(
                f"{tileset.source}: more than {len(tiles):,} tiles of {size_px} px do not fit into "
                f"{MAX_BYTES >> 30} GiB; lower --size-px or train on a part"
            )
        progress(number + 1, len(tileset), "reading tiles")
    if not rows:
        reason = unreadable[0] if unreadable else "it is empty"
        raise BadInput(f"{tileset.source}: no tile could be read; first reason: {reason}")
    known = [tileset.tiles[number] for number, _ in rows]
    groups = [tile.group or f"\0{number}" for tile, (number, _) in zip(known, rows, strict=True)]
    places = [f"{group}\0{place}" for group, (_, place) in zip(groups, rows, strict=True)]
    return LabelledTiles(
        tiles=np.stack(tiles),
        labels=codes([tile.label for tile in known]),
        groups=codes(groups),
        places=codes(places),
        label_names=tuple(sorted({tile.label for tile in known if tile.label is not None})),
        files=tuple(tile.file + place for tile, (_, place) in zip(known, rows, strict=True)),
        unreadable=tuple(unreadable),
        grouped=any(tile.group for tile in known),
    )


def cut_up(picture: Rgb, size_px: int) -> dict[str, Rgb]:
    """Cut a picture into tiles on a centred grid, by ``@x,y``; a small one is resized whole, by ''.

    Blank cut-outs are left out; a picture of which all are blank gives none.
    """
    down, across = picture.shape[0] // size_px, picture.shape[1] // size_px
    if min(down, across) < 2:
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


def split_by_group(data: LabelledTiles, folds: int, fold: int, seed: int) -> tuple[Ints, Ints]:
    """Return the numbers of training and held-out tiles; no group is in both.

    Classes are spread over the folds as evenly as their groups allow. ``folds=0`` holds nothing out.

    Raises:
        BadInput: fewer groups than folds.
    """
    everything = np.arange(len(data.labels))
    if folds == 0:
        return everything, everything[:0]
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

    groups = len(np.unique(data.groups))
    if groups < folds:
        raise BadInput(f"the data has {groups} group(s); {folds} folds need at least {folds}")
    counts = np.bincount(data.labels[data.labels >= 0], minlength=1)
    by_class = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    plain = GroupKFold(folds, shuffle=True, random_state=seed)
    splitter = by_class if counts.min() >= folds else plain
    splits = list(splitter.split(everything, data.labels, data.groups))
    train, held_out = splits[fold]
    return train.astype(np.int64), held_out.astype(np.int64)


def describe(data: LabelledTiles, tileset: TileSet) -> dict[str, Any]:
    """Return what the record of a run says of its data."""
    return {
        "name": tileset.name,
        "fingerprint": tileset.fingerprint,
        "tiles": len(data.labels),
        "classes": list(data.label_names),
        "groups": int(data.groups.max()) + 1 if data.grouped else None,
        "unreadable": list(data.unreadable),
    }


def describe_split(data: LabelledTiles, train: Ints, held_out: Ints) -> dict[str, Any]:
    """Return what the record of a run says of its split."""
    return {
        "by": "group" if data.grouped else "tile (the data names no groups)",
        "train_tiles": len(train),
        "held_out_tiles": len(held_out),
    }
