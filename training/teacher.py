"""Feature maps of a larger net (the teacher) for every training tile, computed once, for distillation.

The teacher's maps are averaged over the eight rotations and reflections of the tile, each mapped back, and
reduced to whitened principal components. The small net learns to predict, from an augmented part of a tile,
the mean of the maps over that part. So it learns the teacher's features for any orientation of the tile,
without running the teacher in every step.

A bundle as a teacher gives one embedding of the whole tile instead of a map; see
:mod:`~histoseek.training.bundle_teacher`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.lib.format import write_array_header_1_0
from numpy.typing import NDArray

from ..artifacts.files import cache_folder, replacing
from ..artifacts.manifest import read_manifest
from ..console import Progress
from ..metrics import Ints
from .bundle_teacher import bundle_maps, is_bundle
from .checkpoint import load_backbone
from .data import LabelledTiles
from .evaluate import to_input
from .models import Encoder, build

BATCH = 32
FITTED_ON = 2048
"""Approximate number of training tiles to fit the components on."""
LEAST_SPREAD = 1e-4
"""Components whose standard deviation is below this fraction of the first one's are left out as noise."""


Maps = Callable[[torch.Tensor], torch.Tensor]
Ask = Callable[[Ints], tuple[torch.Tensor, Ints]]
"""From tile indices (N,) to maps, float (M, F, H, H), and the indices (M,) of the tiles that were read."""


