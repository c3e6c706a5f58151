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
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import BadInput, Mismatch, MissingPart, unknown_name
from ..clusters.clustering import Clustering
from ..search.columns import NOT_PLACED
from ..search.filters import parse
from ..search.query import Query
from ..store.packing import MISSING
from ..store.rows import Hit
from ..vectors.scan import prepared
from .milvus_address import TIMEOUT_S, TOKEN, calls, parse_url
from .milvus_filter import FORMAT, About, Row, expression_of

LIMIT = 16_384
"""Maximum number of hits of one Milvus search."""
TEXT = 60_000
SLOT = 1_000_000
"""Maximum number of parts of one text in the second collection; part 0 holds their number and hash."""
FACTS, CLUSTERINGS = 0, 1


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
        with calls(self.place):
            self.client: Any = MilvusClient(
                self.place.uri, token=os.environ.get(TOKEN, ""), timeout=TIMEOUT_S
            )
            there = self.client.has_collection(self.facts)
            for name in (self.facts, self.place.collection) if there else ():
                if self.client.has_collection(name):
                    self.client.load_collection(name)  # Milvus Lite forgets that when it is killed
        self._seen = ""
        self.about: About | None = self._read_about() if there else None
        if must_exist and not there:
            raise BadInput(f"{url} holds no atlas; run `histoseek index push ATLAS {url}` first")

    def close(self) -> None:
        """Disconnect."""
        self.client.close()

    @property
    def facts(self) -> str:
        """Name of the second collection, which describes the first."""
        return f"{self.place.collection}_about"

    # -- texts in the second collection --------------------------------------------------------

    def _parts(self, first: int, last: int) -> dict[int, str]:
        with calls(self.place):
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
        known = json.loads(head)
        found: dict[int, str] = {}
        step = LIMIT // 2
        for first in range(start + 1, start + 1 + known["parts"], step):
            found |= self._parts(first, min(first + step, start + 1 + known["parts"]))
        text = "".join(found[part] for part in sorted(found))
        if hashlib.sha256(text.encode()).hexdigest() != known["sha256"]:
            return None
        return text

    def write_text(self, slot: int, text: str) -> None:
        """Write a text: its pieces first, then the part that says which they are."""
        start = slot * SLOT
        pieces = [text[at : at + TEXT] for at in range(0, len(text), TEXT)]
        head = json.dumps(
            {"parts": len(pieces), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        )
        rows = [{"part": start + n, "text": p, "none": [0.0, 0.0]} for n, p in enumerate(pieces, 1)]
        with calls(self.place):
            for at in range(0, len(rows), 50):
                self.client.upsert(self.facts, rows[at : at + 50])
            self.client.upsert(self.facts, [{"part": start, "text": head, "none": [0.0, 0.0]}])

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

    def write_about(self, about: About) -> None:
        """Replace what the collection says of itself."""
        # Only ASCII, so that a piece has as many bytes as characters.
        text = json.dumps(about.__dict__)
        self.write_text(FACTS, text)
        self._seen, self.about = hashlib.sha256(text.encode()).hexdigest(), about

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
        with calls(self.place):
            results = self.client.search(
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
