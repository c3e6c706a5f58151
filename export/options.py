"""Options of ``histoseek export`` and ``histoseek triton repository``; imports no torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from ..artifacts.manifest import NAME, StainMethod
from ..artifacts.option_models import Field, Flag, options
from ..errors import BadInput

NOT_STATED = "not stated"


@options
class ExportOptions:
    """Options of the export of a run or a checkpoint; each is a flag of ``histoseek export``."""

    # fmt: off
    name: Annotated[str | None,
        Field(description="Name of the encoder. Default: the name of the folder --out.")] = None
    mpp: Annotated[float | None,
        Field(ge=0.01, le=100, description="µm per pixel at which the encoder is to be used; stored in "
        "the bundle, and `histoseek embed` reads slides at this scale. Without it, `embed` needs "
        "--mpp.")] = None
    pca: Annotated[float | None,
        Field(gt=0, le=1, description="Shorten the embeddings by PCA so that this share of the variance "
        "is kept; the PCA becomes part of the ONNX graph.")] = None
    whiten: Annotated[float,
        Field(ge=0, le=1, description="With --pca, divide each component by its standard deviation to "
        "this power: 0 leaves the components as they are, 1 gives all the same variance.")] = 0.0
    views: Annotated[int,
        Field(description="Number of orientations of a tile whose embeddings are averaged: 1 (as it is), "
        "2 (and turned by 180 degrees), 4 (all quarter turns) or 8 (those, and mirrored). Embedding "
        "takes that many times as long.")] = 1
    published: Annotated[str | None,
        Field(description="Name of the published encoder whose checkpoint is exported; `histoseek export "
        "--list` shows all names."), Flag("--as")] = None
    arch: Annotated[Literal["vit"] | None,
        Field(description="Instead of --as: the architecture of a checkpoint of one's own. Its sizes are "
        "read from the file; needs --mean and --std.")] = None
    heads: Annotated[int | None,
        Field(ge=1, le=256, description="With --arch: attention heads. Default: one for each 64 numbers of "
        "a token.")] = None
    activation: Annotated[Literal["gelu", "quick_gelu"] | None,
        Field(description="With --arch: activation of the MLPs. quick_gelu is that of OpenAI's CLIP. "
        "Default: gelu.")] = None
    input_px: Annotated[int | None,
        Field(ge=8, le=4096, description="With --arch: side of the network's input; positions are "
        "resampled. Default: that of the stored positions.")] = None
    pool: Annotated[Literal["cls", "cls+mean", "mean", "pooler", "head"] | None,
        Field(description="What forms the embedding: the class token, the mean of the patches, both side "
        "by side, or the output of a pooler or of the head that follows. Only the head's output can be "
        "compared with text. Default with --as: as the authors do.")] = None
    tile_px: Annotated[int | None,
        Field(ge=8, le=4096, description="With --as: side of the tiles that the graph takes; it resizes or "
        "crops them to the network's input. Default: as the authors read tiles.")] = None
    tokenizer: Annotated[Path | None,
        Field(description="With --as: tokenizer.json of the checkpoint's text network, for search by text. "
        "Default: the file of that name beside the checkpoint.")] = None
    fit: Annotated[Literal["bilinear", "bicubic", "crop"] | None,
        Field(description="With --as: how a tile of another side becomes the network's input. Default: as "
        "the authors do.")] = None
    mean: Annotated[str | None,
        Field(description="Mean of red, green and blue in 0..1, such as 0.485,0.456,0.406; required for an "
        ".onnx file. Default with --as: that of the authors.")] = None
    std: Annotated[str | None,
        Field(description="Standard deviations of the colours, as for --mean.")] = None
    precision: Annotated[Literal["fp32", "fp16"],
        Field(description="Precision in which the weights are stored. fp16 halves the bundle; it is still "
        "computed in fp32, and is an encoder of its own.")] = "fp32"
    layout: Annotated[Literal["nchw", "nhwc"],
        Field(description="For an .onnx file: order of the axes of its input; n is the batch, c the "
        "colours.")] = "nchw"
    stain_normalise: Annotated[StainMethod | None,
        Field(description="For a bundle: the new encoder first brings the colours of each slide and query "
        "image to those of a reference (H&E), by the method of Macenko or Reinhard. It is an encoder "
        "of its own.")] = None
    licence: Annotated[str,
        Field(description="Licence of the weights. Default: that of the published encoder.")] = NOT_STATED
    notes: Annotated[Path | None, Field(description="Markdown file to add to the model card.")] = None
    # fmt: on

    def __post_init__(self) -> None:
        """Raise BadInput if ``whiten`` is set without ``pca``."""
        if self.whiten and self.pca is None:
            raise BadInput(
                f"--whiten is {self.whiten}, but it scales the components of --pca; pass --pca too"
            )

    def colours(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return ``mean`` and ``std`` as numbers; see :func:`colours`."""
        return colours(self.mean, self.std)

    def only_for(self, source: str, *used: str) -> None:
        """Refuse options that the export of a kind of source does not use.

        Args:
            source: the kind, for the message.
            used: names of the options that it uses besides those that all use.

        Raises:
            BadInput: another option is set.
        """
        special = {
            "published": "--as", "arch": "--arch", "heads": "--heads", "activation": "--activation",
            "input_px": "--input-px", "pool": "--pool", "tile_px": "--tile-px", "fit": "--fit",
            "tokenizer": "--tokenizer", "mean": "--mean", "std": "--std",
            "layout": "--layout", "precision": "--precision",
            "pca": "--pca", "whiten": "--whiten", "views": "--views",
            "stain_normalise": "--stain-normalise",
        }  # fmt: skip
        plain = ExportOptions()
        for name, flag in special.items():
            if name not in used and getattr(self, name) != getattr(plain, name):
                raise BadInput(f"{flag} is not for {source}; leave it out")


