"""A slide that is added through the page or the API, from upload to atlas, as a value."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...errors import (
    BadInput,
)

State = Literal["waiting", "embedding", "adding", "done", "failed"]


@dataclass(frozen=True)
class Addition:
    """A slide on its way into the atlas.

    Attributes:
        id: of the job.
        slide: its name in the atlas.
        state: waiting, embedding, adding, done or failed.
        done: tiles embedded.
        total: tiles known to be wanted; 0 before the slide is open.
        message: why it failed, or what came of it.
        at: when it was asked for, UTC.
        path: of the file; not shown to anyone.
        row: label, patient and mpp, as given.
        replace: whether it takes the place of a slide of that name.
    """

    id: str
    slide: str
    state: State
    done: int
    total: int
    message: str
    at: str
    path: Path
    row: dict[str, str]
    replace: bool = False

    @property
    def over(self) -> bool:
        """Whether nothing more happens."""
        return self.state in {"done", "failed"}

    def public(self) -> dict[str, Any]:
        """Return what may be shown."""
        shown = ("id", "slide", "state", "done", "total", "message", "at")
        return {key: getattr(self, key) for key in shown}


def plain(name: str) -> str:
    """Return a file name without anything that a file name should not have.

    Raises:
        BadInput: nothing is left.
    """
    found = re.sub(r"[^\w.\- ]", "_", name).strip(" .")[-120:]
    if not found or not Path(found).stem.strip("._ "):
        raise BadInput(f"{name!r} is no name for a slide; expected one such as case-1.svs")
    return found
