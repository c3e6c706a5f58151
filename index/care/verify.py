"""Checks every hash, count and link of an atlas, and rebuilds derived data."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ... import stopping
from ...artifacts import audit_chain
from ...artifacts.feature_files import read_features
from ...artifacts.files import sha256_file
from ...artifacts.manifest import check_bundle_graph
from ...errors import Damaged, HistoseekError, StorageFailed
from ..clusters import stored as clusterings
from ..clusters.fitting import fitted
from ..opened import OpenAtlas
from ..search import layout
from ..store import annotation, quality
from ..store.packing import SEAL, seal, unpack_coded, unpack_numbers, unpack_places, unpack_texts
from ..store.schema import has_table
from ..store.store import RESTORE
from ..writer import Writer

SEALED = (
    "meta", "slides", "slide_tiles", "generations", "clusterings", "placements", "clusters",
    annotation.TABLE, quality.TABLE,
)  # fmt: skip


class Kind(Enum):
    """What a problem concerns; it determines the repair."""

    TRUTH = "truth"
    """Slides, their features, the encoder or the catalog itself: these cannot be rebuilt."""
    INDEX = "index"
    """The index file of a generation, or its row."""
    CLUSTERS = "clusters"
    """The file of a fitted clustering."""
    PLACEMENT = "placement"
    """The assignments of one slide's tiles in one clustering."""
    QUALITY = "quality"
    """The measures of one slide's tiles, which its feature file has, too."""
    MAP = "map"
    """The map that the page shows."""
    LINK = "link"
    """The bundle outside the atlas that a linked atlas refers to."""


@dataclass(frozen=True)
class Problem:
    """A problem of an atlas.

    Attributes:
        text: what is wrong, where, and the remedy.
        kind: what it concerns.
    """

    text: str
    kind: Kind = Kind.TRUTH


ROWS = {
    "generations": Kind.INDEX,
    "placements": Kind.PLACEMENT,
    quality.TABLE: Kind.QUALITY,
}
"""Tables whose rows can be rebuilt."""
REBUILT = "(it can be rebuilt)"


def problems(atlas: OpenAtlas) -> list[Problem]:
    """Return all problems of an atlas, in the order in which its parts are checked."""
    found = _database(atlas)
    try:
        if not atlas.manifest.external:
            check_bundle_graph(atlas.encoder_bundle, atlas.manifest, whole=True)
    except HistoseekError as error:
        linked = atlas.store.encoder_link is not None
        found.append(Problem(str(error), Kind.LINK if linked else Kind.TRUTH))
    for check in (_slides, _placements, _files, _index, _map, _audit):
        try:
            found += check(atlas)
        except (HistoseekError, OSError, sqlite3.Error, ValueError, KeyError, TypeError) as error:
            if not found:  # else the first problem is the cause
                found.append(Problem(f"atlas.db: {error}"))
    return found


def _database(atlas: OpenAtlas) -> list[Problem]:
    found: list[Problem] = []
    try:
        rows = atlas.catalog.rows("PRAGMA integrity_check")
        found += [Problem(f"atlas.db: {row[0]}") for row in rows if row[0] != "ok"]
        links = atlas.catalog.rows("PRAGMA foreign_key_check")
        found += [
            Problem(f"atlas.db: row {row[1]} of {row[0]} links to a row that does not exist")
            for row in links
        ]
        with atlas.catalog.read() as db:
            tables = [table for table in SEALED if has_table(db, table)]
        for table in tables:
            for row in atlas.catalog.rows(f"SELECT * FROM {table}"):
                if seal(dict(row)) != row[SEAL]:
                    name = " ".join(str(v) for v in row[:2] if not isinstance(v, bytes))[:60]
                    text = f"atlas.db: a row of {table} ({name}) is damaged"
                    found.append(Problem(text, ROWS.get(table, Kind.TRUTH)))
    except (HistoseekError, sqlite3.Error, UnicodeDecodeError) as error:
        found.append(Problem(f"atlas.db: {error}"))
    return found


def _map(atlas: OpenAtlas) -> list[Problem]:
    try:
        layout.read(atlas.path)
    except Damaged as error:
        return [Problem(str(error), Kind.MAP)]
    return []


def _audit(atlas: OpenAtlas) -> list[Problem]:
    """Check that the page's audit log, if there is one, has all its lines."""
    return [Problem(text) for text in audit_chain.problems(atlas.path / audit_chain.FILE)]


