"""Request and response bodies of the API as pydantic models, the source of its OpenAPI document."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from ...index.search.cases import Pair
from ...index.store import rows
from ...serving.encoders.text import LONGEST
from ..access.users import Role
from ..session import viewer
from ..session.addition import PLAIN, Addition, TileChoice
from ..session.answers import MAX_EXAMPLES, MAX_IMAGES, MAX_K, MAX_TEXTS
from ..session.regions import MAX_CORNERS
from ..session.scaled import COARSEST, FINEST
from ..session.session import MAX_WORDS
from . import openai

MAX_TILE = 2**53
MAX_REGIONS = 8
MAX_ATLASES = 100
AtlasName = Annotated[str, Field(min_length=1, max_length=1_000)]
TileId = Annotated[int, Field(ge=0, le=MAX_TILE)]
Text = Annotated[str, Field(max_length=10_000)]
Words = Annotated[str, Field(max_length=LONGEST)]
Short = Annotated[str, Field(max_length=200)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Request(BaseModel):
    """Base of all request bodies; unknown fields are refused, to reveal typing errors."""

    model_config = ConfigDict(extra="forbid")


class Me(BaseModel):
    """The current user; ``-`` if no login is required."""

    user: str
    role: Role


class EmbeddingsRequest(Request):
    """Images to embed, as base64 (with or without the prefix ``data:…;base64,``).

    Or ``input`` with the other fields, in the form of OpenAI's API; the answer then has that form too.
    """

    images: list[str] = Field([], max_length=MAX_IMAGES)
    input: openai.Inputs | None = Field(
        None, description="a text, texts, data URLs of images, or parts with an image or a text"
    )
    model: Short = Field("", description="with input: name of the atlas's encoder")
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: Short = Field("", description="ignored")


Corner = Annotated[
    list[Annotated[float, Field(ge=-1e9, le=1e9, allow_inf_nan=False)]],
    Field(min_length=2, max_length=2),
]


class SlideRegion(Request):
    """A polygon on a slide of the atlas, in level-0 pixels."""

    slide: Annotated[str, Field(min_length=1, max_length=1_000)]
    ring: list[Corner] = Field(min_length=3, max_length=MAX_CORNERS, description="corners [x, y]")

    @model_validator(mode="before")
    @classmethod
    def _of_a_form(cls, value: Any) -> Any:
        """Read the JSON text that a field of a form holds."""
        return json.loads(value) if isinstance(value, str) else value


class TileElsewhere(Request):
    """A tile of a further atlas of the server."""

    atlas: AtlasName
    tile: TileId

    @model_validator(mode="before")
    @classmethod
    def _of_a_form(cls, value: Any) -> Any:
        """Read the JSON text that a field of a form holds."""
        return json.loads(value) if isinstance(value, str) else value


class SearchRequest(Request):
    """A search query; needs at least one of ``images``, ``like``, ``texts`` and ``regions``."""

    images: list[str] = Field([], max_length=MAX_EXAMPLES, description="base64; hits resemble them")
    unlike_images: list[str] = Field(
        [], max_length=MAX_EXAMPLES, description="base64; hits do not resemble them"
    )
    crop: list[Share] | None = Field(
        None,
        min_length=4,
        max_length=4,
        description="left, top, width, height of the first image, as shares of it",
    )
    mpp: float | None = Field(
        None,
        ge=FINEST,
        le=COARSEST,
        description="µm per pixel of images: each is cut into tiles of the atlas's scale, and the answer "
        "has, in matches, the part of it that each hit resembles",
    )
    like: list[TileId] = Field(
        [], max_length=MAX_EXAMPLES, description="ids of tiles that hits resemble"
    )
    unlike: list[TileId] = Field([], max_length=MAX_EXAMPLES)
    texts: list[Words] = Field(
        [],
        max_length=MAX_TEXTS,
        description="words that hits show; for an encoder with a text network",
    )
    unlike_texts: list[Words] = Field([], max_length=MAX_TEXTS)
    regions: list[SlideRegion] = Field(
        [],
        max_length=MAX_REGIONS,
        description="regions of slides that hits resemble; each is one example, cut into tiles",
    )
    k: int = Field(12, ge=1, le=MAX_K)
    where: Text | None = Field(None, description="such as: organ = 'colon' and patient != 'P7'")
    least: float | None = Field(None, allow_inf_nan=False, description="lowest score of a hit")
    per_slide: bool = Field(False, description="at most one hit per slide")
    leave_out: Literal["", "slide", "patient"] = Field(
        "", description="leave out the slides, or all slides of the patients, of the tiles in like"
    )
    clustering: Short | None = None
    atlases: list[AtlasName] = Field(
        [],
        max_length=MAX_ATLASES,
        description="names of the atlases to search, of those in /v1/atlases; empty: the server's own",
    )
    like_elsewhere: list[TileElsewhere] = Field(
        [], max_length=MAX_EXAMPLES, description="tiles of further atlases that hits resemble"
    )
    unlike_elsewhere: list[TileElsewhere] = Field([], max_length=MAX_EXAMPLES)


class AssignRequest(Request):
    """Images to assign to clusters, as base64."""

    images: list[str] = Field(min_length=1, max_length=MAX_IMAGES)
    clustering: Short | None = None


class SlideRequest(Request):
    """A slide to add from one of the server's allowed folders."""

    path: Annotated[str, Field(min_length=1, max_length=4_000)]
    label: Short = ""
    patient: Short = ""
    mpp: Annotated[str, Field(max_length=20)] = ""
    replace: bool = False
    tissue_model: Literal["absorbance", "small"] = Field(
        PLAIN.tissue_model,
        description="how tissue is found: by absorbance, or by the small network in the package",
    )
    min_sharpness: Share = Field(
        PLAIN.min_sharpness, description="less sharp tiles are left out; 0 keeps all"
    )
    max_pen: Share = Field(
        PLAIN.max_pen, description="tiles with a larger share of pen ink are left out; 1 keeps all"
    )

    @property
    def tiles(self) -> TileChoice:
        """Which tiles are embedded."""
        return TileChoice(self.tissue_model, self.min_sharpness, self.max_pen)


