"""Stain normalisation: the colours of tiles are brought to those of a reference before they are embedded.

An encoder whose manifest names a method does this by itself, for slides and for queries, so that both are
treated alike. The method is fitted to the tissue of a whole slide or image, not to each of its tiles: a
tile with one stain alone keeps it. The change of colours is applied as a table over red, green and blue.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from ...artifacts.manifest import Manifest
from ...errors import BadInput
from .protocol import Encoder, check_tiles

Table = ImageFilter.Color3DLUT
Floats = NDArray[np.float64]
Change = Callable[[Floats], Floats]
Run = Callable[[NDArray[np.uint8]], NDArray[np.float32]]

_STEPS = 33
"""Steps of the table for each channel; between them colours are interpolated."""
LEAST_POINTS, _SAMPLE, _MOST_POINTS = 500, 12_000, 200_000
_GLASS = 0.15
"""Pixels with a mean optical density (to base 10) below it are glass, and are not fitted."""
_BLACK, _GREEN = 20, 0.25
"""Largest value of a nearly black pixel (bars, ink, borders); least saturation of a green one (ink)."""

# Ruderman's colour space for Reinhard et al., Color transfer between images (2001), eq. 3 to 7.
_LMS = np.array([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]])
_OPPONENT = np.diag([3**-0.5, 6**-0.5, 2**-0.5]) @ np.array([[1, 1, 1], [1, 1, -2], [1, -1, 0]])
_REINHARD = np.array([[-0.520, -0.113, 0.018], [0.202, 0.057, 0.008]])
"""Reference: mean and deviation of the three channels, over twelve sources of H&E."""
_LEAST_DEVIATION = 1e-3

# Macenko et al., A method for normalizing histology slides (2009), and the reference of its authors' code.
_REFERENCE = np.array([[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]])
"""Optical densities (natural logarithm) of haematoxylin and eosin, of length 1."""
_STRONG = np.array([1.9705, 1.0308])
"""99th percentile of their amounts."""
_FAINT, _ANGLE_PERCENT, _STRONG_PERCENT = 0.15, 1.0, 99.0
_LEAST_ANGLE = 0.1
"""Least angle between the stains, in radians; those of the reference are .39 apart."""


class NormalisingEncoder:
    """An encoder that normalises the stain of tiles; see :class:`.protocol.Encoder`.

    Attributes:
        graph: the encoder of normalised tiles.
    """

    def __init__(self, graph: Encoder) -> None:
        """Wrap an encoder whose manifest names a method."""
        self.graph, self.manifest = graph, graph.manifest
        self.batch, self.parallel, self.offloads = graph.batch, graph.parallel, graph.offloads

    def describe(self) -> dict[str, Any]:
        """Return what the wrapped encoder states, and the method."""
        return {**self.graph.describe(), "stain_normalise": self.manifest.stain_normalise}

    def embed(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embed tiles, each as an image of its own; :func:`embed_images` also says what failed."""
        return embed_images(self, tiles)[0]

    def close(self) -> None:
        """Close the wrapped encoder."""
        self.graph.close()


def graph_of(encoder: Encoder) -> Encoder:
    """Return the encoder that embeds tiles as they are, without stain normalisation."""
    return encoder.graph if isinstance(encoder, NormalisingEncoder) else encoder


def embed_images(
    encoder: Encoder,
    tiles: NDArray[np.uint8],
    run: Run | None = None,
    one_image: bool = False,
) -> tuple[NDArray[np.float32], list[str]]:
    """Embed query tiles, uint8 (N, S, S, 3) -> float32 (N, D); normalise their stain if the encoder does.

    Args:
        encoder: any encoder.
        tiles: each an image of its own.
        run: embeds tiles as they are; the encoder itself when None.
        one_image: the tiles are parts of one image, to which the method is fitted.

    Returns:
        The embeddings, and for each tile why its colours were left as they are; "" if they were not.

    Raises:
        BadInput: the tiles do not have the manifest's shape and type.
    """
    run, manifest = run or graph_of(encoder).embed, encoder.manifest
    if manifest.stain_normalise is None or not len(tiles):
        return run(tiles), [""] * len(tiles)
    check_tiles(tiles, manifest)
    changed, reasons = tiles.copy(), [""] * len(tiles)
    step = len(tiles) if one_image else 1
    for start in range(0, len(tiles), step):
        part = slice(start, start + step)
        try:
            table = fitted(sampled(tiles[part]), manifest.stain_normalise)
        except BadInput as error:
            reasons[part] = [str(error)] * len(reasons[part])
        else:
            changed[part] = normalised(tiles[part], table)
    return embed_normalised(run, manifest, changed, tiles), reasons


def embed_normalised(
    run: Run, manifest: Manifest, changed: NDArray[np.uint8], tiles: NDArray[np.uint8]
) -> NDArray[np.float32]:
    """Embed normalised tiles (N, S, S, 3) -> (N, D); ``tiles`` are the same without normalisation.

    A tile is out of distribution if the tissue gate says so of it as it is: a photograph gets the colours
    of H&E, and would pass the gate.
    """
    vectors = run(changed)
    if manifest.tissue_gate and changed is not tiles:
        unchanged = run(tiles)
        foreign = manifest.out_of_distribution(unchanged)
        vectors[foreign] = _with_gate_of(vectors[foreign], unchanged[foreign])
    return vectors


