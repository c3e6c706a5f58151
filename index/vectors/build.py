"""Writing a generation: the FAISS index of all slides, built, tuned and measured.

Every pass reads the vectors again, slide by slide, so that memory stays bounded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ... import stopping
from ...artifacts.files import discard, publish_file, sha256_file, storage_failed, temporary
from ...errors import BadInput
from ..store.catalog import insert, now, set_meta
from ..store.packing import pack_numbers
from ..store.store import Store
from . import tuning
from .files import new_main, read_main, write_main
from .scan import import_faiss, prepared

OPTIONS = "index_options"
"""Key of the catalog under which the options of the index are stored."""


def write_generation(
    store: Store, options: tuning.IndexOptions, store_options: bool = False
) -> dict[str, Any]:
    """Write the index of the current state as a new generation.

    Returns:
        The plan, the options and the measurements; with ``store_options``, later generations use the
        options too.

    Raises:
        StorageFailed: no space; the previous generation stays.
        BadInput: the memory budget is too small for any index of this atlas.
    """
    slides = store.tile_ranges()
    total = sum(slide["tiles"] for slide in slides)
    dim, metric = store.manifest.dim, store.manifest.metric
    plan = tuning.plan_for(total, dim, options)
    chunks = _Chunks(store, slides)
    sample, held_out = tuning.draw(chunks, total, dim, plan, options.seed)
    index = stopping.aside(lambda: new_main(dim, metric, plan, sample, options.seed))
    exact_file = temporary(store.path / "vectors.faiss") if plan.kind == "ivf" else None
    file = temporary(store.path / "index.faiss")
    try:
        for vectors in chunks:
            stopping.check()
            index.add(vectors)
        exact = None
        if exact_file is not None:
            _write_flat(exact_file, chunks, index, total)
            exact = read_main(exact_file, dim)
        plan, measured = stopping.aside(
            partial(tuning.tune, index, exact, plan, chunks, held_out, metric, options)
        )
        write_main(index, file)
        about = {"plan": asdict(plan), "options": asdict(options), "measured": measured}
        _publish(store, file, exact_file, slides, about, store_options)
        return about
    finally:
        discard(file)
        if exact_file is not None:
            discard(exact_file)


def _publish(
    store: Store,
    index_file: Path,
    exact_file: Path | None,
    slides: list[dict[str, Any]],
    about: dict[str, Any],
    store_options: bool,
) -> None:
    """Move the temporary files into place, then write the row that names them."""
    last = store.catalog.rows("SELECT seq FROM sqlite_sequence WHERE name = 'generations'")
    number = (last[0]["seq"] if last else 0) + 1
    row: dict[str, Any] = {
        "id": number,
        "file": f"index-{number}.faiss",
        "sha256": sha256_file(index_file),
        "bytes": index_file.stat().st_size,
        "raw_file": None,
        "raw_sha256": None,
        "slides": pack_numbers([(s["id"], s["tiles"]) for s in slides], "<i8"),
        "vectors": sum(slide["tiles"] for slide in slides),
        "about": json.dumps(about),
        "created_at": now(),
    }
    if exact_file is not None:
        row |= {"raw_file": f"vectors-{number}.faiss", "raw_sha256": sha256_file(exact_file)}
        publish_file(exact_file, store.path / row["raw_file"])
    publish_file(index_file, store.path / row["file"])
    with store.catalog.write() as db:
        db.execute("DELETE FROM generations")
        insert(db, "generations", row)
        if store_options:
            set_meta(db, OPTIONS, json.dumps(about["options"]))


def _write_flat(path: Path, chunks: Iterable[NDArray[np.float32]], like: Any, total: int) -> None:
    """Write a FAISS flat index in pieces; FAISS itself can write one only from memory.

    With ordinary writes a full disk raises an error; with a mapped file it would send a signal.

    Raises:
        StorageFailed: no space.
    """
    faiss = import_faiss()
    flat = faiss.IndexFlat(like.d, like.metric_type)
    header: bytes = faiss.serialize_index(flat).tobytes()

    def counted(vectors: int) -> bytes:
        """Return the header: bytes 8 to 16 count the vectors, the last 8 bytes count their values."""
        values = (vectors * like.d).to_bytes(8, "little")
        return b"".join([header[:8], vectors.to_bytes(8, "little"), header[16:-8], values])

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


class _Chunks:
    """The prepared vectors of all slides in order; every iteration reads them again."""

    def __init__(self, store: Store, slides: list[dict[str, Any]]) -> None:
        self._store, self._slides = store, slides

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        metric = self._store.manifest.metric
        for slide in self._slides:
            vectors = self._store.vectors_of(slide)
            if len(vectors) != slide["tiles"]:
                raise BadInput(
                    f"slide {slide['name']!r} has {len(vectors)} vectors; expected {slide['tiles']}, as in "
                    "the catalog; run `histoseek index verify`"
                )
            yield prepared(vectors, metric)
