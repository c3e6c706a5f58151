"""A training job: what every recipe starts with, its loop over epochs, and what it leaves behind."""

from __future__ import annotations

import copy
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning_fabric
import numpy as np
import torch
from lightning_fabric.plugins.precision import MixedPrecision
from numpy.typing import NDArray
from torch import nn

from .. import stopping
from ..artifacts.tilesets import TileSet
from ..console import Report
from ..errors import BadInput
from ..metrics import Ints
from .augment import Augmentation, augment, placement
from .checkpoint import load_backbone
from .data import LabelledTiles, Split, describe, describe_split, load, split
from .distributed import release_norms, synchronise_norms
from .evaluate import judge, normalise, to_input
from .models import Encoder, build
from .options import TrainingOptions
from .run import Progress, RunFolder
from .tensorboard import Log

STILL = Augmentation(0, 0, 0, False, 0, 0, 0, 0)


@dataclass(frozen=True)
class Phase:
    """A stretch of epochs in which the same layers are trained for the same loss.

    Attributes:
        name: as the record tells it; unique in a recipe.
        epochs: how many.
        lr: learning rate.
        tail: of a frozen backbone only the last layers are trained.
        all_layers: everything is trained.
    """

    name: str
    epochs: int
    lr: float
    tail: bool = False
    all_layers: bool = True


