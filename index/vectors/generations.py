"""Generations: the FAISS index file of an atlas, derived from its feature files.

A generation covers the slides that were in the atlas when it was written. The vectors of slides added
later, the recent vectors, are read from the feature files and searched exactly. Slides removed later are
skipped. So adding a slide need not rebuild the index. A new generation is written when recent and removed
vectors exceed a quarter of the newest one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from ...artifacts.files import sha256_file
from ...errors import BadInput, Damaged
from ..store.packing import SEAL, seal, unpack_numbers
from ..store.store import Store
from . import tuning
from .build import OPTIONS, write_generation
from .files import IndexPlan, gpu_copy, read_main

FOLD_SHARE = 0.25
"""Threshold on recent and removed vectors, as a share of the index file; above it a new one is written."""
FOLD_ROWS = 200_000
"""The same threshold as a number of vectors; the smaller of the two applies."""
HASHED_BYTES = 2**30
"""Index files up to this size are hashed whenever they are opened; `verify` hashes all files."""


@dataclass(frozen=True)
class OpenIndex:
    """An open index file.

    Attributes:
        number: of the generation.
        main: the FAISS index.
        exact_vectors: FAISS's flat index (M, D) of the exact vectors; None if ``main`` itself holds them.
        plan: how ``main`` is built and searched.
        about: its plan, options and measurements.
        slides: id and number of tiles of each slide it covers, in order.
        gpu: copy of ``main`` on GPUs; None without one.
    """

    number: int
    main: Any
    exact_vectors: Any
    plan: IndexPlan
    about: dict[str, Any]
    slides: list[tuple[int, int]]
    gpu: Any


class Generations:
    """Opens and replaces the index file of an atlas."""

    def __init__(self, store: Store) -> None:
        """Use the index files of an atlas; nothing is loaded yet."""
        self._store = store
        self._opened: OpenIndex | None = None

    def bytes_on_disk(self) -> dict[str, int]:
        """Return the sizes of the index files of the newest generation."""
        paths = [self._store.path / name for name in self._files()]
        return {path.name: path.stat().st_size for path in paths if path.is_file()}

    def _files(self) -> list[str]:
        rows = self._store.catalog.rows("SELECT file, raw_file FROM generations")
        return [row[key] for row in rows for key in ("file", "raw_file") if row[key]]

    def open(self, row: dict[str, Any]) -> OpenIndex | None:
        """Open the index file of a row of the table ``generations``; None if it cannot be used."""
        if self._opened is not None and self._opened.number == row["id"]:
            return self._opened
        path, dim = self._store.path, self._store.manifest.dim
        try:
            if seal(row) != row[SEAL]:
                return None
            if not self._is_intact(row["file"], row["sha256"], row["bytes"]):
                return None
            about = json.loads(row["about"])
            plan = IndexPlan(**about["plan"])
            main = read_main(path / row["file"], dim)
            exact = None
            if row["raw_file"] is not None:
                if not self._is_intact(row["raw_file"], row["raw_sha256"], None):
                    return None
                exact = read_main(path / row["raw_file"], dim)
            slides = unpack_numbers(row["slides"], "<i8").reshape(-1, 2)
            pairs = [(int(number), int(tiles)) for number, tiles in slides]
        except (Damaged, OSError, ValueError, TypeError, KeyError):
            return None
        if main.ntotal != row["vectors"] or sum(tiles for _, tiles in pairs) != main.ntotal:
            return None
        self._opened = OpenIndex(row["id"], main, exact, plan, about, pairs, gpu_copy(main, plan))
        return self._opened

    def _is_intact(self, file: str, sha256: str, size: int | None) -> bool:
        """Whether a file has the recorded size and, if it is small enough to hash, the recorded hash."""
        path = self._store.path / file
        actual = path.stat().st_size
        if size is not None and actual != size:
            return False
        return actual > HASHED_BYTES or sha256_file(path) == sha256

    def options(self) -> tuning.IndexOptions:
        """Return the stored options of the index, or the defaults."""
        text = self._store.catalog.meta().get(OPTIONS)
        return tuning.IndexOptions(**json.loads(text)) if text else tuning.IndexOptions()

    def settle(self) -> None:
        """Write a new generation if none is usable, or if too much has changed since the newest."""
        catalog = self._store.catalog
        rows = catalog.rows("SELECT * FROM generations ORDER BY id DESC LIMIT 1")
        opened = self.open(dict(rows[0])) if rows else None
        tiles = {s["id"]: s["tiles"] for s in catalog.rows("SELECT id, tiles FROM slides")}
        covered = dict(opened.slides) if opened is not None else {}
        changed = tiles.keys() ^ covered.keys()  # slides added or removed since
        rows_changed = sum((tiles | covered)[slide] for slide in changed)
        if rows_changed > min(FOLD_ROWS, FOLD_SHARE * sum(covered.values())):
            options = self.options()
            try:
                self.write(options)
            except BadInput:  # the stored memory budget no longer fits: build without it
                self.write(replace(options, memory_mb=None))

    def write(self, options: tuning.IndexOptions, store_options: bool = False) -> dict[str, Any]:
        """Write a new generation and delete earlier ones; see :func:`.build.write_generation`."""
        about = write_generation(self._store, options, store_options)
        self.remove_orphans()
        return about

    def remove_orphans(self) -> None:
        """Delete index files that no generation names."""
        named = self._files()
        for pattern in ("index-*.faiss", "vectors-*.faiss"):
            for path in self._store.path.glob(pattern):
                if path.name not in named:
                    path.unlink(missing_ok=True)