class ClusterRequest(Request):
    """A cluster's name; empty to remove it."""

    name: Annotated[str, Field(max_length=2_000)] = ""
    description: Annotated[str, Field(max_length=2_000)] = ""
    clustering: Short | None = None


class SuggestRequest(Request):
    """Words to choose names of clusters from; for an encoder with a text network."""

    words: list[Words] = Field(min_length=2, max_length=MAX_WORDS)
    clustering: Short | None = None


class SuggestedName(BaseModel):
    """A cluster with the words that fit it best, best first."""

    cluster: int
    name: str
    words: list[str]


class SuggestedNames(BaseModel):
    """Proposed names of a clustering's clusters. The words are ranked; none of them has to be right."""

    clusters: list[SuggestedName]


class ErrorDetail(BaseModel):
    """Details of an error."""

    code: str
    message: str
    request_id: str


class Error(BaseModel):
    """The body of every error response."""

    error: ErrorDetail


class Health(BaseModel):
    """The process is running."""

    status: Literal["ok"] = "ok"


class Ready(BaseModel):
    """The encoder answers and the atlas can be read."""

    status: Literal["ready"] = "ready"


class Pending(BaseModel):
    """The requested result is still being computed."""

    status: Literal["being made"] = "being made"


class Encoder(BaseModel):
    """The encoder that computed the embeddings."""

    name: str
    sha256: str
    dim: int


Notes = Annotated[
    list[str],
    Field(
        description="sentences on images whose stain was not normalised, and on what was (not) left out"
    ),
]


class Embeddings(BaseModel):
    """One embedding per image, in the order of the images."""

    encoder: Encoder
    embeddings: list[list[float]]
    notes: Notes


def _fields_of(value: type[Any], without: frozenset[str] = frozenset()) -> Any:
    """Return a base model with the fields of a named tuple."""
    fields: dict[str, Any] = {
        name: (kind, value._field_defaults.get(name, ...))
        for name, kind in get_type_hints(value).items()
        if name not in without
    }
    return create_model(value.__name__, **fields)


class Tile(_fields_of(rows.Hit, frozenset({"rank", "score"}))):  # type: ignore[misc]
    """A tile and its metadata."""


class Hit(_fields_of(rows.Hit)):  # type: ignore[misc]  # noqa: D101
    __doc__ = rows.Hit.__doc__


