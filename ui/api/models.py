"""What the API takes and gives, as pydantic models: the source of its OpenAPI document."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..session.answers import MAX_EXAMPLES, MAX_IMAGES, MAX_K

MAX_TILE = 2**53
TileId = Annotated[int, Field(ge=0, le=MAX_TILE)]
Text = Annotated[str, Field(max_length=10_000)]
Short = Annotated[str, Field(max_length=200)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Request(BaseModel):
    """What every request body has in common: unknown fields are refused, so that typing errors show."""

    model_config = ConfigDict(extra="forbid")


class Me(BaseModel):
    """Who asks: ``-`` where nobody need say so."""

    user: str
    role: Literal["reader", "editor"]


class EmbeddingsRequest(Request):
    """Images to embed, as base64 (with or without ``data:…;base64,`` before it)."""

    images: list[str] = Field(min_length=1, max_length=MAX_IMAGES)


class SearchRequest(Request):
    """What is searched for: at least one of ``images`` and ``like``."""

    images: list[str] = Field([], max_length=MAX_EXAMPLES, description="base64; to be like")
    unlike_images: list[str] = Field([], max_length=MAX_EXAMPLES, description="base64")
    crop: list[Share] | None = Field(
        None,
        min_length=4,
        max_length=4,
        description="left, top, width, height of the first image, as shares of it",
    )
    like: list[TileId] = Field([], max_length=MAX_EXAMPLES, description="tiles of the atlas")
    unlike: list[TileId] = Field([], max_length=MAX_EXAMPLES)
    k: int = Field(12, ge=1, le=MAX_K)
    where: Text | None = Field(None, description="such as: organ = 'colon' and patient != 'P7'")
    least: float | None = Field(None, allow_inf_nan=False, description="lowest score of a hit")
    per_slide: bool = Field(False, description="at most one hit per slide")
    leave_out: Literal["", "slide", "patient"] = Field(
        "", description="of the tiles in like: their slides, or their patients too"
    )
    clustering: Short | None = None


class AssignRequest(Request):
    """Images to place in clusters, as base64."""

    images: list[str] = Field(min_length=1, max_length=MAX_IMAGES)
    clustering: Short | None = None


class SlideRequest(Request):
    """A slide to add from a folder from which slides may be added."""

    path: Annotated[str, Field(min_length=1, max_length=4_000)]
    label: Short = ""
    patient: Short = ""
    mpp: Annotated[str, Field(max_length=20)] = ""
    replace: bool = False


class ClusterRequest(Request):
    """What people call a cluster; empty takes the name away."""

    name: Annotated[str, Field(max_length=2_000)] = ""
    description: Annotated[str, Field(max_length=2_000)] = ""
    clustering: Short | None = None


class ErrorDetail(BaseModel):
    """What went wrong."""

    code: str
    message: str
    request_id: str


class Error(BaseModel):
    """Every error's body."""

    error: ErrorDetail


class Health(BaseModel):
    """The process is up."""

    status: Literal["ok"] = "ok"


class Ready(BaseModel):
    """The encoder answers and the atlas can be read."""

    status: Literal["ready"] = "ready"


class Pending(BaseModel):
    """What was asked for is being made."""

    status: Literal["being made"] = "being made"


class Encoder(BaseModel):
    """Which encoder made embeddings."""

    name: str
    sha256: str
    dim: int


class Embeddings(BaseModel):
    """One embedding per image, in their order."""

    encoder: Encoder
    embeddings: list[list[float]]


class Tile(BaseModel):
    """What is known of a tile."""

    tile: int
    slide: str
    x: int
    y: int
    size_px_level0: int
    mpp: float | None
    label: str | None
    patient: str | None
    cluster: int | None
    file: str | None
    target_mpp: float | None = None


class Hit(Tile):
    """A similar tile; see :class:`histoseek.index.store.rows.Hit`."""

    rank: int
    score: float


class Placed(BaseModel):
    """Where an image belongs in a clustering."""

    cluster: int
    name: str
    distance: float
    strength: float
    unknown: bool


class LabelCount(BaseModel):
    """How many hits have a label."""

    label: str | None
    hits: int


class Verdict(BaseModel):
    """What the nearest tiles say; see :class:`histoseek.ui.session.answers.Verdict`."""

    text: str
    labels: list[LabelCount]
    placed: Placed | None
    nearer_than: float | None
    unknown: bool
    foreign: bool


class SearchAnswer(BaseModel):
    """Similar tiles, what they say, and how they were found."""

    result: str
    verdict: Verdict
    hits: list[Hit]
    milliseconds: dict[str, float]
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
    """Images in clusters."""

    result: str
    images: list[PlacedImage]
    refused: list[RefusedImage]
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


class Slides(BaseModel):
    """Some slides of the atlas, by name."""

    slides: list[Slide]
    total: int


class Job(BaseModel):
    """A slide on its way into the atlas."""

    id: str
    slide: str
    state: Literal["waiting", "embedding", "adding", "done", "failed"]
    done: int
    total: int
    message: str
    at: str


class Jobs(BaseModel):
    """Slides on their way, newest first."""

    jobs: list[Job]


class Removed(BaseModel):
    """What went with a slide."""

    slide: str
    tiles: int


class Cluster(BaseModel):
    """A cluster: what people call it, how large it is, what it holds."""

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


class Region(BaseModel):
    """Two regions that are alike."""

    score: float
    query: int | None
    match: int


class SimilarSlide(BaseModel):
    """A slide or case like another."""

    name: str
    score: float
    label: str | None
    regions: list[Region]


class SimilarSlides(BaseModel):
    """Slides or cases like another, most similar first."""

    slides: list[SimilarSlide]
