"""Find how another tool made features with a checkpoint: which pooling, colours and change of size.

Tiles of a slide are embedded by the checkpoint's network and compared with the features that the other
tool stored for them. The authors' settings come first; then poolings, colours and ways to resize a tile are
tried. Colours are tried with all poolings, because the wrong colours may hide the right pooling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..errors import BadInput
from ..metrics import unit_rows
from .checkpoints import Tensors, load
from .from_checkpoint import fit_of
from .nets.build import image_net
from .nets.vit import Pool, VitEncoder
from .published import PUBLISHED, Published

LEAST = 0.999
"""Least median cosine that counts as the same: features in half precision stay above it."""
LOWEST = 0.95
"""Least cosine of a single tile: one at the slide's edge may be filled up in another way."""
BATCH = 4
FEW = 4
"""Number of tiles with which colours are tried."""
Colours = tuple[tuple[float, ...], tuple[float, ...]]
Fit = Literal["bilinear", "bicubic", "crop"]
FITS: tuple[Fit, ...] = ("bilinear", "bicubic", "crop")


@dataclass(frozen=True)
class Trial:
    """One way to embed the tiles.

    Attributes:
        pool: what forms the embedding.
        mean: per colour, in 0..1.
        std: per colour, in 0..1.
        colours: names of the published encoders with this mean and std.
        fit: how a tile becomes the network's input.
        shown: how the tile was read from the slide.
        tiles: number of tiles that were compared.
        cosine: median cosine with the stored features.
        lowest: lowest cosine with them.
    """

    pool: Pool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    colours: str
    fit: Fit
    shown: str
    tiles: int
    cosine: float
    lowest: float

    @property
    def same(self) -> bool:
        """Whether the features are computed again: nearly the same for most tiles, similar for each."""
        return self.cosine >= LEAST and self.lowest >= LOWEST

    def as_dict(self) -> dict[str, Any]:
        """Return the trial, JSON-ready."""
        return {**asdict(self), "same": self.same}


def find_settings(
    known: Published,
    tensors: Tensors,
    source: str,
    stored: NDArray[np.float32],
    shown: Mapping[str, NDArray[np.uint8]],
) -> list[Trial]:
    """Try settings until one computes the stored features again; return all trials, the best one first.

    Args:
        known: row of the encoder.
        tensors: of the checkpoint.
        source: name of the checkpoint, for messages.
        stored: features (N, D) of another tool.
        shown: the same tiles uint8 (N, T, T, 3), T = ``known.side``, by the way they were read; the first
            is the usual one.

    Raises:
        BadInput: no pooling gives embeddings of this length, or the checkpoint does not fit.
    """
    shape = known.shape
    length = stored.shape[1]
    pools = [cast(Pool, pool) for pool in shape.pools() if shape.dim(cast(Any, pool)) == length]
    if not pools:
        lengths = ", ".join(f"{pool}: {shape.dim(cast(Any, pool))}" for pool in shape.pools())
        raise BadInput(
            f"the features have {length} numbers; {source} can give {lengths}: they are of another encoder"
        )
    net: Any = image_net(shape, pools[0])
    load(net, tensors, source)
    wanted = unit_rows(stored)
    trials: list[Trial] = []

    def tried(colours: Colours, fit: Fit, way: str, only: Sequence[Pool], most: int) -> Trial:
        """Try one way to show at most ``most`` tiles, with several poolings; return the best trial yet."""
        rows = np.unique(np.linspace(0, len(wanted) - 1, most).astype(int))
        for pool, vectors in _embedded(net, known, colours, fit, shown[way][rows], only).items():
            cosines = np.sum(wanted[rows] * unit_rows(vectors), axis=1)
            found = round(float(np.median(cosines)), 6), round(float(cosines.min()), 6)
            trials.append(Trial(pool, *colours, _named(colours), fit, way, len(rows), *found))
        return max(trials, key=lambda trial: trial.cosine)

    every, usual = len(wanted), next(iter(shown))
    best = tried(known.colours, known.fit, usual, pools, every)
    if not best.same:
        for colours in dict.fromkeys(row.colours for row in PUBLISHED.values()):
            if colours != known.colours:
                best = tried(colours, known.fit, usual, pools, FEW)
    fits: Sequence[Fit] = (known.fit,)
    if known.side != shape.size_px:
        croppable = (known.crop_from or known.side) >= shape.size_px
        fits = [fit for fit in FITS if fit != "crop" or croppable]
    ways = [(fit, way) for way in shown for fit in fits]
    while ways and not (best.same and best.tiles == every):
        fit, way = ways.pop(0)
        tried((best.mean, best.std), fit, way, [best.pool], every)
        best = max((t for t in trials if t.tiles == every), key=lambda trial: trial.cosine)
    return sorted(trials, key=lambda trial: (trial is not best, -trial.cosine))


def _embedded(
    net: Any,
    known: Published,
    colours: Colours,
    fit: Fit,
    tiles: NDArray[np.uint8],
    pools: Sequence[Pool],
) -> dict[Pool, NDArray[np.float32]]:
    """Return the embeddings (N, D) of tiles by each pooling; the network runs once."""
    mean, std = (torch.tensor(part)[:, None, None] for part in colours)
    change = fit_of(replace(known, fit=fit)) or nn.Identity()
    found: dict[Pool, list[NDArray[np.float32]]] = {pool: [] for pool in pools}
    with torch.inference_mode():
        for start in range(0, len(tiles), BATCH):
            pixels = torch.from_numpy(tiles[start : start + BATCH]).permute(0, 3, 1, 2).float()
            scaled = (change(pixels) / 255 - mean) / std
            if not isinstance(net, VitEncoder):
                found[pools[0]].append(net(scaled).numpy())
                continue
            tokens = net.trunk(scaled)
            for pool in pools:
                found[pool].append(net.pooled(tokens, pool).numpy())
    return {pool: np.concatenate(parts) for pool, parts in found.items()}


def _named(colours: Colours) -> str:
    names = [name for name, row in PUBLISHED.items() if row.colours == colours]
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
