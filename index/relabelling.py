"""Changes labels, patients and further columns of slides and of single tiles."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..errors import BadInput
from .store.catalog import update
from .store.metadata import Row, slides_meant
from .store.packing import pack_coded, unpack_coded, unpack_texts
from .store.rows import NOT_TAKEN, Relabelled, further, not_taken


def relabel(db: sqlite3.Connection, rows: Sequence[Row]) -> Relabelled:
    """Set metadata in an open transaction; see :meth:`Atlas.relabel <histoseek.index.atlas.Atlas.relabel>`.

    ``rows`` are checked (:func:`~histoseek.index.store.rows.checked_row`), and each names a slide.
    """
    slides = {row["name"]: dict(row) for row in db.execute("SELECT * FROM slides")}
    matched = slides_meant({row["slide"] for row in rows}, list(slides.values()))
    of_slide: dict[str, Row] = {}
    of_tiles: dict[str, dict[str, Row]] = {}
    for row in rows:
        name = matched[row["slide"]]
        if row.get("file"):
            of_tiles.setdefault(name, {})[row["file"]] = row
        else:
            of_slide.setdefault(name, {}).update(row)
    changed = set()
    deleted: Counter[str] = Counter()
    notes = not_taken(rows)
    for name, row in of_slide.items():
        if changes := slide_changes(slides[name], row):
            deleted.update(_deleted(slides[name], changes))
            update(db, "slides", {"id": slides[name]["id"]}, changes)
            changed.add(name)
        notes += _hidden(db, slides[name], row)
    for name, tiles in of_tiles.items():
        if _relabel_tiles(db, slides[name], tiles, deleted):
            changed.add(name)
    of_one = {key for row in rows if row.get("file") for key, value in row.items() if value}
    if unused := sorted(of_one - {"slide", "file", "label", "patient", *NOT_TAKEN}):
        notes.append(
            f"a single tile has no columns of its own, so these are not used: {', '.join(unused)}"
        )
    if deleted := +deleted:
        each = ", ".join(f"{column} {count}" for column, count in sorted(deleted.items()))
        notes.insert(0, f"values deleted by empty cells: {each}")
    return Relabelled(len(changed), notes)


def slide_changes(slide: dict[str, Any], row: Row) -> dict[str, Any]:
    """Return the changed columns of a slide in the catalog; empty if ``row`` changes nothing."""
    changes: dict[str, Any] = {
        key: row[key] or None
        for key in ("label", "patient")
        if key in row and (row[key] or None) != slide[key]
    }
    before: dict[str, str] = json.loads(slide["metadata"])
    emptied = {key for key, value in row.items() if value == ""}
    after = {k: v for k, v in (before | further(row)).items() if k not in emptied}
    if after != before:
        changes["metadata"] = json.dumps(after, sort_keys=True)
    return changes


def _deleted(slide: dict[str, Any], changes: dict[str, Any]) -> list[str]:
    """Return the columns of a slide whose value the changes delete."""
    gone = [key for key, value in changes.items() if value is None]
    if "metadata" in changes:
        gone += set(json.loads(slide["metadata"])) - set(json.loads(changes["metadata"]))
    return gone


def _hidden(db: sqlite3.Connection, slide: dict[str, Any], row: Row) -> list[str]:
    """Return a note for each value of a tile set that some tiles hide, because they have their own."""
    of_tiles = db.execute(
        "SELECT labels, patients FROM slide_tiles WHERE slide_id = ?", (slide["id"],)
    ).fetchone()
    notes = []
    for column, packed in (("label", of_tiles["labels"]), ("patient", of_tiles["patients"])):
        own = 0 if packed is None else int((unpack_coded(packed)[1] >= 0).sum())
        if row.get(column) and own:
            notes.append(
                f"{own} of {slide['tiles']} tiles of {slide['name']!r} keep a {column} of their own; to "
                "change it, give rows with the columns slide and file"
            )
    return notes


def _relabel_tiles(
    db: sqlite3.Connection,
    slide: dict[str, Any],
    tiles: dict[str, dict[str, str]],
    deleted: Counter[str],
) -> bool:
    """Set labels and patients of tiles, and count deleted ones; return whether any changed."""
    row = db.execute("SELECT * FROM slide_tiles WHERE slide_id = ?", (slide["id"],)).fetchone()
    files = [] if row["files"] is None else unpack_texts(row["files"])
    number_of = {file: n for n, file in enumerate(files)}
    changes: dict[str, Any] = {}
    for file in tiles:
        if file not in number_of:
            raise BadInput(
                f"{slide['name']!r} has no tile {file!r}; expected the name of a tile of a tile set"
            )
    for column, key in (("labels", "label"), ("patients", "patient")):
        given = {number_of[file]: new[key] for file, new in tiles.items() if key in new}
        if not given:
            continue
        values: list[str | None] = [None] * slide["tiles"]
        if row[column] is not None:
            names, codes = unpack_coded(row[column])
            values = [None if code < 0 else names[code] for code in codes.tolist()]
        after = [given.get(n, value) or None for n, value in enumerate(values)]
        if after != values:
            changes[column] = pack_coded(after)
            deleted[key] += sum(
                old is not None and not new for old, new in zip(values, after, strict=True)
            )
    if changes:
        update(db, "slide_tiles", {"slide_id": slide["id"]}, changes)
    return bool(changes)
