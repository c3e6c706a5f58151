"""Columns of tiles that stay in the catalog and are read slide by slide: coordinates and clusters.

An atlas of a billion tiles has 8 GB of coordinates; the hits of a search need a few of them. What was read
last is kept, up to a limit.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from ..store import quality
from ..store.catalog import Catalog
from ..store.packing import unpack_numbers, unpack_places
from ..store.store import StateGone

KEPT_BYTES = 32 * 2**20
"""Bytes of each column that are kept: the coordinates of 4 million tiles."""
AT_ONCE = 500
"""Slides read by one statement."""
Read = Callable[[Sequence[int]], Mapping[int, bytes]]


class TileRows:
    """One column of the tiles, by slide id; safe to use from several threads."""

    def __init__(self, read: Read, unpack: Callable[[bytes], NDArray[Any]]) -> None:
        """Use a column of the catalog.

        Args:
            read: returns the stored columns of slides by id.
            unpack: decodes one.
        """
        self._read, self._unpack = read, unpack
        self._kept: OrderedDict[int, NDArray[Any]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def of(self, slides: Iterable[int]) -> dict[int, NDArray[Any]]:
        """Return the column of each slide, in the order of its tiles.

        Raises:
            StateGone: a writer has removed a slide, or replaced the clustering.
        """
        found: dict[int, NDArray[Any]] = {}
        wanted = list(slides)
        with self._lock:
            for slide in wanted:
                if slide in self._kept:
                    self._kept.move_to_end(slide)
                    found[slide] = self._kept[slide]
        missing = [slide for slide in wanted if slide not in found]
        if missing:
            read = {n: self._unpack(blob) for n, blob in self._read(missing).items()}
            found |= read
            self._keep(read)
        return found

    def _keep(self, read: Mapping[int, NDArray[Any]]) -> None:
        with self._lock:
            for slide, values in read.items():
                if slide not in self._kept:
                    self._kept[slide] = values
                    self._bytes += values.nbytes
            while self._bytes > KEPT_BYTES:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes


def places_in(catalog: Catalog) -> TileRows:
    """Return the level-0 coordinates (N, 2) of the tiles of each slide."""
    read = _reader(catalog, "SELECT slide_id, places FROM slide_tiles WHERE slide_id IN ({})")
    return TileRows(read, unpack_places)


def clusters_in(catalog: Catalog, clustering: int) -> TileRows:
    """Return the clusters (N,) of the tiles of each slide in a clustering, by its id."""
    read = _reader(
        catalog,
        f"SELECT slide_id, cluster FROM placements WHERE clustering_id = {int(clustering)} "
        "AND slide_id IN ({})",
    )
    return TileRows(read, lambda blob: unpack_numbers(blob, "<i4"))


def quality_in(catalog: Catalog) -> TileRows:
    """Return the quality (N, Q) of the tiles of each slide that has it."""
    return TileRows(
        _reader(catalog, "SELECT slide_id, quality FROM tile_quality WHERE slide_id IN ({})"),
        quality.unpack,
    )


def _reader(catalog: Catalog, statement: str) -> Read:
    def read(slides: Sequence[int]) -> dict[int, bytes]:
        found: dict[int, bytes] = {}
        with catalog.read() as db:
            for at in range(0, len(slides), AT_ONCE):
                some = slides[at : at + AT_ONCE]
                found |= dict(
                    map(tuple, db.execute(statement.format(",".join("?" * len(some))), some))
                )
        if gone := set(slides) - set(found):
            raise StateGone(
                f"{catalog.path.parent} has changed: slide {min(gone)} of the state that is searched was "
                "removed or assigned again; take a new view"
            )
        return found

    return read