class Placed(BaseModel):
    """The cluster that an image is assigned to."""

    cluster: int
    name: str
    distance: float
    strength: float
    unknown: bool


class LabelCount(BaseModel):
    """A label and the number of hits that have it."""

    label: str | None
    hits: int


class Verdict(BaseModel):
    """Summary of the nearest tiles; see :class:`histoseek.ui.session.answers.Verdict`."""

    text: str
    labels: list[LabelCount]
    placed: Placed | None
    nearer_than: float | None
    compared_with: str
    unknown: bool
    foreign: bool


class Match(BaseModel):
    """The part of an image of known scale that a hit resembles most, as shares of the image."""

    image: int
    box: list[float]


class FoundHit(Hit):
    """A hit; ``atlas`` is the name of its atlas if several were asked."""

    atlas: str | None = None


class AskedAtlas(BaseModel):
    """An atlas of the server; ``away`` says why it cannot be searched, "" if it can."""

    atlas: str
    tiles: int | None = Field(description="null if it is not known, as in Milvus")
    revision: int | None
    scales: tuple[float, float] | None = Field(
        description="smallest and largest µm per pixel of its tiles"
    )
    away: str


class Atlases(BaseModel):
    """The atlases of the server; the first is its own. Its slides can be viewed, and be changed."""

    atlases: list[AskedAtlas]
    shared_slides: int = Field(description="number of slides that several of them have")


class SearchAnswer(BaseModel):
    """Similar tiles, the verdict on the query, and the provenance of the answer."""

    result: str
    verdict: Verdict
    hits: list[FoundHit]
    atlases: list[AskedAtlas] = Field(
        description="the atlases that were asked; empty if it was the server's own alone"
    )
    shared_slides: int = Field(
        description="number of slides that several of the searched atlases have; with per_slide, each "
        "counts as one"
    )
    matches: list[Match]
    milliseconds: dict[str, float]
    notes: Notes
    provenance: dict[str, Any]


class PlacedImage(Placed):
    """An image with its cluster and the most similar tile."""

    foreign: bool
    image: str
    nearest: Hit


class RefusedImage(BaseModel):
    """An image that could not be read."""

    name: str
    reason: str


class AssignAnswer(BaseModel):
    """Images with their clusters, and images that could not be read."""

    result: str
    images: list[PlacedImage]
    refused: list[RefusedImage]
    notes: Notes
    provenance: dict[str, Any]


class Slide(BaseModel):
    """A slide or tile set of the atlas."""

    name: str
    kind: str
    tiles: int
    label: str | None
    patient: str | None
    mpp: float | None
    width: int | None
    height: int | None
    added_at: str
    reason: str
    metadata: dict[str, str]


class Pyramid(_fields_of(viewer.Pyramid)):  # type: ignore[misc]  # noqa: D101
    __doc__ = viewer.Pyramid.__doc__


class Slides(BaseModel):
    """A page of the atlas's slides, sorted by name."""

    slides: list[Slide]
    total: int


class Jobs(BaseModel):
    """Slides that are being added, newest first."""

    jobs: list[Addition]


class Removed(BaseModel):
    """What was removed with a slide."""

    slide: str
    tiles: int
    annotations: int


class Cluster(BaseModel):
    """A cluster: its name, size and contents."""

    cluster: int
    name: str
    description: str
    tiles: int
    slides: int
    unknown: int
    labels: dict[str, int]
    examples: list[Tile]


class Clusters(BaseModel):
    """The clusters of a clustering."""

    clustering: str
    clusters: list[Cluster]


class Region(_fields_of(Pair, frozenset({"query_row"}))):  # type: ignore[misc]
    """A pair of similar regions."""


class SimilarSlide(BaseModel):
    """A slide or case that is similar to the requested one; ``atlas`` is set if several were asked.

    The matches of its regions are tiles of that atlas.
    """

    atlas: str | None = None
    name: str
    score: float
    label: str | None
    regions: list[Region] = Field(validation_alias="pairs")


class SimilarSlides(BaseModel):
    """Similar slides or cases, most similar first."""

    slides: list[SimilarSlide]
    atlases: list[AskedAtlas] = Field(
        [], description="the atlases that were asked; empty if it was the server's own alone"
    )
    shared_slides: int = Field(
        0, description="number of slides that several of the atlases have; each copy is ranked"
    )
    notes: Notes
