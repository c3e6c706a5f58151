"""Reading and encoding at the same time: batches of tiles, two of them read ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from ..errors import BadInput
from ..images import Rgb
from .encoder import Encoder


def embed_rows(
    count: int,
    read: Callable[[int], Rgb],
    encoder: Encoder,
    batch: int,
    done: Callable[[int], None],
) -> tuple[NDArray[np.float32], NDArray[np.int64], list[str]]:
    """Read tiles in one thread while the encoder works on the batch before.

    Args:
        count: how many tiles.
        read: returns tile number 0..count-1, uint8 (S, S, 3), or raises BadInput.
        encoder: turns them into embeddings.
        batch: tiles per call of the encoder.
        done: called with the number of tiles dealt with, after each batch.

    Returns:
        embeddings (M, D), the rows they belong to (M,), and the reasons of the rows left out.
    """
    parts = [np.zeros((0, encoder.manifest.dim), dtype=np.float32)]
    kept: list[int] = []
    unreadable: list[str] = []
    for tiles, rows, reasons in _batches(count, read, batch):
        if len(rows):
            parts.append(encoder.embed(tiles))
        kept += rows
        unreadable += reasons
        done(len(rows) + len(reasons))
    return np.concatenate(parts), np.array(kept, dtype=np.int64), unreadable


def _batches(
    count: int, read: Callable[[int], Rgb], batch: int
) -> Iterator[tuple[NDArray[np.uint8], list[int], list[str]]]:
    def load(start: int) -> tuple[NDArray[np.uint8], list[int], list[str]]:
        tiles: list[Rgb] = []
        rows: list[int] = []
        reasons: list[str] = []
        for row in range(start, min(count, start + batch)):
            try:
                tiles.append(read(row))
                rows.append(row)
            except BadInput as error:
                reasons.append(str(error))
        return (np.stack(tiles) if tiles else np.zeros((0,), np.uint8)), rows, reasons

    starts = list(range(0, count, batch))
    with ThreadPoolExecutor(1, thread_name_prefix="tile-reader") as reader:
        ahead = [reader.submit(load, start) for start in starts[:2]]
        for number in range(len(starts)):
            current = ahead.pop(0).result()
            if number + 2 < len(starts):
                ahead.append(reader.submit(load, starts[number + 2]))
            yield current
