"""Changes an atlas: adds, replaces, removes and relabels slides.

Each slide is one transaction; its feature file is written before the row that names it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .. import stopping
from ..artifacts.feature_files import IMPORTED, STAIN, Features, parse_features, read_about
from ..artifacts.files import remove_leftovers, sha256_file, write_atomic
from ..console import Progress
from ..errors import BadInput, Damaged, HistoseekError, Mismatch, StorageFailed, unknown_name
from .clusters import stored as clusterings
from .clusters.clustering import Clustering
from .relabelling import relabel, slide_changes
from .store import annotation, quality, uploads
from .store.catalog import NEXT_TILE, get_meta, insert, set_meta, update
from .store.metadata import AddedSlides, Metadata, Row, Rows, match_rows
from .store.rows import (
    Added,
    Relabelled,
    checked_row,
    not_taken,
    plain_name,
)
from .store.scales import MIXED, check_scale
from .store.store import FEATURES, Store
from .vectors.generations import Generations
from .writer_rows import slide_row, stain_of, tiles_row

RENAMES = "embed both in one run, which gives them different names"
SCALE = ("size_px_level0", "mpp")
"""Columns that a later import of the same features may add."""


class Writer:
    """Writes to an atlas; the caller must hold the atlas's lock."""

    def __init__(self, store: Store, generations: Generations) -> None:
        """Write to an atlas."""
        self._store, self._generations = store, generations
        self._path, self._catalog, self._manifest = store.path, store.catalog, store.manifest
        self._cached: dict[str, Clustering] = {}
        self._written: dict[str, str] = {}

    def add(
        self, files: Sequence[Path], metadata: Metadata, replace: bool, progress: Progress
    ) -> AddedSlides:
        """Add feature files; see :meth:`Atlas.add <histoseek.index.atlas.Atlas.add>`."""
        results: list[Added] = []
        rows = match_rows(metadata, files, self._catalog.rows("SELECT name, source FROM slides"))
        self._written = {}
        self.tidy()
        for number, file in enumerate(files, start=1):
            try:
                results.append(self._add_one(file, rows, replace))
            except StorageFailed:
                raise
            except HistoseekError as error:
                results.append(Added(str(file), file.stem, "failed", reason=str(error)))
            except Exception as error:  # one invalid file must not stop the others
                reason = f"{file}: unexpected error {type(error).__name__}: {error}"
                results.append(Added(str(file), file.stem, "failed", reason=reason))
            progress(number, len(files), file.stem)
        self.finish()
        added = AddedSlides(results, rows)
        added.notes += not_taken(metadata.values())
        return added

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
            self._assign_new()
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
        self._store.check(item, Path(origin))
        digest = hashlib.sha256(blob).hexdigest()
        target = f"{FEATURES}/{plain_name(item.name)}-{digest[:12]}.h5"
        row = slide_row(item, target, digest, given)
        rows = self._catalog.rows("SELECT * FROM slides WHERE name = ?", (item.name,))
        old = dict(rows[0]) if rows else None
        adds_scale = False
        if old is not None and old["content_sha256"] == row["content_sha256"]:
            changed = [key for key in SCALE if row[key] and row[key] != old[key]]
            if not changed:
                self._written[item.name] = origin
                self._mend(old, row, blob, item)
                source = self._source_now(old, row)
                told = {} if STAIN in json.loads(old["metadata"]) else stain_of(item)
                return self._relabel_known(origin, old, told | given, source)
            adds_scale = not any(old[key] for key in changed)
        with self._catalog.read() as db:
            notice = check_scale(
                db, item.name, item.target_mpp if len(item.features) else None, origin
            )
        if not adds_scale and (first := self._written.get(item.name)) is not None:
            raise Mismatch(
                f"{first}, added just before, has other features of slide {item.name!r}, and an atlas "
                "holds one set of features per slide: give only the folder or the files of one set; if "
                "these are two slides, "
                + ("rename one file" if IMPORTED in item.about else RENAMES)
            )
        if old is not None and not replace and not adds_scale:
            raise Mismatch(
                f"the atlas has other features of slide {item.name!r}{_from(old['source'])}; to replace "
                "them, add these with --replace; if this is another slide of the same name, "
                + ("rename its file" if IMPORTED in item.about else RENAMES)
            )
        reasons = [str(row["reason"]), notice]
        another = old is not None and self._is_another(old, item)
        if old is not None and another:
            reasons.append(
                f"is another slide than the one at {old['source']}: that slide's label, patient, other "
                "columns and annotations were not copied"
            )
        elif old is not None:
            _keep_metadata(row, old, given, stain_of(item))
            row["source"] = self._source_now(old, row)
        write_atomic(self._path / target, blob)
        self._replace_rows(row, old, item, keep_annotations=not another)
        if old is not None and old["source"] != row["source"]:
            self._delete_uploads([old["source"]])
        self._written[item.name] = origin
        state = "added" if old is None else "replaced"
        return Added(origin, item.name, state, len(item.features), "; ".join(filter(None, reasons)))

    def _replace_rows(
        self,
        row: dict[str, Any],
        old: dict[str, Any] | None,
        item: Features,
        keep_annotations: bool,
    ) -> None:
        """Write the rows of a slide, its tiles and their clusters in one step, replacing an old slide."""
        tiles = tiles_row(item, self._manifest.metric)
        assigned = {n: c.assign(item.features) for n, c in self._clusterings().items()}
        with self._catalog.write() as db:
            kept: list[dict[str, Any]] = []
            if old is not None:
                kept = annotation.rows_of(db, old["id"]) if keep_annotations else []
                db.execute("DELETE FROM slides WHERE id = ?", (old["id"],))
            first = int(get_meta(db, NEXT_TILE))
            slide = insert(db, "slides", row)
            insert(db, "slide_tiles", {**tiles, "slide_id": slide, "first_tile": first})
            annotation.put_back(db, kept, slide)
            if item.quality is not None:
                quality.store(db, slide, item.quality)
            set_meta(db, NEXT_TILE, str(first + len(item.features)))
            for clustering, of_tiles in assigned.items():
                clusterings.insert_placement(db, clustering, slide, of_tiles, fitted=False)

    def _source_now(self, old: dict[str, Any], new: dict[str, Any]) -> str:
        """Return a slide's path: that of the new features, unless the slide exists only at the old one.

        The file of an uploaded slide stays the slide's, unless the new one was uploaded too.
        """
        before, after = old["source"], str(new["source"])
        here = uploads.place(self._path, before)
        if here is not None and uploads.place(self._path, after) is None:
            return str(here.absolute())
        return (
            before if not after or (Path(before).exists() and not Path(after).exists()) else after
        )

    def _is_another(self, old: dict[str, Any], item: Features) -> bool:
        """Whether features belong to another slide file than those in the atlas: other content and path."""
        before = read_about(self._path / old["features_file"]) or {}
        marks = [about.get("key", {}).get("content") for about in (before, item.about)]
        return None not in marks and marks[0] != marks[1] and old["source"] != item.source

    def _mend(self, old: dict[str, Any], row: dict[str, Any], blob: bytes, item: Features) -> None:
        """Rewrite the feature file of a known slide if it is damaged, or if the new one has more facts."""
        path = self._path / old["features_file"]
        intact = path.is_file() and sha256_file(path) == old["features_sha256"]
        has_more = "bounds" in item.about and "bounds" not in (read_about(path) or {})
        if item.quality is not None and not has_more:
            known = f"SELECT 1 FROM {quality.TABLE} WHERE slide_id = ?"
            has_more = not self._catalog.rows(known, (old["id"],))
        if intact and not has_more:
            return
        write_atomic(self._path / row["features_file"], blob)
        keys = ("features_file", "features_sha256")
        with self._catalog.write() as db:
            update(db, "slides", {"id": old["id"]}, {key: row[key] for key in keys})
            if item.quality is not None:
                quality.store(db, old["id"], item.quality)

    def _relabel_known(self, origin: str, old: dict[str, Any], given: Row, source: str) -> Added:
        """Update a slide that is already in the atlas from new metadata and features."""
        changes = slide_changes(old, {k: v for k, v in given.items() if v})
        state = "relabelled" if changes else "moved"
        if source != old["source"]:
            changes["source"] = source
        if not changes:
            return Added(origin, old["name"], "unchanged", old["tiles"])
        with self._catalog.write() as db:
            update(db, "slides", {"id": old["id"]}, changes)
        before = {**old, **json.loads(old["metadata"])}
        metadata = json.loads(changes.pop("metadata", "{}"))
        after = {**changes, **metadata}
        text = ", ".join(f"{k} {v!r}" for k, v in after.items() if before.get(k) != v)
        return Added(origin, old["name"], state, old["tiles"], text)

    def remove(self, names: Sequence[str]) -> int:
        """Remove slides; see :meth:`Atlas.remove <histoseek.index.atlas.Atlas.remove>`."""
        self.tidy()
        slides = {row["name"]: row for row in self._catalog.rows("SELECT * FROM slides")}
        for name in names:
            if name not in slides:
                close = [other for other in slides if name.lower() in other.lower()]
                raise unknown_name("slide", name, close or slides)
        removed = [slides[name] for name in set(names)]
        with self._catalog.write() as db:
            for slide in removed:
                db.execute("DELETE FROM slides WHERE id = ?", (slide["id"],))
        self.finish()
        self._delete_uploads(slide["source"] for slide in removed)
        return sum(slide["tiles"] for slide in removed)

    def _delete_uploads(self, sources: Iterable[str]) -> None:
        """Delete the uploaded files of slides that are gone.

        Raises:
            StorageFailed: one cannot be deleted.
        """
        kept = (row["source"] for row in self._catalog.rows("SELECT source FROM slides"))
        if left := uploads.delete(self._path, sources, kept):
            raise StorageFailed(
                f"the slide is no longer in the atlas, but its uploaded file in {left[0]} cannot be "
                "deleted; delete that folder as its owner"
            )

    def relabel(self, rows: Iterable[dict[str, str]]) -> Relabelled:
        """Set metadata; see :meth:`Atlas.relabel <histoseek.index.atlas.Atlas.relabel>`."""
        given = [checked_row(row) for row in rows]
        for row in given:
            if not row.get("slide"):
                raise BadInput(
                    f"a row of the metadata names no slide: {row}; expected a value in the column 'slide'"
                )
        with self._catalog.write() as db:
            return relabel(db, given)

    def _clusterings(self) -> dict[int, Clustering]:
        """Return the clusterings by id; those with a lost file are left out."""
        rows = clusterings.stored(self._catalog)
        loaded = {}
        for row in rows:
            with suppress(Damaged):
                loaded[row["id"]] = clusterings.load(self._path, rows, row["name"], self._cached)[1]
        return loaded

    def _assign_new(self) -> None:
        """Assign slides to clusterings that lack them, for example because their file was lost."""
        for number, clustering in self._clusterings().items():
            missing = self._catalog.rows(
                "SELECT s.* FROM slides AS s WHERE NOT EXISTS (SELECT 1 FROM placements AS p "
                "WHERE p.clustering_id = ? AND p.slide_id = s.id) ORDER BY s.id",
                (number,),
            )
            for slide in missing:
                stopping.check()
                assigned = clustering.assign(self._store.vectors_of(dict(slide)))
                with self._catalog.write() as db:
                    clusterings.insert_placement(db, number, slide["id"], assigned, fitted=False)

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


def _from(source: str) -> str:
    return f" (from {source})" if source else ""


def _keep_metadata(
    row: dict[str, Any], old: dict[str, Any], given: Row, told: dict[str, str]
) -> None:
    """Keep the metadata of the replaced slide in ``row`` unless new values are given.

    What was ``told`` from the slide's colours is no new value.
    """
    before, new = json.loads(old["metadata"]), json.loads(row["metadata"])
    stated = {k: v for k, v in new.items() if told.get(k) != v}
    row["metadata"] = json.dumps(told | before | stated, sort_keys=True)
    for key in ("label", "patient"):
        row[key] = given.get(key) or old[key] or row[key]
