"""Values of questions that are regions of a slide."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...artifacts.geojson import inside
from ...errors import BadInput

MAX_TILES = 256
"""Maximum number of tiles into which a region is cut; of a larger one, so many are taken evenly spaced."""
MAX_CORNERS = 1_000
MAX_CANDIDATES = 200_000
"""Maximum number of tiles in a region before those without tissue are left out."""
ONE_TILE = 1.5
"""A region whose sides are below this many tiles is one tile around its centre."""
LEAST_TISSUE = 0.25
"""A tile with a smaller share of tissue is left out, if there are others."""
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


def grid_in(ring: tuple[Point, ...], side: int, size: tuple[int, int]) -> NDArray[np.int64]:
    """Return the corners (N, 2) of tiles whose centre is inside a polygon and the slide; at least one."""
    low = np.clip(np.min(ring, axis=0), 0, size)
    high = np.clip(np.max(ring, axis=0), 0, size)
    extent, centre = high - low, (low + high) / 2
    one: NDArray[np.int64] = np.round(centre - side / 2).astype(np.int64)[None]
    if (extent < ONE_TILE * side).all():
        return one
    across, down = np.maximum(1, np.round(extent / side)).astype(int).tolist()
    if across * down > MAX_CANDIDATES:
        raise BadInput(
            f"the region has about {across * down:,} tiles; expected at most {MAX_CANDIDATES:,}: draw a "
            "smaller one"
        )
    start = centre - np.array([across, down]) * side / 2
    x, y = (part.ravel() for part in np.meshgrid(np.arange(across), np.arange(down)))
    corners: NDArray[np.int64] = np.round(start + np.stack([x, y], axis=1) * side).astype(np.int64)
    centred = inside(corners + side / 2, [ring])
    return corners[centred] if centred.any() else one
