"""Query images of a known scale: each is cut into tiles of the atlas's scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...artifacts.images import Rgb, resample, square
from ...errors import BadInput
from ...index.atlas import Atlas
from ...index.vectors.scan import Metric, prepared, scan
from ...metrics import unit_rows
from ...serving.slides.tissue import tissue_mask, tissue_share
from .regions import LEAST_TISSUE, MAX_TILES, grid_in

MASK_PX = 1024
LEAST_TILE = 0.7
"""An image must be at least this share of a tile wide and high."""
FINEST, COARSEST = 0.01, 100.0
"""Range of µm per pixel."""
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class ScaledImage:
    """An image, or a part of it, as tiles of the atlas's scale.

    Attributes:
        name: of the image.
        mpp: µm per pixel of the image.
        side: of a tile, in pixels of the image.
        boxes: (N, 4) left, top, width and height of each tile, as shares of the whole image.
        whole: (S, S, 3) the centre of the part, to show.
        without_tissue: number of tiles that were left out because they show no tissue.
        not_taken: number of further tiles, of an image of more than :data:`MAX_TILES`.
    """

    name: str
    mpp: float
    side: int
    boxes: NDArray[np.float64] = field(repr=False)
    whole: Rgb = field(repr=False)
    without_tissue: int
    not_taken: int


def tile_mpp_of(atlas: Atlas) -> float | None:
    """Return µm per pixel of an atlas's tiles as the encoder takes them; None if it is unknown."""
    known = [row["target_mpp"] for row in atlas.view().columns.slides if row["target_mpp"]]
    return float(np.median(known)) if known else atlas.manifest.mpp


def cut_for(
    atlas: Atlas, pixels: Rgb, name: str, mpp: float, crop: Box | None = None
) -> tuple[ScaledImage, NDArray[np.uint8]]:
    """Cut an image into tiles of an atlas's scale; see :func:`cut`.

    Raises:
        BadInput: the scale of the atlas is unknown, too.
    """
    tile_mpp = tile_mpp_of(atlas)
    if tile_mpp is None:
        raise BadInput("the scale of this atlas's tiles is unknown; leave out that of the image")
    return cut(pixels, name, crop, mpp, tile_mpp, atlas.manifest.size_px)


def mean_of(vectors: NDArray[np.float32], metric: str) -> NDArray[np.float32]:
    """Return the mean (D,) of the embeddings (N, D) of an example's tiles; for cosine, of length 1."""
    mean: NDArray[np.float32] = vectors.mean(0)
    return unit_rows(mean[None])[0] if metric == "cosine" else mean


def cut(
    pixels: Rgb, name: str, crop: Box | None, mpp: float, tile_mpp: float, size_px: int
) -> tuple[ScaledImage, NDArray[np.uint8]]:
    """Cut an image into tiles, uint8 (N, S, S, 3), that do not overlap.

    Args:
        pixels: (H, W, 3).
        name: of the image, in messages.
        crop: left, top, width and height of the part to use, as shares of the image; all when None.
        mpp: µm per pixel of the image.
        tile_mpp: µm per pixel of a tile as the encoder takes it.
        size_px: side of a tile as the encoder takes it, S.

    Raises:
        BadInput: the scale is out of range, or the part is smaller than a tile.
    """
    if not FINEST <= mpp <= COARSEST:
        raise BadInput(
            f"the scale of {name} is {mpp:g} µm per pixel; expected {FINEST:g} to {COARSEST:g} "
            "(0.25 at 40x, 0.5 at 20x)"
        )
    height, width = pixels.shape[:2]
    left, top, across, down = (0.0, 0.0, 1.0, 1.0) if crop is None else crop
    x0, y0 = left * width, top * height
    x1, y1 = x0 + across * width, y0 + down * height
    shortest = min(x1 - x0, y1 - y0)
    side = round(size_px * tile_mpp / mpp)
    if shortest < LEAST_TILE * side or side < 1:
        what = "the part of it" if crop else "it"
        raise BadInput(
            f"{name} is too small at {mpp:g} µm per pixel: {what} is {shortest * mpp:.0f} µm wide or high, "
            f"and a tile of this atlas {side * mpp:.0f} µm; take a larger part, or correct the scale"
        )
    side = min(side, int(shortest))
    ring = ((x0, y0), (x1, y0), (x1, y1), (x0, y1))
    corners = np.clip(grid_in(ring, side, (width, height)), 0, (width - side, height - side))
    small, factor = _small(pixels)
    boxes = np.concatenate([corners, corners + side], axis=1) / factor
    shown = tissue_share(tissue_mask(small), boxes) >= LEAST_TISSUE
    kept = corners[shown] if shown.any() else corners
    rows = np.linspace(0, len(kept) - 1, min(len(kept), MAX_TILES)).round().astype(int)
    taken = kept[rows]
    tiles = np.stack(
        [resample(pixels[y : y + side, x : x + side], size_px) for x, y in taken.tolist()]
    )
    part = pixels[int(y0) : max(int(y1), int(y0) + 1), int(x0) : max(int(x1), int(x0) + 1)]
    shares = np.concatenate([taken, np.full_like(taken, side)], axis=1) / (
        width,
        height,
        width,
        height,
    )
    image = ScaledImage(
        name,
        mpp,
        side,
        shares,
        square(part, size_px),
        len(corners) - len(kept),
        len(kept) - len(taken),
    )
    return image, tiles


def _small(pixels: Rgb) -> tuple[Rgb, float]:
    """Return an image of at most :data:`MASK_PX`, and its factor of reduction."""
    factor = max(1.0, max(pixels.shape[:2]) / MASK_PX)
    if factor == 1:
        return pixels, factor
    size = max(1, round(pixels.shape[1] / factor)), max(1, round(pixels.shape[0] / factor))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX)), factor


def matches_of(
    vectors: NDArray[np.float32] | None, metric: Metric, parts: Sequence[NDArray[np.float32]]
) -> tuple[tuple[int, int], ...]:
    """Return, of each hit, the image and its tile that it resembles most.

    Args:
        vectors: (H, D) of the hits; None if they are not known.
        metric: of the vectors.
        parts: embeddings (N, D) of the tiles of each image.
    """
    if vectors is None or not len(vectors):
        return ()
    tiles = np.concatenate(parts)
    owners = [(image, n) for image, part in enumerate(parts) for n in range(len(part))]
    _, near = scan(prepared(vectors, metric), prepared(tiles, metric), 1, metric)
    return tuple(owners[row] for row in near[:, 0].tolist())
