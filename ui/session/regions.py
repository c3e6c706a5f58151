"""Values of questions that are regions of a slide."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...errors import BadInput

MAX_TILES = 256
"""Maximum number of tiles into which a region is cut; of a larger one, so many are taken evenly spaced."""
MAX_CORNERS = 1_000
Point = tuple[float, float]


@dataclass(frozen=True)
class Region:
    """A polygon on a slide.

    Attributes:
        slide: name.
        ring: corners in level-0 pixels, at least three; the last is joined to the first.
    """

    slide: str
    ring: tuple[Point, ...]

    def __post_init__(self) -> None:
        """Raise BadInput if the ring has too few or too many corners, or no area."""
        if not 3 <= len(self.ring) <= MAX_CORNERS:
            raise BadInput(
                f"a region has {len(self.ring)} corners; expected 3 to {MAX_CORNERS:,} of [x, y]"
            )
        if not np.isfinite(self.ring).all():
            raise BadInput("a corner of the region is not finite; expected level-0 pixels")
        low, high = np.min(self.ring, axis=0), np.max(self.ring, axis=0)
        if (high - low).min() < 1:
            raise BadInput("the region has no area; draw it again")


@dataclass(frozen=True)
class Cut:
    """The tiles of a region.

    Attributes:
        region: the region.
        corners: (N, 2) left and top of each tile, in level-0 pixels.
        side: of a tile, in level-0 pixels.
        without_tissue: number of tiles of the region that were left out because they show no tissue.
        not_taken: number of further tiles, of a region of more than :data:`MAX_TILES`.
    """

    region: Region
    corners: NDArray[np.int64]
    side: int
    without_tissue: int
    not_taken: int
