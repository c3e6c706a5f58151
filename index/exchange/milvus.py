"""The atlas on Milvus: the same search, distributed over several machines.

``push`` copies tiles to a collection and skips unchanged slides, so an interrupted push is completed by
repeating it. Repeated values (slide, label, patient, metadata) are stored as numbers; their names are in a
second collection. So a filter becomes lists of numbers, and no user-supplied text gets into a Milvus
expression.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...console import Report
from ...errors import BadInput, Damaged, Mismatch, MissingPart, unknown_name
from ..atlas import Atlas
from ..clusters.clustering import Clustering
from ..search.columns import NOT_PLACED
from ..search.filters import parse
from ..search.query import Query
from ..store.packing import MISSING, SEAL
from ..store.rows import Hit
from ..vectors.scan import prepared
from ..view import View
from .milvus_address import TIMEOUT_S, TOKEN, _calls, parse_url
from .milvus_filter import FORMAT, About, Row, expression_of

BATCH_VALUES = 250_000
"""Coordinates sent in one request (1 MB)."""
LIMIT = 16_384
"""Maximum number of hits of one Milvus search."""
TEXT = 60_000
SLOT = 1_000_000
"""Maximum number of parts of one text in the second collection; part 0 holds their number and hash."""
FACTS, CLUSTERINGS = 0, 1
FLAT_UP_TO = 100_000
INDEXES = ("FLAT", "AUTOINDEX", "IVF_FLAT", "IVF_SQ8", "IVF_PQ", "HNSW", "SCANN", "DISKANN")
SEALED_TOGETHER = 100
"""A push stores its progress after this many slides; at most as many are sent again after a kill."""
CLUSTERING_BYTES = 64 * 2**20
"""Maximum size of a clustering that is pushed; HDBSCAN's contain all fitted tiles."""


