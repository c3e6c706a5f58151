"""Bodies of ``/v1/embeddings`` in the form of OpenAI's API, for programs that speak it."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from ...errors import BadInput, NotFound
from ...serving.encoders.text import LONGEST
from ..session.answers import MAX_IMAGES
from ..session.session import Session
from .bodies import pixels_of

URL = "data:"
Base64 = Annotated[str, Field(description="an image as base64, or as a data URL")]


class ImageUrl(BaseModel):
    """An image as a data URL; this server fetches no URL."""

    url: str


class Part(BaseModel):
    """An image or a text to embed: ``{"image": …}``, ``{"text": …}``, or a part of a chat message."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text", "image_url", "input_text", "input_image"] | None = None
    image: Base64 | None = None
    image_url: ImageUrl | str | None = None
    text: Annotated[str, Field(max_length=LONGEST)] | None = None


Inputs = str | Annotated[list[str | Part], Field(min_length=1, max_length=MAX_IMAGES)]


class Embedding(BaseModel):
    """The embedding of one input: a list of numbers, or float32 (little-endian) in base64."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Always 0: tokens are not counted."""

    prompt_tokens: int = 0
    total_tokens: int = 0


class OpenAiEmbeddings(BaseModel):
    """The answer in the form of OpenAI's API, and notes about images whose stain was not normalised."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage = Usage()
    notes: list[str] = []


def check_model(session: Session, model: str, dimensions: int | None) -> None:
    """Check that a request means the atlas's encoder.

    Raises:
        NotFound: it names another model.
        BadInput: it asks for another length.
    """
    manifest = session.atlas.manifest
    if model and model != manifest.name:
        raise NotFound(f"there is no model {model!r} here; this atlas has {manifest.name!r}")
    if dimensions not in (None, manifest.dim):
        raise BadInput(
            f"dimensions is {dimensions}; embeddings of this encoder have {manifest.dim}"
        )


def embed(session: Session, inputs: str | list[Any]) -> tuple[NDArray[np.float32], list[str]]:
    """Embed texts and images (N, D), in their order; also return notes about the images.

    Args:
        session: the open atlas.
        inputs: a text, or texts and :class:`Part`; a text that is a data URL is an image.

    Raises:
        BadInput: an image cannot be read, a part has nothing to embed, or the encoder takes no text.
    """
    parts = [
        _content(n, item) for n, item in enumerate([inputs] if isinstance(inputs, str) else inputs)
    ]
    vectors = np.empty((len(parts), session.atlas.manifest.dim), np.float32)
    notes: list[str] = []
    images = [n for n, (kind, _) in enumerate(parts) if kind == "image"]
    texts = [n for n, (kind, _) in enumerate(parts) if kind == "text"]
    if images:
        names = [f"input[{n}]" for n in images]
        tiles = [
            session.read(pixels_of(parts[n][1]), name)
            for n, name in zip(images, names, strict=True)
        ]
        vectors[images] = session.embed(tiles, notes, names)
    if texts:
        vectors[texts] = session.embed_text([parts[n][1] for n in texts])
    return vectors, notes


def _content(number: int, item: str | Part) -> tuple[Literal["image", "text"], str]:
    if isinstance(item, str):
        return ("image" if item[:5].lower() == URL else "text"), item
    url = item.image_url.url if isinstance(item.image_url, ImageUrl) else item.image_url
    if url is not None and url[:5].lower() != URL:
        raise BadInput(f"input[{number}]: this server fetches no URL; send the image as a data URL")
    given = [value for value in (item.image, url, item.text) if value is not None]
    if len(given) != 1:
        raise BadInput(f"input[{number}] has {len(given)} contents; expected an image or a text")
    return ("text" if item.text is not None else "image"), given[0]


def answer(
    session: Session,
    vectors: NDArray[np.float32],
    encoding: Literal["float", "base64"],
    notes: list[str],
) -> OpenAiEmbeddings:
    """Return embeddings (N, D) as the answer to a request."""
    data = [
        Embedding(
            index=n,
            embedding=base64.b64encode(row.astype("<f4").tobytes()).decode()
            if encoding == "base64"
            else row.tolist(),
        )
        for n, row in enumerate(vectors)
    ]
    return OpenAiEmbeddings(data=data, model=session.atlas.manifest.name, notes=notes)
