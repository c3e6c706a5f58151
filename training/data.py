"""Labelled tiles as arrays for training, and splits that never cut a group in two."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import BadInput
from ..images import square
from ..metrics import Ints, codes
from ..tilesets import TileSet

IN_MEMORY_BYTES = 4 * 2**30
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class LabelledTiles:
    """Decoded tiles with what is known of each.

    Attributes:
        tiles: uint8 (N, S, S, 3); on disk, memory-mapped, when larger than 4 GiB.
        labels: (N,) class numbers, -1 is unlabelled.
        groups: (N,) group numbers; a tile without a group is a group of its own.
        label_names: the classes in order of their number.
        files: (N,) names.
        unreadable: what was left out, with the reason.
        grouped: whether the data named any group.
    """

    tiles: NDArray[np.uint8]
    labels: Ints
    groups: Ints
    label_names: tuple[str, ...]
    files: tuple[str, ...]
    unreadable: tuple[str, ...]
    grouped: bool


def load(tileset: TileSet, size_px: int, progress: Progress) -> LabelledTiles:
    """Decode a tile set; an unreadable tile is left out, counted and named.

    Raises:
        BadInput: no tile could be read.
    """
    count = len(tileset)
    shape = (count, size_px, size_px, 3)
    if count * size_px * size_px * 3 > IN_MEMORY_BYTES:
        scratch = tempfile.NamedTemporaryFile(prefix="histoseek-tiles-")  # noqa: SIM115
        pixels: NDArray[np.uint8] = np.memmap(scratch, dtype=np.uint8, mode="w+", shape=shape)
    else:
        pixels = np.empty(shape, dtype=np.uint8)
    kept: list[int] = []
    unreadable: list[str] = []
    for number in range(count):
        try:
            pixels[len(kept)] = square(tileset.read(number), size_px)
            kept.append(number)
        except BadInput as error:
            unreadable.append(str(error))
        progress(number + 1, count, "reading tiles")
    if not kept:
        raise BadInput(f"{tileset.source}: no tile could be read; first reason: {unreadable[0]}")
    rows = [tileset.tiles[n] for n in kept]
    labels = [row.label for row in rows]
    alone = [row.group or f"\0{n}" for n, row in enumerate(rows)]
    return LabelledTiles(
        tiles=pixels[: len(kept)],
        labels=codes(labels),
        groups=codes(alone),
        label_names=tuple(sorted({x for x in labels if x is not None})),
        files=tuple(row.file for row in rows),
        unreadable=tuple(unreadable),
        grouped=any(row.group for row in rows),
    )


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
