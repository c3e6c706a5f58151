"""A tile set prepared for embedding: read piece by piece, then described."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...artifacts.feature_files import Features
from ...artifacts.images import square
from ...artifacts.manifest import Manifest
from ...artifacts.tilesets import TileSet
from ...errors import BadInput
from ..slides.quality import Limits
from .job import Job
from .measured import Measured


@dataclass
class TilesWork:
    """A tile set; see :class:`Work`."""

    job: Job
    tileset: TileSet
    manifest: Manifest
    name: str
    path: Path
    key: dict[str, Any]
    tissue: float | None = None
    limits: Limits = field(default_factory=Limits)
    seconds: float = 0.0
    closing: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        """Count the tiles, and collect what the result states."""
        self.count = len(self.tileset)
        self.notes = list(self.tileset.notes)
        self.left_out: Sequence[dict[str, str]] = [t._asdict() for t in self.tileset.left_out]

    def read(self, start: int, out: NDArray[np.uint8]) -> dict[int, BadInput]:
        """See :class:`Work`."""
        failed = {}
        for number in range(len(out)):
            try:
                out[number] = square(self.tileset.read(start + number), self.manifest.size_px)
            except BadInput as error:
                failed[number] = error
        return failed

    def draw(self, faults: NDArray[np.int8]) -> None:
        """A tile set has no overlay."""

    def describe(self, measured: Measured, unreadable: list[str]) -> Features:
        """See :class:`Work`."""
        embedded = measured.embedded()
        tiles = [self.tileset.tiles[row] for row in embedded.tolist()]
        return Features(
            name=self.name,
            encoder=self.manifest.name,
            encoder_sha256=self.manifest.sha256,
            features=np.zeros((0, self.manifest.dim), dtype=np.float32),
            coords=np.zeros((len(tiles), 2), dtype=np.int64),
            files=tuple(t.file for t in tiles),
            kind="tiles",
            source=self.job.location,
            size_px=self.manifest.size_px,
            labels=tuple(t.label or "" for t in tiles),
            groups=tuple(t.group or "" for t in tiles),
            quality=measured.quality(embedded),
            about={
                "key": self.key,
                "source": self.job.location,
                "unreadable": unreadable,
                "tiles": len(tiles),
                "reason": "",
                "notes": self.notes,
            },
        )

    def close(self) -> None:
        """No file is held open."""
        self.closing.close()
