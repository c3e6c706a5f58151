"""Copying an atlas to Milvus: only what changed, and so that a push may stop anywhere."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...console import Progress, no_progress
from ...errors import BadInput, Damaged, Mismatch, unknown_name
from ..atlas import Atlas
from ..search.columns import NOT_PLACED
from ..store.packing import MISSING, SEAL
from ..vectors.scan import prepared
from ..view import View
from .milvus import CLUSTERINGS, TEXT, MilvusAtlas
from .milvus_address import calls
from .milvus_filter import About

BATCH_VALUES = 250_000
"""Coordinates sent in one request (1 MB)."""
FLAT_UP_TO = 100_000
INDEXES = ("FLAT", "AUTOINDEX", "IVF_FLAT", "IVF_SQ8", "IVF_PQ", "HNSW", "SCANN", "DISKANN")
SAVED_TOGETHER = 100
"""Slides after which a push notes what is done; as many are sent again after a kill."""
CLUSTERING_BYTES = 64 * 2**20
"""Clusterings up to this size go along; HDBSCAN's hold the tiles that were fitted."""


def push(
    atlas: Atlas,
    url: str,
    index: str | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Copy an atlas to Milvus; only what changed since the last time.

    Args:
        atlas: to copy.
        url: see :func:`parse_url`.
        index: Milvus's type of index for a collection that is made: FLAT (exact), AUTOINDEX, HNSW, …; None
            takes FLAT up to 100,000 tiles.
        progress: called after each slide.

    Returns:
        What was copied.

    Raises:
        Mismatch: the collection is of another encoder.
        Unavailable: Milvus does not answer.
    """
    engine = MilvusAtlas(url, must_exist=False)
    try:
        return push_changes(engine, atlas, index, progress)
    finally:
        engine.close()


def _create(engine: MilvusAtlas, about: About) -> None:
    """Make the collections, or those of them that a push which was cut off did not."""
    from pymilvus import DataType

    client = engine.client
    metric = "COSINE" if about.metric == "cosine" else "L2"
    strong = {"consistency_level": "Strong"}
    with calls(engine.place):
        if not client.has_collection(engine.facts):
            if client.has_collection(engine.place.collection):
                raise BadInput(
                    f"collection {engine.place.collection!r} is there and not histoseek's; choose another"
                )
            facts = client.create_schema(auto_id=False, enable_dynamic_field=False)
            facts.add_field("part", DataType.INT64, is_primary=True)
            facts.add_field("text", DataType.VARCHAR, max_length=TEXT + 1)
            facts.add_field("none", DataType.FLOAT_VECTOR, dim=2)
            flat = client.prepare_index_params()
            flat.add_index("none", index_type="FLAT", metric_type="L2")
            client.create_collection(engine.facts, schema=facts, index_params=flat, **strong)
        if client.has_collection(engine.place.collection):
            client.drop_collection(engine.place.collection)  # half made: nothing says what it holds
        tiles = client.create_schema(auto_id=False, enable_dynamic_field=False)
        tiles.add_field("tile", DataType.INT64, is_primary=True)
        tiles.add_field("vector", DataType.FLOAT_VECTOR, dim=about.dim)
        for name in (
            "slide_id",
            "x",
            "y",
            "cluster",
            *(f"c{n}" for n in range(len(about.columns))),
        ):
            tiles.add_field(name, DataType.INT64)
        tiles.add_field("file", DataType.VARCHAR, max_length=TEXT)
        index = client.prepare_index_params()
        index.add_index("vector", index_type=about.index, metric_type=metric)
        client.create_collection(
            engine.place.collection, schema=tiles, index_params=index, **strong
        )
    engine.write_about(about)


def push_changes(
    engine: MilvusAtlas,
    atlas: Atlas,
    index: str | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Copy what changed of an atlas; see :func:`push`."""
    view = atlas.view()
    columns = view.columns
    about = _opened(engine, atlas, view, index)
    slides = {s["id"]: s for s in columns.slides if s["name"]}
    checksums = {number: _checksum(view, slide) for number, slide in slides.items()}
    known = {facts[0]: (facts[1], code) for code, facts in about.slides.items()}
    gone = [number for number in known if number not in slides]
    changed = [n for n in slides if known.get(n, ("", 0))[0] != checksums[n]]
    about.revision = -1  # not whole until the end
    # Order: 1 names, 2 tiles, 3 the slide's checksum. A push can stop anywhere; the next one sends slides
    # whose checksum is missing again.
    numbers = {
        name: _numbers(about.columns[name], columns.coded(name).names) for name in columns.names()
    }
    code_of = {name: code for code, name in enumerate(about.columns["slide"])}
    for number in changed:
        if number in known:
            about.slides[known[number][1]][1] = ""
    engine.write_about(about)
    for number in (*gone, *(n for n in changed if n in known)):
        with calls(engine.place):
            engine.client.delete(engine.place.collection, filter=f"slide_id == {number}")
        del about.slides[known[number][1]]
    for number in changed:
        slide = slides[number]
        facts = [number, "", slide["size_px_level0"], slide["mpp"], slide["target_mpp"]]
        about.slides[code_of[slide["name"]]] = facts
    engine.write_about(about)
    where = {slide["id"]: n for n, slide in enumerate(columns.slides)}
    for done, number in enumerate(changed, start=1):
        slide = slides[number]
        _push_slide(engine, atlas, view, about, numbers, where[number])
        about.slides[code_of[slide["name"]]][1] = checksums[number]
        if done % SAVED_TOGETHER == 0:
            engine.write_about(about)
        progress(done, len(changed), slide["name"])
    engine.write_text(CLUSTERINGS, json.dumps(_clusterings(atlas, view)))
    about.revision, about.clustering = view.revision, columns.newest or ""
    engine.write_about(about)
    return {
        "milvus": engine.place.url,
        "index": about.index,
        "slides_pushed": len(changed),
        "slides_removed": len(gone),
        "tiles": len(view.index),
        "revision": view.revision,
    }


def _opened(engine: MilvusAtlas, atlas: Atlas, view: View, index: str | None) -> About:
    """Return what the collection says of itself, and make the collection if it is not there."""
    manifest = atlas.manifest
    identity = atlas.store.identity
    if index is not None and index not in INDEXES:
        raise unknown_name("index of Milvus", index, INDEXES)
    if engine.about is None:
        kind = index or ("FLAT" if len(view.index) <= FLAT_UP_TO else "AUTOINDEX")
        about = About(
            identity, manifest.name, manifest.sha256, manifest.dim, manifest.metric, index=kind
        )
        about.columns = {name: [] for name in view.columns.names()}
        _create(engine, about)
        return about
    about = engine.about
    if about.sha256 != manifest.sha256:
        raise Mismatch(
            f"{engine.place.url} holds embeddings of encoder {about.encoder!r} ({about.sha256[:12]}), "
            f"the atlas is bound to {manifest.name!r} ({manifest.sha256[:12]}); choose another "
            "collection"
        )
    if about.atlas != identity:
        raise Mismatch(
            f"{engine.place.url} holds another atlas of the same encoder; choose another collection"
        )
    if index not in {None, about.index}:
        raise BadInput(
            f"{engine.place.url} has index {about.index}; for {index} push to another collection"
        )
    if missing := [name for name in view.columns.names() if name not in about.columns]:
        raise BadInput(
            f"the atlas has new columns {', '.join(missing)}, which the collection lacks; push to "
            "another collection, then drop the old one"
        )
    return about


def _push_slide(
    engine: MilvusAtlas,
    atlas: Atlas,
    view: View,
    about: About,
    numbers: dict[str, NDArray[np.int64]],
    number: int,
) -> None:
    columns = view.columns
    slide = columns.slides[number]
    rows = np.arange(columns.starts[number], columns.starts[number + 1])
    codes = {
        f"c{n}": numbers[name][columns.coded(name).codes[rows]].tolist()
        if name in numbers
        else [MISSING] * len(rows)
        for n, name in enumerate(about.columns)
    }
    vectors = prepared(atlas.store.vectors_of(slide), atlas.manifest.metric)
    places, ids = columns.places()[rows].tolist(), columns.ids(rows).tolist()
    clusters = columns.clusters()
    cluster = [NOT_PLACED] * len(rows) if clusters is None else clusters[rows].tolist()
    files = columns.files(number)
    step = max(1, BATCH_VALUES // about.dim)
    for start in range(0, len(rows), step):
        batch = [
            {
                "tile": ids[row],
                "vector": vectors[row],
                "slide_id": slide["id"],
                "x": places[row][0],
                "y": places[row][1],
                "cluster": cluster[row],
                "file": "" if files is None else files[row] or "",
                **{name: values[row] for name, values in codes.items()},
            }
            for row in range(start, min(start + step, len(rows)))
        ]
        with calls(engine.place):
            engine.client.upsert(engine.place.collection, batch)


def _numbers(known: list[str], names: Sequence[str]) -> NDArray[np.int64]:
    """Return the number of each name in the collection's own list, which grows; the last is of no name."""
    number = {name: n for n, name in enumerate(known)}
    for name in names:
        if name not in number:
            number[name] = len(known)
            known.append(name)
    return np.array([*(number[name] for name in names), MISSING], dtype=np.int64)


def _checksum(view: View, slide: Mapping[str, Any]) -> str:
    """Return a checksum of everything that a push sends of a slide, as one state has it."""
    digest = hashlib.blake2b(slide[SEAL] + slide["tiles_seal"], digest_size=8)
    digest.update(view.columns.placement(slide["id"]))
    return digest.hexdigest()


def _clusterings(atlas: Atlas, view: View) -> dict[str, dict[str, Any]]:
    """Return the clusterings that are whole and not too large, JSON-ready."""
    found: dict[str, dict[str, Any]] = {}
    for fitted in view.clusterings():
        try:
            name, clustering = view.clustering(fitted)
        except Damaged:
            if atlas.catalog.revision() != view.revision:
                raise  # a writer replaced it meanwhile: the push is to be repeated
            continue  # its file is lost: `index verify` names it
        else:
            blob = clustering.to_bytes()
            if len(blob) <= CLUSTERING_BYTES:
                found[name] = {
                    "method": clustering.method,
                    "about": clustering.about,
                    "names": view.cluster_names(name),
                    "npz": base64.b64encode(blob).decode(),
                }
    return found
