"""The map of an atlas: computed in the background, with its points and their colours."""

from __future__ import annotations

import json
import logging
import time
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...errors import BadInput, HistoseekError, MissingPart, NotFound
from ...index.atlas import Atlas
from ...index.search.layout import Layout
from ...index.search.places import GRID, Places
from ...index.store.annotation import FIELDS as ANNOTATION_FIELDS
from ...index.view import View
from .background import Background
from .words import cluster_name

MAP_POINTS = 2_000_000
"""Maximum number of tiles in an answer; of more, so many are drawn at random."""
LAYOUT_S = 20.0
"""Seconds to wait for the map."""
SAY_EVERY_S = 30.0
Box = tuple[int, int, int, int]
log = logging.getLogger("histoseek.map")


@dataclass(frozen=True)
class Points:
    """The atlas's tiles on the map.

    Attributes:
        ids: (N,) ids of all tiles, ascending.
        places: (N, 2) coordinates from 0 to 65,535.
        revision: of the atlas.
        layout: the map.
    """

    ids: NDArray[np.int64]
    places: NDArray[np.uint16]
    revision: int
    layout: Layout


class AtlasMap:
    """Coordinates of an atlas's tiles on its map."""

    def __init__(self, atlas: Atlas, background: Background) -> None:
        """Store the atlas; the map is computed in the background when it is first requested."""
        self._atlas, self._background = atlas, background
        self._points: Points | None = None

    def layout(self) -> Layout | None:
        """Return the map; None while it is being computed in the background.

        Raises:
            MissingPart: openTSNE is not installed.
        """

        def stored_or_made() -> Layout:
            with suppress(HistoseekError):  # if its file is damaged, the map is computed again
                if stored := self._atlas.layout():
                    return stored
            return self._atlas.make_layout()

        tiles = len(self._atlas.view().index)
        return self._background.get("layout", tiles.bit_length(), stored_or_made)

    def wait(self, patience_s: float = LAYOUT_S) -> None:
        """Wait until the map is ready, at most ``patience_s`` seconds."""
        deadline = time.monotonic() + patience_s
        with suppress(MissingPart):
            while self.layout() is None and time.monotonic() < deadline:
                time.sleep(0.1)

    def points(self) -> Points | None:
        """Return the tiles' coordinates on the map; None while they are being computed."""
        layout = self.layout()
        if layout is None:
            return None
        last = self._points
        revision = self._atlas.catalog.revision()
        if last is not None and last.revision == revision and last.layout is layout:
            return last
        points = self._background.get(
            "points", (revision, id(layout)), lambda: self._place_all(layout)
        )
        self._points = points or last
        return points

    def _place_all(self, layout: Layout) -> Points:
        said = time.monotonic()

        def say(done: int, total: int) -> None:
            nonlocal said
            if time.monotonic() - said > SAY_EVERY_S:
                said = time.monotonic()
                log.warning("placing tiles on the map: %d of %d", done, total)

        found: Places = self._atlas.map_places(layout, say)
        return Points(found.ids, found.places, found.revision, layout)

    def colours(
        self, points: Points, by: str, rows: NDArray[np.int64] | None = None
    ) -> tuple[list[str], NDArray[np.int32]]:
        """Return the values that colour the points, and each point's value number (M,), -1 for none.

        Args:
            points: points of the map.
            by: ``cluster``, ``cluster.NAME``, ``label``, ``slide``, ``patient``, a metadata column or a
                field of annotations.
            rows: (M,) of the points; all when None.

        Raises:
            NotFound: there is no such clustering or column.
        """
        return self._atlas.ask(self._colours, points, by, rows)

    def _colours(
        self, view: View, /, points: Points, by: str, rows: NDArray[np.int64] | None
    ) -> tuple[list[str], NDArray[np.int32]]:
        columns = view.columns
        at = columns.positions(points.ids if rows is None else points.ids[rows])
        if by == "cluster" or by.startswith("cluster."):
            name = by.partition(".")[2] or next(iter(view.clusterings()), None)
            assigned = columns.clusters(name)
            if assigned is None:
                raise NotFound(f"the atlas has no clustering {name or ''}; fit one first")
            codes = np.where(at >= 0, np.maximum(assigned[at], -1), -1).astype(np.int32)
            names = view.state.cluster_names[str(name)]
            count = int(codes.max(initial=-1)) + 1
            return [cluster_name(c, names) for c in range(count)], codes
        known = [*columns.names(), *ANNOTATION_FIELDS]
        if by not in known:
            raise NotFound(f"the atlas has no column {by!r}; it has {', '.join(known)}")
        coded = columns.coded(by)
        return coded.names, np.where(at >= 0, coded.codes[at], -1).astype(np.int32)

    def document(self, by: str, box: Box | None = None, places: bool = True) -> bytes | None:
        """Return the points as bytes for a browser; None while they are being computed.

        The route ``/v1/map`` describes them.

        Args:
            by: see :meth:`colours`.
            box: left, bottom, right, top; all tiles when None.
            places: whether ids and places are wanted too, not only codes.

        Raises:
            BadInput: the box is empty, or the atlas has no tiles.
            NotFound: there is no such clustering or column.
        """
        if not len(self._atlas.view().index):
            raise BadInput("the atlas has no tiles yet; add slides first")
        points = self.points()
        if points is None:
            return None
        rows, inside = _chosen(points, box)
        names, codes = self.colours(points, by, rows)
        ids = points.ids if rows is None else points.ids[rows]
        runs = _runs(ids)
        wide = next(n for n in (1, 2, 4) if len(names) < 256**n)
        header = {
            "revision": points.revision, "shown": len(ids), "inside": inside, "total": len(points.ids),
            "by": by, "names": names, "places": places, "runs": runs, "code_bytes": wide,
            "method": points.layout.method, "landmarks": len(points.layout.points),
            "trust": points.layout.trust,
        }  # fmt: skip
        text = json.dumps(header).encode()
        text += b" " * (-(len(text) + 4) % 8)
        parts = [np.uint32(len(text)).astype("<u4").tobytes(), text]
        if places:
            shown = points.places if rows is None else points.places[rows]
            parts += [b"" if runs is not None else ids.astype("<f8").tobytes()]
            parts += [shown.astype("<u2").tobytes()]
        return b"".join([*parts, (codes + 1).astype(f"<u{wide}").tobytes()])


def _chosen(points: Points, box: Box | None) -> tuple[NDArray[np.int64] | None, int]:
    """Return the rows of the points to show, ascending (None for all), and how many are in the box."""
    rows: NDArray[np.int64] | None = None
    inside = len(points.ids)
    if box is not None:
        left, bottom, right, top = box
        if left > right or bottom > top:
            raise BadInput(
                f"the box {box} is empty; expected left, bottom, right, top, 0 to {GRID}"
            )
        x, y = points.places.T
        rows = np.flatnonzero((x >= left) & (x <= right) & (y >= bottom) & (y <= top))
        inside = len(rows)
    if inside > MAP_POINTS:
        drawn = np.random.default_rng(0).choice(inside, MAP_POINTS, replace=False)
        drawn.sort()
        rows = drawn if rows is None else rows[drawn]
    return rows, inside


def _runs(ids: NDArray[np.int64]) -> list[list[int]] | None:
    """Return first id and length of each run of consecutive ids; None if they are as long as the ids."""
    starts = np.flatnonzero(np.diff(ids, prepend=-2) != 1)
    if len(starts) > max(16, len(ids) // 8):
        return None
    lengths = np.diff([*starts.tolist(), len(ids)])
    return np.stack([ids[starts], lengths], axis=1).astype(int).tolist() if len(ids) else []
