"""Train a network that finds tissue, on scenes made from tiles."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ...artifacts.images import Rgb
from ...artifacts.tilesets import TileSet
from ...console import Progress
from ...errors import BadInput
from ..memory import keep_freed_memory
from ..run import RunFolder
from .net import WIDTHS, TissueNet
from .options import TissueOptions
from .scenes import MPP, scene

RECIPE = "tissue"
EPOCH = 100
"""Steps after which the state of the run is saved."""
TILE_PX = 256
"""Side to which large tiles are reduced when they are read."""
MAX_TILES = 8000
"""Of a larger set, this many tiles are drawn; they stay in memory."""
HELD_OUT = 64
"""Scenes on which the trained network is measured; made from tiles of groups that it was not trained on."""
FOLDS = 10
_WARMUP, _DECAY = 0.05, 1e-4


def fit(
    options: TissueOptions,
    tileset: TileSet,
    out: Path,
    progress: Progress,
    selection: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train and write the run; a killed run resumes after its last 100 steps, with the same result.

    Args:
        options: of the training.
        tileset: tiles of tissue, of any stain and scale; their labels are not used.
        out: folder of the run.
        progress: called with the number of steps done, the total and a text.
        selection: sources and exclusions of the tile set, for the record.

    Returns:
        The content of ``run.json``; ``metrics`` has the precision and recall of pixels on held-out scenes.

    Raises:
        BadInput: too few tiles can be read.
        Mismatch: ``out`` holds a run with other options or data.
    """
    identity = {"recipe": RECIPE, "options": asdict(options), "data": tileset.identity()}
    folder = RunFolder(out, identity)
    finished = folder.finished()
    if finished is not None:
        return finished
    started = time.monotonic()
    keep_freed_memory()
    train, held_out, unreadable = _tiles(tileset, progress)
    torch.manual_seed(options.seed)
    net = TissueNet()
    history = folder.resume(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=options.lr, weight_decay=_DECAY)
    if history:
        folder.resume_optimizer(optimizer)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    done = len(history) * EPOCH
    losses: list[float] = []
    for step, (pictures, tissue) in _batches(options, train, done):
        net.train()
        for group in optimizer.param_groups:
            group["lr"] = options.lr * rate_at(step, options.steps)
        loss = loss_of(net(to_input(pictures)), torch.from_numpy(tissue))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
        if len(losses) == EPOCH or step + 1 == options.steps:
            history.append({"steps": step + 1, "loss": float(np.mean(losses))})
            if step + 1 < options.steps:
                folder.save(net, optimizer, history)
            progress(step + 1, options.steps, f"loss {history[-1]['loss']:.4f}")
            losses = []
    scenes = [
        scene(_random(options.seed, 1, n), held_out, options.side_px) for n in range(HELD_OUT)
    ]
    found = predict(net, np.stack([made.picture for made in scenes]))
    truth = np.stack([made.tissue for made in scenes])
    record = {
        "recipe": RECIPE,
        "options": asdict(options),
        "data": {
            "name": tileset.name,
            "fingerprint": tileset.fingerprint,
            "tiles": len(train) + len(held_out),
            "tiles_of_the_set": len(tileset),
            "unreadable": unreadable,
            "selection": selection or {},
        },
        "mpp": MPP,
        "size_px": options.side_px,
        "history": history,
        "metrics": {
            "scenes": HELD_OUT,
            "precision": float((found & truth).sum() / max(1, found.sum())),
            "recall": float((found & truth).sum() / max(1, truth.sum())),
            "share_of_tissue": float(truth.mean()),
        },
        "seconds": round(time.monotonic() - started, 1),
        "threads": torch.get_num_threads(),
    }
    return folder.finish(net.state_dict(), {"model": RECIPE, "widths": list(WIDTHS)}, record)


