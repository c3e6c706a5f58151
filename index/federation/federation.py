"""A federation: several atlases of one encoder, searched as if they were one.

Each shard answers exactly as it would alone, and the answers are merged by score. A slide or a patient with
the same name in two shards is the same slide or patient, as in one atlas. A shard that cannot be opened, or
does not answer in time, is named in the answer; the others are searched.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...errors import BadInput, Mismatch, NotFound, Unavailable, unknown_name
from ..atlas import Atlas
from ..search.filters import Compare, Every, Filter, Some, fields_of, parse
from ..search.query import Query
from ..search.tiles import combined
from ..store.rows import Hit
from ..store.scales import TOLERANCE
from .asking import ANY, Asking
from .shards import OF_ONE_ATLAS, AtlasShard, Facts, Shard, named, other_encoder

TIMEOUT_S = 10.0


class Example(NamedTuple):
    """A tile of a shard."""

    atlas: str
    tile: int


class Found(NamedTuple):
    """A hit of a federation.

    Attributes:
        atlas: name of the shard.
        hit: as the shard returned it, with its rank among the hits of all shards.
    """

    atlas: str
    hit: Hit

    def as_dict(self) -> dict[str, Any]:
        """Return the hit as JSON."""
        return {"atlas": self.atlas, **self.hit._asdict()}


class Searched(NamedTuple):
    """What happened to a shard during a search.

    Attributes:
        atlas: its name.
        address: as the user gave it.
        revision: that was searched; None if the shard was away.
        tiles: number of its tiles; None if it is not known.
        scales: smallest and largest µm per pixel of its tiles; None if it is not known.
        away: why it was not searched; "" if it was.
    """

    atlas: str
    address: str
    revision: int | None
    tiles: int | None
    scales: tuple[float, float] | None
    away: str


@dataclass(frozen=True)
class Answer:
    """The answer of a federation.

    Attributes:
        hits: by example, best first; one list if the query combines its examples.
        shards: the shards that were asked, in the order of the federation.
        shared_slides: slides that several of the searched shards have, with the names of these shards.
    """

    hits: list[list[Found]]
    shards: list[Searched]
    shared_slides: dict[str, list[str]]

    @property
    def away(self) -> list[Searched]:
        """The shards that were not searched."""
        return [shard for shard in self.shards if shard.away]

    @property
    def mixed_scales(self) -> bool:
        """Whether the µm per pixel of the searched tiles differ by more than an atlas allows."""
        return mixed(self.shards)


def mixed(shards: Sequence[Searched]) -> bool:
    """Return whether the µm per pixel of the shards' tiles differ by more than an atlas allows."""
    known = [shard.scales for shard in shards if shard.scales and not shard.away]
    if not known:
        return False
    low, high = min(scale for scale, _ in known), max(scale for _, scale in known)
    return high > (1 + TOLERANCE) * low


