"""An encoder bundle as a teacher: its embeddings of whole tiles, by ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ..artifacts.images import square
from ..artifacts.manifest import GRAPH, INPUT, OUTPUT, Manifest, read_manifest
from ..errors import Damaged, need

See = Callable[[NDArray[np.uint8]], torch.Tensor]
BATCH = 8
VIEWS = (1, 2, 4, 8)


def is_bundle(teacher: str) -> bool:
    """Whether the option ``teacher`` names the folder of a bundle, not a network with known weights."""
    return teacher not in {"", "efficientnet-lite0"}


def bundle_maps(bundle: Path, views: int) -> tuple[Manifest, See]:
    """Return a bundle's manifest, and a function from tiles (N, S, S, 3) to maps (N, D, 1, 1).

    A map is the mean of the embeddings, of length 1 each, of this many orientations of the tile. Tiles of
    another side are resampled to the bundle's.

    Raises:
        BadInput: the folder is no bundle.
        Damaged: the graph does not match the manifest, or cannot be loaded.
    """
    manifest = read_manifest(bundle)
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    runtime = need("onnxruntime", "cpu")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    usable = [name for name in wanted if name in runtime.get_available_providers()]
    try:
        session = runtime.InferenceSession(str(bundle / GRAPH), options, providers=usable)
    except Exception as error:
        raise Damaged(f"{bundle / GRAPH} cannot be loaded by ONNX Runtime: {error}") from error

    def see(tiles: NDArray[np.uint8]) -> torch.Tensor:
        sized = np.stack([square(tile, manifest.size_px) for tile in tiles])
        total = np.zeros((len(tiles), manifest.dim), np.float32)
        for mirrored in (False, True)[: 1 + (views == 8)]:
            side = sized[:, :, ::-1] if mirrored else sized
            for turn in (0, 2) if views == 2 else range(min(views, 4)):
                view = np.ascontiguousarray(np.rot90(side, turn, (1, 2)))
                for start in range(0, len(view), BATCH):
                    part = view[start : start + BATCH]
                    total[start : start + BATCH] += session.run([OUTPUT], {INPUT: part})[0]
        return torch.from_numpy(total / views)[:, :, None, None]

    return manifest, see