class MilvusAtlas:
    """A pushed atlas; it offers search and assign like :class:`~histoseek.index.atlas.Atlas`."""

    def __init__(self, url: str, must_exist: bool = True) -> None:
        """Connect.

        Args:
            url: see :func:`parse_url`.
            must_exist: whether to fail if the collection does not exist.

        Raises:
            BadInput: there is no such collection, or a newer histoseek wrote it.
            MissingPart: pymilvus is not installed.
            Unavailable: Milvus does not answer.
        """
        try:
            from pymilvus import MilvusClient
        except ImportError as error:
            raise MissingPart("Milvus needs pymilvus: pip install 'histoseek[milvus]'") from error
        for name in ("pymilvus", "milvus_lite"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # they also raise what they log
        self.place = parse_url(url)
        with _calls(self.place):
            self._client: Any = MilvusClient(
                self.place.uri, token=os.environ.get(TOKEN, ""), timeout=TIMEOUT_S
            )
            there = self._client.has_collection(self._facts)
            for name in (self._facts, self.place.collection) if there else ():
                if self._client.has_collection(name):
                    self._client.load_collection(name)  # forgotten by Milvus Lite if killed
        self._seen = ""
        self.about: About | None = self._read_about() if there else None
        if must_exist and not there:
            raise BadInput(f"{url} holds no atlas; run `histoseek index push ATLAS {url}` first")

    def close(self) -> None:
        """Disconnect."""
        self._client.close()

    @property
    def _facts(self) -> str:
        return f"{self.place.collection}_about"

    # -- texts in the second collection --------------------------------------------------------

    def _parts(self, first: int, last: int) -> dict[int, str]:
        with _calls(self.place):
            rows = self._client.query(
                self._facts,
                filter=f"part >= {first} and part < {last}",
                output_fields=["part", "text"],
                limit=LIMIT,
            )
        return {row["part"]: row["text"] for row in rows}

    def _read_text(self, slot: int) -> str | None:
        """Return a text; None if it is missing or incomplete."""
        start = slot * SLOT
        head = self._parts(start, start + 1).get(start)
        if head is None:
            return None
        known = json.loads(head)
        found: dict[int, str] = {}
        step = LIMIT // 2
        for first in range(start + 1, start + 1 + known["parts"], step):
            found |= self._parts(first, min(first + step, start + 1 + known["parts"]))
        text = "".join(found[part] for part in sorted(found))
        if hashlib.sha256(text.encode()).hexdigest() != known["sha256"]:
            return None
        return text

    def _write_text(self, slot: int, text: str) -> None:
        """Write a text: its pieces first, then part 0 with their number and hash."""
        start = slot * SLOT
        pieces = [text[at : at + TEXT] for at in range(0, len(text), TEXT)]
        head = json.dumps(
            {"parts": len(pieces), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        )
        rows = [{"part": start + n, "text": p, "none": [0.0, 0.0]} for n, p in enumerate(pieces, 1)]
        with _calls(self.place):
            for at in range(0, len(rows), 50):
                self._client.upsert(self._facts, rows[at : at + 50])
            self._client.upsert(self._facts, [{"part": start, "text": head, "none": [0.0, 0.0]}])

    def _read_about(self) -> About | None:
        text = self._read_text(FACTS)
        if text is None:
            return None
        known = json.loads(text)
        if known["format"] > FORMAT:
            raise BadInput(
                f"{self.place.url} has format {known['format']}; this histoseek knows {FORMAT}: upgrade it"
            )
        known["slides"] = {int(n): slide for n, slide in known["slides"].items()}
        self._seen = hashlib.sha256(text.encode()).hexdigest()
        return About(**known)

    def _write_about(self, about: About) -> None:
        # JSON in ASCII: a piece has as many bytes as characters.
        text = json.dumps(about.__dict__)
        self._write_text(FACTS, text)
        self._seen, self.about = hashlib.sha256(text.encode()).hexdigest(), about

    def _create(self, about: About) -> None:
        """Create the collections, or the missing one if an earlier push was interrupted."""
        from pymilvus import DataType

        client = self._client
        metric = "COSINE" if about.metric == "cosine" else "L2"
        strong = {"consistency_level": "Strong"}
        with _calls(self.place):
            if not client.has_collection(self._facts):
                if client.has_collection(self.place.collection):
                    raise BadInput(
                        f"collection {self.place.collection!r} is there and not histoseek's; choose another"
                    )
                facts = client.create_schema(auto_id=False, enable_dynamic_field=False)
                facts.add_field("part", DataType.INT64, is_primary=True)
                facts.add_field("text", DataType.VARCHAR, max_length=TEXT + 1)
                facts.add_field("none", DataType.FLOAT_VECTOR, dim=2)
                flat = client.prepare_index_params()
                flat.add_index("none", index_type="FLAT", metric_type="L2")
                client.create_collection(self._facts, schema=facts, index_params=flat, **strong)
            if client.has_collection(self.place.collection):
                client.drop_collection(
                    self.place.collection
                )  # incomplete: its content is not known
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
                self.place.collection, schema=tiles, index_params=index, **strong
            )
        self._write_about(about)

    # -- pushing --------------------------------------------------------------------------------

    def push(
        self, atlas: Atlas, index: str | None, progress: Report = lambda done, total, text: None
    ) -> dict[str, Any]:
        """Copy the changes of an atlas; see :func:`push`."""
        view = atlas.view()
        columns = view.columns
        about = self._opened(atlas, view, index)
        slides = {s["id"]: s for s in columns.slides if s["name"]}
        seals = {number: _seal(view, slide) for number, slide in slides.items()}
        known = {facts[0]: (facts[1], code) for code, facts in about.slides.items()}
        gone = [number for number in known if number not in slides]
        changed = [n for n in slides if known.get(n, ("", 0))[0] != seals[n]]
        about.revision = -1  # incomplete until the end
        # Order: write names before the tiles that use them, delete tiles before their slide's entry, write
        # a slide's checksum after its tiles. A push can stop anywhere; the next one sends again the slides
        # whose checksum is missing.
        numbers = {
            name: _numbers(about.columns[name], columns.coded(name).names)
            for name in columns.names()
        }
        code_of = {name: code for code, name in enumerate(about.columns["slide"])}
        for number in changed:
            if number in known:
                about.slides[known[number][1]][1] = ""
        self._write_about(about)
        for number in (*gone, *(n for n in changed if n in known)):
            with _calls(self.place):
                self._client.delete(self.place.collection, filter=f"slide_id == {number}")
            del about.slides[known[number][1]]
        for number in changed:
            slide = slides[number]
            facts = [number, "", slide["size_px_level0"], slide["mpp"], slide["target_mpp"]]
            about.slides[code_of[slide["name"]]] = facts
        self._write_about(about)
        where = {slide["id"]: n for n, slide in enumerate(columns.slides)}
        for done, number in enumerate(changed, start=1):
            slide = slides[number]
            self._push_slide(atlas, view, about, numbers, where[number])
            about.slides[code_of[slide["name"]]][1] = seals[number]
            if done % SEALED_TOGETHER == 0:
                self._write_about(about)
            progress(done, len(changed), slide["name"])
        self._write_text(CLUSTERINGS, json.dumps(_clusterings(view)))
        about.revision, about.clustering = view.revision, columns.newest or ""
        self._write_about(about)
        return {
            "milvus": self.place.url,
            "index": about.index,
            "slides_pushed": len(changed),
            "slides_removed": len(gone),
            "tiles": len(view.index),
            "revision": view.revision,
        }

    def _opened(self, atlas: Atlas, view: View, index: str | None) -> About:
        """Return the collection's description; create the collection if it does not exist."""
        manifest = atlas.manifest
        identity = atlas.store.identity
        if index is not None and index not in INDEXES:
            raise unknown_name("index of Milvus", index, INDEXES)
        if self.about is None:
            kind = index or ("FLAT" if len(view.index) <= FLAT_UP_TO else "AUTOINDEX")
            about = About(
                identity, manifest.name, manifest.sha256, manifest.dim, manifest.metric, index=kind
            )
            about.columns = {name: [] for name in view.columns.names()}
            self._create(about)
            return about
        about = self.about
        if about.sha256 != manifest.sha256:
            raise Mismatch(
                f"{self.place.url} holds embeddings of encoder {about.encoder!r} ({about.sha256[:12]}), "
                f"the atlas is bound to {manifest.name!r} ({manifest.sha256[:12]}); choose another "
                "collection"
            )
        if about.atlas != identity:
            raise Mismatch(
                f"{self.place.url} holds another atlas of the same encoder; choose another collection"
            )
        if index not in {None, about.index}:
            raise BadInput(
                f"{self.place.url} has index {about.index}; for {index} push to another collection"
            )
        if missing := [name for name in view.columns.names() if name not in about.columns]:
            raise BadInput(
                f"the atlas has new columns {', '.join(missing)}, which the collection lacks; push to "
                "another collection, then drop the old one"
            )
        return about

    def _push_slide(
        self,
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
            with _calls(self.place):
                self._client.upsert(self.place.collection, batch)

    # -- searching ------------------------------------------------------------------------------

    def search(
        self,
        query: Query,
    ) -> list[list[Hit]]:
        """Return the most similar tiles of each vector of a query; see ``View.search``.

        Raises:
            BadInput: the query has tiles or combines examples, asks for more than 16,384 hits, filters by
                file name, or sets ``exact`` on an index other than FLAT.
            Unavailable: Milvus does not answer.
        """
        if query.tiles or query.combines or query.vectors is None:
            raise BadInput("Milvus is searched by images, each of its own; leave --engine out")
        k, where, least = query.k, query.where, query.least
        about = self._ready(query.vectors)
        if k > LIMIT:
            raise BadInput(f"k is {k}; Milvus gives at most {LIMIT} hits")
        if about.index != "FLAT" and (query.exact or least is not None):
            raise BadInput(
                f"the collection has index {about.index}; exact search and --least need FLAT"
            )
        expression = expression_of(about, parse(where)) if where and where.strip() else ""
        ready = prepared(query.vectors, about.metric)
        if query.per_slide:
            found = [self._one_per_slide(about, vector, k, expression) for vector in ready]
        else:
            found = self._found(about, ready, k, expression)
        answers = []
        for rows in found:
            kept = [row for row in rows if least is None or row[0] >= least][:k]
            hits = [_hit(about, score, row) for score, row in kept]
            answers.append([hit._replace(rank=rank) for rank, hit in enumerate(hits, start=1)])
        return answers

    def assign(self, queries: NDArray[np.float32], name: str | None = None) -> list[dict[str, Any]]:
        """Assign new vectors (Q, D) to the pushed clusters; see ``Atlas.assign``.

        Raises:
            BadInput: the collection has no such clustering, or it was too large to push.
        """
        about = self._ready(queries)
        known = json.loads(self._read_text(CLUSTERINGS) or "{}")
        name = name or about.clustering
        if name not in known:
            raise unknown_name("clustering that was pushed", name, known)
        made = known[name]
        clustering = Clustering.from_bytes(
            made["method"], base64.b64decode(made["npz"]), made["about"]
        )
        names = {int(cluster): text for cluster, text in made["names"].items()}
        return clustering.assign(queries).rows(names)

    def _ready(self, queries: NDArray[np.float32]) -> About:
        """Read the newest description of the collection, check the queries, and return it."""
        head = self._parts(0, 1).get(0)
        if head is None or json.loads(head)["sha256"] != self._seen:
            self.about = self._read_about()
        about = self.about
        if about is None or about.revision < 0:
            raise BadInput(
                f"{self.place.url} was not pushed to its end; run `histoseek index push` again"
            )
        if queries.ndim != 2 or queries.shape[1] != about.dim:
            raise Mismatch(
                f"queries have shape {queries.shape}; expected vectors of length {about.dim}"
            )
        if not np.isfinite(queries).all():
            raise BadInput("queries hold NaN or infinity; embed the images again")
        return about

    def _found(
        self, about: About, ready: NDArray[np.float32], k: int, expression: str
    ) -> list[list[Row]]:
        fields = ["x", "y", "cluster", "file", *(f"c{n}" for n in range(len(about.columns)))]
        metric = "COSINE" if about.metric == "cosine" else "L2"
        with _calls(self.place):
            results = self._client.search(
                self.place.collection,
                data=list(ready),
                limit=k,
                filter=expression,
                output_fields=fields,
                search_params={"metric_type": metric},
            )
        return [[(_score(about, row["distance"]), row) for row in rows] for rows in results]

    def _one_per_slide(
        self, about: About, vector: NDArray[np.float32], k: int, expression: str
    ) -> list[Row]:
        """Return the best tile of each of the k nearest slides."""
        column = f"c{list(about.columns).index('slide')}"
        best: dict[int, Row] = {}
        ask = min(LIMIT, 8 * k)
        while len(best) < k:
            others = f"{column} not in {sorted(best)}" if best else ""
            both = " and ".join(f"({part})" for part in (expression, others) if part)
            (rows,) = self._found(about, vector[None], ask, both)
            for score, row in rows:
                if len(best) < k:
                    best.setdefault(row["entity"][column], (score, row))
            if len(rows) < ask:
                break
            ask = min(LIMIT, 4 * ask)
        return list(best.values())


def _score(about: About, distance: float) -> float:
    return distance if about.metric == "cosine" else -float(np.sqrt(max(distance, 0.0)))


def _hit(about: About, score: float, row: Mapping[str, Any]) -> Hit:
    entity = row["entity"]
    order = list(about.columns)

    def name(column: str) -> str | None:
        code = entity[f"c{order.index(column)}"]
        return None if code == MISSING else about.columns[column][code]

    _, _, size, mpp, *scale = about.slides[entity[f"c{order.index('slide')}"]]
    return Hit(
        0,
        round(score, 6),
        row["tile"],
        name("slide") or "",
        entity["x"],
        entity["y"],
        size,
        mpp,
        name("label"),
        name("patient"),
        None if entity["cluster"] == NOT_PLACED else entity["cluster"],
        entity["file"] or None,
        scale[0] if scale else None,
    )


def _numbers(known: list[str], names: Sequence[str]) -> NDArray[np.int64]:
    """Return the number of each name in the collection's list, after adding new names; -1 at the end."""
    number = {name: n for n, name in enumerate(known)}
    for name in names:
        if name not in number:
            number[name] = len(known)
            known.append(name)
    return np.array([*(number[name] for name in names), MISSING], dtype=np.int64)


def _seal(view: View, slide: Mapping[str, Any]) -> str:
    """Return a checksum of everything that a push sends for a slide."""
    digest = hashlib.blake2b(slide[SEAL] + slide["tiles_seal"], digest_size=8)
    digest.update(view.columns.placement(slide["id"]))
    return digest.hexdigest()


def _clusterings(view: View) -> dict[str, dict[str, Any]]:
    """Return the clusterings that can be read and are not too large, JSON-ready."""
    found: dict[str, dict[str, Any]] = {}
    for fitted in view.clusterings():
        with suppress(Damaged):
            name, clustering = view.clustering(fitted)
            blob = clustering.to_bytes()
            if len(blob) <= CLUSTERING_BYTES:
                found[name] = {
                    "method": clustering.method,
                    "about": clustering.about,
                    "names": view.cluster_names(name),
                    "npz": base64.b64encode(blob).decode(),
                }
    return found


def push(
    atlas: Atlas,
    url: str,
    index: str | None = None,
    progress: Report = lambda done, total, text: None,
) -> dict[str, Any]:
    """Copy an atlas to Milvus; only what changed since the last push.

    Args:
        atlas: to copy.
        url: see :func:`parse_url`.
        index: Milvus's index type for a new collection: FLAT (exact), AUTOINDEX, HNSW, …; None takes FLAT
            up to 100,000 tiles, else AUTOINDEX.
        progress: called after each slide.

    Returns:
        A summary of what was copied.

    Raises:
        Mismatch: the collection belongs to another encoder or atlas.
        Unavailable: Milvus does not answer.
    """
    engine = MilvusAtlas(url, must_exist=False)
    try:
        return engine.push(atlas, index, progress)
    finally:
        engine.close()
