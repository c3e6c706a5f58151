"""Changes an atlas: adds, replaces, removes and relabels slides.

Each slide is one transaction; its feature file is written before the row that names it.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .. import stopping
from ..artifacts.feature_files import Features, check_features, parse_features, read_about
from ..artifacts.files import remove_leftovers, sha256_file, write_atomic
from ..artifacts.tables import clean_row
from ..console import Progress
from ..errors import BadInput, Damaged, HistoseekError, Mismatch, StorageFailed, unknown_name
from .clusters import stored as clusterings
from .clusters.clustering import Clustering
from .store.catalog import NEXT_TILE, get_meta, insert, set_meta, update
from .store.metadata import AddedSlides, Metadata, Row, Rows, match_rows, slides_meant
from .store.packing import pack_coded, unpack_coded, unpack_texts
from .store.rows import Added, further, plain_name
from .store.scales import MIXED, check_scale
from .store.store import FEATURES, Store
from .vectors.generations import Generations
from .writer_rows import slide_row, tiles_row

SCALE = ("size_px_level0", "mpp")
"""Columns that a later import of the same features may add."""


class Writer:
    """Writes to an atlas; the caller must hold the atlas's lock."""

    def __init__(self, store: Store, generations: Generations) -> None:
        """Write to an atlas."""
        self._store, self._generations = store, generations
        self._path, self._catalog, self._manifest = store.path, store.catalog, store.manifest
        self._known: dict[int, str] = {}
        self._loaded: dict[int, Clustering] = {}

    def add(
        self, files: Sequence[Path], metadata: Metadata, replace: bool, progress: Progress
    ) -> AddedSlides:
        """Add feature files; see :meth:`Atlas.add <histoseek.index.atlas.Atlas.add>`."""
        results: list[Added] = []
        rows = self.match_rows(metadata, files)
        self.tidy()
        for number, file in enumerate(files, start=1):
            try:
                results.append(self._add_one(file, rows, replace))
            except StorageFailed:
                raise
            except HistoseekError as error:
                results.append(Added(str(file), file.stem, "failed", reason=str(error)))
            except Exception as error:  # one invalid file must not stop the others
                reason = f"{file}: unexpected {type(error).__name__}: {error}"
                results.append(Added(str(file), file.stem, "failed", reason=reason))
            progress(number, len(files), file.stem)
        self.finish()
        return AddedSlides(results, rows)

    def match_rows(self, metadata: Metadata, files: Sequence[Path]) -> Rows:
        """Find the row of each slide; see :func:`~histoseek.index.store.metadata.match_rows`."""
        return match_rows(metadata, files, self._catalog.rows("SELECT name, source FROM slides"))

    def allow_mixed_scales(self) -> None:
        """From now on, allow tiles of different scales in the atlas."""
        if MIXED not in self._catalog.meta():
            with self._catalog.write() as db:
                set_meta(db, MIXED, "yes")

    def tidy(self) -> None:
        """Remove temporary files of writers that have died."""
        remove_leftovers([self._path, self._path / FEATURES])

    def finish(self) -> None:
        """Update all derived data for the current slides."""
        self._remove_orphans()
        with suppress(Damaged):  # `verify` reports slides that cannot be read
            self.assign_new()
            self._generations.settle()

    def _add_one(self, file: Path, rows: Rows, replace: bool) -> Added:
        if not file.is_file():
            raise BadInput(f"{file} does not exist; check the path")
        blob = file.read_bytes()  # once: `embed` may replace the file meanwhile
        item = parse_features(blob, file)
        return self.add_features(item, blob, str(file), rows.of(file), replace)

    def add_features(
        self, item: Features, blob: bytes, origin: str, given: Row, replace: bool
    ) -> Added:
        """Add one slide.

        Args:
            item: its features.
            blob: the bytes of its feature file.
            origin: name of the input for the report.
            given: metadata of the slide, such as label and patient.
            replace: whether to replace different features of the same name.

        Raises:
            Mismatch: the features have another encoder or scale, or other features have this name.
            BadInput: features are not finite.
            StorageFailed: no space.
        """
        manifest = self._manifest
        check_features(item, manifest.name, manifest.sha256, manifest.dim, Path(origin))
        digest = hashlib.sha256(blob).hexdigest()
        target = f"{FEATURES}/{plain_name(item.name)}-{digest[:12]}.h5"
        row = slide_row(item, target, digest, given)
        found = self._catalog.rows("SELECT * FROM slides WHERE name = ?", (item.name,))
        same = bool(found) and found[0]["content_sha256"] == row["content_sha256"]
        changed = [key for key in SCALE if same and row[key] and row[key] != found[0][key]]
        if same and not changed:
            self._mend(dict(found[0]), row, blob, item.about)
            source = _source_now(found[0]["source"], row["source"])
            return self._relabel_known(origin, dict(found[0]), given, source)
        learnt = bool(changed) and not any(found[0][key] for key in changed)
        with self._catalog.read() as db:
            check_scale(db, item.name, item.target_mpp if len(item.features) else None, origin)
        if found and not replace and not learnt:
            raise Mismatch(
                f"the atlas holds slide {item.name!r} (from {found[0]['source']}) with other features; "
                "to put these in its place add them with --replace; if it is another slide of the same "
                "name, embed both in one run, which gives them different names"
            )
        reason = str(row["reason"])
        if found and self._is_another(dict(found[0]), item):
            reason = "; ".join(
                filter(
                    None,
                    [
                        reason,
                        f"another slide than the one at {found[0]['source']}: its label, patient and other "
                        "columns were not taken over",
                    ],
                )
            )
        elif found:  # keep the slide's metadata unless new values are given
            before = json.loads(found[0]["metadata"])
            row["metadata"] = json.dumps(before | json.loads(row["metadata"]), sort_keys=True)
            row["label"] = given.get("label") or found[0]["label"] or row["label"]
            row["patient"] = given.get("patient") or found[0]["patient"] or row["patient"]
        write_atomic(self._path / target, blob)
        tiles = tiles_row(item, manifest.metric)
        placed = [
            (number, clustering.assign(item.features))
            for number, clustering in self._clusterings().items()
        ]
        with self._catalog.write() as db:
            if found:
                db.execute("DELETE FROM slides WHERE id = ?", (found[0]["id"],))
            first = int(get_meta(db, NEXT_TILE))
            number = insert(db, "slides", row)
            insert(db, "slide_tiles", {**tiles, "slide_id": number, "first_tile": first})
            set_meta(db, NEXT_TILE, str(first + len(item.features)))
            for clustering, where in placed:
                clusterings.insert_placement(db, clustering, number, where, fitted=False)
        state = "replaced" if found else "added"
        return Added(origin, item.name, state, len(item.features), reason)

    def _is_another(self, found: dict[str, Any], item: Features) -> bool:
        """Whether features belong to another slide file than those in the atlas: other content and path."""
        before = read_about(self._path / found["features_file"]) or {}
        marks = [about.get("key", {}).get("content") for about in (before, item.about)]
        return None not in marks and marks[0] != marks[1] and found["source"] != item.source

    def _mend(
        self, found: dict[str, Any], row: dict[str, Any], blob: bytes, about: dict[str, Any]
    ) -> None:
        """Rewrite the feature file of a known slide if it is damaged, or if the new one holds more."""
        path = self._path / found["features_file"]
        whole = path.is_file() and sha256_file(path) == found["features_sha256"]
        knows_more = "bounds" in about and "bounds" not in (read_about(path) or {})
        if whole and not knows_more:
            return
        write_atomic(self._path / row["features_file"], blob)
        keys = ("features_file", "features_sha256")
        with self._catalog.write() as db:
            update(db, "slides", {"id": found["id"]}, {key: row[key] for key in keys})

    def _relabel_known(self, origin: str, found: dict[str, Any], given: Row, source: str) -> Added:
        """Update a slide that is already in the atlas from new metadata and features."""
        changes = _slide_changes(found, {k: v for k, v in given.items() if v})
        state = "relabelled" if changes else "moved"
        if source != found["source"]:
            changes["source"] = source
        if not changes:
            return Added(origin, found["name"], "unchanged", found["tiles"])
        with self._catalog.write() as db:
            update(db, "slides", {"id": found["id"]}, changes)
        known = {**found, **json.loads(found["metadata"])}
        said = {**changes, **json.loads(changes.get("metadata") or "{}")}
        said.pop("metadata", None)
        text = ", ".join(f"{k} {v!r}" for k, v in said.items() if known.get(k) != v)
        return Added(origin, found["name"], state, found["tiles"], text)

    def remove(self, names: Sequence[str]) -> int:
        """Remove slides by name, all or none; return the number of tiles removed.

        Raises:
            BadInput: a slide is not in the atlas.
        """
        self.tidy()
        slides = {row["name"]: row for row in self._catalog.rows("SELECT * FROM slides")}
        for name in names:
            if name not in slides:
                close = [known for known in slides if name.lower() in known.lower()][:10]
                raise unknown_name("slide", name, close or sorted(slides)[:10])
        wanted = set(names)
        with self._catalog.write() as db:
            for name in wanted:
                db.execute("DELETE FROM slides WHERE id = ?", (slides[name]["id"],))
        self.finish()
        return sum(slides[name]["tiles"] for name in wanted)

    def relabel(self, rows: Iterable[dict[str, str]]) -> int:
        """Set label, patient and other columns; all rows in one step.

        Args:
            rows: ``slide`` and the columns to set. A row with ``file`` sets those of one tile of a tile
                set. An empty value removes the old one; missing columns are not changed.

        Returns:
            The number of slides changed.

        Raises:
            BadInput: a slide or file is not in the atlas; nothing is changed.
        """
        of_slide: dict[str, Row] = {}
        of_tiles: dict[str, dict[str, Row]] = {}
        given = [clean_row(row) for row in rows]
        for row in given:
            if not row.get("slide"):
                raise BadInput(
                    f"a row of metadata names no slide: {row}; expected a column 'slide'"
                )
        changed = set()
        with self._catalog.write() as db:
            known = {row["name"]: dict(row) for row in db.execute("SELECT * FROM slides")}
            meant = slides_meant({row["slide"] for row in given}, list(known.values()))
            for row in given:
                name = meant[row["slide"]]
                if row.get("file"):
                    of_tiles.setdefault(name, {})[row["file"]] = row
                else:
                    of_slide.setdefault(name, {}).update(row)
            for name, row in of_slide.items():
                values = _slide_changes(known[name], row)
                if values:
                    update(db, "slides", {"id": known[name]["id"]}, values)
                    changed.add(name)
            for name, tiles in of_tiles.items():
                if _relabel_tiles(db, known[name], tiles):
                    changed.add(name)
        return len(changed)

    def _clusterings(self) -> dict[int, Clustering]:
        """Return the clusterings by id, cached; those with a lost file are left out."""
        fits = clusterings.stored(self._catalog)
        known = {row["id"]: row["sha256"] for row in fits}
        kept = {n: c for n, c in self._loaded.items() if known.get(n) == self._known.get(n)}
        for row in fits:
            if row["id"] not in kept:
                with suppress(Damaged):
                    kept[row["id"]] = clusterings.load(self._path, fits, row["name"])[1]
        self._known, self._loaded = known, kept
        return kept

    def assign_new(self) -> None:
        """Assign slides to clusterings that lack them, for example because their file was lost."""
        for number, clustering in self._clusterings().items():
            missing = self._catalog.rows(
                "SELECT s.* FROM slides AS s WHERE NOT EXISTS (SELECT 1 FROM placements AS p "
                "WHERE p.clustering_id = ? AND p.slide_id = s.id) ORDER BY s.id",
                (number,),
            )
            for slide in missing:
                stopping.check()
                placed = clustering.assign(self._store.vectors_of(dict(slide)))
                with self._catalog.write() as db:
                    clusterings.insert_placement(db, number, slide["id"], placed, fitted=False)

    def _remove_orphans(self) -> None:
        """Delete unused feature files: those of removed slides, and leftovers of a crash."""
        named = {
            row["features_file"] for row in self._catalog.rows("SELECT features_file FROM slides")
        }
        for path in (self._path / FEATURES).glob("*.h5"):
            if f"{FEATURES}/{path.name}" not in named:
                path.unlink(missing_ok=True)  # a reader of it retries
        clusterings.remove_orphans(self._path, self._catalog)
        self._generations.remove_orphans()


