"""The atlas on Milvus: the same search over as many machines as it takes.

``push`` copies tiles to a collection; what is there already and did not change is left alone, so a push
that was cut off is finished by repeating it. Values that repeat (slide, label, patient, metadata) are
stored as numbers, with their names in a second collection: a filter becomes lists of numbers, and no text
of a person ever stands in a Milvus expression.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
from numpy.typing import NDArray

from ..console import Report
from ..errors import BadInput, Mismatch, MissingPart, Unavailable, unknown_name
from .columns import NOT_PLACED
from .filters import Compare, Every, Filter, Not, holds, parse
from .records import Hit
from .search import Wanted
from .tile_table import MISSING, SEAL
from .vectors import prepared

if TYPE_CHECKING:
    from .atlas import Atlas
    from .generations import View

TOKEN = "HISTOSEEK_MILVUS_TOKEN"
COLLECTION = "histoseek"
FORMAT = 1
BATCH_VALUES = 250_000
"""Coordinates sent in one request (1 MB)."""
LIMIT = 16_384
"""Hits that Milvus gives at most."""
TEXT = 60_000
FLAT_UP_TO = 100_000
TIMEOUT_S = 60
SEALED_TOGETHER = 100
"""Slides after which a push notes what is done; as many are sent again after a kill."""


@dataclass
class About:
    """What the second collection says of the first.

    Attributes:
        encoder: name of the encoder.
        sha256: its identity.
        dim: D.
        metric: cosine or l2.
        revision: of the atlas when it was pushed.
        clustering: whose clusters hits show; "" for none.
        index: type of Milvus's index.
        columns: names of the numbers of each column; their order never changes.
        slides: by number of the slide's name: id, seal, size_px_level0 and mpp.
    """

    encoder: str
    sha256: str
    dim: int
    metric: str
    revision: int = -1
    clustering: str = ""
    index: str = "FLAT"
    columns: dict[str, list[str]] = field(default_factory=dict)
    slides: dict[int, list[Any]] = field(default_factory=dict)
    format: int = FORMAT


@dataclass(frozen=True)
class Place:
    """Where a collection is.

    Attributes:
        uri: as pymilvus takes it.
        collection: its name.
        url: as it was given.
    """

    uri: str
    collection: str
    url: str


def parse_url(url: str) -> Place:
    """Read ``milvus://host:19530/collection``, ``milvus+https://…``, or ``milvus:///folder/file.db``.

    The last is Milvus Lite, a file on this machine; ``?collection=`` names another collection in it.

    Raises:
        BadInput: another kind of address.
    """
    parts = urlsplit(url)
    expected = (
        "expected milvus://host:19530/collection, or milvus:///folder/file.db for Milvus Lite"
    )
    if parts.scheme not in {"milvus", "milvus+https"} or parts.username or parts.password:
        raise BadInput(f"{url!r} is no address of Milvus; {expected}; a token goes into {TOKEN}")
    if not parts.hostname:
        if not parts.path.endswith(".db"):
            raise BadInput(f"{url!r} names no host and no .db file; {expected}")
        collection = parse_qs(parts.query).get("collection", [COLLECTION])[0]
        uri = parts.path
    else:
        collection = parts.path.strip("/") or COLLECTION
        scheme = "https" if parts.scheme.endswith("https") else "http"
        uri = f"{scheme}://{parts.hostname}:{parts.port or 19530}"
    if not re.fullmatch(r"[A-Za-z_]\w{0,200}", collection):
        raise BadInput(f"collection {collection!r}: expected letters, digits and _ only")
    return Place(uri, collection, url)


@contextmanager
def _calls(place: Place) -> Iterator[None]:
    """Turn what pymilvus raises into our errors."""
    from pymilvus.exceptions import MilvusException

    try:
        yield
    except (MilvusException, ConnectionError, TimeoutError) as error:
        text = str(getattr(error, "message", error)).splitlines()[0][:300]
        raise Unavailable(
            f"Milvus at {place.url} did not do what was asked ({text}); see that it runs and that {TOKEN} "
            "is right, then run the same command again"
        ) from error


class MilvusAtlas:
    """A pushed atlas, open for search; the methods are those of :class:`~histoseek.index.atlas.Atlas`."""

    def __init__(self, url: str, must_exist: bool = True) -> None:
        """Connect.

        Args:
            url: see :func:`parse_url`.
            must_exist: whether the collection has to be there already.

        Raises:
            BadInput: no such collection, or one of a newer histoseek.
            MissingPart: pymilvus is not installed.
            Unavailable: Milvus does not answer.
        """
        try:
            from pymilvus import MilvusClient
        except ImportError as error:
            raise MissingPart("Milvus needs pymilvus: pip install 'histoseek[milvus]'") from error
        for name in ("pymilvus", "milvus_lite"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # they log what they also raise
        self.place = parse_url(url)
        with _calls(self.place):
            self._client: Any = MilvusClient(
                self.place.uri, token=os.environ.get(TOKEN, ""), timeout=TIMEOUT_S
            )
            there = self._client.has_collection(self._facts)
            for name in (self._facts, self.place.collection) if there else ():
                self._client.load_collection(name)  # Milvus Lite forgets that when it is killed
        self.about = self._read_about() if there else None
        if must_exist and self.about is None:
            raise BadInput(f"{url} holds no atlas; run `histoseek index push ATLAS {url}` first")

    def close(self) -> None:
        """Disconnect."""
        self._client.close()

    @property
    def _facts(self) -> str:
        return f"{self.place.collection}_about"

    # -- what the collection says of itself ---------------------------------------------------

    def _read_about(self) -> About | None:
        with _calls(self.place):
            rows = self._client.query(
                self._facts, filter="part >= 0", output_fields=["part", "text"], limit=LIMIT
            )
        if not rows:
            return None
        text = "".join(row["text"] for row in sorted(rows, key=lambda row: row["part"]))
        known = json.loads(text)
        if known["format"] > FORMAT:
            raise BadInput(
                f"{self.place.url} has format {known['format']}; this histoseek knows {FORMAT}: upgrade it"
            )
        known["slides"] = {int(n): slide for n, slide in known["slides"].items()}
        return About(**known)

    def _write_about(self, about: About) -> None:
        text = json.dumps(
            about.__dict__
        )  # only ASCII, so that a piece has as many bytes as characters
        pieces = [text[at : at + TEXT] for at in range(0, len(text), TEXT)]
        rows = [{"part": n, "text": piece, "none": [0.0, 0.0]} for n, piece in enumerate(pieces)]
        with _calls(self.place):
            self._client.upsert(self._facts, rows)
            self._client.delete(self._facts, filter=f"part >= {len(pieces)}")
        self.about = about

    def _create(self, about: About, fields: Sequence[str]) -> None:
        from pymilvus import DataType

        client = self._client
        metric = "COSINE" if about.metric == "cosine" else "L2"
        with _calls(self.place):
            facts = client.create_schema(auto_id=False, enable_dynamic_field=False)
            facts.add_field("part", DataType.INT64, is_primary=True)
            facts.add_field("text", DataType.VARCHAR, max_length=TEXT + 1)
            facts.add_field("none", DataType.FLOAT_VECTOR, dim=2)
            flat = client.prepare_index_params()
            flat.add_index("none", index_type="FLAT", metric_type="L2")
            tiles = client.create_schema(auto_id=False, enable_dynamic_field=False)
            tiles.add_field("tile", DataType.INT64, is_primary=True)
            tiles.add_field("vector", DataType.FLOAT_VECTOR, dim=about.dim)
            for name in ("slide_id", "x", "y", "cluster", *fields):
                tiles.add_field(name, DataType.INT64)
            tiles.add_field("file", DataType.VARCHAR, max_length=TEXT)
            index = client.prepare_index_params()
            index.add_index("vector", index_type=about.index, metric_type=metric)
            strong = {"consistency_level": "Strong"}
            client.create_collection(
                self.place.collection, schema=tiles, index_params=index, **strong
            )
            client.create_collection(self._facts, schema=facts, index_params=flat, **strong)

    # -- pushing --------------------------------------------------------------------------------

    def push(
        self, atlas: Atlas, index: str | None, progress: Report = lambda done, total, text: None
    ) -> dict[str, Any]:
        """Copy what changed of an atlas; see :func:`push`."""
        view = atlas.view()
        manifest = atlas.manifest
        columns = view.columns
        names = columns.names()
        about = self.about
        if about is None:
            kind = index or ("FLAT" if len(view.index) <= FLAT_UP_TO else "AUTOINDEX")
            about = About(manifest.name, manifest.sha256, manifest.dim, manifest.metric, index=kind)
            about.columns = {name: [] for name in names}
            self._create(about, [f"c{n}" for n in range(len(names))])
            self._write_about(about)
        elif about.sha256 != manifest.sha256:
            raise Mismatch(
                f"{self.place.url} holds embeddings of encoder {about.encoder!r} ({about.sha256[:12]}), "
                f"the atlas is bound to {manifest.name!r} ({manifest.sha256[:12]}); choose another "
                "collection"
            )
        elif missing := [name for name in names if name not in about.columns]:
            raise BadInput(
                f"the atlas has new columns {', '.join(missing)}, which the collection lacks; push to "
                "another collection, then drop the old one"
            )
        seals = _seals(atlas, columns.newest)
        slides = [s for s in columns.slides if s["name"]]
        pushed = {slide[0]: (slide[1], number) for number, slide in about.slides.items()}
        gone = [number for number in pushed if number not in {s["id"] for s in slides}]
        changed = [s for s in slides if pushed.get(s["id"], ("", 0))[0] != seals[s["id"]]]
        about.revision = -1  # not whole until the end
        for number in gone:
            del about.slides[pushed[number][1]]
        # Names go before the tiles that use them, a slide's seal after: a push may end anywhere.
        numbers = {name: _numbers(about.columns[name], columns.coded(name).names) for name in names}
        codes = {slide["id"]: about.columns["slide"].index(slide["name"]) for slide in changed}
        for slide in changed:
            facts = [slide["id"], "", slide["size_px_level0"], slide["mpp"]]
            about.slides[codes[slide["id"]]] = facts
        self._write_about(about)
        for number in gone:
            with _calls(self.place):
                self._client.delete(self.place.collection, filter=f"slide_id == {number}")
        for done, slide in enumerate(changed, start=1):
            self._push_slide(atlas, view, numbers, slide)
            about.slides[codes[slide["id"]]][1] = seals[slide["id"]]
            if done % SEALED_TOGETHER == 0:
                self._write_about(about)
            progress(done, len(changed), slide["name"])
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

    def _push_slide(
        self,
        atlas: Atlas,
        view: View,
        numbers: dict[str, NDArray[np.int64]],
        slide: Mapping[str, Any],
    ) -> None:
        columns, about = view.columns, self.about
        assert about is not None
        number = next(n for n, s in enumerate(columns.slides) if s["id"] == slide["id"])
        rows = np.arange(columns.starts[number], columns.starts[number + 1])
        codes = {
            f"c{n}": numbers[name][columns.coded(name).codes[rows]].tolist()
            if name in numbers
            else [MISSING] * len(rows)
            for n, name in enumerate(about.columns)
        }
        vectors = prepared(atlas.generations.vectors_of(slide), atlas.manifest.metric)
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
        queries: NDArray[np.float32],
        k: int = 10,
        where: str | None = None,
        least: float | None = None,
        per_slide: bool = False,
        exact: bool = False,
    ) -> list[list[Hit]]:
        """Return the k most similar tiles of each query; see ``Atlas.search``.

        Raises:
            BadInput: also more than 16,384 hits, a filter by file name, or ``exact`` on another index than
                FLAT.
            Unavailable: Milvus does not answer.
        """
        wanted = Wanted(k, where, least, per_slide, exact)
        about = self._ready(queries)
        if k > LIMIT:
            raise BadInput(f"k is {k}; Milvus gives at most {LIMIT} hits")
        if exact and about.index != "FLAT":
            raise BadInput(f"the collection has index {about.index}; exact search needs FLAT")
        expression = expression_of(about, parse(where)) if where and where.strip() else ""
        ready = prepared(queries, about.metric)  # type: ignore[arg-type]
        ask = min(LIMIT, 8 * k) if per_slide else k
        found = self._found(ready, ask, expression)
        answers = []
        for query, hits in zip(ready, found, strict=True):
            kept = _kept(hits, wanted)
            more = ask
            while per_slide and len(kept) < k and len(hits) == more and more < LIMIT:
                more = min(LIMIT, 4 * more)
                (hits,) = self._found(query[None], more, expression)
                kept = _kept(hits, wanted)
            answers.append([hit._replace(rank=rank) for rank, hit in enumerate(kept, start=1)])
        return answers

    def _ready(self, queries: NDArray[np.float32]) -> About:
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

    def _found(self, ready: NDArray[np.float32], k: int, expression: str) -> list[list[Hit]]:
        about = self.about
        assert about is not None
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
        return [[self._hit(about, row) for row in rows] for rows in results]

    def _hit(self, about: About, row: Mapping[str, Any]) -> Hit:
        entity = row["entity"]
        order = list(about.columns)

        def name(column: str) -> str | None:
            code = entity[f"c{order.index(column)}"]
            return None if code == MISSING else about.columns[column][code]

        _, _, size, mpp = about.slides[entity[f"c{order.index('slide')}"]]
        score = float(row["distance"])
        if about.metric == "l2":
            score = -float(np.sqrt(max(score, 0.0)))
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
        )


def _kept(hits: list[Hit], wanted: Wanted) -> list[Hit]:
    seen: set[str] = set()
    kept = []
    for hit in hits:
        low = wanted.least is not None and hit.score < wanted.least
        if not low and not (wanted.per_slide and hit.slide in seen):
            seen.add(hit.slide)
            kept.append(hit)
    return kept[: wanted.k]


def _numbers(known: list[str], names: Sequence[str]) -> NDArray[np.int64]:
    """Return the number of each name in the collection's own list, which grows; the last is of no name."""
    number = {name: n for n, name in enumerate(known)}
    for name in names:
        if name not in number:
            number[name] = len(known)
            known.append(name)
    return np.array([*(number[name] for name in names), MISSING], dtype=np.int64)


