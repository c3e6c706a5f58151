"""The map of an atlas: computed in the background, with its points and their colours."""

from __future__ import annotations

import time
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from ...errors import HistoseekError, MissingPart, NotFound
from ...index.atlas import Atlas
from ...index.search.layout import Layout
from ...index.store.annotation import FIELDS as ANNOTATION_FIELDS
from .answers import Points
from .background import Background
from .words import cluster_name

MAP_POINTS = 200_000
"""Maximum number of tiles shown."""
LAYOUT_S = 20.0
"""Seconds to wait for the map."""


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
        """Return the tiles' coordinates on the map; None while it is being computed."""
        layout = self.layout()
        if layout is None:
            return None
        last = self._points
        revision = self._atlas.catalog.revision()
        if last is not None and last.revision == revision and last.layout is layout:
            return last
        points = self._background.get("points", revision, lambda: self._place_all(layout))
        self._points = points or last
        return points

    def _place_all(self, layout: Layout) -> Points:
        # Read before the vectors: after a commit in between, the points are outdated but not wrong.
        revision = self._atlas.catalog.revision()
        ids, vectors = self._atlas.vectors()
        rows = np.arange(len(ids))
        if len(rows) > MAP_POINTS:
            rows = np.sort(np.random.default_rng(0).choice(rows, MAP_POINTS, replace=False))
        places = layout.place(vectors[rows])
        return Points(ids[rows], places, len(ids), layout, revision)

    def colours(self, points: Points, by: str) -> tuple[list[str], NDArray[np.int32]]:
        """Return the values that colour the points, and each point's value number (M,), -1 for none.

        Args:
            points: points of the map.
            by: ``cluster``, ``cluster.NAME``, ``label``, ``slide``, ``patient``, a metadata column or a
                field of annotations.
        """
        view = self._atlas.view()
        columns = view.columns
        at = columns.positions(points.ids)
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
