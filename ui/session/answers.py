"""Values of answers: hits with a verdict, assigned images, and points on the map; checks of queries."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...artifacts.images import Rgb
from ...errors import BadInput, TooLarge
from ...index.federation.answers import Example, Searched
from ...index.search.cases import Similar
from ...index.search.query import Query
from ...index.store.rows import Hit
from .regions import Cut
from .scaled import ScaledImage

MAX_K = 1_000
MAX_TEXTS = 8
"""Maximum number of texts in a query: each takes the text network some 0.1 s on all cores."""
MAX_EXAMPLES = 64
"""Maximum number of images and tiles in one search."""

MAX_IMAGES = 256
"""Maximum number of images embedded or assigned in one request."""
MAX_PIXELS = 32_000_000


@dataclass(frozen=True)
class Verdict:
    """Summary of a query's nearest tiles.

    Attributes:
        labels: labels of the hits with their counts, most frequent first; None means no label.
        slides: slides of the hits with their counts, most frequent first.
        placed: cluster, name, distance, strength and unknown; None without a clustering, or if the
            query combines several examples.
        nearer_than: share of the atlas's tiles whose distance to the nearest tile of another patient
            exceeds the query's distance to its nearest hit; None until it is computed.
        compared_with: ``patient``; or ``tile`` if ``nearer_than`` is of the nearest other tile, because
            the atlas has one patient or slide only.
        unknown: whether the query is unlike anything in the atlas: it belongs to no cluster, or at most
            1 % of the atlas's tiles are as far from all others, or it is foreign.
        foreign: whether the query is out of distribution: not stained tissue, according to the encoder's
            tissue gate.
    """

    labels: list[tuple[str | None, int]]
    slides: list[tuple[str, int]]
    placed: dict[str, Any] | None
    nearer_than: float | None
    unknown: bool
    foreign: bool = False
    compared_with: Literal["patient", "tile"] = "patient"


@dataclass(frozen=True)
class Among:
    """Further atlases in a search.

    Attributes:
        atlases: names of the atlases to search; empty for the server's own.
        like: tiles of further atlases that hits resemble.
        unlike: tiles of further atlases that hits do not resemble.
    """

    atlases: tuple[str, ...] = ()
    like: tuple[Example, ...] = ()
    unlike: tuple[Example, ...] = ()


ALONE = Among()


@dataclass(frozen=True)
class SimilarAnswer:
    """Slides or cases that are similar to one.

    Attributes:
        cases: best first.
        atlases: the atlas of each; () if only the server's own was asked.
        searched: the atlases that were asked; () likewise.
        shared_slides: number of slides that several of the searched atlases have.
        notes: sentences on what was not left out.
    """

    cases: list[Similar]
    atlases: tuple[str, ...] = ()
    searched: tuple[Searched, ...] = ()
    shared_slides: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class SearchAnswer:
    """The answer to a search.

    Attributes:
        id: id under which the answer can be retrieved.
        at: time, UTC, ISO 8601.
        vector: (D,) the query vector.
        hits: similar tiles, best first.
        generation: generation of the index.
        revision: revision of the atlas.
        milliseconds: time of embedding and of searching.
        regions: the regions of the query, with the tiles that were cut from them.
        scaled: the images of known scale, and how they were cut.
        matches: of each hit, the number of the image in ``scaled`` and of its tile that it resembles most;
            empty if there is one tile in all, or if a hit is in Milvus.
        atlases: of each hit, the name of its atlas; empty if only the server's own was searched.
        searched: the atlases that were asked, and why some were not searched; likewise.
        shared_slides: number of slides that several of the server's atlases have.
        among: the further atlases of the query.
        notes: sentences about images of the query whose stain was not normalised, and on the filter.
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
    regions: tuple[Cut, ...] = ()
    scaled: tuple[ScaledImage, ...] = ()
    matches: tuple[tuple[int, int], ...] = ()
    atlases: tuple[str, ...] = ()
    searched: tuple[Searched, ...] = ()
    shared_slides: int = 0
    among: Among = ALONE
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClusterAnswer:
    """The cluster assignments of several images; :class:`SearchAnswer` describes the other fields.

    Attributes:
        names: names of the assigned images.
        tiles: their pixels as the encoder saw them.
        placed: cluster, name, distance, strength, unknown and foreign of each.
        nearest: each image's most similar tile of the atlas.
        points: (N, 2) their coordinates on the map; None while there is no map.
        refused: names of images that could not be read, with the reason.
        clusters: the clusters with example tiles, if the caller requested examples.
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
    notes: tuple[str, ...] = ()


def now() -> str:
    """Return the current time, UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def new_id() -> str:
    """Return an unguessable id for an answer."""
    return secrets.token_urlsafe(12)


def check_limits(query: Query) -> None:
    """Raise if a query exceeds the limits of the page and the API.

    Raises:
        BadInput: the query has no positive example, or k is out of range.
        TooLarge: there are too many examples.
    """
    if not query.images and not query.tiles and not query.texts and query.vectors is None:
        raise BadInput(
            "there is nothing to search for; give an image, a tile or a region of the atlas, or a text"
        )
    if query.examples > MAX_EXAMPLES:
        raise TooLarge(
            f"{query.examples} examples were given; a search takes at most {MAX_EXAMPLES}"
        )
    if len(query.texts) + len(query.unlike_texts) > MAX_TEXTS:
        raise TooLarge(
            f"more than {MAX_TEXTS} texts were given; a search takes at most {MAX_TEXTS}"
        )
    if query.k > MAX_K:
        raise BadInput(f"k is {query.k}; expected 1 to {MAX_K}")


def both(where: str | None, other: str) -> str:
    """Return a filter that combines both with ``and``."""
    return f"({where}) and {other}" if where else other


def cropped(pixels: Rgb, crop: tuple[float, float, float, float], name: str) -> Rgb:
    """Return a part of an image (H, W, 3); ``crop`` is left, top, width, height as shares.

    Raises:
        BadInput: the crop is outside the image, or smaller than 8 x 8 pixels.
    """
    left, top, width, height = crop
    positive = all(np.isfinite(crop)) and left >= 0 and top >= 0 and width > 0 and height > 0
    if not positive or left + width > 1 + 1e-6 or top + height > 1 + 1e-6:
        raise BadInput(
            f"crop is {left:g}, {top:g}, {width:g}, {height:g}; expected left, top, width and height as "
            "shares of the image, from 0 to 1"
        )
    high, wide = pixels.shape[:2]
    x0, y0 = round(left * wide), round(top * high)
    x1, y1 = round((left + width) * wide), round((top + height) * high)
    if x1 - x0 < 8 or y1 - y0 < 8:
        raise BadInput(
            f"the crop of {name} is {x1 - x0} x {y1 - y0} pixels; expected at least 8 x 8"
        )
    return np.ascontiguousarray(pixels[y0:y1, x0:x1])
