"""Checking an atlas: every hash, count and link, without changing anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import HistoseekError
from ..feature_files import check_features, read_features
from ..files import sha256_file
from ..manifest import check_bundle_graph

if TYPE_CHECKING:
    from .atlas import Atlas


def problems(atlas: Atlas) -> list[str]:
    """Return one line for everything that is wrong with an atlas, in the order it was looked at."""
    found = _database(atlas)
    try:
        check_bundle_graph(atlas.encoder_bundle, atlas.manifest)
    except HistoseekError as error:
        found.append(str(error))
    return found + _slides(atlas) + _derived(atlas)


def _database(atlas: Atlas) -> list[str]:
    found: list[str] = []
    try:
        rows = atlas.catalog.rows("PRAGMA integrity_check")
        found += [f"atlas.db: {row[0]}" for row in rows if row[0] != "ok"]
        links = atlas.catalog.rows("PRAGMA foreign_key_check")
        found += [f"atlas.db: row {row[1]} of {row[0]} links to nothing" for row in links]
    except HistoseekError as error:
        found.append(str(error))
    return found


def _slides(atlas: Atlas) -> list[str]:
    found: list[str] = []
    counts = {
        row["slide_id"]: row["tiles"]
        for row in atlas.catalog.rows("SELECT slide_id, COUNT(*) AS tiles FROM tiles GROUP BY 1")
    }
    manifest = atlas.manifest
    for slide in atlas.slides():
        path = atlas.path / slide["features_file"]
        if not path.is_file():
            found.append(f"{path} of slide {slide['name']!r} is missing")
            continue
        if sha256_file(path) != slide["features_sha256"]:
            found.append(f"{path} of slide {slide['name']!r} is changed since it was added")
            continue
        try:
            item = read_features(path)
            check_features(item, manifest.name, manifest.sha256, manifest.dim, path)
        except HistoseekError as error:
            found.append(str(error))
            continue
        rows = (slide["tiles"], counts.get(slide["id"], 0), len(item.features))
        if len(set(rows)) != 1:
            found.append(f"slide {slide['name']!r} has {rows} tiles (said, listed, in features)")
    return found


def _derived(atlas: Atlas) -> list[str]:
    found: list[str] = []
    total = atlas.catalog.rows("SELECT COUNT(*) AS tiles FROM tiles")[0]["tiles"]
    for table in ("generations", "clusterings"):
        for row in atlas.catalog.rows(f"SELECT * FROM {table}"):
            path = atlas.path / row["file"]
            if not path.is_file():
                found.append(f"{path} is missing (derived: it can be made again)")
            elif sha256_file(path) != row["sha256"]:
                found.append(f"{path} is changed (derived: it can be made again)")
            if table == "generations" and row["vectors"] != total:
                found.append(f"{path} has {row['vectors']} vectors, the atlas {total} tiles")
    return found