def _source_now(known: str, given: str) -> str:
    """Return the slide's path: that of the new features, unless the slide exists only at the old one."""
    if not given or (Path(known).exists() and not Path(given).exists()):
        return known
    return given


def _slide_changes(known: dict[str, Any], row: dict[str, str]) -> dict[str, Any]:
    changes: dict[str, Any] = {
        key: row[key] or None
        for key in ("label", "patient")
        if key in row and (row[key] or None) != known[key]
    }
    before: dict[str, str] = json.loads(known["metadata"])
    emptied = {key for key, value in row.items() if value == ""}
    after = {k: v for k, v in (before | further(row)).items() if k not in emptied}
    if after != before:
        changes["metadata"] = json.dumps(after, sort_keys=True)
    return changes


def _relabel_tiles(
    db: sqlite3.Connection, slide: dict[str, Any], tiles: dict[str, dict[str, str]]
) -> bool:
    row = db.execute("SELECT * FROM slide_tiles WHERE slide_id = ?", (slide["id"],)).fetchone()
    files = [] if row["files"] is None else unpack_texts(row["files"])
    place = {file: n for n, file in enumerate(files)}
    changes: dict[str, Any] = {}
    for file in tiles:
        if file not in place:
            raise BadInput(
                f"{slide['name']!r} holds no tile {file!r}; expected the name of a tile of a tile set"
            )
    for column, key in (("labels", "label"), ("patients", "patient")):
        given = {place[file]: new[key] for file, new in tiles.items() if key in new}
        if not given:
            continue
        values: list[str | None] = [None] * slide["tiles"]
        if row[column] is not None:
            names, codes = unpack_coded(row[column])
            values = [None if code < 0 else names[code] for code in codes.tolist()]
        after = [given.get(n, value) or None for n, value in enumerate(values)]
        if after != values:
            changes[column] = pack_coded(after)
    if changes:
        update(db, "slide_tiles", {"slide_id": slide["id"]}, changes)
    return bool(changes)