def teacher_maps(
    name: str,
    data: LabelledTiles,
    train: Ints,
    dim: int,
    device: torch.device,
    progress: Progress,
    power: float = 0.0,
    views: int = 1,
) -> NDArray[np.float16]:
    """Return the teacher's maps of every tile as whitened components, fitted on training tiles.

    For tiles in memory the teacher's maps are cached under a hash of the tiles, in HISTOSEEK_CACHE (else
    ~/.cache/histoseek); a tile of 224 px takes 122 KiB. Runs with other folds or seeds and resumed runs
    reuse them.

    Args:
        name: name of a registered model, which is also the name of its pretrained weights, or the folder of
            a bundle.
        data: the tiles.
        train: (K,) indices of the training tiles, on which the components are fitted.
        dim: maximum number of components, D.
        device: device of the teacher.
        progress: called with the number done, the total and a text.
        power: as in :func:`components`.
        views: orientations over which the embeddings of a bundle are averaged: 1, 2, 4 or 8.

    Returns:
        float16 (N, D, H, H); zeros for tiles that cannot be read.

    Raises:
        MissingPart: the teacher's weights are not installed.
        StorageFailed: the cache cannot be written.
    """
    text = f"asking the teacher {name}"
    ask = asker(name, data, device, progress, views)
    pooled = [
        ask(part)[0].mean((2, 3)).cpu().numpy()
        for part in _batches(train[:: max(1, len(train) // FITTED_ON)])
    ]
    mean, axes = components(np.concatenate(pooled), dim, power)
    shift, turn = torch.from_numpy(mean).to(device), torch.from_numpy(axes).to(device)
    found: NDArray[np.float16] | None = None
    for part in _batches(np.arange(len(data))):
        maps, read = ask(part)
        maps = torch.einsum("nchw,cd->ndhw", maps - shift[:, None, None], turn)
        if found is None:
            found = np.zeros((len(data), *maps.shape[1:]), dtype=np.float16)
        found[read] = maps.half().cpu().numpy()
        if data.stream is not None:
            progress(int(part[-1]) + 1, len(data), text)
    assert found is not None  # the data has at least one tile
    return found


def asker(
    name: str, data: LabelledTiles, device: torch.device, progress: Progress, views: int
) -> Ask:
    """Return a function from tile indices to the teacher's maps; see :func:`teacher_maps`."""
    if data.stream is not None:
        return _live(name, data, device, views)
    called = name
    if is_bundle(name):
        called = f"bundle {read_manifest(Path(name)).sha256} {views}"
    key = hashlib.sha256(f"maps {called} {data.tiles.shape}".encode())
    key.update(np.ascontiguousarray(data.tiles).data)
    path = cache_folder() / "teacher" / f"{key.hexdigest()}.npy"
    if not path.is_file():
        text = f"asking the teacher {name}"
        live = _live(name, data, device, views)
        _keep(path, live, len(data), lambda n: progress(n, len(data), text))
    known = np.load(path, mmap_mode="r", allow_pickle=False)
    return lambda numbers: (torch.from_numpy(known[numbers]).to(device).float(), numbers)


def _live(name: str, data: LabelledTiles, device: torch.device, views: int) -> Ask:
    """Return a function that runs the teacher on tiles of given indices."""
    if is_bundle(name):
        _, see = bundle_maps(Path(name), views)

        def ask_bundle(numbers: Ints) -> tuple[torch.Tensor, Ints]:
            tiles, read = data.read(numbers)
            return see(tiles).to(device), read

        return ask_bundle
    teacher = build(name)
    load_backbone(teacher.backbone, name)
    teacher.eval().requires_grad_(False)
    teacher.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def ask(numbers: Ints) -> tuple[torch.Tensor, Ints]:
        tiles, read = data.read(numbers)
        return all_views(teacher, tiles), read

    return ask


def _keep(path: Path, ask: Ask, count: int, progress: Callable[[int], None]) -> None:
    """Write the maps of ``count`` tiles to an .npy file, float16 (N, F, H, H), atomically."""
    with replacing(path) as temp, open(temp, "wb") as stream:
        for part in _batches(np.arange(count)):
            maps = ask(part)[0].half().cpu().numpy()
            if not stream.tell():
                shape = (count, *maps.shape[1:])
                head = {"descr": "<f2", "fortran_order": False, "shape": shape}
                write_array_header_1_0(stream, head)
            stream.write(np.ascontiguousarray(maps, "<f2").data)
            progress(int(part[-1]) + 1)


def _batches(numbers: Ints) -> Iterator[Ints]:
    for start in range(0, len(numbers), BATCH):
        yield numbers[start : start + BATCH]


@torch.inference_mode()
def all_views(teacher: Encoder, tiles: NDArray[np.uint8]) -> torch.Tensor:
    """Return the mean of the maps (N, F, H, H) over the eight rotations and reflections of the tiles.

    The maps of every view are mapped back and divided by the length of their pooled features, so that all
    views have equal weight.
    """
    pixels, see = to_input(teacher, tiles), cast(Maps, teacher.backbone.maps)
    total: torch.Tensor | None = None
    for mirrored in (False, True):
        side = pixels.flip(3) if mirrored else pixels
        for turn in range(4):
            view = torch.rot90(side, turn, (2, 3))
            maps = see(view.contiguous(memory_format=torch.channels_last))
            length = maps.mean((2, 3), keepdim=True).norm(dim=1, keepdim=True).clamp(min=1e-12)
            back = torch.rot90(maps / length, -turn, (2, 3))
            back = back.flip(3) if mirrored else back
            total = back if total is None else total + back
    assert total is not None
    return total / 8


def components(
    sample: NDArray[np.float32], dim: int, power: float = 0.0
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the mean (F,) and whitened principal directions (F, D) of a sample (K, F); D <= ``dim``.

    Each whitened component is multiplied by this ``power`` of its standard deviation relative to the first.
    """
    exact = sample.astype(np.float64)
    mean = exact.mean(axis=0)
    variance, directions = np.linalg.eigh((exact - mean).T @ (exact - mean) / len(exact))
    spread = np.sqrt(np.maximum(variance[::-1][:dim], 0))
    kept = spread > LEAST_SPREAD * spread[0]
    scale = (spread[kept] / spread[0]) ** power / spread[kept]
    axes = directions[:, ::-1][:, :dim][:, kept] * scale
    return mean.astype(np.float32), axes.astype(np.float32)
