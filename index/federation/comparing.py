"""Compares slides and cases with those of several atlases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import BadInput, NotFound, Unavailable
from ..search.cases import Case
from ..search.filters import Compare, Every, Filter, Some
from ..search.query import Query
from .answers import FoundCase
from .asking import Asking
from .parts import not_in, reasons_of
from .shards import AtlasShard, Facts, Reply


@dataclass(frozen=True)
class NamedCase:
    """A slide or case of a shard that is the query.

    Attributes:
        atlas: name of the shard.
        case: the slide or case.
        tiles: the tiles of its mosaic, by id.
    """

    atlas: str
    case: Case
    tiles: dict[int, dict[str, Any]]

    def in_pairs(self, found: FoundCase) -> FoundCase:
        """Return a found case whose pairs have this query's tiles with their atlas, as the matches have."""
        if found.atlas == self.atlas:
            return found._replace(query_tiles=found.tiles)
        ids = [self.case.tiles[pair.query_row] for pair in found.case.pairs]
        pairs = [p._replace(query=n) for p, n in zip(found.case.pairs, ids, strict=True)]
        return found._replace(
            case=found.case._replace(pairs=pairs), query_tiles={n: self.tiles[n] for n in ids}
        )


@dataclass(frozen=True)
class Comparing:
    """The questions of one comparison to the shards.

    Attributes:
        asking: asks them.
        timeout_s: time to wait for each.
        by: slide or patient.
        away: why shards were not compared, by name; those that do not answer are added.
    """

    asking: Asking
    timeout_s: float
    by: str
    away: dict[str, str]

    def query(self, name: str, shards: Sequence[AtlasShard], atlas: str | None) -> NamedCase:
        """Return the slide or case of a name.

        Args:
            name: of the slide or case.
            shards: where to look.
            atlas: the only one to look in, if it was named.

        Raises:
            BadInput: several shards have it.
            NotFound: none has it.
            Unavailable: the named shard is away.
        """
        at = {shard.name: shard for shard in shards}
        answers = self.asking.ask(
            shards, lambda shard: at[shard.name].case(name, self.by), timeout_s=self.timeout_s
        )
        self.away.update(answers.away)
        if atlas is not None and atlas in self.away:
            raise Unavailable(
                f"the atlas {atlas} of the query cannot be searched: {self.away[atlas]}"
            )
        found = {shard: case for shard, case in answers.of.items() if case is not None}
        if not found:
            reasons = f"; not searched: {reasons_of(self.away)}" if self.away else ""
            raise NotFound(f"no {self.by} {name!r} in {', '.join(answers.of)}{reasons}")
        if len(found) > 1:
            raise BadInput(
                f"{' and '.join(found)} have a {self.by} {name!r}; name its atlas, such as "
                f"{next(iter(found))}:{name}"
            )
        ((own, (case, tiles)),) = found.items()
        return NamedCase(own, case, tiles)

    def compare(
        self,
        query: str | NDArray[np.float32],
        named: NamedCase | None,
        settings: Query,
        shards: Mapping[str, AtlasShard],
        among: Mapping[str, Facts],
    ) -> tuple[list[FoundCase], dict[str, Reply[list[FoundCase]]]]:
        """Return the similar slides or cases, best first, and the reply of each shard that answered.

        Args:
            query: name of a slide or case, or vectors (Q, D).
            named: the slide or case of that name.
            settings: k and filter.
            shards: by name.
            among: facts of those to compare with.
        """
        fields = frozenset[str]().union(*(facts.fields for facts in among.values()))
        vectors = query if named is None else named.case.vectors
        left_out = None if named is None else _others(named.case, self.by)

        def find(shard: AtlasShard) -> Reply[list[FoundCase]]:
            own = named is not None and shard.name == named.atlas
            absent = fields - among[shard.name].fields
            asked = replace(settings, absent=absent, also=None if own else left_out)
            return shard.similar(query if own else vectors, self.by, asked)

        answers = self.asking.ask(
            [shards[name] for name in among], lambda shard: find(shards[shard.name]),
            timeout_s=self.timeout_s,
        )  # fmt: skip
        self.away.update(answers.away)
        found = [
            one if named is None else named.in_pairs(one)
            for name in among if name in answers.of for one in answers.of[name].found
        ]  # fmt: skip
        found.sort(key=lambda one: -one.case.score)
        return found, answers.of


def _others(case: Case, by: str) -> Filter:
    """Return the filter that leaves the slides of a query and of its patients out of another atlas."""
    slides = not_in("slide", case.slides)
    if by == "patient":  # the other patients of a tile set of the same name stay
        slides = Some((slides, Compare("kind", "!=", ("slide",))))
    return Every((slides, not_in("patient", case.patients))) if case.patients else slides
