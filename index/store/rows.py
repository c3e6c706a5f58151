"""Values that go into an atlas and come out: hits, results of adding, metadata columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...artifacts.tables import clean_row, own_name
from ...errors import BadInput


class Hit(NamedTuple):
    """One similar tile.

    Attributes:
        rank: 1 is the most similar.
        score: cosine similarity; for an l2 encoder, the negative distance.
        tile: the tile's id in the atlas.
        slide: name of its slide or tile set.
        x: left edge of the tile in level-0 pixels.
        y: top edge of the tile in level-0 pixels.
        size_px_level0: side of the tile in level-0 pixels; 0 in a tile set.
        mpp: micrometres per pixel of level 0.
        label: of the tile, or else of the slide.
        patient: of the tile (its group), or else of the slide.
        cluster: in the newest clustering; None if there is none.
        file: name of the tile in a tile set.
        target_mpp: micrometres per pixel of the tile as the encoder received it; None if unknown.
    """

    rank: int
    score: float
    tile: int
    slide: str
    x: int
    y: int
    size_px_level0: int
    mpp: float | None
    label: str | None
    patient: str | None
    cluster: int | None
    file: str | None
    target_mpp: float | None = None


@dataclass(frozen=True)
class Added:
    """The result for one feature file to add.

    Attributes:
        file: the file.
        slide: its name in the atlas.
        state: added, unchanged (already in the atlas), relabelled, moved (the slide has a new path),
            replaced or failed.
        tiles: number of tiles.
        reason: why it failed or has no tiles, or what else the user should know.
        encoder_by: for a file of another tool, the source that states which encoder made it.
    """

    file: str
    slide: str
    state: str
    tiles: int = 0
    reason: str = ""
    encoder_by: str = ""


def plain_name(name: str) -> str:
    """Return a name that is safe as a file name: other characters become underscores."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)[:100].lstrip(".") or "_"


OWN = {
    "tile", "x", "y", "size_px_level0", "kind", "cluster", "vector", "projection_x", "projection_y",
    "annotation.label", "annotation.note", "annotation.author",
}  # fmt: skip
"""Column names reserved for histoseek and its exports."""


NOT_TAKEN = ("mpp", "path")
"""Columns of a table that an atlas takes from the features instead."""


def check_types(row: Any) -> None:
    """Check that a metadata row that a program gives is a dictionary of texts or numbers.

    Raises:
        BadInput: it is something else.
    """
    if not isinstance(row, Mapping):
        raise BadInput(f"a row of the metadata is {row!r}; expected a dictionary of columns")
    for key, value in row.items():
        if isinstance(value, bytes | list | tuple | set | Mapping):
            raise BadInput(f"the column {key!r} of the metadata has {value!r}; expected text")


def checked_row(row: Mapping[Any, Any]) -> dict[str, str]:
    """Return a metadata row that a user gives, with its values as texts.

    Raises:
        BadInput: it is no dictionary; a value is neither text nor number; or a column is named like
            ``patient`` but for its case, and would not be taken for it.
    """
    check_types(row)
    clean = clean_row(row)
    for name in clean:
        if (meant := own_name(name, clean)) != name:
            raise BadInput(
                f"the metadata has a column {name!r}; histoseek reads {meant!r}: rename the column"
            )
    return clean


def not_taken(rows: Iterable[Mapping[Any, Any]]) -> list[str]:
    """Return a note on columns with values that an atlas takes from the features; [] if there are none."""
    given = [clean_row(row) for row in rows]
    names = [name for name in NOT_TAKEN if any(row.get(name) for row in given)]
    verb, they = ("is", "it comes") if len(names) == 1 else ("are", "they come")
    columns = " and ".join(map(repr, names))
    source = "from the features, or from the table that `index import` is given"
    return [f"{columns} of the metadata {verb} not used here: {they} {source}"] if names else []


class Relabelled(int):
    """The number of slides whose metadata was changed.

    Attributes:
        notes: what was deleted or has no effect, one sentence each.
    """

    notes: list[str]

    def __new__(cls, changed: int, notes: Iterable[str] = ()) -> Relabelled:
        """Store the number and the notes."""
        made = super().__new__(cls, changed)
        made.notes = list(notes)
        return made


def further(row: dict[str, Any]) -> dict[str, str]:
    """Return the non-empty user-defined columns of a metadata row, as text.

    Raises:
        BadInput: a column has a name reserved for histoseek.
    """
    standard = {"slide", "path", "label", "patient", "mpp", "file"}
    if reserved := sorted(OWN & set(row)):
        raise BadInput(
            f"the metadata has a column {reserved[0]!r}; histoseek uses this name itself: rename the column"
        )
    return {str(k): str(v) for k, v in row.items() if k not in standard and v not in (None, "")}
