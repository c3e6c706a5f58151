"""Copies an atlas to Milvus: only changes, in an order that lets a push stop at any time."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
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
"""Slides after which a push saves its progress; a push that is killed sends at most as many again."""
CLUSTERING_BYTES = 64 * 2**20
"""Maximum size of a clustering that is pushed; HDBSCAN's contain the fitted tiles."""


def push(
    atlas: Atlas,
    url: str,
    index: str | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Copy the changes of an atlas since the last push to Milvus; return a report.

    Args:
        atlas: to copy.
        url: see :func:`parse_url`.
        index: Milvus's type of index for a new collection: FLAT (exact), AUTOINDEX, HNSW, …; None takes
            FLAT up to 100,000 tiles, AUTOINDEX above.
        progress: called after each slide.

    Raises:
        BadInput: the index is unknown, or the collection has another index or lacks a new column.
        Mismatch: the collection belongs to another encoder or atlas.
        Unavailable: Milvus does not answer.
    """
    with closing(MilvusAtlas(url, must_exist=False)) as engine:
        return push_changes(engine, atlas, index, progress)


def _create(engine: MilvusAtlas, about: About) -> None:
    """Create the two collections, also after a push that stopped between them."""
    from pymilvus import DataType

    client = engine.client
    metric = "COSINE" if about.metric == "cosine" else "L2"
    strong = {"consistency_level": "Strong"}
    with calls(engine.address):
        if not client.has_collection(engine.facts):
            if client.has_collection(engine.address.collection):
                raise BadInput(
                    f"collection {engine.address.collection!r} exists, but histoseek did not create it; "
                    "choose another name"
                )
            facts = client.create_schema(auto_id=False, enable_dynamic_field=False)
            facts.add_field("part", DataType.INT64, is_primary=True)
            facts.add_field("text", DataType.VARCHAR, max_length=TEXT + 1)
            facts.add_field("none", DataType.FLOAT_VECTOR, dim=2)
            flat = client.prepare_index_params()
            flat.add_index("none", index_type="FLAT", metric_type="L2")
            client.create_collection(engine.facts, schema=facts, index_params=flat, **strong)
        if client.has_collection(engine.address.collection):
            client.drop_collection(engine.address.collection)  # incomplete: it has no description
        tiles = client.create_schema(auto_id=False, enable_dynamic_field=False)
        tiles.add_field("tile", DataType.INT64, is_primary=True)
        tiles.add_field("vector", DataType.FLOAT_VECTOR, dim=about.dim)
        for name in ("slide_id", "x", "y", "cluster", *map(about.field_of, about.columns)):
            tiles.add_field(name, DataType.INT64)
        tiles.add_field("file", DataType.VARCHAR, max_length=TEXT)
        index = client.prepare_index_params()
        index.add_index("vector", index_type=about.index, metric_type=metric)
        client.create_collection(
            engine.address.collection, schema=tiles, index_params=index, **strong
        )
    engine.write_about(about)


def push_changes(
    engine: MilvusAtlas,
    atlas: Atlas,
    index: str | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Copy the changes of an atlas; see :func:`push`."""
    view = atlas.view()
    columns = view.columns
    about = _described(engine, atlas, view, index)
    slides = {slide["id"]: n for n, slide in enumerate(columns.slides) if slide["name"]}
    checksums = {key: _checksum(view, columns.slides[n]) for key, n in slides.items()}
    pushed = {record[0]: code for code, record in about.slides.items()}
    removed = [key for key in pushed if key not in slides]
    changed = [
        key for key in slides if key not in pushed or about.slides[pushed[key]][1] != checksums[key]
    ]
    replaced = [key for key in changed if key in pushed]
    about.revision = -1  # until the push is complete
    # Order: 1 names, 2 tiles, 3 the slide's checksum. A push can stop at any time; the next one sends
    # slides without a checksum again.
    codes = {
        name: _codes(about.columns[name], columns.coded(name).names) for name in columns.names()
    }
    code_of = {name: code for code, name in enumerate(about.columns["slide"])}
    for key in replaced:
        about.slides[pushed[key]][1] = ""
    engine.write_about(about)
    for key in (*removed, *replaced):
        with calls(engine.address):
            engine.client.delete(engine.address.collection, filter=f"slide_id == {key}")
        del about.slides[pushed[key]]
    for key in changed:
        slide = columns.slides[slides[key]]
        record = [key, "", slide["size_px_level0"], slide["mpp"], slide["target_mpp"]]
        about.slides[code_of[slide["name"]]] = record
    engine.write_about(about)
    for done, key in enumerate(changed, start=1):
        slide = columns.slides[slides[key]]
        _push_slide(engine, atlas, view, about, codes, slides[key])
        about.slides[code_of[slide["name"]]][1] = checksums[key]
        if done % SAVED_TOGETHER == 0:
            engine.write_about(about)
        progress(done, len(changed), slide["name"])
    engine.write_text(CLUSTERINGS, json.dumps(_clusterings(atlas, view)))
    about.revision, about.clustering = view.revision, columns.newest or ""
    engine.write_about(about)
    return {
        "milvus": engine.address.url,
        "index": about.index,
        "slides_pushed": len(changed),
        "slides_removed": len(removed),
        "tiles": len(view.index),
        "revision": view.revision,
    }


def _described(engine: MilvusAtlas, atlas: Atlas, view: View, index: str | None) -> About:
    """Return the description of the collection; create the collection if it does not exist."""
    manifest, identity, url = atlas.manifest, atlas.store.identity, engine.address.url
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
            f"{url} contains embeddings of encoder {about.encoder!r} ({about.sha256[:12]}), but the atlas "
            f"is bound to {manifest.name!r} ({manifest.sha256[:12]}); choose another collection"
        )
    if about.atlas != identity:
        raise Mismatch(
            f"{url} contains another atlas of the same encoder; choose another collection"
        )
    if index not in {None, about.index}:
        raise BadInput(f"{url} has index {about.index}; for {index} push to another collection")
    if missing := [name for name in view.columns.names() if name not in about.columns]:
        raise BadInput(
            f"the atlas has new columns ({', '.join(missing)}) that the collection lacks; push to another "
            "collection, then drop the old one"
        )
    return about


