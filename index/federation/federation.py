"""A federation: several atlases of one encoder, searched as if they were one.

Each shard answers exactly as it would alone, and the answers are merged by score. If a slide or patient is
left out, so are those of the same name in other shards. A shard that cannot be opened, or does not answer
in time, is named in the answer; the others are searched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...errors import BadInput, Mismatch, NotFound, Unavailable, unknown_name
from ..atlas import Atlas
from ..search.cases import check_by, nothing_else
from ..search.query import Query
from ..search.tiles import combined
from ..store.rows import Hit
from .answers import Answer, Example, Found, Searched, SimilarCases
from .asking import ANY, Asking
from .comparing import Comparing
from .parts import Part, check_filter, merged, reasons_of, shared_slides
from .shards import NO_MOSAICS, AtlasShard, Facts, Reply, Shard, named, other_encoder

TIMEOUT_S = 10.0
COMPARE_S = 600.0
"""Time in seconds to wait for a comparison of slides, which may read many vectors from a slow disk."""


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
        self.check(names)
        return [shard for shard in self.shards if shard.name in set(names)]

    def check(self, names: Sequence[str]) -> None:
        """Check names of shards.

        Raises:
            NotFound: there is no shard of a name.
        """
        every = [shard.name for shard in self.shards]
        for name in names:
            if name not in every:
                raise unknown_name("atlas", name, every)

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
            f"no atlas is a folder that can be opened ({reasons_of(away) or 'all are in Milvus'}); name "
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
            raise NotFound(
                f"{name} is a Milvus collection; expected an atlas on disk, which has images"
            )
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

        def find(shard: Shard) -> list[Reply[list[list[Hit]]]]:
            absent = fields - known[shard.name].fields
            asked = [part.query_for(shard.name, query, absent) for part in parts]
            return [shard.find(one, query.leave_out == "patient") for one in asked]

        answers = self._asking.ask([shard for shard in chosen if shard.name in known], find)
        if not answers.of:
            reasons = {s.name: {**away, **answers.away}[s.name] for s in chosen}
            raise _none_of(reasons)
        replies = {name: of[0] for name, of in answers.of.items()}
        found: list[list[Found]] = []
        for number, part in enumerate(parts):
            for row in range(len(part.vectors)):
                of_shards = {
                    shard.name: part.kept(shard.name, answers.of[shard.name][number].found[row])
                    for shard in chosen if shard.name in answers.of
                }  # fmt: skip
                found.append(merged(of_shards, query.k, query.per_slide))
        return self._answer(found, chosen, known, {**away, **answers.away}, replies)

    def similar(
        self,
        query: str | NDArray[np.float32],
        k: int = 10,
        by: Literal["slide", "patient"] = "slide",
        where: str | None = None,
        atlas: str | None = None,
        only: Sequence[str] | None = None,
        timeout_s: float = COMPARE_S,
    ) -> SimilarCases:
        """Return the slides or cases of several atlases that are most similar to one, or to new tiles.

        They are compared by the median of the minimum distances, as :meth:`View.similar
        <histoseek.index.view.View.similar>` does by default. Slides of the query's name and of its patients
        are left out of every atlas. A patient with slides in several atlases is one case in each of them.
        Milvus collections have no mosaics; they are named as away.

        Args:
            query: name of a slide (with ``by="patient"`` also of a patient), or vectors (Q, D) of tiles.
            k: number of slides or cases.
            by: what is ranked.
            where: metadata filter; only tiles that pass count.
            atlas: name of the shard that has the query; it is looked for in those to compare with if None.
            only: names of the shards to compare with; all when None.
            timeout_s: time to wait for each shard.

        Raises:
            BadInput: the filter is invalid, several atlases have the query, or all atlases answer and there
                is nothing to compare with.
            NotFound: no atlas that answers has the query, or there is no shard of a name.
            Mismatch: two shards have different encoders, or vectors have another length.
            Unavailable: no shard answers, or that of the query does not.
        """
        settings = Query(k=k, where=where)
        check_by(by)
        chosen = self._named(only)
        homes = chosen if atlas is None else self._named([atlas])
        on_disk = {s.name: s for s in (*chosen, *homes) if isinstance(s, AtlasShard)}
        away = {s.name: NO_MOSAICS for s in chosen if s.name not in on_disk}
        if not on_disk:
            raise _none_of(away)
        known, missing = self.facts(list(on_disk))
        away |= missing
        among = {s.name: known[s.name] for s in chosen if s.name in known}
        check_filter(where, among, away)
        asking = Comparing(self._asking, timeout_s, by, away)
        named = None
        if isinstance(query, str):
            named = asking.query(query, [on_disk[s.name] for s in homes if s.name in known], atlas)
        found, replies = asking.compare(query, named, settings, on_disk, among)
        if not replies:
            raise _none_of({shard.name: away[shard.name] for shard in chosen})
        if not found and not away:  # else the answer says which atlases are missing
            raise nothing_else(where)
        searched = self._answer([], chosen, known, away, replies)
        return SimilarCases(found[:k], searched, None if named is None else named.atlas)

    def status(self) -> Answer:
        """Return an answer without hits: which shards can be searched now.

        Raises:
            Mismatch: two shards have different encoders.
            Unavailable: none of the shards answers.
        """
        known, away = self.facts()
        replies = {name: Reply(None, facts.revision, []) for name, facts in known.items()}
        return self._answer([], self.shards, known, away, replies)

    @staticmethod
    def _answer(
        hits: list[list[Found]],
        shards: Sequence[Shard],
        known: dict[str, Facts],
        away: dict[str, str],
        replies: Mapping[str, Reply[Any]],
    ) -> Answer:
        """Return an answer that says of each shard what was searched, or why it was not."""
        searched = [
            Searched(
                shard.name, shard.address,
                replies[shard.name].revision if shard.name in replies else None,
                known[shard.name].tiles if shard.name in known else None,
                known[shard.name].scales if shard.name in known else None, away.get(shard.name, ""),
            )
            for shard in shards
        ]  # fmt: skip
        shared = shared_slides({name: known[name] for name in replies})
        notes = [
            f"{shard.name}: {note}"
            for shard in shards if shard.name in replies for note in replies[shard.name].notes
        ]  # fmt: skip
        return Answer(hits, searched, shared, notes)

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
            self.check([name])
            if name in away:
                raise Unavailable(
                    f"the atlas {name} of an example cannot be searched: {away[name]}"
                )
            rows = [n for n, example in enumerate(examples) if example.atlas == name]
            ids = [examples[n].tile for n in rows]
            answers = self._asking.ask([shards[name]], examples_of(ids))
            if name in answers.away:
                raise Unavailable(
                    f"the atlas {name} of an example cannot be searched: {answers.away[name]}"
                )
            vectors[rows], tiles = answers.of[name]
            hits |= dict(zip(rows, tiles, strict=True))
        return vectors, [hits[n] for n in range(len(examples))]


def examples_of(ids: list[int]) -> Callable[[Shard], tuple[NDArray[np.float32], list[Hit]]]:
    """Return the question for the vectors of tiles, and the tiles, by id."""
    return lambda shard: shard.examples(ids)


def _none_of(away: dict[str, str]) -> Unavailable:
    """Return the error of a question that no shard answers."""
    which = "the atlas cannot" if len(away) == 1 else f"none of the {len(away)} atlases can"
    return Unavailable(f"{which} be searched: {reasons_of(away)}")


def _joined(first: NDArray[np.float32] | None, second: NDArray[np.float32]) -> NDArray[np.float32]:
    return second if first is None else np.concatenate([first, second])
