"""Fit the tissue gate to synthetic images that are out of distribution.

The images are made from tiles and from noise. No real photograph, ultrasound or X-ray image is used, so
those remain available to evaluate the gate.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from ..errors import BadInput
from ..metrics import Ints, Metric
from .augment import Augmentation, augment
from .data import LabelledTiles
from .models.gate import HIDDEN, LIMIT, TissueGate, colour_statistics, shrink

SAMPLES = 2400
"""Number of tiles, and also of images out of distribution, that a gate is fitted to."""
LEAST = 3
"""Minimum number of tiles: a third stays unchanged, a third imitates other labs, a third other stains."""
PENALTY, PASSES = 1.0, 60
"""L2 penalty of the gate's weights, and passes over the images: more fits the synthetic images too well."""
BATCH = 64
OTHER_LABS = Augmentation(rotation_deg=180, zoom=0.25, stain=0.3, colour=0.1)
HAEMATOXYLIN_EOSIN = ((0.650, 0.704, 0.286), (0.072, 0.990, 0.105))
OTHER_STAINS = {
    "haematoxylin, DAB": ((0.650, 0.704, 0.286), (0.268, 0.570, 0.776)),
    "haematoxylin, AEC": ((0.650, 0.704, 0.286), (0.274, 0.680, 0.680)),
    "haematoxylin, PAS": ((0.644, 0.717, 0.267), (0.175, 0.972, 0.155)),
    "Masson's trichrome": ((0.800, 0.591, 0.105), (0.100, 0.737, 0.668)),
    "alcian blue, haematoxylin": ((0.875, 0.458, 0.158), (0.553, 0.754, 0.354)),
}
"""Optical densities per RGB channel: Ruifrok & Johnston 2001, as in Landini's Colour Deconvolution."""
DRAWS, GREENEST = 8, 0.02
"""Attempts to exchange a tile's colours, and how far green may be below red and blue."""
Rng = np.random.Generator
Picture = NDArray[np.float32]


def non_tissue_tiles(tiles: NDArray[np.uint8], count: int, seed: int) -> NDArray[np.uint8]:
    """Return ``count`` synthetic images out of distribution, uint8 (count, S, S, 3).

    The kinds alternate: tiles without colour, with exchanged or rotated colours, inverted, or blurred and
    recoloured; plain fields with noise; noise with the spectrum of natural images; overlapping shapes.

    Args:
        tiles: real tiles to change, uint8 (N, S, S, 3).
        count: number of images.
        seed: seed of all random draws.
    """
    rng = np.random.default_rng(seed)
    kinds = (_grey, _exchanged, _inverted, _recoloured, _plain, _noise, _shapes)
    made = np.empty((count, *tiles.shape[1:]), dtype=np.uint8)
    for number in range(count):
        tile = tiles[rng.integers(len(tiles))].astype(np.float32) / 255
        made[number] = np.clip(kinds[number % len(kinds)](tile, rng), 0, 1) * 255
    return made


def _grey(tile: Picture, rng: Rng) -> Picture:
    """Remove the colour and change the contrast at random, dark on light or light on dark."""
    grey = tile.mean(axis=2, keepdims=True)
    grey = 1 - grey if rng.random() < 0.5 else grey
    grey = np.clip((grey - grey.mean()) * rng.uniform(0.4, 2) + rng.uniform(0.1, 0.9), 0, 1)
    grey = np.clip(_softened(grey, rng), 0, 1) if rng.random() < 0.5 else grey
    return np.repeat(grey ** rng.uniform(0.5, 2), 3, axis=2).astype(np.float32)


def _exchanged(tile: Picture, rng: Rng) -> Picture:
    """Permute red, green and blue, or rotate the hue by 60 to 300 degrees, so that green is strongest.

    Most stains absorb green. Brown, blue and violet tiles could be of another stain: they are drawn again.
    """
    found = tile[:, :, (1, 0, 2)]
    for _ in range(DRAWS):
        if rng.random() < 0.5:
            orders = ((1, 0, 2), (1, 2, 0), (2, 0, 1), (0, 2, 1))
            found = tile[:, :, orders[rng.integers(len(orders))]]
        else:
            angle = np.radians(rng.uniform(60, 300))
            diagonal = np.full((3, 3), 1 / 3)
            across = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
            turn = np.cos(angle) * (np.eye(3) - diagonal) + np.sin(angle) * across + diagonal
            found = (tile @ turn.T).astype(np.float32)
        red, green, blue = found.mean((0, 1))
        if green >= max(red, blue) - GREENEST:
            break
    return found


