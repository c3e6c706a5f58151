"""Annotations: regions of slides with a label and a note, which people draw or bring from QuPath."""

from __future__ import annotations

import json
import sqlite3
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ...artifacts.geojson import Polygon, area_of
from ...errors import BadInput, NotFound, unknown_name
from .catalog import Catalog, insert, now, update
from .packing import SEAL
from .schema import has_table

TABLE = "annotations"
LONGEST_LABEL = 200
LONGEST_NOTE = 10_000
MAX_CORNERS = 200_000
"""Maximum number of corners of one annotation."""
FARTHEST = 10**9
FIELDS = {"annotation.label": "label", "annotation.note": "note", "annotation.author": "author"}
"""Fields of a filter, and the attribute of an annotation that each one means."""


@dataclass(frozen=True)
class Annotation:
    """A region of a slide.

    Attributes:
        slide: name.
        polygons: in level-0 pixels: for each its rings (n, 2) of x, y, the outline first, then holes.
        label: such as a tissue class; "" for none.
        note: free text.
        author: who stored it last; "" if unknown.
        id: a UUID; QuPath keeps it, so that a file that comes back changes the same annotation.
        created_at: UTC; ``changed_at`` likewise. Both are set when it is stored.
    """

    slide: str
    polygons: list[Polygon] = field(compare=False)
    label: str = ""
    note: str = ""
    author: str = ""
    id: str = ""
    created_at: str = ""
    changed_at: str = ""

    @property
    def rings(self) -> list[Any]:
        """All rings, of all polygons."""
        return [ring for rings in self.polygons for ring in rings]

    @property
    def area(self) -> float:
        """The area of the outlines less that of the holes, in square level-0 pixels."""
        return sum(
            area_of(rings[0]) - sum(area_of(hole) for hole in rings[1:]) for rings in self.polygons
        )

    def checked(self) -> Annotation:
        """Return it with an id.

        Raises:
            BadInput: it has no area, too many corners, too long a text or an id that is no UUID.
        """
        where = f"an annotation of slide {self.slide!r}"
        if any(np.abs(ring).max() > FARTHEST for ring in self.rings):
            raise BadInput(
                f"{where} has a corner beyond {FARTHEST:,} pixels; expected level-0 pixels"
            )
        if not self.polygons or self.area <= 0:
            raise BadInput(f"{where} has no area; expected at least one polygon")
        corners = sum(len(ring) for ring in self.rings)
        if corners > MAX_CORNERS:
            raise BadInput(f"{where} has {corners:,} corners; expected at most {MAX_CORNERS:,}")
        texts = {"label": LONGEST_LABEL, "note": LONGEST_NOTE, "author": LONGEST_LABEL}
        for name, longest in texts.items():
            text = getattr(self, name)
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise BadInput(f"the {name} of {where} is not valid text ({error})") from error
            if len(text) > longest:
                raise BadInput(
                    f"the {name} of {where} has {len(text):,} characters; expected at most {longest:,}"
                )
        try:
            number = str(uuid.UUID(self.id)) if self.id else str(uuid.uuid4())
        except ValueError as error:
            raise BadInput(
                f"the id {self.id!r} of {where} is not valid; expected a UUID"
            ) from error
        return replace(self, id=number)


@dataclass(frozen=True)
class Annotated:
    """Ids of annotations that were added, changed, or were stored already in the same form."""

    added: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)


def read(db: sqlite3.Connection, slide: str | None = None) -> list[Annotation]:
    """Return the annotations of a slide, or all, by slide and then oldest first."""
    return [of_row(row) for row in rows(db, slide)]


def rows(db: sqlite3.Connection, slide: str | None = None) -> list[sqlite3.Row]:
    """Return the rows of :func:`read`, for :func:`of_row`."""
    if not has_table(db, TABLE):
        return []
    condition, values = ("WHERE s.name = ?", (slide,)) if slide is not None else ("", ())
    return db.execute(
        f"SELECT a.*, s.name AS slide FROM {TABLE} AS a JOIN slides AS s ON s.id = a.slide_id "
        f"{condition} ORDER BY s.name, a.id",
        values,
    ).fetchall()


def of_row(row: sqlite3.Row) -> Annotation:
    """Return the annotation of a row."""
    polygons = [[np.array(ring, float) for ring in rings] for rings in json.loads(row["polygons"])]
    texts = {key: row[key] for key in ("slide", "label", "note", "author")}
    times = {key: row[key] for key in ("created_at", "changed_at")}
    return Annotation(polygons=polygons, id=row["uuid"], **texts, **times)


def store(catalog: Catalog, given: Iterable[Annotation]) -> Annotated:
    """Add annotations; one whose id is stored already is changed. All or none.

    Raises:
        BadInput: one is invalid, or its id is that of another slide's annotation.
        NotFound: there is no slide of its name, or it is a set of ready tiles.
    """
    items = [item.checked() for item in given]
    report = Annotated()
    with catalog.write() as db:
        slides = {row["name"]: dict(row) for row in db.execute("SELECT * FROM slides")}
        for item in items:
            if item.slide not in slides:
                raise unknown_name("slide", item.slide, slides)
            if slides[item.slide]["kind"] != "slide":
                raise NotFound(f"{item.slide!r} is a set of ready tiles; regions are of slides")
            _store_one(db, item, slides[item.slide]["id"], report)
    return report


def _store_one(db: sqlite3.Connection, item: Annotation, slide: int, report: Annotated) -> None:
    shape = [
        [np.round(ring, 2).tolist() for ring in rings] for rings in item.polygons
    ]  # a hundredth of a pixel
    values = {"label": item.label, "note": item.note, "polygons": json.dumps(shape)}
    old = db.execute(f"SELECT * FROM {TABLE} WHERE uuid = ?", (item.id,)).fetchone()
    if old is None:
        times = {"created_at": item.created_at or now(), "changed_at": now()}
        row = {"slide_id": slide, "uuid": item.id, **values, "author": item.author, **times}
        insert(db, TABLE, row)
        report.added.append(item.id)
        return
    if old["slide_id"] != slide:
        raise BadInput(
            f"the annotation {item.id} of slide {item.slide!r} is stored already as one of another slide; "
            "give the slide whose file it is from, or remove it there first"
        )
    if all(old[key] == value for key, value in values.items()):
        report.unchanged.append(item.id)
        return
    update(db, TABLE, {"uuid": item.id}, {**values, "author": item.author, "changed_at": now()})
    report.changed.append(item.id)


def remove(catalog: Catalog, ids: Sequence[str]) -> int:
    """Remove annotations by id, all or none; return their number.

    Raises:
        NotFound: there is no annotation with one of the ids.
    """
    with catalog.write() as db:
        for number in ids:
            if not db.execute(f"DELETE FROM {TABLE} WHERE uuid = ?", (number,)).rowcount:
                raise NotFound(f"the atlas has no annotation {number!r}, or it was removed")
    return len(ids)


def rows_of(db: sqlite3.Connection, slide: int) -> list[dict[str, Any]]:
    """Return the stored rows of a slide by its id, to :func:`put_back` when the slide is replaced."""
    rows = db.execute(f"SELECT * FROM {TABLE} WHERE slide_id = ? ORDER BY id", (slide,))
    return [{k: v for k, v in dict(row).items() if k not in {"id", SEAL}} for row in rows]


def put_back(db: sqlite3.Connection, rows: Iterable[dict[str, Any]], slide: int) -> None:
    """Store rows of a replaced slide for its new row."""
    for row in rows:
        insert(db, TABLE, {**row, "slide_id": slide})