class Objective(nn.Module, ABC):
    """What a recipe trains: an encoder with the heads that its loss needs."""

    encoder: Encoder
    looks: bool = False
    """Whether ``forward`` is also told where each tile is looked at, (N, 2, 3), by augment.placement."""

    def begin_phase(self, phase: Phase) -> None:
        """Set what the phase trains; here everything that is not fixed."""
        self.train()

    def begin_epoch(self, job: Job, phase: Phase, epoch: int, optimizer: Any) -> dict[str, float]:
        """Do what comes before an epoch of a phase; returns what is to be logged."""
        return {}

    @abstractmethod
    def forward(self, tiles: torch.Tensor, numbers: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return ``loss`` and its parts, means over tiles (N, 3, S, S) with dataset numbers (N,)."""


class Job:
    """One run of a recipe.

    Attributes:
        options: of the recipe.
        finished: the record, if this very run was finished before; then there is nothing to do.
        data: the tiles, after :meth:`prepare`.
        parts: how they are split, after :meth:`prepare`.
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
        progress: Report,
        selection: dict[str, Any] | None = None,
    ) -> None:
        """Name the run; nothing is read or written yet but an earlier record.

        Raises:
            Mismatch: ``out`` holds a run with other options or data; says which.
        """
        self.started = time.monotonic()
        self.recipe, self.paper, self.options = recipe, paper, options
        self.tileset, self.selection = tileset, selection or {}
        identity = {"recipe": recipe, "options": asdict(options), "data": tileset.identity()}
        self.folder = RunFolder(out, identity)
        self.finished = self.folder.finished()
        self._progress = progress
        self._state = Progress()
        self._scaler: Any = None

    def prepare(self, cut: int = 0) -> None:
        """Start the devices, read the tiles and split them; seeds the weights that are made next."""
        self.fabric, self._scaler = _fabric(self.options)
        self.fabric.launch()
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started != self.fabric.world_size:
            raise BadInput(
                f"{started} processes were started and --devices is {self.options.devices}; pass "
                f"--devices {started}, so that they train together"
            )
        self.report = self._progress if self.fabric.is_global_zero else _silent
        options = self.options
        side = options.architecture()["size_px"]
        self.data = load(self.tileset, side, self.report, cut, options.stream)
        self.parts = split(
            self.data, options.folds, options.fold, options.seed, options.split, options.validates
        )
        torch.manual_seed(options.seed)

    def keep(self, wanted: NDArray[np.bool_]) -> None:
        """Leave tiles out of every part where ``wanted`` (N,) is false."""
        train, validate, test = (
            part[wanted[part]] for part in (self.parts.train, self.parts.validate, self.parts.test)
        )
        self.parts = Split(train, validate, test, self.parts.by)

    def build(self, **more: Any) -> Encoder:
        """Build the encoder, with its pretrained weights if asked for, and remember how it began."""
        self.architecture = {**self.options.architecture(), **more}
        encoder = build(**self.architecture)
        if self.options.weights:
            load_backbone(encoder.backbone, self.options.weights, self.options.weights_sha256)
        self.initial = copy.deepcopy(encoder)
        return encoder

    def train(self, net: Objective, phases: Sequence[Phase]) -> None:
        """Run the phases epoch by epoch, saving the whole state after each.

        A run that was killed goes on after its last whole epoch, to the same weights.

        Raises:
            BadInput: the loss is not finite; the last whole epoch is kept.
        """
        self._state = self.folder.resume(net)
        net.to(self.fabric.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.fabric.world_size > 1:
            synchronise_norms(net)
        total = sum(phase.epochs for phase in phases)
        with Log(self.folder.path, self.options.tensorboard and self.fabric.is_global_zero) as log:
            for phase in phases:
                self._run_phase(net, phase, total, log)
        release_norms(net)

    def _run_phase(self, net: Objective, phase: Phase, total: int, log: Log) -> None:
        done = [row for row in self._state.history if row["phase"] == phase.name]
        if len(done) >= phase.epochs or self._is_stopped(done):
            if done and self._keeps and self._state.history[-1] is done[-1]:
                self.folder.load_best(net)  # killed after the phase's last epoch
            return
        net.begin_phase(phase)
        plain = _optimizer(self.options, phase, net)
        model, optimizer = self.fabric.setup(net, plain)
        if done:
            self.folder.resume_optimizer(plain)  # after setup: its state goes where the weights are
            self.folder.resume_scaler(self._scaler)
        for epoch in range(len(done), phase.epochs):
            row = self._epoch(net, model, optimizer, phase, epoch, done)
            self._check_weights(net, row)
            done.append(row)
            self._state.history.append(row)
            if self.fabric.is_global_zero:
                best = min(done, key=_watched) is row
                self.folder.save(net, optimizer, self._state, self._scaler, best and self._keeps)
            log.epoch(row)
            shown = ", ".join(f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, float))
            self.report(len(self._state.history), total, f"{phase.name}: {shown}")
            if self._is_stopped(done):
                break
        if self._keeps:
            self.fabric.barrier()
            self.folder.load_best(net)

    @property
    def _keeps(self) -> bool:
        return self.options.keep_best and bool(len(self.parts.validate))

    def _is_stopped(self, done: list[dict[str, Any]]) -> bool:
        """Tell whether the loss has not fallen for ``patience`` epochs."""
        if not self.options.patience or not done:
            return False
        best = min(range(len(done)), key=lambda n: _watched(done[n]))
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
        """Train one epoch; all randomness follows from seed, epoch and rank. Returns its record."""
        options, number = self.options, len(self._state.history)
        told = net.begin_epoch(self, phase, epoch, optimizer)
        net.begin_phase(phase)
        started = time.monotonic()
        steps = self._steps()
        slower = _plateau_factor([_watched(row) for row in done], options)
        sums: dict[str, torch.Tensor] = {}
        seed = _seed(options.seed, number, self.fabric.global_rank)
        torch.manual_seed(seed)
        changes = torch.Generator().manual_seed(seed)
        order = self.order(net, number)
        for step, (tiles, numbers) in enumerate(self._batches(order, steps)):
            stopping.check()
            rate = options.rate(epoch * steps + step, phase.epochs * steps, epoch)
            for group in optimizer.param_groups:
                group["lr"] = phase.lr * rate * slower
            tiles, where = self.change(net.encoder, tiles, changes)
            losses = model(tiles, numbers, where) if net.looks else model(tiles, numbers)
            loss = losses["loss"]
            optimizer.zero_grad()
            self.fabric.backward(loss)
            optimizer.step()
            for name, value in losses.items():
                sums[name] = sums.get(name, torch.zeros((), device=loss.device)) + value.detach()
            if step % 16 == 0 or step + 1 == steps:  # a look at the value waits for the device
                self._check(sums["loss"], number, step)
        row: dict[str, Any] = {"epoch": number + 1, "phase": phase.name}
        row |= {name: float(value) / steps for name, value in sums.items()}
        row |= told
        if len(self.parts.validate):
            row["validation_loss"] = self.fabric.broadcast(self._validate(net))
        seconds = time.monotonic() - started
        return {
            **row,
            "lr": phase.lr * rate * slower,
            "tiles_per_s": round(steps * self._step_size / seconds, 1),
        }

    def order(self, net: Objective, number: int) -> Ints:
        """Return the order of the training tiles in epoch ``number``; a net may draw its own."""
        rng = np.random.default_rng((self.options.seed, number))
        draw: Callable[[Ints, np.random.Generator], Ints] | None = getattr(net, "draw", None)
        order = draw(self.parts.train, rng) if draw else rng.permutation(self.parts.train)
        wanted = self._steps() * self._step_size
        return order if len(order) >= wanted else np.resize(order, wanted)  # some cannot be read

    @property
    def _step_size(self) -> int:
        whole = self.options.batch * self.fabric.world_size
        ranks = self.fabric.world_size
        return min(whole, max(ranks, len(self.parts.train) // ranks * ranks))

    def _steps(self) -> int:
        return max(1, len(self.parts.train) // self._step_size)

    def _batches(self, order: Ints, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield this device's share of every batch, uint8 tiles and their numbers, one batch read ahead."""
        rank, ranks, device = self.fabric.global_rank, self.fabric.world_size, self.fabric.device
        shares = [
            order[step * self._step_size : (step + 1) * self._step_size][rank::ranks]
            for step in range(steps)
        ]

        last: dict[str, Any] = {}

        def fetch(share: Ints) -> tuple[torch.Tensor, torch.Tensor]:
            tiles, numbers = self.data.read(share)
            if len(numbers) < 2:  # too few for a batch norm: take the batch before once more
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
            ready = _ahead(fetch, shares)
        for pixels, numbers in ready:
            yield pixels.to(device, non_blocking=True), numbers.to(device, non_blocking=True)

    def change(
        self, encoder: Encoder, pixels: torch.Tensor, generator: torch.Generator | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Turn uint8 tiles (N, S, S, 3) into the net's input, changed at random if there is a generator.

        Returns with it where each tile is looked at, (N, 2, 3); None where it is seen as it is.
        """
        ranges = self.options.augmentation()
        where = None
        if generator is None or ranges == STILL:
            tiles = to_input(encoder, pixels)
        else:
            tiles = pixels.permute(0, 3, 1, 2).float() / 255
            where = placement(len(tiles), tiles.shape[-1], ranges, generator).to(tiles.device)
            tiles = normalise(encoder, augment(tiles, ranges, generator, where))
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
                f"the loss is {float(total)} in epoch {number + 1}, by step {step + 1}; the last whole "
                "epoch is kept: lower --lr or check the data"
            )

    def _check_weights(self, net: nn.Module, row: dict[str, Any]) -> None:
        """Refuse an epoch that ended in weights or a validation loss that are not finite."""
        finite = all(bool(torch.isfinite(weight).all()) for weight in net.parameters())
        if not finite or not np.isfinite(_watched(row)):
            raise BadInput(
                f"after epoch {row['epoch']} the loss is {_watched(row)} and the weights are "
                f"{'finite' if finite else 'not all finite'}; the epoch before it is kept: lower --lr, "
                "check the data, or use --precision 32-true"
            )

    def finish(
        self,
        encoder: Encoder,
        metrics: dict[str, Any] | None = None,
        tensors: dict[str, torch.Tensor] | None = None,
    ) -> dict[str, Any]:
        """Judge the encoder and write weights and record; returns the record (rank 0 only).

        Args:
            encoder: as trained.
            metrics: of the recipe, beside those of :func:`judge`.
            tensors: to keep beside the weights, such as ``clusters.centres``.
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
                    "epochs": self._state.history,
                    "seconds": round(time.monotonic() - self.started, 1),
                },
            )
        self.fabric.barrier()
        return record


def _ahead(fetch: Callable[[Ints], Any], shares: Sequence[Ints]) -> Iterator[Any]:
    """Yield ``fetch(share)`` in order, with the next one on its way."""
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as reader:
        coming = reader.submit(fetch, shares[0])
        for share in shares[1:]:
            following = reader.submit(fetch, share)
            yield coming.result()
            coming = following
        yield coming.result()


def _fabric(options: TrainingOptions) -> tuple[lightning_fabric.Fabric, Any]:
    """Return Fabric, and the scaler of 16-mixed, whose state belongs into the checkpoint."""
    plugins: list[Any] = []
    scaler = None
    precision: Any = options.precision
    try:
        if precision == "16-mixed" and torch.cuda.is_available():
            scaler = torch.amp.GradScaler("cuda")
            plugins, precision = [MixedPrecision("16-mixed", "cuda", scaler)], None
        fabric = lightning_fabric.Fabric(
            accelerator=options.accelerator,
            devices=options.devices,
            precision=precision,
            plugins=plugins or None,
        )
    except (ValueError, RuntimeError, TypeError) as error:
        raise BadInput(
            f"accelerator {options.accelerator!r}, devices {options.devices}, precision "
            f"{options.precision!r}: {error}"
        ) from error
    return fabric, scaler


def _silent(done: int, total: int, text: str) -> None:
    pass


def _optimizer(options: TrainingOptions, phase: Phase, net: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in net.parameters() if p.requires_grad]
    decay = options.weight_decay
    if options.optimiser == "adam":
        return torch.optim.Adam(trained, lr=phase.lr, weight_decay=decay)
    if options.optimiser == "adamw":
        return torch.optim.AdamW(trained, lr=phase.lr, weight_decay=decay)
    if options.optimiser == "sgd":
        return torch.optim.SGD(trained, lr=phase.lr, momentum=0.9, weight_decay=decay)
    return torch.optim.RMSprop(trained, lr=phase.lr, weight_decay=decay)


def _watched(row: dict[str, Any]) -> float:
    """Return the loss that decides: of validation where there is one."""
    value: float = row.get("validation_loss", row["loss"])
    return value


def _plateau_factor(losses: list[float], options: TrainingOptions) -> float:
    """Return the factor on the learning rate that torch's ReduceLROnPlateau reaches over ``losses``.

    Computed anew from the history each time, so that a resumed run needs no state for it.
    """
    if not options.plateau:
        return 1.0
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    plan = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=options.plateau_factor, patience=options.plateau
    )
    for loss in losses:
        plan.step(loss)
    return float(optimizer.param_groups[0]["lr"])


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