def _seals(atlas: Atlas, clustering: str | None) -> dict[int, str]:
    """Return a checksum of everything that a push sends of each slide."""
    found = {}
    for row in atlas.catalog.rows(
        f"SELECT s.id, s.{SEAL} AS one, t.{SEAL} AS two FROM slides AS s "
        "JOIN slide_tiles AS t ON t.slide_id = s.id"
    ):
        found[row["id"]] = hashlib.blake2b(row["one"] + row["two"], digest_size=8)
    for row in atlas.catalog.rows(
        f"SELECT p.slide_id, p.{SEAL} AS one FROM placements AS p "
        "JOIN clusterings AS c ON c.id = p.clustering_id WHERE c.name = ?",
        (clustering or "",),
    ):
        found[row["slide_id"]].update(row["one"])
    return {number: digest.hexdigest() for number, digest in found.items()}


def expression_of(about: About, wanted: Filter) -> str:
    """Return a filter as a Milvus expression, in which there are only field names and numbers.

    Raises:
        BadInput: a field that the collection does not have, or cannot filter by.
    """
    if isinstance(wanted, Not):
        return f"not ({expression_of(about, wanted.part)})"
    if not isinstance(wanted, Compare):
        word = " and " if isinstance(wanted, Every) else " or "
        return word.join(f"({expression_of(about, part)})" for part in wanted.parts)
    if wanted.field in {"x", "y", "tile"} or wanted.field == "cluster":
        return _number_expression(wanted)
    if wanted.field == "mpp":
        numbers = [
            number
            for number, (_, _, _, mpp) in about.slides.items()
            if holds(None if mpp is None else repr(float(mpp)), wanted)
        ]
        return f"c{list(about.columns).index('slide')} in {numbers}"
    if wanted.field not in about.columns:
        raise unknown_name("field of the Milvus collection", wanted.field, about.columns)
    names = about.columns[wanted.field]
    passing = [number for number, name in enumerate(names) if holds(name, wanted)]
    passing += [MISSING] * holds(None, wanted)
    return f"c{list(about.columns).index(wanted.field)} in {passing}"


