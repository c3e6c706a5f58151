"""What is asked and what is answered, as values: queries, hits with a verdict, placed images, the map."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...artifacts.images import Rgb
from ...errors import BadInput, TooLarge
from ...index.search.layout import Layout
from ...index.search.query import Query
from ...index.store.rows import Hit

MAX_K = 1_000
MAX_EXAMPLES = 64
"""Images and tiles that one search may name."""

MAX_IMAGES = 256
"""Images that are embedded or assigned at once."""
MAX_PIXELS = 32_000_000


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
        clusters: of the clustering with example tiles, if they were asked for.
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
    clusters: list[dict[str, Any]] = field(default_factory=list, repr=False)


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


def new_id() -> str:
    """Return an id for an answer that nobody can guess."""
    return secrets.token_urlsafe(12)


def check_limits(query: Query) -> None:
    """Refuse a query that is larger than page and API allow.

    Raises:
        BadInput: nothing to be like, or k out of range.
        TooLarge: too many examples.
    """
    if not query.images and not query.tiles:
        raise BadInput("nothing to search for: give an image, or a tile of the atlas")
    if query.examples > MAX_EXAMPLES:
        raise TooLarge(f"{query.examples} examples; at most {MAX_EXAMPLES} make one search")
    if query.k > MAX_K:
        raise BadInput(f"k is {query.k}; expected 1 to {MAX_K}")


def both(where: str | None, other: str) -> str:
    """Return a filter that lets through what passes both."""
    return f"({where}) and {other}" if where else other


def cropped(pixels: Rgb, crop: tuple[float, float, float, float], name: str) -> Rgb:
    """Return part of a picture (H, W, 3), given as shares: left, top, width, height.

    Raises:
        BadInput: it lies outside, or holds less than 8 x 8 pixels.
    """
    left, top, width, height = crop
    fits = all(np.isfinite(crop)) and left >= 0 and top >= 0 and width > 0 and height > 0
    if not fits or left + width > 1 + 1e-6 or top + height > 1 + 1e-6:
        raise BadInput(
            f"crop is {left:g}, {top:g}, {width:g}, {height:g}; expected left, top, width and height as "
            "shares of the picture, from 0 to 1"
        )
    high, wide = pixels.shape[:2]
    x0, y0 = round(left * wide), round(top * high)
    x1, y1 = round((left + width) * wide), round((top + height) * high)
    if x1 - x0 < 8 or y1 - y0 < 8:
        raise BadInput(
            f"the crop of {name} is {x1 - x0} x {y1 - y0} pixels; expected at least 8 x 8"
        )
    return np.ascontiguousarray(pixels[y0:y1, x0:x1])
