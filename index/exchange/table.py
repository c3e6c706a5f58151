"""The table of tiles that all exports write."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import BadInput
from ..clusters.stored import placements
from ..search.columns import NOT_PLACED, Coded
from ..search.tiles import Mask, allowed
from ..store.annotation import FIELDS as ANNOTATION_FIELDS
from ..view import View
from .column_names import unique_names

FIRST = 6
"""Number of tile columns before the metadata columns."""


@dataclass(frozen=True)
class Table:
    """The data to export.

    Attributes:
        vectors: (N, D).
        columns: by name, each (N,): numbers, or coded texts.
        encoder: name and sha256.
        original: for renamed columns, the name in the metadata by the new name.
    """

    vectors: NDArray[np.float32]
    columns: dict[str, NDArray[Any] | Coded]
    encoder: dict[str, Any]
    original: dict[str, str] = field(default_factory=dict)

    def numbers(self, name: str) -> NDArray[Any]:
        """Return a column of numbers."""
        column = self.columns[name]
        assert not isinstance(column, Coded)
        return column


def table_of(view: View, where: str | None = None) -> Table:
    """Gather the tiles of a view that pass a filter, in the order of the index.

    Raises:
        BadInput: no tile passes, or the filter is invalid.
    """
    columns = view.columns
    alive = columns.alive()
    passing = allowed(view.state, where)
    mask: Mask = alive if passing is None else alive & passing
    rows = np.flatnonzero(mask)
    if not len(rows):
        raise BadInput("no tile passes the filter; use a filter that matches more tiles")
    vectors = np.empty((len(rows), view.state.manifest.dim), dtype=np.float32)
    at = 0
    for number, slide in enumerate(columns.slides):
        start = int(columns.starts[number])
        inside = np.flatnonzero(mask[start : start + slide["tiles"]])
        if len(inside):
            vectors[at : at + len(inside)] = view.state.store.vectors_of(slide)[inside]
            at += len(inside)
    manifest = view.state.manifest
    encoder = {"name": manifest.name, "sha256": manifest.sha256, "metric": manifest.metric}
    of_tiles = _tile_columns(view, rows)
    annotated = ANNOTATION_FIELDS if columns.annotations else {}
    names = unique_names([*columns.names(), *annotated], taken=of_tiles)
    metadata: dict[str, NDArray[Any] | Coded] = {}
    for name, called in names.items():
        coded = columns.coded(name)
        metadata[called] = Coded(coded.names, coded.codes[rows])
    first = dict(list(of_tiles.items())[:FIRST])
    original = {called: name for name, called in names.items() if called != name}
    return Table(vectors, {**first, **metadata, **of_tiles}, encoder, original)


def _tile_columns(view: View, rows: NDArray[np.int64]) -> dict[str, NDArray[Any] | Coded]:
    """Return histoseek's columns of each tile; a metadata column of the same name is renamed."""
    columns = view.columns
    coords = columns.places()[rows]
    slide = columns.slide_of(rows)
    scales = {
        key: np.array([np.nan if s[key] is None else s[key] for s in columns.slides], np.float64)
        for key in ("mpp", "target_mpp")
    }
    size = np.array([s["size_px_level0"] for s in columns.slides])
    values: dict[str, NDArray[Any] | Coded] = {
        "tile": columns.ids(rows),
        "x": coords[:, 0],
        "y": coords[:, 1],
        "size_px_level0": size[slide],
        "mpp": scales["mpp"][slide],
        "target_mpp": scales["target_mpp"][slide],
    }
    values |= {name: columns.quality(name)[rows] for name in columns.qualities()}
    files = [columns.files(n) for n in range(len(columns.slides))]
    if any(f is not None for f in files):
        inside = rows - columns.starts[slide]
        pairs = zip(slide.tolist(), inside.tolist(), strict=True)
        values["file"] = np.array([_name(files[s], r) for s, r in pairs])
    for name in columns.clusterings():
        values |= _assigned(view, name, rows, slide)
    return values


def _assigned(
    view: View, name: str, rows: NDArray[np.int64], slide: NDArray[np.int64]
) -> dict[str, NDArray[Any]]:
    """Return cluster (-1 noise, -2 not assigned), strength and the flag unknown for a clustering."""
    columns = view.columns
    with view.state.reading() as db:
        by_slide = placements(db, name)
    cluster = np.full(len(rows), NOT_PLACED, dtype=np.int64)
    strength = np.zeros(len(rows))
    unknown = np.ones(len(rows), dtype=bool)
    for number in np.unique(slide).tolist():
        inside = slide == number
        stored = by_slide.get(columns.slides[number]["id"])
        if stored is not None:
            part = stored[0].part(rows[inside] - columns.starts[number])
            cluster[inside], strength[inside] = part.cluster, part.strength
            unknown[inside] = part.unknown
    return {f"cluster.{name}": cluster, f"strength.{name}": strength, f"unknown.{name}": unknown}


def _name(files: list[str | None] | None, row: int) -> str:
    return "" if files is None else files[row] or ""