def _tiles(tileset: TileSet, progress: Progress) -> tuple[list[Rgb], list[Rgb], dict[str, str]]:
    """Read the tiles; a tenth of their groups is held out."""
    groups = sorted({tile.group or tile.file for tile in tileset.tiles})
    away = set(
        np.random.default_rng(0).permutation(groups)[: max(1, len(groups) // FOLDS)].tolist()
    )
    parts: tuple[list[Rgb], list[Rgb]] = ([], [])
    unreadable: dict[str, str] = {}
    drawn = np.random.default_rng(0).permutation(len(tileset))[:MAX_TILES]
    for done, number in enumerate(np.sort(drawn).tolist(), start=1):
        tile = tileset.tiles[number]
        try:
            picture = tileset.read(number)
        except BadInput as error:
            unreadable[tile.file] = str(error)
            continue
        step = max(1, min(picture.shape[:2]) // TILE_PX)
        if step > 1:
            height, width = (side // step * step for side in picture.shape[:2])
            blocks = picture[:height, :width].reshape(height // step, step, width // step, step, 3)
            picture = blocks.mean((1, 3)).astype(np.uint8)
        parts[(tile.group or tile.file) in away].append(picture)
        progress(done, len(drawn), "reading tiles")
    if not parts[0] or not parts[1]:
        reason = f"; first reason: {next(iter(unreadable.values()))}" if unreadable else ""
        raise BadInput(
            f"{tileset.source}: {len(parts[0])} + {len(parts[1])} tiles of {len(groups)} groups could be "
            f"read; expected at least 2 groups, one of which is held out{reason}"
        )
    return *parts, unreadable


def _random(*numbers: int) -> np.random.Generator:
    return np.random.default_rng(numbers)


def _batches(
    options: TissueOptions, tiles: Sequence[Rgb], first: int
) -> Iterator[tuple[int, tuple[NDArray[np.uint8], NDArray[np.bool_]]]]:
    """Yield the number and the scenes of each step; the next step's are made meanwhile, in a thread."""

    def make(step: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        numbers = range(step * options.batch, (step + 1) * options.batch)
        made = [scene(_random(options.seed, 0, n), tiles, options.side_px) for n in numbers]
        return np.stack([one.picture for one in made]), np.stack([one.tissue for one in made])

    with ThreadPoolExecutor(1, thread_name_prefix="scenes") as maker:
        waiting = maker.submit(make, first)
        for step in range(first, options.steps):
            ready = waiting.result()
            if step + 1 < options.steps:
                waiting = maker.submit(make, step + 1)
            yield step, ready


def rate_at(step: int, steps: int) -> float:
    """Return the factor of the learning rate: a linear warmup, then half a cosine."""
    warm = max(1, round(_WARMUP * steps))
    if step < warm:
        return (step + 1) / warm
    return float(0.5 + 0.5 * np.cos(np.pi * (step - warm) / max(1, steps - warm)))


def to_input(pictures: NDArray[np.uint8]) -> torch.Tensor:
    """Return pictures (N, S, S, 3) as the network takes them, (N, 3, S, S) in 0..1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def loss_of(logits: torch.Tensor, tissue: torch.Tensor) -> torch.Tensor:
    """Return cross-entropy plus 1 - Dice, of logits (N, 1, S/2, S/2) and tissue (N, S, S)."""
    truth = nn.functional.avg_pool2d(tissue[:, None].float(), 2)
    entropy = nn.functional.binary_cross_entropy_with_logits(logits, truth)
    found = logits.sigmoid()
    dice = (2 * (found * truth).sum() + 1) / (found.sum() + truth.sum() + 1)
    return entropy + 1 - dice


@torch.inference_mode()
def predict(net: TissueNet, pictures: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return where pictures (N, S, S, 3) show tissue, (N, S, S)."""
    net.eval()
    found = torch.cat([net(to_input(part)) > 0 for part in np.array_split(pictures, len(pictures))])
    whole: NDArray[np.bool_] = found[:, 0].numpy().repeat(2, 1).repeat(2, 2)
    return whole
