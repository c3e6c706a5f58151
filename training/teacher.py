"""What a larger net says of every training tile, once, for a small one to learn.

The teacher's features of a tile are averaged over its eight turns and mirror images and whitened: so a
small net learns what the large one sees in a tile however it lies, at no cost per step.
"""

from __future__ import annotations

import hashlib
import io

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..console import Report
from ..files import cache_folder, write_atomic
from ..metrics import Ints
from .checkpoint import load_backbone
from .data import LabelledTiles
from .evaluate import to_input
from .models import build

BATCH = 32
LEAST_SPREAD = 1e-4
"""Components that vary less than this share of the first are noise, and are left out."""


def teacher_features(
    name: str, data: LabelledTiles, device: torch.device, progress: Report
) -> NDArray[np.float16]:
    """Return the teacher's unit features of every tile, averaged over its eight turns and mirror images.

    Those of tiles in memory are kept in the user's cache (HISTOSEEK_CACHE, else ~/.cache/histoseek), by
    the tiles' bytes: the folds of a cross-validation and a run that is taken up ask the teacher once.

    Args:
        name: of a registered model whose weights have the same name.
        data: the tiles.
        device: where the teacher runs.
        progress: called with what is done, of how many, and a text.

    Returns:
        float16 (N, F); zeros for tiles that cannot be read.

    Raises:
        MissingPart: the teacher's weights are not installed.
        StorageFailed: the cache cannot be written.
    """
    path = None
    if data.stream is None:
        key = hashlib.sha256(f"{name} {data.tiles.shape}".encode())
        key.update(np.ascontiguousarray(data.tiles).data)
        path = cache_folder() / "teacher" / f"{key.hexdigest()}.npy"
        if path.is_file():
            known: NDArray[np.float16] = np.load(path, allow_pickle=False)
            return known
    teacher = build(name)
    load_backbone(teacher.backbone, name)
    teacher.eval().requires_grad_(False)
    teacher.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    seen = np.zeros((len(data), teacher.dim), dtype=np.float16)
    for start in range(0, len(data), BATCH):
        numbers = np.arange(start, min(start + BATCH, len(data)))
        tiles, read = data.read(numbers)
        if len(read):
            seen[read] = _all_views(teacher, to_input(teacher, tiles)).half().cpu().numpy()
        progress(int(numbers[-1]) + 1, len(data), f"asking the teacher {name}")
    if path is not None:
        buffer = io.BytesIO()
        np.save(buffer, seen, allow_pickle=False)
        write_atomic(path, buffer.getvalue())
    return seen


@torch.inference_mode()
def _all_views(teacher: nn.Module, tiles: torch.Tensor) -> torch.Tensor:
    """Return the mean of the unit features (N, F) over the eight turns and mirror images of tiles."""
    sides = (tiles, tiles.flip(3))
    views = [torch.rot90(side, turn, (2, 3)) for side in sides for turn in range(4)]
    seen = [teacher(view.contiguous(memory_format=torch.channels_last)) for view in views]
    return torch.stack([nn.functional.normalize(features) for features in seen]).mean(0)


def whitened(features: NDArray[np.float16], fitted: Ints, dim: int) -> NDArray[np.float32]:
    """Return features (N, F) as whitened principal components of length 1, float32 (N, D).

    Args:
        features: a row of zeros is a tile that is not known, and stays so.
        fitted: (K,) rows that mean and components are fitted on.
        dim: components that are kept, D; 0 keeps the features as they are, centred.
    """
    known = np.asarray(features.any(axis=1))
    sample = features[fitted[known[fitted]]].astype(np.float64)
    mean = sample.mean(axis=0)
    axes = np.eye(features.shape[1])
    if dim:
        variance, directions = np.linalg.eigh((sample - mean).T @ (sample - mean))
        spread = np.sqrt(np.maximum(variance[::-1][:dim], 0))
        kept = spread > LEAST_SPREAD * spread[0]
        axes = directions[:, ::-1][:, :dim][:, kept] / spread[kept]
    found = np.zeros((len(features), axes.shape[1]), dtype=np.float32)
    found[known] = (features[known] - mean) @ axes
    length = np.linalg.norm(found, axis=1, keepdims=True)
    unit: NDArray[np.float32] = found / np.maximum(length, 1e-12)
    return unit