class Federation:
    """Several atlases of one encoder, searched as one; safe to use from several threads.

    Attributes:
        shards: in the order in which they were given.
        strict: whether a shard of another encoder than the first one's raises an error; else it is away.
    """

    def __init__(self, atlases: Sequence[str | Path | Atlas], timeout_s: float = TIMEOUT_S) -> None:
        """Name the shards; each is opened at the first question.

        Args:
            atlases: folders of atlases, opened atlases, or Milvus collections as in ``index push``.
            timeout_s: time to wait for the answer of each shard to a question.

        Raises:
            BadInput: there is no atlas, one was given twice, or the timeout is out of range.
        """
        if not atlases:
            raise BadInput("no atlas was given; expected one or more")
        self.shards = named(atlases)
        self.strict = True
        self._asking = Asking(timeout_s)

    def close(self) -> None:
        """Disconnect from servers."""
        for shard in self.shards:
            shard.close()

    def facts(self, names: Sequence[str] | None = None) -> tuple[dict[str, Facts], dict[str, str]]:
        """Return facts of the shards that answer, and why the others do not, both by name.

        Args:
            names: of the shards to ask; all when None.

        Raises:
            NotFound: there is no shard of a name.
            Mismatch: two shards have different encoders.
            Unavailable: none of the shards answers.
        """
        asked = self._named(names)
        answers = self._asking.ask(asked, lambda shard: shard.facts(), away=ANY)
        away = dict(answers.away)
        known: dict[str, Facts] = {}
        for shard in asked:
            facts = answers.of.get(shard.name)
            if facts is None:
                continue
            first = next(iter(known), shard.name)
            problem = other_encoder(shard.name, facts, first, known.get(first, facts))
            if problem and self.strict:
                raise Mismatch(problem)
            if problem:
                away[shard.name] = problem
            else:
                known[shard.name] = facts
        if not known:
            raise _none_of(away)
        return known, away

    def _named(self, names: Sequence[str] | None) -> list[Shard]:
        """Return shards by name, in the order of the federation; all for None."""
        if names is None:
            return list(self.shards)
        every = {shard.name: shard for shard in self.shards}
        for name in names:
            if name not in every:
                raise unknown_name("atlas", name, every)
        return [shard for shard in self.shards if shard.name in set(names)]

    def an_atlas(self) -> Atlas:
        """Return the first atlas on disk that can be opened; it has the encoder of all.

        Raises:
            Unavailable: there is none.
        """
        away: dict[str, str] = {}
        for shard in self.shards:
            if isinstance(shard, AtlasShard):
                if not (reason := self._why_away(shard)):
                    return shard.atlas
                away[shard.name] = reason
        raise Unavailable(
            f"no atlas is a folder that can be opened ({_reasons(away) or 'all are in Milvus'}); name "
            "one, which has the encoder for images and texts"
        )

    def atlas(self, name: str) -> Atlas:
        """Return the atlas on disk of a shard.

        Raises:
            NotFound: there is no shard of that name, or it is a Milvus collection.
            Unavailable: it cannot be opened.
        """
        (shard,) = self._named([name])
        if not isinstance(shard, AtlasShard):
            raise NotFound(f"{name} is a Milvus collection, not an atlas on disk")
        if reason := self._why_away(shard):
            raise Unavailable(f"the atlas {name} cannot be read: {reason}")
        return shard.atlas

    def _why_away(self, shard: Shard) -> str:
        """Return why a shard cannot be opened; "" if it can."""
        return self._asking.ask([shard], lambda one: one.facts(), away=ANY).away.get(shard.name, "")

    def search(
        self,
        query: Query,
        tiles: Sequence[Example] = (),
        unlike_tiles: Sequence[Example] = (),
    ) -> Answer:
        """Return similar tiles of all shards: one list per vector and then per tile, best first.

        A query that combines its examples gets one list. Scores, filters, ``per_slide`` and ``leave_out``
        mean what they mean in one atlas that contains all shards.

        Args:
            query: with vectors; its ``tiles`` and ``unlike_tiles`` must be empty.
            tiles: examples to be like that are tiles of a shard.
            unlike_tiles: examples to be unlike.

        Raises:
            BadInput: the query has no example, has images or texts, or its filter is invalid or compares a
                field whose numbers mean something else in each atlas.
            NotFound: a tile, or the atlas of a tile, does not exist.
            Mismatch: two shards have different encoders, or vectors have another length.
            Unavailable: no shard answers, or that of an example does not.
        """
        if query.tiles or query.unlike_tiles:
            raise BadInput(
                "ids of tiles need the name of their atlas; pass tiles=[Example(atlas, id)]"
            )
        if query.images or query.unlike_images or query.by_text:
            raise BadInput(
                "the query's images or texts are not embedded; call Query.embedded first"
            )
        known, away = self.facts()
        check_filter(query.where, known, away)
        vectors, hits = self._examples(tiles, known, away)
        parts: list[Part] = []
        if query.combines or unlike_tiles:
            unlike, _ = self._examples(unlike_tiles, known, away)
            like, other = _joined(query.vectors, vectors), _joined(query.unlike_vectors, unlike)
            if not len(like):
                raise BadInput(
                    "the query has no example that hits should resemble; expected at least one"
                )
            metric = next(iter(known.values())).metric
            vector = combined(like, other, metric)  # type: ignore[arg-type]
            parts = [Part(vector[None], list(tiles), hits)]
        else:
            if query.vectors is not None and len(query.vectors):
                parts.append(Part(query.vectors))
            for example, vector, hit in zip(tiles, vectors, hits, strict=True):
                parts.append(Part(vector[None], [example], [hit]))
        if not parts:
            raise BadInput("the query has no example; give an image, or a tile of an atlas")
        return self._find(parts, query, known, away, self.shards)

    def search_near(
        self,
        vector: NDArray[np.float32],
        query: Query,
        tiles: Sequence[Example] = (),
        only: Sequence[str] | None = None,
    ) -> Answer:
        """Return the tiles near a vector (D,) that stands for all examples of a query; one list of hits.

        Args:
            vector: the vector.
            query: k, filter, what to leave out and so on; its examples are ignored.
            tiles: the examples that are tiles of a shard; they, their slides or patients are left out.
            only: names of the shards to search; all when None.

        Raises:
            BadInput: as for :meth:`search`.
            NotFound: a tile, or an atlas, does not exist.
            Mismatch: as for :meth:`search`.
            Unavailable: no shard answers, or that of an example does not.
        """
        chosen = self._named(only)
        names = {*(shard.name for shard in chosen), *(tile.atlas for tile in tiles)}
        known, away = self.facts(sorted(names))
        among = {name: facts for name, facts in known.items() if name in {s.name for s in chosen}}
        check_filter(query.where, among, away)
        _, hits = self._examples(tiles, known, away)
        part = Part(vector[None], tiles, hits)
        return self._find([part], query, known, away, chosen)

    def examples(self, tiles: Sequence[Example]) -> NDArray[np.float32]:
        """Return the vectors (T, D) of one or more tiles of the shards.

        Raises:
            BadInput: a tile is in Milvus.
            NotFound: a tile, or the atlas of a tile, does not exist.
            Unavailable: the atlas of a tile is away.
        """
        return self._examples(tiles, *self.facts([tile.atlas for tile in tiles]))[0]

    def _find(
        self,
        parts: Sequence[Part],
        query: Query,
        known: dict[str, Facts],
        away: dict[str, str],
        chosen: Sequence[Shard],
    ) -> Answer:
        """Ask some of the shards for all parts, and merge their answers."""
        names = [shard.name for shard in chosen if shard.name in known]
        fields = frozenset[str]().union(*(known[name].fields for name in names))

        def find(shard: Shard) -> list[tuple[list[list[Hit]], int]]:
            absent = fields - known[shard.name].fields
            return [shard.find(part.query_for(shard.name, query, absent)) for part in parts]

        answers = self._asking.ask([shard for shard in chosen if shard.name in known], find)
        if not answers.of:
            reasons = {s.name: {**away, **answers.away}[s.name] for s in chosen}
            raise _none_of(reasons)
        revisions = {name: of[0][1] for name, of in answers.of.items()}
        found: list[list[Found]] = []
        for number, part in enumerate(parts):
            for row in range(len(part.vectors)):
                of_shards = {
                    shard.name: part.kept(shard.name, answers.of[shard.name][number][0][row])
                    for shard in chosen if shard.name in answers.of
                }  # fmt: skip
                found.append(merged(of_shards, query.k, query.per_slide))
        shards = self._searched(chosen, known, {**away, **answers.away}, revisions)
        return Answer(found, shards, shared_slides({name: known[name] for name in revisions}))

    def status(self) -> Answer:
        """Return an answer without hits: which shards can be searched now.

        Raises:
            Mismatch: two shards have different encoders.
            Unavailable: none of the shards answers.
        """
        known, away = self.facts()
        revisions = {name: facts.revision for name, facts in known.items()}
        shards = self._searched(self.shards, known, away, revisions)
        return Answer([], shards, shared_slides(known))

    @staticmethod
    def _searched(
        shards: Sequence[Shard],
        known: dict[str, Facts],
        away: dict[str, str],
        revisions: dict[str, int],
    ) -> list[Searched]:
        return [
            Searched(
                shard.name, shard.address, revisions.get(shard.name),
                known[shard.name].tiles if shard.name in known else None,
                known[shard.name].scales if shard.name in known else None, away.get(shard.name, ""),
            )
            for shard in shards
        ]  # fmt: skip

    def _examples(
        self, examples: Sequence[Example], known: dict[str, Facts], away: dict[str, str]
    ) -> tuple[NDArray[np.float32], list[Hit]]:
        """Return the vectors (T, D) of tiles of the shards, and the tiles.

        Raises:
            NotFound: a tile, or the atlas of a tile, does not exist.
            Unavailable: the atlas of a tile is away.
        """
        dim = next(iter(known.values())).dim
        vectors = np.empty((len(examples), dim), dtype=np.float32)
        hits: dict[int, Hit] = {}
        shards = {shard.name: shard for shard in self.shards}
        for name in dict.fromkeys(example.atlas for example in examples):
            if name not in shards:
                raise unknown_name("atlas", name, shards)
            if name in away:
                raise Unavailable(
                    f"the atlas {name} of an example cannot be searched: {away[name]}"
                )
            rows = [n for n, example in enumerate(examples) if example.atlas == name]
            ids = [examples[n].tile for n in rows]
            answers = self._asking.ask([shards[name]], partial(_examples_of, ids=ids))
            if name in answers.away:
                raise Unavailable(
                    f"the atlas {name} of an example cannot be searched: {answers.away[name]}"
                )
            vectors[rows], tiles = answers.of[name]
            hits |= dict(zip(rows, tiles, strict=True))
        return vectors, [hits[n] for n in range(len(examples))]


