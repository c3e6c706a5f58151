"""Generations: the FAISS index file of an atlas, derived from its feature files, and what came after it.

A generation covers the slides that were there when it was written. Slides added since are the tail: their
vectors are read from the feature files and searched exactly. Slides removed since are skipped. So adding
never rebuilds what is there; once the tail and the removed make up a quarter, a new generation is written.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ... import stopping
from ...artifacts.feature_files import parse_features
from ...artifacts.files import discard, publish_file, sha256_file, storage_failed, temporary
from ...artifacts.manifest import Manifest
from ...errors import BadInput, Damaged
from ..clusters.mosaic import mosaic
from ..search.columns import Columns
from ..store.catalog import REVISION, Catalog, get_meta, insert, now, set_meta
from ..store.packing import SEAL, pack_numbers, seal, unpack_numbers, unpack_places
from . import tuning
from .files import Plan, gpu_copy, new_main, read_main, write_main
from .index import VectorIndex
from .scan import import_faiss, prepared

T = TypeVar("T")
OPTIONS = "index_options"
FOLD_SHARE = 0.25
"""Share of the index file that may have been added or removed before a new one is written."""
FOLD_ROWS = 200_000
"""Vectors that may have been added or removed before a new one is written, however large it is."""
HASHED_BYTES = 2**30
"""Index files up to this size are hashed whenever they are opened; `verify` hashes all."""
GONE = -(2**62)
"""First tile of a slide that was removed: no tile has such a number."""


@dataclass(frozen=True)
class View:
    """One committed state of an atlas, for reading: it does not change when the atlas does.

    Attributes:
        revision: which state.
        columns: what is known of the tiles.
        index: their vectors.
        generation: of the index file, 0 for none.
        about: of the index file: plan, target, what was measured.
        clusterings: the catalog's rows of the fitted clusterings, newest first.
        cluster_names: names that people gave to clusters, by clustering and number.
    """

    revision: int
    columns: Columns
    index: VectorIndex
    generation: int
    about: dict[str, Any]
    clusterings: list[dict[str, Any]]
    cluster_names: dict[str, dict[int, str]]


@dataclass(frozen=True)
class _State:
    """What one transaction read of the catalog."""

    revision: int
    slides: list[dict[str, Any]]
    generation: dict[str, Any] | None
    placements: dict[str, dict[int, bytes]]
    clusterings: list[dict[str, Any]]
    cluster_names: dict[str, dict[int, str]]


@dataclass(frozen=True)
class _Main:
    """An index file that is open.

    Attributes:
        number: of the generation.
        main: FAISS's index.
        raw: (M, D) exact vectors, where it holds codes.
        plan: of it.
        about: what was asked of it and measured.
        slides: ids and tiles of the slides it covers, in order.
        gpu: copy on GPUs.
    """

    number: int
    main: Any
    raw: Any
    plan: Plan
    about: dict[str, Any]
    slides: list[tuple[int, int]]
    gpu: Any


class Generations:
    """Builds, stores and opens the index of an atlas."""

    def __init__(self, path: Path, catalog: Catalog, manifest: Manifest) -> None:
        """Serve the atlas in ``path``; nothing is loaded yet."""
        self._path, self._catalog, self._manifest = path, catalog, manifest
        self._lock = threading.Lock()
        self._view: View | None = None
        self._main: _Main | None = None
        self._tail: dict[int, NDArray[np.float32]] = {}
        self._mosaics: dict[int, tuple[NDArray[np.int64], NDArray[np.float32]]] = {}

    # -- the truth ------------------------------------------------------------------------------

    def vectors_of(self, slide: Mapping[str, Any]) -> NDArray[np.float32]:
        """Return the vectors (N, D) of a slide, from its feature file.

        Raises:
            Damaged: the file is missing, cannot be read, or is not the one that was added.
        """
        path = self._path / slide["features_file"]
        state = "is changed"
        try:
            blob = path.read_bytes()
        except FileNotFoundError:
            blob, state = b"", "is missing"
        except OSError as error:
            blob, state = b"", f"cannot be read ({error.strerror})"
        if hashlib.sha256(blob).hexdigest() != slide["features_sha256"]:
            raise Damaged(
                f"{path} of slide {slide['name']!r} {state}; restore it, or embed the slide again and add "
                "it with --replace"
            )
        return parse_features(blob, path).features

    def slides(self) -> list[dict[str, Any]]:
        """Return all slides with the number of their first tile, in the order of their ids."""
        rows = self._catalog.rows(
            "SELECT s.*, t.first_tile FROM slides AS s JOIN slide_tiles AS t ON t.slide_id = s.id "
            "ORDER BY s.id"
        )
        return [dict(row) for row in rows]

    def vectors(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return tile ids (N,) ascending and vectors (N, D), from the feature files.

        Raises:
            Damaged: a feature file is missing or is not the one that was added.
        """
        return self.steady(self._vectors)

    def bytes_on_disk(self) -> dict[str, int]:
        """Return the sizes of the index files of the newest generation."""
        rows = self._catalog.rows("SELECT file, raw_file FROM generations")
        names = [row[key] for row in rows for key in ("file", "raw_file") if row[key]]
        there = {name: self._path / name for name in names}
        return {name: path.stat().st_size for name, path in there.items() if path.is_file()}

    def steady(self, read: Callable[[], T]) -> T:
        """Read feature files; once more if a writer replaced some of them meanwhile.

        Raises:
            Damaged: as ``read`` does, of an atlas that nobody changed.
        """
        for _ in range(100):
            revision = self._catalog.revision()
            try:
                return read()
            except Damaged:
                if self._catalog.revision() == revision:
                    raise
        return read()

    def unmoved(self, read: Callable[[], T]) -> T:
        """Read the catalog in several steps; once more if a writer committed in between.

        Of an atlas that changes all the time the last reading is taken.
        """
        for _ in range(10):
            revision = self._catalog.revision()
            found = read()
            if self._catalog.revision() == revision:
                break
        return found

    def _vectors(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        ids = [np.zeros(0, dtype=np.int64)]
        parts = [np.zeros((0, self._manifest.dim), dtype=np.float32)]
        for slide in self.slides():
            parts.append(self.vectors_of(slide))
            ids.append(np.arange(slide["first_tile"], slide["first_tile"] + slide["tiles"]))
        return np.concatenate(ids).astype(np.int64), np.concatenate(parts)

    def mosaic_of(self, slide: Mapping[str, Any]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the rows (M,) of a slide's mosaic and their prepared vectors (M, D); kept by slide."""
        known = self._mosaics.get(slide["id"])
        if known is None:
            vectors = prepared(self.vectors_of(slide), self._manifest.metric)
            if slide["mosaic"] is None:  # of an atlas that an earlier version wrote
                rows = mosaic(vectors, unpack_places(slide["places"]))
            else:
                rows = unpack_numbers(slide["mosaic"], "<i4").astype(np.int64)
            known = self._mosaics[slide["id"]] = rows, vectors[rows]
        return known

    # -- reading --------------------------------------------------------------------------------

    def view(self) -> View:
        """Return the newest committed state; the one of before as long as nothing changed.

        Raises:
            Damaged: a feature file of a slide that is not in the index file is missing or changed.
        """
        view, revision = self._view, self._catalog.revision()
        if view is not None and view.revision == revision:
            return view
        with self._lock:
            if self._view is not None and self._view.revision == self._catalog.revision():
                return self._view  # another thread has opened it meanwhile
            for attempt in range(100):
                before = self._catalog.revision()
                try:
                    self._view = self._open(self._state())
                    return self._view
                except Damaged:
                    # A writer may have removed a file of the state that was read: look again.
                    if attempt == 99 or self._catalog.revision() == before:
                        raise
            raise AssertionError("not reached")

    def _state(self) -> _State:
        with self._catalog.read() as db:
            revision = int(get_meta(db, REVISION))
            slides = db.execute(
                "SELECT s.*, t.first_tile, t.places, t.files, t.labels, t.patients, t.mosaic, "
                "t.seal AS tiles_seal "
                "FROM slides AS s JOIN slide_tiles AS t ON t.slide_id = s.id ORDER BY s.id"
            ).fetchall()
            generation = db.execute("SELECT * FROM generations ORDER BY id DESC").fetchone()
            fits = [dict(row) for row in db.execute("SELECT * FROM clusterings ORDER BY id")]
            placements: dict[str, dict[int, bytes]] = {row["name"]: {} for row in fits}
            given: dict[str, dict[int, str]] = {row["name"]: {} for row in fits}
            for row in db.execute(
                "SELECT c.name AS clustering, n.cluster, n.name FROM clusters AS n "
                "JOIN clusterings AS c ON c.id = n.clustering_id WHERE n.name != ''"
            ):
                given[row["clustering"]][row["cluster"]] = row["name"]
            for row in db.execute(
                "SELECT c.name, p.slide_id, p.cluster FROM placements AS p "
                "JOIN clusterings AS c ON c.id = p.clustering_id"
            ):
                placements[row["name"]][row["slide_id"]] = row["cluster"]
            if int(get_meta(db, REVISION)) != revision:  # a folder that only others can write
                raise Damaged(f"{self._path} changed while it was read; try again")
        return _State(
            revision,
            [dict(row) for row in slides],
            None if generation is None else dict(generation),
            placements,
            fits[::-1],
            given,
        )

    def _open(self, state: _State) -> View:
        known = {slide["id"]: slide for slide in state.slides}
        self._mosaics = {n: m for n, m in self._mosaics.items() if n in known}
        covered: list[dict[str, Any]] = []
        opened = None if state.generation is None else self._open_main(state.generation)
        moved = self._catalog.revision() != state.revision
        if opened is None and state.generation is not None and moved:
            raise Damaged("the index file was replaced while it was opened; try again")
        if opened is not None:
            covered = [known.get(n) or _gone(n, tiles) for n, tiles in opened.slides]
        inside = {slide["id"] for slide in covered}
        late = [slide for slide in state.slides if slide["id"] not in inside]
        order = [*covered, *late]
        alive = None
        if any(slide["first_tile"] == GONE for slide in covered):
            there = [slide["first_tile"] != GONE for slide in order]
            alive = np.repeat(there, [slide["tiles"] for slide in order])
        index = VectorIndex(
            self._manifest.dim,
            self._manifest.metric,
            self._read_tail(late),
            opened.main if opened else None,
            opened.plan if opened else None,
            opened.raw if opened else None,
            alive,
            opened.gpu if opened else None,
        )
        newest = next(reversed(state.placements), None)
        columns = Columns(order, state.placements, newest)
        return View(
            state.revision,
            columns,
            index,
            opened.number if opened else 0,
            opened.about if opened else {},
            state.clusterings,
            state.cluster_names,
        )

    def _open_main(self, row: dict[str, Any]) -> _Main | None:
        """Open the index file of a generation; None if it is unusable: then all slides are tail."""
        if self._main is not None and self._main.number == row["id"]:
            return self._main
        try:
            if seal(row) != row[SEAL] or not self._is_whole(
                row["file"], row["sha256"], row["bytes"]
            ):
                return None
            about = json.loads(row["about"])
            plan = Plan(**about["plan"])
            main = read_main(self._path / row["file"], self._manifest.dim)
            raw = None
            if row["raw_file"] is not None:
                if not self._is_whole(row["raw_file"], row["raw_sha256"], None):
                    return None
                raw = read_main(self._path / row["raw_file"], self._manifest.dim)
            slides = unpack_numbers(row["slides"], "<i8").reshape(-1, 2)
            pairs = [(int(number), int(tiles)) for number, tiles in slides]
        except (Damaged, OSError, ValueError, TypeError, KeyError):
            return None
        if main.ntotal != row["vectors"] or sum(tiles for _, tiles in pairs) != main.ntotal:
            return None
        self._main = _Main(row["id"], main, raw, plan, about, pairs, gpu_copy(main, plan))
        return self._main

    def _is_whole(self, file: str, sha256: str, size: int | None) -> bool:
        """Whether a file has its size, and, if it is not too large to look, its content."""
        path = self._path / file
        found = path.stat().st_size
        if size is not None and found != size:
            return False
        return found > HASHED_BYTES or sha256_file(path) == sha256

    def _read_tail(self, late: Sequence[dict[str, Any]]) -> NDArray[np.float32]:
        """Return the prepared vectors of slides that no index file holds; what was read is kept."""
        wanted = {slide["id"] for slide in late}
        self._tail = {n: vectors for n, vectors in self._tail.items() if n in wanted}
        for slide in late:
            if slide["id"] not in self._tail:
                found = prepared(self.vectors_of(slide), self._manifest.metric)
                if len(found) != slide["tiles"]:
                    raise Damaged(
                        f"{slide['features_file']} of slide {slide['name']!r} holds {len(found)} vectors, "
                        f"the catalog says {slide['tiles']}; embed the slide again"
                    )
                self._tail[slide["id"]] = found
        empty = np.zeros((0, self._manifest.dim), dtype=np.float32)
        joined = np.concatenate([empty, *(self._tail[slide["id"]] for slide in late)])
        start = 0
        for slide in late:  # parts of the whole from now on, not copies
            self._tail[slide["id"]] = joined[start : start + slide["tiles"]]
            start += slide["tiles"]
        return joined

    # -- writing --------------------------------------------------------------------------------

    def options(self) -> tuning.Options:
        """Return how the atlas wants its index built."""
        text = self._catalog.meta().get(OPTIONS)
        return tuning.Options(**json.loads(text)) if text else tuning.Options()

    def settle(self) -> None:
        """Write a new generation if there is none that is usable, or too much came after it."""
        rows = self._catalog.rows("SELECT * FROM generations ORDER BY id DESC LIMIT 1")
        opened = self._open_main(dict(rows[0])) if rows else None
        tiles = {s["id"]: s["tiles"] for s in self._catalog.rows("SELECT id, tiles FROM slides")}
        if opened is None:
            late, covered = sum(tiles.values()), 0
        else:
            held = dict(opened.slides)
            covered = sum(held.values())
            late = sum(n for number, n in tiles.items() if number not in held)
            late += sum(n for number, n in held.items() if number not in tiles)
        if late > min(FOLD_ROWS, FOLD_SHARE * covered) or (opened is None and late):
            options = self.options()
            try:
                self.write(options)
            except BadInput:  # the budget of another day: better a larger index than none
                self.write(replace(options, memory_mb=None))

    def write(self, options: tuning.Options, store_options: bool = False) -> dict[str, Any]:
        """Write the index of the current state as a new generation; earlier ones are dropped.

        Args:
            options: what the index must reach.
            store_options: keep them for the generations to come.

        Returns:
            What was built and measured.

        Raises:
            StorageFailed: no space; the generation before stays.
            BadInput: a memory budget that no index of this atlas keeps.
        """
        slides = self.slides()
        total = sum(slide["tiles"] for slide in slides)
        dim, metric = self._manifest.dim, self._manifest.metric
        plan = tuning.plan_for(total, dim, options)
        chunks = _Chunks(self, slides)
        sample, held_out = tuning.draw(chunks, total, dim, plan, options.seed)
        index = stopping.aside(lambda: new_main(dim, metric, plan, sample, options.seed))
        raw_temp = temporary(self._path / "vectors.faiss") if plan.kind == "ivf" else None
        temp = temporary(self._path / "index.faiss")
        try:
            for vectors in chunks:
                stopping.check()
                index.add(vectors)
            raw = None
            if raw_temp is not None:
                _write_flat(raw_temp, chunks, index, total)
                raw = read_main(raw_temp, dim)
            plan, measured = stopping.aside(
                partial(tuning.tune, index, raw, plan, chunks, held_out, metric, options)
            )
            write_main(index, temp)
            return self._publish(
                temp, raw_temp, slides, total, plan, measured, options, store_options
            )
        finally:
            discard(temp)
            if raw_temp is not None:
                discard(raw_temp)

    def _publish(
        self,
        temp: Path,
        raw_temp: Path | None,
        slides: list[dict[str, Any]],
        total: int,
        plan: Plan,
        measured: dict[str, Any],
        options: tuning.Options,
        store_options: bool,
    ) -> dict[str, Any]:
        last = self._catalog.rows("SELECT seq FROM sqlite_sequence WHERE name = 'generations'")
        number = (last[0]["seq"] if last else 0) + 1
        file = self._path / f"index-{number}.faiss"
        raw_file = self._path / f"vectors-{number}.faiss"
        about = {"plan": plan.as_dict(), "options": options.as_dict(), "measured": measured}
        row: dict[str, Any] = {
            "id": number,
            "file": file.name,
            "sha256": sha256_file(temp),
            "bytes": temp.stat().st_size,
            "raw_file": None if raw_temp is None else raw_file.name,
            "raw_sha256": None if raw_temp is None else sha256_file(raw_temp),
            "slides": pack_numbers([(s["id"], s["tiles"]) for s in slides], "<i8"),
            "vectors": total,
            "about": json.dumps(about),
            "created_at": now(),
        }
        publish_file(temp, file)
        if raw_temp is not None:
            publish_file(raw_temp, raw_file)
        with self._catalog.write() as db:
            db.execute("DELETE FROM generations")
            insert(db, "generations", row)
            if store_options:
                set_meta(db, OPTIONS, json.dumps(options.as_dict()))
        self.remove_orphans()
        return about

    def remove_orphans(self) -> None:
        """Delete index files that no generation names."""
        named = {
            row[key]
            for row in self._catalog.rows("SELECT file, raw_file FROM generations")
            for key in ("file", "raw_file")
        }
        for pattern in ("index-*.faiss", "vectors-*.faiss"):
            for path in self._path.glob(pattern):
                if path.name not in named:
                    path.unlink(missing_ok=True)


def _write_flat(path: Path, chunks: Iterable[NDArray[np.float32]], like: Any, total: int) -> None:
    """Write a FAISS flat index a piece at a time, which FAISS itself writes only from memory.

    A full disk is an error here, not a signal as with a mapped file.

    Raises:
        StorageFailed: no space.
    """
    faiss = import_faiss()
    flat = faiss.IndexFlat(like.d, like.metric_type)
    header: bytes = faiss.serialize_index(flat).tobytes()

    def counted(vectors: int) -> bytes:
        """The number of vectors stands after name and length, that of their values at the end."""
        values = (vectors * like.d).to_bytes(8, "little")
        found: bytes = header[:8] + vectors.to_bytes(8, "little") + header[16:-8] + values
        return found

    flat.add(np.zeros((1, like.d), dtype=np.float32))
    assert faiss.serialize_index(flat).tobytes()[: len(header)] == counted(1), (
        "FAISS's format changed"
    )
    try:
        with open(path, "wb") as out:
            out.write(counted(total))
            for vectors in chunks:
                out.write(vectors.astype("<f4").tobytes())
    except OSError as error:
        raise storage_failed(path, error) from error


def _gone(number: int, tiles: int) -> dict[str, Any]:
    """Return a stand-in for a slide that was removed after the index file was written."""
    return {
        "id": number,
        "name": "",
        "kind": None,
        "tiles": tiles,
        "first_tile": GONE,
        "places": bytes(8 * tiles),
        "files": None,
        "labels": None,
        "patients": None,
        "mosaic": b"",
        "label": None,
        "patient": None,
        "metadata": "{}",
        "mpp": None,
        "target_mpp": None,
        "size_px_level0": 0,
    }


class _Chunks:
    """The prepared vectors of all slides, one after another, read again at every pass."""

    def __init__(self, generations: Generations, slides: list[dict[str, Any]]) -> None:
        self._generations, self._slides = generations, slides

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        metric = self._generations._manifest.metric
        for slide in self._slides:
            vectors = self._generations.vectors_of(slide)
            if len(vectors) != slide["tiles"]:
                raise BadInput(
                    f"slide {slide['name']!r} has {len(vectors)} vectors, the catalog says "
                    f"{slide['tiles']}; run `histoseek index verify`"
                )
            yield prepared(vectors, metric)