def _push_slide(
    engine: MilvusAtlas,
    atlas: Atlas,
    view: View,
    about: About,
    codes: dict[str, NDArray[np.int64]],
    number: int,
) -> None:
    columns = view.columns
    slide = columns.slides[number]
    rows = np.arange(columns.starts[number], columns.starts[number + 1])
    fields = {
        about.field_of(name): codes[name][columns.coded(name).codes[rows]].tolist()
        if name in codes
        else [MISSING] * len(rows)
        for name in about.columns
    }
    vectors = prepared(atlas.store.vectors_of(slide), atlas.manifest.metric)
    coords, ids = columns.places_of(number).tolist(), columns.ids(rows).tolist()
    clusters = columns.clusters()
    cluster = [NOT_PLACED] * len(rows) if clusters is None else clusters[rows].tolist()
    files = [name or "" for name in columns.files(number) or [None] * len(rows)]
    if any(len(name.encode()) > TEXT for name in files):
        raise BadInput(
            f"slide {slide['name']!r} has a file name of more than {TEXT:,} bytes, which Milvus cannot "
            "store; shorten it and add the slide again"
        )
    step = max(1, BATCH_VALUES // about.dim)
    for start in range(0, len(rows), step):
        batch = [
            {
                "tile": ids[row],
                "vector": vectors[row],
                "slide_id": slide["id"],
                "x": coords[row][0],
                "y": coords[row][1],
                "cluster": cluster[row],
                "file": files[row],
                **{name: values[row] for name, values in fields.items()},
            }
            for row in range(start, min(start + step, len(rows)))
        ]
        with calls(engine.address):
            engine.client.upsert(engine.address.collection, batch)


def _codes(pushed: list[str], names: Sequence[str]) -> NDArray[np.int64]:
    """Return the collection's code of each name, then MISSING; it appends new names."""
    pushed[:] = dict.fromkeys([*pushed, *names])
    code = {name: n for n, name in enumerate(pushed)}
    return np.array([*(code[name] for name in names), MISSING], dtype=np.int64)


def _checksum(view: View, slide: Mapping[str, Any]) -> str:
    """Return a checksum of everything that a push sends of a slide."""
    digest = hashlib.blake2b(slide[SEAL] + slide["tiles_seal"], digest_size=8)
    digest.update(view.columns.placement(slide["id"]))
    return digest.hexdigest()


def _clusterings(atlas: Atlas, view: View) -> dict[str, dict[str, Any]]:
    """Return the clusterings that are undamaged and not too large, JSON-ready."""
    records: dict[str, dict[str, Any]] = {}
    for fitted in view.clusterings():
        try:
            name, clustering = view.clustering(fitted)
        except Damaged:
            if atlas.catalog.revision() != view.revision:
                raise  # a writer replaced it meanwhile: repeat the push
            continue  # its file is lost: `index verify` reports it
        blob = clustering.to_bytes()
        if len(blob) <= CLUSTERING_BYTES:
            records[name] = {
                "method": clustering.method,
                "about": clustering.about,
                "names": view.cluster_names(name),
                "npz": base64.b64encode(blob).decode(),
            }
    return records
