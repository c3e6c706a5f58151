"""What a federation is asked and answers: examples, hits with their atlases, and what was searched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..search.cases import Similar
from ..store.rows import Hit
from ..store.scales import TOLERANCE


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


class FoundCase(NamedTuple):
    """A similar slide or case of a federation.

    Attributes:
        atlas: name of the shard.
        case: the slide or case; the query's tiles have the ids of the query's atlas.
        tiles: the matching tiles of its pairs, by id.
        query_tiles: the query's tiles of its pairs, by id; {} for a query by vectors.
    """

    atlas: str
    case: Similar
    tiles: dict[int, dict[str, Any]]
    query_tiles: dict[int, dict[str, Any]] = {}


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
        notes: what the shards left out, or did not leave out, without a word.
    """

    hits: list[list[Found]]
    shards: list[Searched]
    shared_slides: dict[str, list[str]]
    notes: list[str] = field(default_factory=list)

    @property
    def away(self) -> list[Searched]:
        """The shards that were not searched."""
        return [shard for shard in self.shards if shard.away]

    @property
    def mixed_scales(self) -> bool:
        """Whether the µm per pixel of the searched tiles differ by more than an atlas allows."""
        return mixed(self.shards)


@dataclass(frozen=True)
class SimilarCases:
    """The slides or cases of several atlases that are similar to one.

    Attributes:
        cases: best first.
        searched: the shards that were asked, and slides that several of them have; without hits.
        atlas: name of the shard that has the query; None for a query by vectors.
    """

    cases: list[FoundCase]
    searched: Answer
    atlas: str | None


def mixed(shards: Sequence[Searched]) -> bool:
    """Return whether the µm per pixel of the shards' tiles differ by more than an atlas allows."""
    known = [shard.scales for shard in shards if shard.scales and not shard.away]
    if not known:
        return False
    low, high = min(scale for scale, _ in known), max(scale for _, scale in known)
    return high > (1 + TOLERANCE) * low