def _slides(atlas: OpenAtlas) -> list[Problem]:
    rows = atlas.catalog.rows(
        "SELECT s.*, t.first_tile, t.places, t.files, t.labels, t.patients, t.mosaic FROM slides AS s "
        "LEFT JOIN slide_tiles AS t ON t.slide_id = s.id ORDER BY t.first_tile, s.id"
    )
    found: list[Problem] = []
    end, with_quality = 0, _with_quality(atlas)
    for slide in map(dict, rows):
        stopping.check()
        if slide["places"] is None:
            found.append(Problem(f"slide {slide['name']!r} has no tiles listed in atlas.db"))
            continue
        if slide["first_tile"] < end:
            found.append(Problem(f"slide {slide['name']!r} has tile ids of another slide"))
        end = max(end, slide["first_tile"] + slide["tiles"])
        found += _slide(atlas, slide, slide["id"] in with_quality)
    if int(atlas.catalog.meta()["next_tile"]) < end:
        found.append(Problem(f"atlas.db: the next tile id is below {end}, which is in use"))
    return found


def _slide(atlas: OpenAtlas, slide: dict[str, Any], has_quality: bool) -> list[Problem]:
    path = atlas.path / slide["features_file"]
    title = f"{path} of slide {slide['name']!r}"
    try:
        if not path.is_file():
            return [Problem(f"{title} is missing; {RESTORE}")]
        if sha256_file(path) != slide["features_sha256"]:
            return [Problem(f"{title} has changed since it was added; {RESTORE}")]
        item = read_features(path)
        atlas.store.check(item, path)
    except OSError as error:
        return [Problem(f"{title} cannot be read ({error.strerror}); check the permissions")]
    except HistoseekError as error:
        return [Problem(str(error))]
    found = []
    if item.quality is not None and not has_quality:
        text = f"slide {slide['name']!r} lacks the measures of its tiles in atlas.db {REBUILT}"
        found.append(Problem(text, Kind.QUALITY))
    count, places = len(item.features), unpack_places(slide["places"])
    lengths = {
        "in the catalog": slide["tiles"],
        "feature vectors": count,
        "coordinates": len(places),
    }
    if slide["files"] is not None:
        lengths["file names"] = len(unpack_texts(slide["files"]))
    for key in ("labels", "patients"):
        if slide[key] is not None:
            lengths[key] = len(unpack_coded(slide[key])[1])
    if len(set(lengths.values())) != 1:
        counts = ", ".join(f"{number} {key}" for key, number in lengths.items())
        found.append(Problem(f"slide {slide['name']!r}: the numbers of its tiles differ: {counts}"))
    elif not np.array_equal(places, item.coords):
        text = (
            f"slide {slide['name']!r}: the tile coordinates in atlas.db differ from those in {path}"
        )
        found.append(Problem(text))
    if slide["mosaic"] is not None:
        rows = unpack_numbers(slide["mosaic"], "<i4")
        if len(rows) and (rows.min() < 0 or rows.max() >= count):
            found.append(
                Problem(f"slide {slide['name']!r}: its mosaic has tiles that do not exist")
            )
    return found


def _with_quality(atlas: OpenAtlas) -> set[int]:
    """Return the ids of the slides with intact measures of all their tiles."""
    with atlas.catalog.read() as db:
        if not has_table(db, quality.TABLE):
            return set()
        rows = db.execute(
            f"SELECT q.*, s.tiles FROM {quality.TABLE} AS q JOIN slides AS s ON s.id = q.slide_id"
        ).fetchall()
    intact = set()
    for row in map(dict, rows):
        tiles = row.pop("tiles")
        if seal(row) == row[SEAL] and len(row["quality"]) == tiles * quality.BYTES:
            intact.add(row["slide_id"])
    return intact


def _measures_again(atlas: OpenAtlas) -> list[str]:
    """Restore damaged or missing measures from the feature files."""
    intact, restored = _with_quality(atlas), 0
    for slide in map(dict, atlas.catalog.rows("SELECT * FROM slides")):
        if slide["id"] in intact:
            continue
        measures = read_features(atlas.path / slide["features_file"]).quality
        if measures is not None:
            with atlas.catalog.write() as db:
                quality.store(db, slide["id"], measures)
            restored += 1
    return [f"the measures of the tiles of {restored} slides were restored"] if restored else []


def _placements(atlas: OpenAtlas) -> list[Problem]:
    """Check that every clustering has an assignment for each tile of every slide."""
    found = []
    slides = atlas.catalog.rows("SELECT * FROM slides")
    for name in [row["name"] for row in clusterings.stored(atlas.catalog)]:
        with atlas.catalog.read() as db:
            placed = clusterings.placements(db, name)
        for slide in slides:
            if slide["id"] not in placed:
                text = f"slide {slide['name']!r} is not assigned to clusters of {name!r}"
                found.append(Problem(f"{text} {REBUILT}", Kind.PLACEMENT))
                continue
            assigned = placed[slide["id"]][0]
            lengths = {len(getattr(assigned, column)) for column in clusterings.KINDS}
            if lengths != {slide["tiles"]}:
                text = f"slide {slide['name']!r} has {slide['tiles']} tiles, but clustering {name!r} has "
                text += f"the clusters of {max(lengths)}"
                found.append(Problem(f"{text} {REBUILT}", Kind.PLACEMENT))
    return found