def encoder_name(options: ExportOptions, out: Path) -> str:
    """Return the encoder's name: that of the options, else that of the folder.

    Raises:
        BadInput: the name has characters that a server or a file system may refuse.
    """
    return checked_name(options.name or out.name)


def checked_name(name: str) -> str:
    """Return a name of an encoder or a tissue network.

    Raises:
        BadInput: it has characters that a server or a file system may refuse.
    """
    if not re.fullmatch(NAME, name):
        raise BadInput(
            f"name {name!r}: expected letters, digits, '.', '_' and '-' only; pass --name"
        )
    return name


def colours(mean: str | None, std: str | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and the standard deviation of the colours as numbers.

    Raises:
        BadInput: one is missing, or is not three numbers.
    """
    found = []
    for flag, text in (("--mean", mean), ("--std", std)):
        try:
            values = tuple(float(part) for part in (text or "").split(","))
        except ValueError:
            values = ()
        inside = all(0 <= value <= 1 for value in values)  # false for nan
        if len(values) != 3 or not inside or (flag == "--std" and min(values) <= 0):
            raise BadInput(
                f"{flag} is {text!r}; expected three numbers for red, green and blue in 0..1, such as "
                "0.485,0.456,0.406"
            )
        found.append(values)
    return found[0], found[1]


@options
class TissueExportOptions:
    """Options of the export of a tissue network; each is a flag of ``histoseek tissue export``."""

    # fmt: off
    name: Annotated[str | None,
        Field(description="Name of the network. Default: the name of the folder --out.")] = None
    mpp: Annotated[float | None,
        Field(ge=0.1, le=100, description="For an .onnx file: µm per pixel of the images that the network "
        "takes.")] = None
    tissue: Annotated[tuple[int, ...],
        Field(description="For an .onnx file with several classes: number of the class that is tissue, "
        "from 0. Repeatable."), Flag("--class")] = ()
    output: Annotated[Literal["logits", "probabilities"],
        Field(description="For an .onnx file: what it returns. Logits get a softmax, or a sigmoid if "
        "there is one class.")] = "logits"
    mean: Annotated[str | None,
        Field(description="For an .onnx file: mean of red, green and blue in 0..1, such as "
        "0.485,0.456,0.406.")] = None
    std: Annotated[str | None,
        Field(description="Standard deviations of the colours, as for --mean.")] = None
    layout: Annotated[Literal["nchw", "nhwc"],
        Field(description="For an .onnx file: order of the axes of its input and output.")] = "nchw"
    size_px: Annotated[int | None,
        Field(ge=32, le=4096, description="For an .onnx file that takes images of any size: side of the "
        "squares in which slides are read, in pixels.")] = None
    threshold: Annotated[float,
        Field(gt=0, lt=1, description="Values above are tissue.")] = 0.5
    licence: Annotated[str, Field(description="Licence of the weights.")] = NOT_STATED
    notes: Annotated[Path | None, Field(description="Markdown file to add to the model card.")] = None
    # fmt: on


@options
class TritonOptions:
    """Options of a model on a server; each is a flag of ``histoseek triton repository``."""

    # fmt: off
    max_batch: Annotated[int | None,
        Field(ge=1, le=1024, description="Maximum number of tiles per batch. Default: 64; 16 for a graph "
        "above 64 MB.")] = None
    instances: Annotated[int | None,
        Field(ge=1, le=64, description="Number of copies of the model that run at the same time, per "
        "GPU; without a GPU: per machine. Default: 2; 1 for a graph above 64 MB.")] = None
    queue: Annotated[int,
        Field(ge=1, le=100_000, description="Maximum number of waiting requests; further requests are "
        "refused.")] = 256
    delay_us: Annotated[int,
        Field(ge=0, le=1_000_000, description="Maximum time to wait until a batch is full, in "
        "microseconds.")] = 1000
    fp16: Annotated[bool,
        Field(description="Also write a second model, <name>-fp16, in half precision.")] = False
    # fmt: on