def _inverted(tile: Picture, rng: Rng) -> Picture:
    """Invert the colours, as in a photographic negative."""
    return 1 - tile * np.float32(rng.uniform(0.7, 1))


def _recoloured(tile: Picture, rng: Rng) -> Picture:
    """Blur the tile and mix its colours at random, like a scene out of focus."""
    soft = _softened(tile, rng)
    mixed = (soft - soft.mean((0, 1))) @ rng.normal(0, 1, (3, 3)) * rng.uniform(0.5, 2)
    scene: Picture = (mixed + rng.uniform(0.1, 0.9, 3)).astype(np.float32)
    return scene


def _plain(tile: Picture, rng: Rng) -> Picture:
    """Return a plain colour, often near white, with little noise."""
    level = rng.uniform(0.75, 1, 3) if rng.random() < 0.7 else rng.uniform(0, 1, 3)
    return (level + rng.normal(0, rng.uniform(0, 0.02), tile.shape)).astype(np.float32)


def _noise(tile: Picture, rng: Rng) -> Picture:
    """Return noise in random colours; its amplitude falls with frequency as in natural images."""
    side = tile.shape[0]
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
    frequency[0, 0] = 1
    spectrum = np.fft.rfft2(rng.normal(size=(3, side, side))) / frequency ** rng.uniform(0.6, 2)
    field = np.fft.irfft2(spectrum, (side, side)).transpose(1, 2, 0)
    field = field / field.std() @ rng.normal(0, 1, (3, 3)) * rng.uniform(0.08, 0.25)
    noise: Picture = (field + rng.uniform(0.1, 0.9, 3)).astype(np.float32)
    return noise


def _shapes(tile: Picture, rng: Rng) -> Picture:
    """Return overlapping discs, boxes and bars in random colours, more or less sharp."""
    side = tile.shape[0]
    picture = Image.new("RGB", (side, side), tuple(int(v) for v in rng.integers(0, 256, 3)))
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(3, 60))):
        x, y = rng.uniform(-0.2, 1, 2) * side
        wide, high = rng.uniform(0.03, 0.6, 2) * side
        colour = tuple(int(v) for v in rng.integers(0, 256, 3))
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((x, y, x + wide, y + high), fill=colour)
    soft = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 6)))
    return np.asarray(soft, np.float32) / np.float32(255)


