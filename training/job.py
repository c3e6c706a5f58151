"""A training job: data and devices, the loop over epochs, the finished run."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .. import stopping
from ..artifacts.tilesets import TileSet
from ..console import Progress
from ..errors import BadInput
from ..metrics import Ints
from .augment import augment, placement
from .checkpoint import load_backbone
from .data import LabelledTiles, Split, describe, describe_split, load, split
from .distributed import release_norms, synchronise_norms
from .evaluate import judge, normalise, to_input
from .memory import keep_freed_memory
from .models import Encoder, build
from .options import TrainingOptions
from .run import RunFolder
from .steps import (
    STILL,
    Objective,
    Phase,
    ahead,
    combine_seeds,
    make_optimizer,
    open_fabric,
    plateau_factor,
    silent,
    watched_loss,
)
from .tensorboard import Log


class Job:
    """One run of a recipe.

    Attributes:
        options: options of the recipe.
        finished: the record if the run is finished already, else None.
        data: the tiles, set by :meth:`prepare`.
        parts: the split of the tiles, set by :meth:`prepare`.
        fabric: Lightning Fabric: devices, precision, data parallelism.
    """

    data: LabelledTiles
    parts: Split

    def __init__(
        self,
        recipe: str,
        paper: str,
        options: TrainingOptions,
        tileset: TileSet,
        out: Path,
        progress: Progress,
        selection: dict[str, Any] | None = None,
    ) -> None:
        """Identify the run and read its record if it is finished; nothing else is read.

        Raises:
            Mismatch: ``out`` holds a run with other options or data; the message names the difference.
        """
        self.started = time.monotonic()
        self.recipe, self.paper, self.options = recipe, paper, options
        self.tileset, self.selection = tileset, selection or {}
        identity = {"recipe": recipe, "options": asdict(options), "data": tileset.identity()}
        self.folder = RunFolder(out, identity)
        self.finished = self.folder.finished()
        self._progress = progress
        self._history: list[dict[str, Any]] = []
        self._earlier = 0.0  # seconds that stopped runs had trained
        self._scaler: Any = None

    def prepare(self, cut: int = 0) -> None:
        """Start the devices, read and split the tiles, and seed torch for the weights."""
        self.fabric, self._scaler = open_fabric(self.options)
        self.fabric.launch()
        if self.fabric.device.type == "cpu":
            keep_freed_memory()
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started != self.fabric.world_size:
            raise BadInput(
                f"{started} processes were started and --devices is {self.options.devices}; pass "
                f"--devices {started}, so that they train together"
            )
        self.report = self._progress if self.fabric.is_global_zero else silent
        options = self.options
        side = options.architecture()["size_px"]
        self.data = load(self.tileset, side, self.report, cut, options.stream)
        self.parts = split(
            self.data, options.folds, options.fold, options.seed, options.split, options.validates
        )
        torch.manual_seed(options.seed)

    def keep(self, wanted: NDArray[np.bool_]) -> None:
        """Remove tiles where ``wanted`` (N,) is false from every part."""
        train, validate, test = (
            part[wanted[part]] for part in (self.parts.train, self.parts.validate, self.parts.test)
        )
        self.parts = Split(train, validate, test, self.parts.by)

    def build(self, **more: Any) -> Encoder:
        """Build the encoder, load pretrained weights if set, and keep an untrained copy as the baseline."""
        self.architecture = {**self.options.architecture(), **more}
        encoder = build(**self.architecture)
        if self.options.weights:
            load_backbone(encoder.backbone, self.options.weights, self.options.weights_sha256)
        self.initial = copy.deepcopy(encoder)
        return encoder

    def train(self, net: Objective, phases: Sequence[Phase]) -> None:
        """Run the phases epoch by epoch and save the whole state after each epoch.

        A killed run resumes after its last complete epoch and ends with the same weights.

        Raises:
            BadInput: the loss is not finite; the last complete epoch is kept.
        """
        self._history = self.folder.resume(net)
        self._earlier = sum(row.get("seconds", 0.0) for row in self._history)
        net.to(self.fabric.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.fabric.world_size > 1:
            synchronise_norms(net)
        total = sum(phase.epochs for phase in phases)
        with Log(self.folder.path, self.options.tensorboard and self.fabric.is_global_zero) as log:
            for phase in phases:
                self._run_phase(net, phase, total, log)
        release_norms(net)

    def _run_phase(self, net: Objective, phase: Phase, total: int, log: Log) -> None:
        done = [row for row in self._history if row["phase"] == phase.name]
        if len(done) >= phase.epochs or self._is_stopped(done):
            if done and self._keeps and self._history[-1] is done[-1]:
                self.folder.load_best(net)  # the run was killed after the phase's last epoch
            return
        net.begin_phase(phase)
        plain = make_optimizer(self.options, phase, net, self.fabric.device.type == "cpu")
        model, optimizer = self.fabric.setup(net, plain)
        if done:
            self.folder.resume_optimizer(plain)  # after setup: state goes to the weights' device
            self.folder.resume_scaler(self._scaler)
        for epoch in range(len(done), phase.epochs):
            row = self._epoch(net, model, optimizer, phase, epoch, done)
            self._check_weights(net, row)
            done.append(row)
            self._history.append(row)
            if self.fabric.is_global_zero:
                best = min(done, key=watched_loss) is row
                self.folder.save(net, optimizer, self._history, self._scaler, best and self._keeps)
            log.epoch(row)
            shown = ", ".join(f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, float))
            self.report(len(self._history), total, f"{phase.name}: {shown}")
            if self._is_stopped(done):
                break
        if self._keeps:
            self.fabric.barrier()
            self.folder.load_best(net)

    @property
    def _keeps(self) -> bool:
        return self.options.keep_best and bool(len(self.parts.validate))

    def _is_stopped(self, done: list[dict[str, Any]]) -> bool:
        """Return whether the loss has not fallen for ``patience`` epochs."""
        if not self.options.patience or not done:
            return False
        best = min(range(len(done)), key=lambda n: watched_loss(done[n]))
        return len(done) - 1 - best >= self.options.patience

    def _epoch(
        self,
        net: Objective,
        model: Any,
        optimizer: Any,
        phase: Phase,
        epoch: int,
        done: list[dict[str, Any]],
    ) -> dict[str, Any]:
        """Train one epoch and return its record; seed, epoch and rank determine all random numbers."""
        options, number = self.options, len(self._history)
        began = time.monotonic()
        told = net.begin_epoch(self, phase, epoch, optimizer)
        net.begin_phase(phase)
        started = time.monotonic()
        steps = self._steps()
        slower = plateau_factor([watched_loss(row) for row in done], options)
        sums: dict[str, torch.Tensor] = {}
        seed = combine_seeds(options.seed, number, self.fabric.global_rank)
        torch.manual_seed(seed)
        changes = torch.Generator().manual_seed(seed)
        order = self.order(net, number)
        for step, (tiles, numbers) in enumerate(self._batches(order, steps)):
            stopping.check()
            rate = options.rate(epoch * steps + step, phase.epochs * steps, epoch)
            for group in optimizer.param_groups:
                group["lr"] = phase.lr * rate * slower
            if net.views > 1:
                tiles, numbers = tiles.repeat(net.views, 1, 1, 1), numbers.repeat(net.views)
            tiles, where = self.change(net.encoder, tiles, changes, net.views)
            losses = model(tiles, numbers, where) if net.looks else model(tiles, numbers)
            loss = losses["loss"]
            optimizer.zero_grad()
            self.fabric.backward(loss)
            optimizer.step()
            for name, value in losses.items():
                sums[name] = sums.get(name, torch.zeros((), device=loss.device)) + value.detach()
            if step % 16 == 0 or step + 1 == steps:  # rarely: the check waits for the device
                self._check(sums["loss"], number, step)
        row: dict[str, Any] = {"epoch": number + 1, "phase": phase.name}
        row |= {name: float(value) / steps for name, value in sums.items()}
        row |= told
        if len(self.parts.validate):
            row["validation_loss"] = self.fabric.broadcast(self._validate(net))
        ended = time.monotonic()
        return {
            **row,
            "lr": phase.lr * rate * slower,
            "seconds": round(ended - began, 2),
            "tiles_per_s": round(steps * self._step_size / (ended - started), 1),
        }

    def order(self, net: Objective, number: int) -> Ints:
        """Return the order of the training tiles in epoch ``number``; ``net.draw`` decides if it exists."""
        rng = np.random.default_rng((self.options.seed, number))
        draw: Callable[[Ints, np.random.Generator], Ints] | None = getattr(net, "draw", None)
        order = draw(self.parts.train, rng) if draw else rng.permutation(self.parts.train)
        wanted = self._steps() * self._step_size
        return order if len(order) >= wanted else np.resize(order, wanted)  # some unreadable

    @property
    def _step_size(self) -> int:
        whole = self.options.batch * self.fabric.world_size
        ranks = self.fabric.world_size
        return min(whole, max(ranks, len(self.parts.train) // ranks * ranks))

    def _steps(self) -> int:
        return max(1, len(self.parts.train) // self._step_size)

    def _batches(self, order: Ints, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield this device's part of each batch, uint8 tiles and their indices; reads one batch ahead."""
        rank, ranks, device = self.fabric.global_rank, self.fabric.world_size, self.fabric.device
        shares = [
            order[step * self._step_size : (step + 1) * self._step_size][rank::ranks]
            for step in range(steps)
        ]

        last: dict[str, Any] = {}

        def fetch(share: Ints) -> tuple[torch.Tensor, torch.Tensor]:
            tiles, numbers = self.data.read(share)
            if len(numbers) < 2:  # too few for a batch norm: repeat the previous batch
                tiles, numbers = last.get("batch", (tiles, numbers))
            last["batch"] = tiles, numbers
            if len(numbers) < 2:
                raise BadInput(
                    f"only {len(numbers)} of {len(share)} tiles of a batch could be read; first "
                    f"reason: {next(iter(self.data.unreadable.values()), 'none')}"
                )
            pixels = torch.from_numpy(tiles)
            if device.type == "cuda":
                pixels = pixels.pin_memory()
            return pixels, torch.from_numpy(numbers)

        if self.data.stream is None and device.type == "cpu":  # nothing to wait for
            ready: Iterator[Any] = map(fetch, shares)
        else:
            ready = ahead(fetch, shares)
        for pixels, numbers in ready:
            yield pixels.to(device, non_blocking=True), numbers.to(device, non_blocking=True)

    def change(
        self,
        encoder: Encoder,
        pixels: torch.Tensor,
        generator: torch.Generator | None,
        views: int = 1,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Convert uint8 tiles (N, S, S, 3) to the net's input, with augmentation if a generator is given.

        Also returns the placement of each tile, (N, 2, 3), or None without augmentation.
        """
        ranges = self.options.augmentation()
        where = None
        if generator is None or ranges == STILL:
            tiles = to_input(encoder, pixels)
        else:
            tiles = pixels.permute(0, 3, 1, 2)
            where = placement(len(tiles), tiles.shape[-1], ranges, generator, views)
            where = where.to(tiles.device)
            tiles = augment(tiles, ranges, generator, where, partial(normalise, encoder))
        return tiles.contiguous(memory_format=torch.channels_last), where

    @torch.no_grad()
    def _validate(self, net: Objective) -> float:
        """Return the mean loss over the validation tiles."""
        net.eval()
        total, count = 0.0, 0
        for start in range(0, len(self.parts.validate), self.options.batch):
            tiles, numbers = self.data.read(self.parts.validate[start : start + self.options.batch])
            if not len(numbers):
                continue
            pixels = torch.from_numpy(tiles).to(self.fabric.device)
            ids = torch.from_numpy(numbers).to(self.fabric.device)
            loss = net(self.change(net.encoder, pixels, None)[0], ids)["loss"]
            total, count = total + float(loss) * len(numbers), count + len(numbers)
        net.train()
        return total / max(1, count)

    def _check(self, total: torch.Tensor, number: int, step: int) -> None:
        if not bool(torch.isfinite(total)):
            raise BadInput(
                f"the loss is {float(total)} in epoch {number + 1}, by step {step + 1}; the last complete "
                "epoch is kept: lower --lr or check the data"
            )

    def _check_weights(self, net: nn.Module, row: dict[str, Any]) -> None:
        """Raise BadInput if the weights or the validation loss are not finite after an epoch."""
        finite = all(bool(torch.isfinite(weight).all()) for weight in net.parameters())
        if not finite or not np.isfinite(watched_loss(row)):
            raise BadInput(
                f"after epoch {row['epoch']} the loss is {watched_loss(row)} and the weights are "
                f"{'finite' if finite else 'not all finite'}; the previous epoch is kept: lower --lr, "
                "check the data, or use --precision 32-true"
            )

    def finish(
        self,
        encoder: Encoder,
        metrics: dict[str, Any] | None = None,
        tensors: dict[str, torch.Tensor] | None = None,
    ) -> dict[str, Any]:
        """Evaluate the encoder, write weights and record; returns the record, on rank 0 only.

        Args:
            encoder: the trained encoder.
            metrics: metrics of the recipe, added to those of :func:`judge`.
            tensors: tensors to store with the weights, such as ``clusters.centres``.
        """
        record: dict[str, Any] = {}
        if self.fabric.is_global_zero:
            encoder.eval()
            self.initial.to(self.fabric.device)
            basis, found = judge(
                encoder, self.initial, self.data, self.parts, self.options.seed, self.options.judge
            )
            weights = dict(encoder.state_dict())
            weights |= {f"pca.{k}": torch.from_numpy(v) for k, v in basis.items()}
            with Log(self.folder.path, self.options.tensorboard) as log:
                log.projector(encoder, self.data, self.parts)
            record = self.folder.finish(
                {**weights, **(tensors or {})},
                self.architecture,
                {
                    "recipe": self.recipe,
                    "paper": self.paper,
                    "options": asdict(self.options),
                    "data": {**describe(self.data, self.tileset), "selection": self.selection},
                    "split": describe_split(self.parts),
                    "metrics": {**found, **(metrics or {})},
                    "epochs": self._history,
                    "seconds": round(self._earlier + time.monotonic() - self.started, 1),
                },
            )
        self.fabric.barrier()
        return record