def _examples_of(shard: Shard, ids: list[int]) -> tuple[NDArray[np.float32], list[Hit]]:
    return shard.examples(ids)


@dataclass(frozen=True)
class Part:
    """Vectors that are searched with the same exclusions.

    Attributes:
        vectors: (Q, D).
        tiles: the examples that the vectors stand for.
        hits: what is known of these examples: slide, patient.
    """

    vectors: NDArray[np.float32]
    tiles: Sequence[Example] = ()
    hits: Sequence[Hit] = ()

    def own(self, name: str) -> list[int]:
        """Return the ids of the examples that are tiles of a shard."""
        return [example.tile for example in self.tiles if example.atlas == name]

    def query_for(self, name: str, query: Query, absent: frozenset[str]) -> Query:
        """Return the question to a shard.

        Args:
            name: of the shard.
            query: of the federation.
            absent: fields of other shards that this one lacks.
        """
        k, own = query.k, self.own(name)
        left_out: Filter | None = None
        if query.leave_out == "tile" and not query.per_slide:
            k += len(own)  # the examples themselves are dropped from the answer
        elif query.leave_out == "tile":
            left_out = Compare("tile", "not in", tuple(map(float, own))) if own else None
        elif self.hits:
            left_out = _without(self.hits, query.leave_out)
        return Query(
            vectors=self.vectors, k=k, where=query.where, least=query.least, exact=query.exact,
            per_slide=query.per_slide, absent=absent, also=left_out,
        )  # fmt: skip

    def kept(self, name: str, hits: list[Hit]) -> list[Hit]:
        """Return hits of a shard without the examples themselves."""
        own = set(self.own(name))
        return [hit for hit in hits if hit.tile not in own]


