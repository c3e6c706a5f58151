"""The atlas on Milvus: the same search, distributed over several machines.

``push`` copies tiles to a collection and skips unchanged slides, so an interrupted push is completed by
repeating it. Repeated values (slide, label, patient, metadata) are stored as numbers; a second collection
holds their names. So a filter becomes lists of numbers, and no text of a user gets into a Milvus
expression. (Filter templates would do the same for texts, but Milvus Lite 3.2 does not read them.)
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import BadInput, Mismatch, MissingPart, unknown_name
from ..clusters.clustering import Clustering
from ..search.columns import NOT_PLACED
from ..search.filters import Every, notes_of, parse, without_fields
from ..search.query import Query
from ..store.packing import MISSING
from ..store.rows import Hit
from ..vectors.scan import prepared
from .milvus_address import TIMEOUT_S, TOKEN, calls, parse_url
from .milvus_filter import FORMAT, About, expression_of

Row = tuple[float, Mapping[str, Any]]
"""A score, and a row as Milvus returns it."""
LIMIT = 16_384
"""Maximum number of hits of one Milvus search."""
TEXT = 60_000
"""Maximum bytes of one text field; Milvus allows 65,535."""
SLOT = 1_000_000
"""Maximum number of parts of one text in the second collection; part 0 holds their number and hash."""
FACTS, CLUSTERINGS = 0, 1


class MilvusAtlas:
    """A pushed atlas; it offers search and assign like :class:`~histoseek.index.atlas.Atlas`."""

    def __init__(self, url: str, must_exist: bool = True) -> None:
        """Connect to an address (see :func:`parse_url`).

        Raises:
            BadInput: the collection does not exist although it must, or a newer histoseek wrote it.
            MissingPart: pymilvus is not installed.
            Unavailable: Milvus does not answer.
        """
        try:
            from pymilvus import MilvusClient
        except ImportError as error:
            raise MissingPart("Milvus needs pymilvus: pip install 'histoseek[milvus]'") from error
        for name in ("pymilvus", "milvus_lite"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # they also raise what they log
        self.address = parse_url(url)
        with calls(self.address):
            self.client: Any = MilvusClient(
                self.address.uri, token=os.environ.get(TOKEN, ""), timeout=TIMEOUT_S
            )
            exists = self.client.has_collection(self.facts)
            for name in (self.facts, self.address.collection) if exists else ():
                if self.client.has_collection(name):
                    self.client.load_collection(name)  # Milvus Lite forgets that when it is killed
        self._seen = ""
        self.about: About | None = self._read_about() if exists else None
        if must_exist and not exists:
            raise BadInput(f"{url} contains no atlas; run `histoseek index push ATLAS {url}` first")

    def close(self) -> None:
        """Disconnect."""
        self.client.close()

    @property
    def facts(self) -> str:
        """Name of the second collection, which describes the first."""
        return f"{self.address.collection}_about"

    def _parts(self, first: int, last: int) -> dict[int, str]:
        with calls(self.address):
            rows = self.client.query(
                self.facts,
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
        summary = json.loads(head)
        end = start + 1 + summary["parts"]
        parts: dict[int, str] = {}
        step = LIMIT // 2
        for first in range(start + 1, end, step):
            parts |= self._parts(first, min(first + step, end))
        text = "".join(parts[part] for part in sorted(parts))
        return text if _sha256(text) == summary["sha256"] else None

    def write_text(self, slot: int, text: str) -> None:
        """Write an ASCII text (a part has as many bytes as characters): its parts, then their summary."""
        parts = [text[at : at + TEXT] for at in range(0, len(text), TEXT)]
        summary = json.dumps({"parts": len(parts), "sha256": _sha256(text)})
        rows = [
            {"part": slot * SLOT + n, "text": part, "none": [0.0, 0.0]}
            for n, part in enumerate([summary, *parts])
        ]
        with calls(self.address):
            for at in range(1, len(rows), 50):
                self.client.upsert(self.facts, rows[at : at + 50])
            self.client.upsert(self.facts, rows[:1])

    def _read_about(self) -> About | None:
        text = self._read_text(FACTS)
        if text is None:
            return None
        record = json.loads(text)
        if record["format"] > FORMAT:
            raise BadInput(
                f"{self.address.url} has format {record['format']}; this histoseek reads formats up to "
                f"{FORMAT}: install a newer histoseek"
            )
        record["slides"] = {int(code): slide for code, slide in record["slides"].items()}
        self._seen = _sha256(text)
        return About(**record)

    def write_about(self, about: About) -> None:
        """Replace the description of the collection."""
        text = json.dumps(about.__dict__)
        self.write_text(FACTS, text)
        self._seen, self.about = _sha256(text), about

    def search(self, query: Query) -> list[list[Hit]]:
        """Return the most similar tiles of each vector of a query; see ``View.search``.

        Raises:
            BadInput: the query has tiles or combines examples, asks for more than 16,384 hits, filters by
                file name, or sets ``exact`` on an index other than FLAT.
            Unavailable: Milvus does not answer.
        """
        if query.tiles or query.combines or query.vectors is None:
            raise BadInput(
                "Milvus cannot search by tiles of the atlas or by combined examples; leave out --engine"
            )
        k, where, least = query.k, query.where, query.least
        about = self._ready(query.vectors)
        if k > LIMIT:
            raise BadInput(f"k is {k}; Milvus returns at most {LIMIT} hits")
        if about.index != "FLAT" and (query.exact or least is not None):
            raise BadInput(
                f"the collection has index {about.index}; exact search and --least need index FLAT"
            )
        parts = [without_fields(parse(where), query.absent)] if where and where.strip() else []
        parts += [] if query.also is None else [query.also]
        expression = expression_of(about, Every(tuple(parts))) if parts else ""
        ready = prepared(query.vectors, about.metric)
        if query.per_slide:
            answers = [self._one_per_slide(about, vector, k, expression) for vector in ready]
        else:
            answers = self._nearest(about, ready, k, expression)
        near = [[row for row in rows if least is None or row[0] >= least] for rows in answers]
        return [
            [_hit(about, rank, score, row) for rank, (score, row) in enumerate(rows, start=1)]
            for rows in near
        ]

    def assign(self, queries: NDArray[np.float32], name: str | None = None) -> list[dict[str, Any]]:
        """Assign new vectors (Q, D) to the pushed clusters; see ``Atlas.assign``.

        Raises:
            BadInput: the collection has no such clustering, or it was too large to push.
        """
        about = self._ready(queries)
        pushed = json.loads(self._read_text(CLUSTERINGS) or "{}")
        name = name or about.clustering
        if name not in pushed:
            raise unknown_name("clustering in Milvus", name, pushed)
        record = pushed[name]
        blob = base64.b64decode(record["npz"])
        clustering = Clustering.from_bytes(record["method"], blob, record["about"])
        names = {int(cluster): text for cluster, text in record["names"].items()}
        return clustering.assign(queries).rows(names)

    def filter_notes(self, where: str | None) -> list[str]:
        """Return what a filter leaves out without a word; see ``View.notes``."""
        if self.about is None or where is None or not where.strip():
            return []
        return notes_of(self.about.columns.get, parse(where))

    def newest(self) -> About:
        """Return the newest description of the collection.

        Raises:
            BadInput: the last push did not finish.
            Unavailable: Milvus does not answer.
        """
        head = self._parts(0, 1).get(0)
        if head is None or json.loads(head)["sha256"] != self._seen:
            self.about = self._read_about()
        about = self.about
        if about is None or about.revision < 0:
            raise BadInput(
                f"the last push to {self.address.url} did not finish; run `histoseek index push` again"
            )
        return about

    def _ready(self, queries: NDArray[np.float32]) -> About:
        """Return the newest description of the collection, after a check of the queries."""
        about = self.newest()
        if queries.ndim != 2 or queries.shape[1] != about.dim:
            raise Mismatch(
                f"queries have shape {queries.shape}; expected vectors of length {about.dim}"
            )
        if not np.isfinite(queries).all():
            raise BadInput("the queries contain NaN or infinity; embed the images again")
        return about

    def _nearest(
        self, about: About, ready: NDArray[np.float32], k: int, expression: str
    ) -> list[list[Row]]:
        fields = ["x", "y", "cluster", "file", *(f"c{n}" for n in range(len(about.columns)))]
        metric = "COSINE" if about.metric == "cosine" else "L2"
        with calls(self.address):
            results = self.client.search(
                self.address.collection,
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
        """Return the best tile of each of the k nearest slides.

        Milvus's ``group_by_field`` returns too few slides if one slide has thousands of near tiles.
        """
        column = about.field_of("slide")
        best: dict[int, Row] = {}
        limit = min(LIMIT, 8 * k)
        while len(best) < k:
            others = f"{column} not in {sorted(best)}" if best else ""
            both = " and ".join(f"({part})" for part in (expression, others) if part)
            (rows,) = self._nearest(about, vector[None], limit, both)
            for score, row in rows:
                if len(best) < k:
                    best.setdefault(row["entity"][column], (score, row))
            if len(rows) < limit:
                break
            limit = min(LIMIT, 4 * limit)
        return list(best.values())


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _score(about: About, distance: float) -> float:
    return distance if about.metric == "cosine" else -float(np.sqrt(max(distance, 0.0)))


def _hit(about: About, rank: int, score: float, row: Mapping[str, Any]) -> Hit:
    entity = row["entity"]

    def name(column: str) -> str | None:
        code = entity[about.field_of(column)]
        return None if code == MISSING else about.columns[column][code]

    _, _, size, mpp, *scale = about.slides[entity[about.field_of("slide")]]
    return Hit(
        rank,
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
