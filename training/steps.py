"""Parts of a training step: phase, objective, devices, optimiser and learning rate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import lightning_fabric
import numpy as np
import torch
from lightning_fabric.plugins.precision import MixedPrecision
from torch import nn

from ..errors import BadInput
from ..metrics import Ints
from .augment import Augmentation
from .data import LabelledTiles, Split
from .models import Encoder
from .options import TrainingOptions

STILL = Augmentation(0, 0, 0, False, 0, 0, 0, 0)


@dataclass(frozen=True)
class Phase:
    """Consecutive epochs that train the same layers with the same loss.

    Attributes:
        name: name in the record; unique in a recipe.
        epochs: number of epochs.
        lr: learning rate.
        tail: whether to train the last layers of an otherwise frozen backbone.
        all_layers: whether to train all layers.
    """

    name: str
    epochs: int
    lr: float
    tail: bool = False
    all_layers: bool = True


class TrainingJob(Protocol):
    """The parts of a training job that an objective may use: tiles, their split, the devices."""

    data: LabelledTiles
    parts: Split
    fabric: lightning_fabric.Fabric


class Objective(nn.Module, ABC):
    """An encoder with the heads that a recipe's loss needs."""

    encoder: Encoder
    views: int = 1
    """How many changed views of each tile a batch has; view v of tile n is number v * tiles + n."""
    looks: bool = False
    """Whether ``forward`` also takes the placement of each tile, (N, 2, 3), from augment.placement."""

    def begin_phase(self, phase: Phase) -> None:
        """Select the layers that the phase trains; all by default."""
        self.train()

    def begin_epoch(
        self, job: TrainingJob, phase: Phase, epoch: int, optimizer: Any
    ) -> dict[str, float]:
        """Prepare an epoch; return values to log."""
        return {}

    @abstractmethod
    def forward(self, tiles: torch.Tensor, numbers: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return ``loss`` and its parts, means over tiles (N, 3, S, S) with indices ``numbers`` (N,)."""


def ahead(fetch: Callable[[Ints], Any], shares: Sequence[Ints]) -> Iterator[Any]:
    """Yield ``fetch(share)`` in order and fetch the next one meanwhile, in a thread."""
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as reader:
        coming = reader.submit(fetch, shares[0])
        for share in shares[1:]:
            following = reader.submit(fetch, share)
            yield coming.result()
            coming = following
        yield coming.result()


def open_fabric(options: TrainingOptions) -> tuple[lightning_fabric.Fabric, Any]:
    """Return Fabric and the gradient scaler of 16-mixed (else None), which the checkpoint must contain."""
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


def silent(done: int, total: int, text: str) -> None:
    """Report nothing; the progress callback of every process but the first."""


def make_optimizer(
    options: TrainingOptions, phase: Phase, net: nn.Module, on_cpu: bool = False
) -> torch.optim.Optimizer:
    """Return the optimiser named in the options, for the weights that the phase trains.

    Args:
        options: name and weight decay.
        phase: its learning rate.
        net: its weights.
        on_cpu: it will run there, where torch's fused step is far faster than the default one.
    """
    trained = [p for p in net.parameters() if p.requires_grad]
    decay, fused = options.weight_decay, on_cpu or None
    if options.optimiser == "adam":
        return torch.optim.Adam(trained, lr=phase.lr, weight_decay=decay, fused=fused)
    if options.optimiser == "adamw":
        return torch.optim.AdamW(trained, lr=phase.lr, weight_decay=decay, fused=fused)
    if options.optimiser == "sgd":
        # not fused: that fails where deepcluster has renewed a layer, whose momentum is missing
        return torch.optim.SGD(trained, lr=phase.lr, momentum=0.9, weight_decay=decay)
    if options.optimiser == "adadelta":  # decay and epsilon of Keras
        return torch.optim.Adadelta(trained, lr=phase.lr, rho=0.95, eps=1e-7, weight_decay=decay)
    return torch.optim.RMSprop(trained, lr=phase.lr, weight_decay=decay)


def watched_loss(row: dict[str, Any]) -> float:
    """Return the validation loss, or the training loss if there is no validation."""
    value: float = row.get("validation_loss", row["loss"])
    return value


def plateau_factor(losses: list[float], options: TrainingOptions) -> float:
    """Return the factor on the learning rate that torch's ReduceLROnPlateau reaches over ``losses``.

    It is recomputed from the history each time, so that a resumed run needs no state for it.
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


def combine_seeds(*numbers: int) -> int:
    """Return one seed derived from all the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
