"""The questions to the shards of a federation, and the merging of their answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...errors import BadInput, NotFound, unknown_name
from ..search.filters import Compare, Every, Filter, Some, fields_of, parse
from ..search.query import Query
from ..store.rows import Hit
from .answers import Example, Found
from .shards import OF_ONE_ATLAS, Facts


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
        return not_in("slide", (hit.slide for hit in hits))
    parts: list[Filter] = []
    if patients := {hit.patient for hit in hits if hit.patient is not None}:
        parts.append(not_in("patient", patients))
    if slides := {hit.slide for hit in hits if hit.patient is None}:
        parts.append(Some((not_in("slide", slides), Compare("patient", "is not null"))))
    return Every(tuple(parts))


def not_in(field: str, names: Iterable[str]) -> Filter:
    """Return a filter that leaves out values of a field."""
    return Compare(field, "not in", tuple(sorted(set(names))))


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
        unasked = f" (not asked: {reasons_of(away)})" if away else ""
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


def reasons_of(away: dict[str, str]) -> str:
    """Return why shards are away, in one line."""
    return "; ".join(f"{name}: {why}" for name, why in away.items())