def _number_expression(wanted: Compare) -> str:
    if any(isinstance(value, str) for value in wanted.values):
        raise BadInput(f"{wanted.field} is a number; the filter compares it with {wanted.values}")
    missing = f"{wanted.field} == {NOT_PLACED}" if wanted.field == "cluster" else "tile < 0"
    if wanted.operator in {"is null", "is not null"}:
        return missing if wanted.operator == "is null" else f"not ({missing})"
    numbers = [float(value) for value in wanted.values]
    if wanted.operator in {"in", "not in"}:
        whole = [int(value) for value in numbers if value.is_integer()]
        inside = f"{wanted.field} in {whole}"
        return inside if wanted.operator == "in" else f"not ({inside})"
    if wanted.operator in {"like", "not like"}:
        raise BadInput(f"{wanted.field} is a number; {wanted.operator!r} is for texts")
    sign = {"=": "==", "!=": "!="}.get(wanted.operator, wanted.operator)
    compared = f"{wanted.field} {sign} {numbers[0]!r}"
    return compared if wanted.operator == "!=" else f"({compared}) and not ({missing})"


def push(
    atlas: Atlas,
    url: str,
    index: str | None = None,
    progress: Report = lambda done, total, text: None,
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
        return engine.push(atlas, index, progress)
    finally:
        engine.close()