def _without(hits: Sequence[Hit], leave_out: str) -> Filter:
    """Return a filter that leaves out the slides or patients of tiles; see :class:`Query`."""
    if leave_out == "slide":
        return _not_in("slide", (hit.slide for hit in hits))
    parts: list[Filter] = []
    if patients := {hit.patient for hit in hits if hit.patient is not None}:
        parts.append(_not_in("patient", patients))
    if slides := {hit.slide for hit in hits if hit.patient is None}:
        parts.append(Some((_not_in("slide", slides), Compare("patient", "is not null"))))
    return Every(tuple(parts))


def _not_in(field: str, names: Iterable[str]) -> Filter:
    return Compare(field, "not in", tuple(sorted(set(names))))


def _none_of(away: dict[str, str]) -> Unavailable:
    """Return the error of a question that no shard answers."""
    which = "the atlas cannot" if len(away) == 1 else f"none of the {len(away)} atlases can"
    return Unavailable(f"{which} be searched: {_reasons(away)}")


def _reasons(away: dict[str, str]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in away.items())


def _joined(first: NDArray[np.float32] | None, second: NDArray[np.float32]) -> NDArray[np.float32]:
    return second if first is None else np.concatenate([first, second])


def merged(of_shards: dict[str, list[Hit]], k: int, per_slide: bool) -> list[Found]:
    """Return the k best hits of all shards; equal scores stay in the order of the shards.

    Args:
        of_shards: the hits of each shard, best first, by its name.
        k: number of hits.
        per_slide: keep only the best hit of slides with the same name.
    """
    found = [Found(name, hit) for name, hits in of_shards.items() for hit in hits]
    found.sort(key=lambda one: -one.hit.score)
    if per_slide:
        best: dict[str, Found] = {}
        for one in found:
            best.setdefault(one.hit.slide, one)
        found = list(best.values())
    return [
        Found(name, hit._replace(rank=rank)) for rank, (name, hit) in enumerate(found[:k], start=1)
    ]


def check_filter(where: str | None, known: dict[str, Facts], away: dict[str, str]) -> None:
    """Check that a filter means the same in every shard that is searched.

    Raises:
        BadInput: it cannot be read, has a field that no shard has or that one cannot filter by, or compares
            numbers of one atlas.
    """
    if where is None:
        return
    everywhere = frozenset[str]().union(*(facts.fields for facts in known.values()))
    for name in sorted(fields_of(parse(where))):
        for shard, facts in known.items():
            if name in facts.refused:
                raise BadInput(
                    f"the filter compares {name!r}, by which {shard}, a Milvus collection, cannot filter; "
                    "leave out the comparison or the collection"
                )
        if name in everywhere:
            continue
        if name.partition(".")[0] in OF_ONE_ATLAS:
            raise BadInput(
                f"the filter compares {name!r}, whose numbers mean something else in each atlas; filter by "
                "columns such as label, or search one atlas"
            )
        unasked = f" (not asked: {_reasons(away)})" if away else ""
        raise NotFound(f"{unknown_name('field', name, everywhere)}{unasked}")


def shared_slides(known: dict[str, Facts]) -> dict[str, list[str]]:
    """Return slides that more than one shard has, with the names of these shards."""
    seen: set[str] = set()
    twice: set[str] = set()
    for facts in known.values():
        twice |= seen & facts.slides
        seen |= facts.slides
    return {
        slide: [name for name, facts in known.items() if slide in facts.slides]
        for slide in sorted(twice)
    }
