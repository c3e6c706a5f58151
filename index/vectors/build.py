"""Writing a generation: the FAISS index of all slides, built, tuned and measured.

Every pass reads the vectors again, slide by slide, so that memory stays bounded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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
from .files import IndexPlan, new_main, read_main, write_main
from .scan import import_faiss, prepared

OPTIONS = "index_options"
"""Key of the catalog under which the options of the index are stored."""


@dataclass(frozen=True)
class _Built:
    """An index in temporary files.

    Attributes:
        file: the FAISS index.
        exact_file: the exact vectors; None if the index itself holds them.
        slides: rows of the slides it covers, in order.
        plan: how it was built.
        measured: measurements of it, such as recall.
    """

    file: Path
    exact_file: Path | None
    slides: list[dict[str, Any]]
    plan: IndexPlan
    measured: dict[str, Any]


def write_generation(
    store: Store, options: tuning.IndexOptions, store_options: bool = False
) -> dict[str, Any]:
    """Write the index of the current state as a new generation.

    Args:
        store: of the atlas.
        options: the requirements for the index.
        store_options: also use these options for later generations.

    Returns:
        The plan, the options and the measurements.

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
        built = _Built(file, exact_file, slides, plan, measured)
        return _publish(store, built, options, store_options)
    finally:
        discard(file)
        if exact_file is not None:
            discard(exact_file)


def _publish(
    store: Store, built: _Built, options: tuning.IndexOptions, store_options: bool
) -> dict[str, Any]:
    """Move the files into place, then write the row that names them."""
    last = store.catalog.rows("SELECT seq FROM sqlite_sequence WHERE name = 'generations'")
    number = (last[0]["seq"] if last else 0) + 1
    file = store.path / f"index-{number}.faiss"
    exact_file = store.path / f"vectors-{number}.faiss"
    coded = built.exact_file is not None
    about = {
        "plan": built.plan.as_dict(),
        "options": options.as_dict(),
        "measured": built.measured,
    }
    row: dict[str, Any] = {
        "id": number,
        "file": file.name,
        "sha256": sha256_file(built.file),
        "bytes": built.file.stat().st_size,
        "raw_file": exact_file.name if coded else None,
        "raw_sha256": None if built.exact_file is None else sha256_file(built.exact_file),
        "slides": pack_numbers([(s["id"], s["tiles"]) for s in built.slides], "<i8"),
        "vectors": sum(slide["tiles"] for slide in built.slides),
        "about": json.dumps(about),
        "created_at": now(),
    }
    publish_file(built.file, file)
    if built.exact_file is not None:
        publish_file(built.exact_file, exact_file)
    with store.catalog.write() as db:
        db.execute("DELETE FROM generations")
        insert(db, "generations", row)
        if store_options:
            set_meta(db, OPTIONS, json.dumps(options.as_dict()))
    return about


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
                    f"slide {slide['name']!r} has {len(vectors)} vectors, the catalog says "
                    f"{slide['tiles']}; run `histoseek index verify`"
                )
            yield prepared(vectors, metric)
