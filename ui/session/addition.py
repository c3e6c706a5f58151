"""A slide that is added through the page or the API, from upload to atlas, as a value."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ...errors import BadInput
from ...serving.embedding.results import EmbedOptions

DEFAULTS = EmbedOptions()
State = Literal["waiting", "embedding", "adding", "done", "failed"]
PRIVATE = Field(exclude=True)
"""Marks fields that the API does not show."""


@dataclass(frozen=True)
class TileChoice:
    """Which tiles of an added slide are embedded; as the options of ``embed``.

    Attributes:
        tissue_model: how tissue is found: ``absorbance``, or ``small`` for the network in this package.
        min_sharpness: less sharp tiles are left out.
        max_pen: tiles with a larger share of pen ink are left out.
    """

    tissue_model: Literal["absorbance", "small"] = "absorbance"
    min_sharpness: float = DEFAULTS.min_sharpness
    max_pen: float = DEFAULTS.max_pen


PLAIN = TileChoice()


@dataclass(frozen=True)
class Addition:
    """A slide that is being added to the atlas.

    Attributes:
        id: the job's id.
        slide: its name in the atlas.
        state: waiting, embedding, adding, done or failed.
        done: number of tiles embedded.
        total: number of tiles to embed; 0 before the slide is opened.
        message: why it failed, or its result.
        at: when it was requested, UTC.
    """

    id: str
    slide: str
    state: State
    done: int
    total: int
    message: str
    at: str
    # not shown to users: the file; label, patient and mpp as given; which tiles; whether to replace one;
    # user, address and request id of the request
    path: Annotated[Path, PRIVATE]
    row: Annotated[dict[str, str], PRIVATE]
    tiles: Annotated[TileChoice, PRIVATE]
    replace: Annotated[bool, PRIVATE]
    by: Annotated[dict[str, str], PRIVATE]

    @property
    def over(self) -> bool:
        """Whether it is done or has failed."""
        return self.state in {"done", "failed"}


def plain(name: str) -> str:
    """Return a file name with only letters, digits, spaces and ``_.-``.

    Raises:
        BadInput: nothing is left.
    """
    safe = re.sub(r"[^\w.\- ]", "_", name).strip(" .")[-120:]
    if not safe or not Path(safe).stem.strip("._ "):
        raise BadInput(f"{name!r} is not a name for a slide; expected a name such as case-1.svs")
    return safe