def not_normalised(names: Sequence[str], reasons: Sequence[str]) -> list[str]:
    """Return notes about the images whose colours were left as they are; see :func:`embed_images`."""
    told = zip(names, reasons, strict=True)
    return [f"the stain of {name} was not normalised: {reason}" for name, reason in told if reason]


def _with_gate_of(
    vectors: NDArray[np.float32], unchanged: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return embeddings (N, D) with the tissue gate's angle from those of the unchanged tiles (N, D)."""
    gate = unchanged[:, -1:]
    lengths = np.linalg.norm(vectors[:, :-1], axis=1, keepdims=True)
    scale = np.sqrt(np.maximum(0, 1 - gate**2)) / np.maximum(lengths, 1e-12)
    return np.concatenate([vectors[:, :-1] * scale, gate], axis=1)


def normalised(tiles: NDArray[np.uint8], table: Table) -> NDArray[np.uint8]:
    """Return tiles (N, H, W, 3) with the colours of a table."""
    return np.stack([np.asarray(Image.fromarray(tile).filter(table)) for tile in tiles])


def sampled(tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return pixels (M, 3) of tiles (N, H, W, 3), in even steps of at most 4."""
    step = int(np.clip(np.sqrt(tiles[..., 0].size / _SAMPLE), 1, 4))
    return tiles[:, step // 2 :: step, step // 2 :: step].reshape(-1, 3)


def fitted(pixels: NDArray[np.uint8], method: str) -> Table:
    """Return the table that brings the colours of a slide or image to those of the reference.

    Args:
        pixels: of the slide, (N, 3); glass, nearly black pixels and green ones (ink) are left out.
        method: ``reinhard`` (mean and deviation of the colours) or ``macenko`` (two stains).

    Raises:
        BadInput: too few pixels show tissue, or their stains cannot be told apart.
    """
    pixels = pixels[:: -(-len(pixels) // _MOST_POINTS) or 1]
    values = pixels.astype(np.float64)
    most = values.max(1)
    is_green = (values[:, 1] == most) & (most - values.min(1) > _GREEN * most)
    dense = -np.log10((values + 1) / 256).mean(1) > _GLASS
    tissue = values[dense & (most > _BLACK) & ~is_green]
    if len(tissue) < LEAST_POINTS:
        raise BadInput(
            f"{len(tissue)} of {len(pixels)} pixels have colours of stained tissue, and stain "
            f"normalisation needs {LEAST_POINTS}"
        )
    change = (_by_reinhard if method == "reinhard" else _by_macenko)(tissue)
    grid = np.linspace(0, 255, _STEPS)
    blue, green, red = np.meshgrid(grid, grid, grid, indexing="ij")
    after = change(np.stack([red, green, blue], -1).reshape(-1, 3))
    if not np.isfinite(after).all():
        raise BadInput("the colours of the tissue hardly differ")
    return Table(_STEPS, (np.clip(after, 0, 255) / 255).astype(np.float32))


def _by_reinhard(tissue: Floats) -> Change:
    values = _ruderman(tissue)
    mean, deviation = values.mean(0), values.std(0)
    if deviation.min() < _LEAST_DEVIATION:
        raise BadInput("the colours of the tissue hardly differ")
    back = np.linalg.inv(_OPPONENT).T, np.linalg.inv(_LMS).T

    def change(pixels: Floats) -> Floats:
        values = (_ruderman(pixels) - mean) / deviation * _REINHARD[1] + _REINHARD[0]
        return np.asarray(10 ** (values @ back[0]) @ back[1] * 256 - 1)

    return change


def _ruderman(pixels: Floats) -> Floats:
    return np.asarray(np.log10((pixels + 1) / 256 @ _LMS.T) @ _OPPONENT.T)


def _by_macenko(tissue: Floats) -> Change:
    density = -np.log((tissue + 1) / 256)
    strong = density[(density >= _FAINT).all(1)]
    if len(strong) < LEAST_POINTS:
        raise BadInput("too few pixels absorb all colours, so the two stains cannot be told apart")
    plane = np.linalg.eigh(np.cov(strong.T))[1][:, 1:]
    plane *= np.where(plane.sum(0) < 0, -1, 1)
    angles = np.arctan2(*(strong @ plane).T)
    ends = np.percentile(angles, [_ANGLE_PERCENT, 100 - _ANGLE_PERCENT])
    if ends[1] - ends[0] < _LEAST_ANGLE:
        raise BadInput("the pixels show one stain only, so two cannot be told apart")
    stains = np.stack([np.sin(ends), np.cos(ends)], 1) @ plane.T
    if stains[0, 0] < stains[1, 0]:  # haematoxylin absorbs more red light
        stains = stains[::-1]
    amounts = density @ np.linalg.pinv(stains)
    scale = _STRONG / np.maximum(np.percentile(amounts, _STRONG_PERCENT, axis=0), 1e-3)

    def change(pixels: Floats) -> Floats:
        found = np.maximum(0, -np.log((pixels + 1) / 256) @ np.linalg.pinv(stains)) * scale
        return np.asarray(256 * np.exp(-found @ _REFERENCE) - 1)

    return change
