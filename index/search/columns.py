"""The columns of the tiles: arrays parallel to the vectors, used to build hits and to filter.

A position is a row of these arrays and of the index. The slides follow each other in the order of the
index. A column is decoded on first use and then cached.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from sqlite3 import Row
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...artifacts.feature_files import QUALITY
from ...artifacts.geojson import inside
from ...errors import Damaged
from ..store import packing
from ..store.annotation import FIELDS as ANNOTATION_FIELDS
from ..store.annotation import Annotation, of_row
from ..store.packing import MISSING, Codes, unpack_coded
from ..store.rows import Hit
from .tile_rows import TileRows

T = TypeVar("T")
MASKS_CACHED = 16
FACTS = ("name", "size_px_level0", "mpp", "target_mpp")
"""Columns of the slide that appear in a hit."""

SLIDES_AT_ONCE = 500
"""Slides whose coordinates are read at once for a whole column."""
NOT_PLACED = -2
"""Cluster of a tile that has no assignment in a clustering (yet)."""


@dataclass(frozen=True)
class Coded:
    """A column of repeated values.

    Attributes:
        names: the distinct values.
        codes: (N,) indices into ``names``; -1 for no value.
    """

    names: list[str]
    codes: Codes


@dataclass(frozen=True)
class StoredColumn:
    """A column that some slides have, such as the clusters of a clustering.

    Attributes:
        slides: ids of the slides that had it when the state was opened.
        rows: the values of their tiles, by slide id.
    """

    slides: frozenset[int]
    rows: TileRows


@dataclass(frozen=True)
class _SlideOfHits:
    """What the hits of one slide show.

    Attributes:
        facts: of the slide, as in FACTS.
        places: (N, 2) of its tiles.
        clusters: (N,) of its tiles; None without a clustering.
        files: names of its tiles; None for a slide.
        label: from a tile's row to its label.
        patient: from a tile's row to its patient.
    """

    facts: tuple[Any, ...]
    places: NDArray[np.int32]
    clusters: NDArray[np.int32] | None
    files: list[str | None] | None
    label: Callable[[int], str | None]
    patient: Callable[[int], str | None]


class Columns:
    """The columns of one state of an atlas; safe to use from several threads."""

    def __init__(
        self,
        slides: Sequence[Mapping[str, Any]],
        places: TileRows,
        placements: Mapping[str, StoredColumn],
        newest: str | None,
        annotations: Sequence[Row] = (),
        quality: StoredColumn | None = None,
    ) -> None:
        """Wrap rows of the catalog.

        Args:
            slides: rows of ``slides`` joined with ``slide_tiles`` but for the coordinates, in the order of
                the positions.
            places: the coordinates, by slide id.
            placements: of each clustering, the clusters of the slides' tiles.
            newest: the clustering that hits show.
            annotations: the catalog's rows of annotations, decoded on first use.
            quality: (N, Q) of the slides' tiles.
        """
        self._annotations = annotations
        self.slides = list(slides)
        self.newest = newest
        self._places, self._placements, self._quality = places, placements, quality
        sizes = np.array([s["tiles"] for s in slides], dtype=np.int64)
        self.starts: NDArray[np.int64] = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._first = np.array([s["first_tile"] for s in slides], dtype=np.int64)
        self._cache: dict[str, Any] = {}
        self._masks: OrderedDict[str, NDArray[np.bool_]] = OrderedDict()
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def cached(self, key: str, make: Callable[[], T]) -> T:
        """Return the result of ``make``, which is called once per key and cached."""
        with self._lock:
            if key not in self._cache:
                self._cache[key] = make()
            value: T = self._cache[key]
            return value

    def mask(self, where: str, make: Callable[[], NDArray[np.bool_]]) -> NDArray[np.bool_]:
        """Return which tiles (N,) pass a filter; the last few masks are cached."""
        with self._lock:
            if where not in self._masks:
                self._masks[where] = make()
                if len(self._masks) > MASKS_CACHED:
                    self._masks.popitem(last=False)
            self._masks.move_to_end(where)
            return self._masks[where]

    def slide_of(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the slide's number (row of ``slides``) of each position."""
        return np.searchsorted(self.starts, positions, side="right") - 1

    def ids(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the tile ids of positions."""
        slide = self.slide_of(positions)
        return self._first[slide] + positions - self.starts[slide]

    def positions(self, tiles: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the positions of tile ids; -1 for an unknown or removed id."""
        if not len(self._first):
            return np.full(len(tiles), -1, dtype=np.int64)
        order = np.argsort(self._first, kind="stable")
        # A slide without tiles has the same first id as the next slide; side="right" picks the last of
        # them, which has tiles.
        slide = order[np.maximum(np.searchsorted(self._first[order], tiles, side="right") - 1, 0)]
        row = tiles - self._first[slide]
        inside = (row >= 0) & (row < np.diff(self.starts)[slide])
        return np.where(inside, self.starts[slide] + row, -1)

    def alive(self) -> NDArray[np.bool_]:
        """Return which positions (N,) are not of removed slides."""
        named = np.array([bool(s["name"]) for s in self.slides], dtype=np.bool_)
        return np.repeat(named, np.diff(self.starts))

    def present(self) -> NDArray[np.int64]:
        """Return the positions of all tiles except those of removed slides, ascending."""
        return np.flatnonzero(self.alive())

    def places(self) -> NDArray[np.int32]:
        """Return the level-0 coordinates x, y of every tile (N, 2); 0 for removed slides.

        Raises:
            StateGone: a writer has removed a slide.
        """
        places = np.zeros((len(self), 2), dtype=np.int32)
        for at in range(0, len(self.slides), SLIDES_AT_ONCE):
            numbers = [
                n
                for n in range(len(self.slides))[at : at + SLIDES_AT_ONCE]
                if self.slides[n]["name"]
            ]
            for n, part in self._places_of(numbers).items():
                places[self.starts[n] : self.starts[n + 1]] = part
        return places

    def places_of(self, slide: int) -> NDArray[np.int32]:
        """Return the level-0 coordinates x, y of a slide's tiles (N, 2), by the slide's number.

        Raises:
            StateGone: a writer has removed the slide.
        """
        return self._places_of([slide])[slide]

    def _places_of(self, numbers: Sequence[int]) -> dict[int, NDArray[np.int32]]:
        ids = {self.slides[n]["id"]: n for n in numbers}
        return {ids[slide]: rows for slide, rows in self._places.of(ids).items()}

    def files(self, slide: int) -> list[str | None] | None:
        """Return the file names of a tile set's tiles; None for a slide."""
        blob = self.slides[slide]["files"]
        if blob is None:
            return None
        return self.cached(f"files {slide}", lambda: packing.unpack_texts(blob))

    def metadata(self, slide: int) -> dict[str, str]:
        """Return the user-defined columns of a slide."""
        return self.cached(
            f"metadata {slide}", lambda: dict(json.loads(self.slides[slide]["metadata"]))
        )

    def names(self) -> list[str]:
        """Return the fields that :meth:`coded` accepts."""
        extra = {key for n in range(len(self.slides)) for key in self.metadata(n)}
        return ["slide", "kind", "label", "patient", *sorted(extra)]

    def fields(self) -> list[str]:
        """Return all fields that a filter accepts."""
        of_tiles = ["file", "tile", "x", "y", "mpp", "target_mpp", "cluster", *self.qualities()]
        return [*self.names(), *of_tiles, *ANNOTATION_FIELDS]

    def qualities(self) -> list[str]:
        """Return the measures of quality that tiles have; a column of the metadata hides its namesake."""
        if self._quality is None or not self._quality.slides:
            return []
        names = self.names()
        return [name for name in QUALITY if name not in names]

    def coded(self, field: str) -> Coded:
        """Return a column by name: slide, kind, label, patient, or any column of the metadata.

        The label or patient of a tile takes precedence over that of its slide. A field of annotations has
        the value of the smallest one around a tile.
        """
        make = self._make_annotated if field in ANNOTATION_FIELDS else self._make_coded
        return self.cached(f"coded {field}", lambda: make(field))

    @property
    def annotations(self) -> list[Annotation]:
        """The annotations of all slides."""
        return self.cached("annotations", lambda: [of_row(row) for row in self._annotations])

    def annotated(self) -> list[tuple[Annotation, NDArray[np.int64]]]:
        """Return each annotation with the positions of the tiles whose centre is inside, largest first."""
        return self.cached("annotated", self._make_positions)

    def _make_positions(self) -> list[tuple[Annotation, NDArray[np.int64]]]:
        number_of = {slide["name"]: n for n, slide in enumerate(self.slides)}
        found = []
        for item in sorted(self.annotations, key=lambda a: -a.area):
            number = number_of[item.slide]
            start, end = self.starts[number : number + 2].tolist()
            half = self.slides[number]["size_px_level0"] / 2
            centres = self.places_of(number) + half
            corners = np.concatenate(item.rings)
            near = np.flatnonzero(
                ((centres >= corners.min(axis=0)) & (centres <= corners.max(axis=0))).all(axis=1)
            )
            found.append((item, start + near[inside(centres[near], item.rings)]))
        return found

    def _make_annotated(self, field: str) -> Coded:
        names: dict[str, int] = {}
        codes = np.full(len(self), MISSING, dtype=np.int32)
        for item, positions in self.annotated():
            if value := getattr(item, ANNOTATION_FIELDS[field]):
                codes[positions] = names.setdefault(value, len(names))
        return Coded(list(names), codes)

    def _make_coded(self, field: str) -> Coded:
        numbers: dict[str, int] = {}

        def number(name: str) -> int:
            return numbers.setdefault(name, len(numbers))

        codes = np.full(len(self), MISSING, dtype=np.int32)
        for n, slide in enumerate(self.slides):
            part = codes[self.starts[n] : self.starts[n + 1]]
            if field == "slide":
                whole: str | None = slide["name"]
            elif field in {"kind", "label", "patient"}:
                whole = slide[field]
            else:
                whole = self.metadata(n).get(field)
            if whole:
                part[:] = number(whole)
            blob = slide[f"{field}s"] if field in {"label", "patient"} else None
            if blob is not None:
                names, of_tiles = unpack_coded(blob)
                table = np.array([number(name) for name in names], dtype=np.int32)
                part[of_tiles >= 0] = table[of_tiles[of_tiles >= 0]]
        return Coded(list(numbers), codes)

    def label_counts(self, positions: NDArray[np.int64]) -> dict[str, int]:
        """Return the number of tiles of each label at positions (T,), most frequent first."""
        label = self.coded("label")
        counts = np.bincount(label.codes[positions] + 1, minlength=len(label.names) + 1).tolist()
        labels = [(n, name) for n, name in zip(counts, ["(none)", *label.names], strict=True) if n]
        return {name: n for n, name in sorted(labels, key=lambda pair: (-pair[0], pair[1]))}

    def clusters(self, clustering: str | None = None) -> NDArray[np.int32] | None:
        """Return every tile's cluster (N,): -1 noise, -2 not assigned. Return None without a clustering.

        Args:
            clustering: its name; None for the newest.
        """
        name = clustering or self.newest
        if name is None or name not in self._placements:
            return None

        def make() -> NDArray[np.int32]:
            clusters = np.full(len(self), NOT_PLACED, dtype=np.int32)
            for tiles, part in self._stored(self._placements[name]):
                clusters[tiles] = part
            return clusters

        return self.cached(f"clusters {name}", make)

    def quality(self, measure: str) -> NDArray[np.float32]:
        """Return one of :meth:`qualities` of every tile (N,); NaN where it was not measured.

        Raises:
            StateGone: a writer has removed a slide.
        """
        values = np.full(len(self), np.nan, dtype=np.float32)
        if self._quality is not None:
            for tiles, part in self._stored(self._quality):
                if len(part) != tiles.stop - tiles.start:
                    raise Damaged(
                        "the quality of tiles in the atlas's database is incomplete; run `histoseek index "
                        "verify --repair`"
                    )
                values[tiles] = part[:, QUALITY.index(measure)]
        return values

    def _stored(self, column: StoredColumn) -> Iterator[tuple[slice, NDArray[Any]]]:
        """Yield the positions and values of the tiles of each slide that has a column."""
        number = {slide["id"]: n for n, slide in enumerate(self.slides)}
        having = sorted(column.slides & set(number))
        for at in range(0, len(having), SLIDES_AT_ONCE):
            for slide, part in column.rows.of(having[at : at + SLIDES_AT_ONCE]).items():
                start, end = self.starts[number[slide] : number[slide] + 2].tolist()
                yield slice(start, end), part

    def placement(self, slide: int) -> bytes:
        """Return the clusters of a slide's tiles (by slide id) in the newest clustering, as stored."""
        return b"".join(part.astype("<i4").tobytes() for part in self._placed([slide]).values())

    def _placed(self, slides: Iterable[int]) -> dict[int, NDArray[np.int32]]:
        """Return the clusters of slides, by id, in the newest clustering; of those that have them."""
        stored = self._placements.get(self.newest or "")
        return {} if stored is None else stored.rows.of(n for n in slides if n in stored.slides)

    def clusterings(self) -> list[str]:
        """Return the names of the clusterings."""
        return list(self._placements)

    def hits(self, positions: NDArray[np.int64], scores: NDArray[np.float32]) -> list[list[Hit]]:
        """Return hits, by query, for positions (Q, k); -1 stands for no hit.

        Args:
            positions: best first.
            scores: (Q, k).
        """
        is_hit = positions >= 0
        flat = positions[is_hit]
        slide_of = self.slide_of(flat)
        slides = np.unique(slide_of).tolist()
        placed = self._placed(self.slides[n]["id"] for n in slides)
        places = self._places_of(slides)
        known = {n: self._facts(n, places[n], placed) for n in slides}
        hits = []
        for rank, score, tile, number, row in zip(
            (np.nonzero(is_hit)[1] + 1).tolist(),
            scores[is_hit].astype(np.float64).round(6).tolist(),
            self.ids(flat).tolist(),
            slide_of.tolist(),
            (flat - self.starts[slide_of]).tolist(),
            strict=True,
        ):
            slide = known[number]
            name, size, mpp, scale = slide.facts
            x, y = slide.places[row].tolist()
            hits.append(
                Hit(
                    rank, score, tile, name, x, y, size, mpp, slide.label(row), slide.patient(row),
                    None if slide.clusters is None else int(slide.clusters[row]),
                    None if slide.files is None else slide.files[row], scale,
                )
            )  # fmt: skip
        rest = iter(hits)
        return [list(islice(rest, count)) for count in is_hit.sum(axis=1).tolist()]

    def _facts(
        self, slide: int, places: NDArray[np.int32], placed: Mapping[int, NDArray[np.int32]]
    ) -> _SlideOfHits:
        """Return what hits of a slide show, by the slide's number."""
        row = self.slides[slide]
        return _SlideOfHits(
            tuple(row[key] for key in FACTS), places, placed.get(row["id"]), self.files(slide),
            self._values_of("label", slide), self._values_of("patient", slide),
        )  # fmt: skip

    def _values_of(self, field: str, slide: int) -> Callable[[int], str | None]:
        """Return a function from a tile's row in a slide to its label or patient."""
        whole: str | None = self.slides[slide][field] or None
        blob = self.slides[slide][f"{field}s"]
        if blob is None:
            return lambda row: whole
        names, codes = self.cached(f"{field} {slide}", lambda: unpack_coded(blob))
        return lambda row: names[codes[row]] if codes[row] >= 0 else whole

    def tiles(self, positions: NDArray[np.int64]) -> list[dict[str, Any]]:
        """Return the fields of a hit, except rank and score, for the tiles at positions (T,)."""
        (hits,) = self.hits(positions[None], np.zeros((1, len(positions)), dtype=np.float32))
        return [
            {k: v for k, v in hit._asdict().items() if k not in {"rank", "score"}} for hit in hits
        ]