def _softened(tile: Picture, rng: Rng) -> Picture:
    """Shrink and enlarge the tile, so that details are lost."""
    side = tile.shape[0]
    small = int(rng.integers(max(2, side // 16), max(3, side // 3)))
    planes = [
        Image.fromarray(tile[:, :, n]).resize((small, small)).resize((side, side), Image.Resampling.BICUBIC)
        for n in range(tile.shape[2])
    ]  # fmt: skip
    return np.stack([np.asarray(plane, np.float32) for plane in planes], axis=2)


def restained(tiles: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    """Return H&E tiles in the colours of other stains, uint8 (N, S, S, 3).

    The densities of haematoxylin and eosin are separated and rendered in the colours of another pair of
    stains. The second stain has a random strength and, in half of the tiles, covers a random part of the
    tile only, as an antibody marks some cells or none.

    Args:
        tiles: uint8 (N, S, S, 3).
        seed: seed of all random draws.
    """
    rng = np.random.default_rng(seed)
    third = np.cross(*HAEMATOXYLIN_EOSIN)
    apart = np.linalg.inv(np.stack([*HAEMATOXYLIN_EOSIN, third]))
    pairs = list(OTHER_STAINS.values())
    made = np.empty_like(tiles)
    for number, tile in enumerate(tiles):
        density = -np.log(np.maximum(tile, 1) / 255.0) @ apart
        first, second = np.maximum(density[:, :, 0], 0), np.maximum(density[:, :, 1], 0)
        if rng.random() < 0.5:
            second = np.where(second > np.quantile(second, rng.random()), second, 0)
        stains = np.stack([first * rng.uniform(0.3, 1.2), second * rng.uniform(0, 2.25)], 2)
        made[number] = 255 * np.exp(-stains @ np.array(pairs[number % len(pairs)]))
    return made


def fit_gate(gate: TissueGate, data: LabelledTiles, train: Ints, seed: int) -> None:
    """Fit a gate to separate training tiles, also in other stains, from images out of distribution.

    Classes are drawn in proportion to the square root of their size, so that no large class dominates.

    Args:
        gate: gate to fit, changed in place.
        data: labelled tiles.
        train: (K,) indices of the training tiles.
        seed: seed of all random draws.

    Raises:
        BadInput: fewer than :data:`LEAST` of the drawn tiles can be read.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    rng = np.random.default_rng(seed)
    classes, sizes = np.unique(data.labels[train], return_counts=True)
    drawn = rng.choice(classes, SAMPLES, p=np.sqrt(sizes) / np.sqrt(sizes).sum())
    numbers = np.sort([rng.choice(train[data.labels[train] == label]) for label in drawn])
    tiles, _ = data.read(numbers.astype(np.int64))
    if len(tiles) < LEAST:
        raise BadInput(
            f"{len(tiles)} of the training tiles drawn for the gate could be read; expected at least "
            f"{LEAST}; check that the files are still there"
        )
    tiles = tiles[rng.permutation(len(tiles))]
    plain, other = len(tiles) // 3, len(tiles) * 2 // 3
    generator = torch.Generator().manual_seed(seed)
    found = np.concatenate(
        [
            _statistics(tiles[:plain], None, generator),
            _statistics(tiles[plain:other], OTHER_LABS, generator),
            _statistics(restained(tiles[other:], seed), OTHER_LABS, generator),
            _statistics(non_tissue_tiles(tiles, len(tiles), seed), None, generator),
        ]
    )
    is_not_tissue = np.arange(len(found)) >= len(tiles)
    centre, spread = found.mean(0), found.std(0) + 1e-6
    near = np.clip((found - centre) / spread, -LIMIT, LIMIT)
    model = MLPClassifier((HIDDEN,), alpha=PENALTY, max_iter=PASSES, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # it stops early on purpose
        model.fit(near, is_not_tissue)
    for name, value in {
        "centre": centre, "scale": 1 / spread,
        "hidden": model.coefs_[0].T, "hidden_bias": model.intercepts_[0],
        "weight": model.coefs_[1][:, 0], "bias": model.intercepts_[1],
    }.items():  # fmt: skip
        gate.get_buffer(name).copy_(torch.from_numpy(np.asarray(value, np.float32)))


def judge_gate(gate: TissueGate, tiles: NDArray[np.uint8], seed: int) -> dict[str, Any]:
    """Return false-alarm rate on held-out tiles (N, S, S, 3) and hit rate on images made from them."""
    with torch.inference_mode():
        alarms, catches = (
            float(
                np.mean([_is_not_tissue(gate, part) for part in np.array_split(shown, len(shown))])
            )
            for shown in (tiles, non_tissue_tiles(tiles, len(tiles), seed + 1))
        )
    return {
        "gate": [
            Metric("false_alarms", alarms, 0.5, "a coin").as_dict(),
            Metric("caught", catches, 0.5, "a coin").as_dict(),
        ]
    }


def _is_not_tissue(gate: TissueGate, tiles: NDArray[np.uint8]) -> bool:
    pixels = torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255
    return bool(gate(gate.shrink(pixels))[0] > 0.5)


@torch.inference_mode()
def _statistics(
    tiles: NDArray[np.uint8], ranges: Augmentation | None, generator: torch.Generator
) -> NDArray[np.float64]:
    parts = []
    for start in range(0, len(tiles), BATCH):
        pixels = torch.from_numpy(tiles[start : start + BATCH]).permute(0, 3, 1, 2).float() / 255
        if ranges is not None:
            pixels = augment(pixels, ranges, generator)
        parts.append(colour_statistics(shrink(pixels)).double().numpy())
    return np.concatenate(parts)