def _files(atlas: OpenAtlas) -> list[Problem]:
    """Check that every file named in the catalog exists and has the recorded hash."""
    found: list[Problem] = []
    for row in atlas.catalog.rows("SELECT * FROM generations"):
        found += _file(atlas.path / row["file"], row["sha256"], Kind.INDEX)
        if row["raw_file"] is not None:
            found += _file(atlas.path / row["raw_file"], row["raw_sha256"], Kind.INDEX)
    for row in atlas.catalog.rows("SELECT * FROM clusterings"):
        found += _file(atlas.path / row["file"], row["sha256"], Kind.CLUSTERS)
    return found


def _file(path: Path, digest: str, kind: Kind) -> list[Problem]:
    if not path.is_file():
        return [Problem(f"{path} is missing {REBUILT}", kind)]
    if sha256_file(path) != digest:
        return [Problem(f"{path} has changed {REBUILT}", kind)]
    return []


def _index(atlas: OpenAtlas) -> list[Problem]:
    """Check that the index holds every tile exactly once."""
    view = atlas.view()
    total = atlas.catalog.rows("SELECT COALESCE(SUM(tiles), 0) AS tiles FROM slides")[0]["tiles"]
    if len(view.index) != total:
        text = f"the index has {len(view.index)} vectors, but the atlas has {total} tiles"
        return [Problem(f"{text} {REBUILT}", Kind.INDEX)]
    return []


def repair(atlas: OpenAtlas, writer: Writer) -> list[str]:
    """Rebuild damaged derived data and remove leftovers; the source data is never changed.

    A clustering whose file is lost is fitted again on the same tiles. The file is written only if every
    tile gets the same assignment as before, so that names given by people stay correct.
    """
    writer.tidy()
    done: list[str] = []
    if any(problem.kind is Kind.INDEX for problem in problems(atlas)):
        _try(done, lambda: _write_index(atlas))
    for row in reversed(clusterings.stored(atlas.catalog)):
        if _file(atlas.path / row["file"], row["sha256"], Kind.CLUSTERS):
            _try(done, partial(_fit_again, atlas, row))
    _try(done, lambda: _assign_again(atlas))
    _try(done, lambda: _measures_again(atlas))
    if _map(atlas):
        (atlas.path / layout.FILE).unlink()
        done.append("the damaged map was deleted; it will be rebuilt when it is needed")
    writer.finish()
    return done


def _try(done: list[str], mend: Callable[[], list[str]]) -> None:
    """Do one repair; if it fails, the others still run."""
    try:
        done += mend()
    except StorageFailed:
        raise
    except HistoseekError as error:
        done.append(f"not repaired: {error}")


def _write_index(atlas: OpenAtlas) -> list[str]:
    atlas.generations.write(atlas.generations.options())
    return ["the index was rebuilt"]


def _assign_again(atlas: OpenAtlas) -> list[str]:
    """Replace damaged assignments."""
    slides = {slide["id"]: slide for slide in atlas.store.tile_ranges()}
    names = {row["id"]: row["name"] for row in clusterings.stored(atlas.catalog)}
    rows = map(dict, atlas.catalog.rows("SELECT * FROM placements"))
    broken = [
        row
        for row in rows
        if (slide := slides.get(row["slide_id"]))
        and (seal(row) != row[SEAL] or len(row["cluster"]) != 4 * slide["tiles"])
    ]
    if not broken:
        return []
    view = atlas.view()
    for row in broken:
        number, slide = row["clustering_id"], slides[row["slide_id"]]
        assigned = view.clustering(names[number])[1].assign(atlas.store.vectors_of(slide))
        with atlas.catalog.write() as db:
            at = (number, slide["id"])
            db.execute("DELETE FROM placements WHERE clustering_id = ? AND slide_id = ?", at)
            fitted_on = row["fitted"] == 1
            clusterings.insert_placement(db, number, slide["id"], assigned, fitted_on)
    return [f"the clusters of {len(broken)} slides were assigned again"]


def _fit_again(atlas: OpenAtlas, row: dict[str, Any]) -> list[str]:
    name = row["name"]
    with atlas.catalog.read() as db:
        old = clusterings.placements(db, name)
    slides = [s for s in atlas.store.tile_ranges() if s["id"] in old and old[s["id"]][1]]
    about = {"seed": 0, **json.loads(row["about"])}
    method = "encoder" if about.get("from") == "encoder" else row["method"]
    clustering, by_slide = fitted(atlas.view().state, method, slides, about)
    if not all(np.array_equal(new.cluster, old[slide][0].cluster) for slide, new in by_slide):
        return [
            f"clustering {name!r} cannot be rebuilt, because tiles that it was fitted to were removed; "
            "the tiles keep their clusters; fit it again to assign new images"
        ]
    clusterings.replace_file(atlas.path, atlas.catalog, row, clustering)
    return [f"clustering {name!r} was rebuilt; every tile has the same cluster as before"]
