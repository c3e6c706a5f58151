"""What is asked and what is answered, as values: queries, hits with a verdict, placed images, the map."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...artifacts.images import Rgb
from ...errors import BadInput, TooLarge
from ...index.search.map import Layout
from ...index.store.rows import Hit

MAX_K = 1_000
MAX_EXAMPLES = 64
"""Images and tiles that one search may name."""

LeaveOut = Literal["", "slide", "patient"]
LEAVE_OUT: tuple[LeaveOut, ...] = ("", "slide", "patient")


@dataclass(frozen=True)
class Query:
    """What is searched for.

    Attributes:
        images: to be like, each (S, S, 3) as the encoder sees it.
        unlike_images: not to be like.
        like: ids of tiles of the atlas to be like.
        unlike: ids of tiles not to be like.
        k: hits.
        where: metadata filter, see :mod:`~histoseek.index.search.filters`.
        least: lowest score of a hit.
        per_slide: at most one hit per slide.
        leave_out: of the tiles in ``like``: nothing more, their slides, or their patients too.
        clustering: in which the query is placed; the newest when None.
    """

    images: tuple[Rgb, ...] = ()
    unlike_images: tuple[Rgb, ...] = ()
    like: tuple[int, ...] = ()
    unlike: tuple[int, ...] = ()
    k: int = 12
    where: str | None = None
    least: float | None = None
    per_slide: bool = False
    leave_out: LeaveOut = ""
    clustering: str | None = None

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            BadInput: nothing to be like, or a number out of its range.
        """
        if not self.images and not self.like:
            raise BadInput("nothing to search for: give an image, or a tile of the atlas")
        count = sum(map(len, (self.images, self.unlike_images, self.like, self.unlike)))
        if count > MAX_EXAMPLES:
            raise TooLarge(f"{count} examples; at most {MAX_EXAMPLES} make one search")
        if not 1 <= self.k <= MAX_K:
            raise BadInput(f"k is {self.k}; expected 1 to {MAX_K}")
        if self.leave_out not in LEAVE_OUT:
            raise BadInput(f"leave_out is {self.leave_out!r}; expected slide, patient or nothing")


@dataclass(frozen=True)
class Verdict:
    """What the nearest tiles say of a query.

    Attributes:
        labels: labels of the hits with their counts, most frequent first; None stands for no label.
        slides: likewise the slides.
        placed: cluster, name, distance, strength and unknown; None without a clustering, or if the
            query is made of several examples.
        nearer_than: share of the atlas's own tiles that are farther from their nearest tile of another
            patient than the query is from its nearest hit; None while that is not known.
        unknown: whether it is unlike anything in the atlas: fits no cluster, or is farther from all tiles
            than all but 1 % of the atlas's own, or foreign.
        foreign: whether it is unlike the stained tissue that the encoder was made for (``Manifest.gate``).
    """

    labels: list[tuple[str | None, int]]
    slides: list[tuple[str, int]]
    placed: dict[str, Any] | None
    nearer_than: float | None
    unknown: bool
    foreign: bool = False


@dataclass(frozen=True)
class Found:
    """The answer to a search.

    Attributes:
        id: by which it can be asked for again.
        at: when, UTC, ISO 8601.
        query: what was asked.
        vector: (D,) that was compared.
        hits: best first.
        verdict: what they say.
        generation: of the index.
        revision: of the atlas.
        milliseconds: of embedding and of searching.
    """

    id: str
    at: str
    query: Query
    vector: NDArray[np.float32] = field(repr=False)
    hits: list[Hit]
    verdict: Verdict
    generation: int
    revision: int
    milliseconds: dict[str, float]


@dataclass(frozen=True)
class Clustered:
    """The answer to several images.

    Attributes:
        id: by which it can be asked for again.
        at: when, UTC, ISO 8601.
        clustering: its name.
        names: of the images that could be placed.
        tiles: their pixels as the encoder saw them.
        placed: cluster, name, distance, strength, unknown and foreign of each.
        nearest: the most similar tile of the atlas of each.
        points: (N, 2) their places on the map; None while there is no map.
        refused: names of images that could not be read, with the reason.
        generation: of the index.
        revision: of the atlas.
    """

    id: str
    at: str
    clustering: str
    names: list[str]
    tiles: list[Rgb]
    placed: list[dict[str, Any]]
    nearest: list[Hit]
    points: NDArray[np.float32] | None
    refused: list[tuple[str, str]]
    generation: int
    revision: int


@dataclass(frozen=True)
class Points:
    """The atlas on its map.

    Attributes:
        ids: (M,) tiles that are shown, drawn at random if there are too many.
        places: (M, 2) within -1 and 1.
        total: tiles of the atlas.
        layout: how they were placed.
        revision: of the atlas.
    """

    ids: NDArray[np.int64]
    places: NDArray[np.float32]
    total: int
    layout: Layout
    revision: int


def now() -> str:
    """Return the time, UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
