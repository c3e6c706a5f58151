"""Options of ``histoseek export`` and ``histoseek triton repository``; imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ..artifacts.option_models import Field, options
from ..errors import BadInput


@options
class ExportOptions:
    """Options of the export of a run; each is a flag of ``histoseek export``."""

    # fmt: off
    name: Annotated[str | None,
        Field(description="Name of the encoder; default: the folder's name.")] = None
    mpp: Annotated[float | None,
        Field(ge=0.01, le=100, description="µm per pixel to read slides at.")] = None
    pca: Annotated[float | None,
        Field(gt=0, le=1, description="Keep this share of the variance by PCA in the graph.")] = None
    whiten: Annotated[float,
        Field(ge=0, le=1, description="With --pca, divide each component by its standard deviation to "
        "this power: 0 keeps their scale, 1 gives all the same weight.")] = 0.0
    views: Annotated[int,
        Field(description="Orientations to average: 1 none, 2 half turns, 4 quarter turns, 8 also "
        "mirror images.")] = 1
    licence: Annotated[str, Field(description="Licence of the weights.")] = "not stated"
    notes: Annotated[Path | None, Field(description="Markdown file to add to the model card.")] = None
    # fmt: on

    def __post_init__(self) -> None:
        """Raise BadInput if ``whiten`` is set without ``pca``."""
        if self.whiten and self.pca is None:
            raise BadInput(
                f"--whiten is {self.whiten}, which needs --pca: it scales its components"
            )


@options
class TritonOptions:
    """Options of a model on a server; each is a flag of ``histoseek triton repository``."""

    # fmt: off
    max_batch: Annotated[int, Field(ge=1, le=1024, description="Most tiles per batch.")] = 64
    instances: Annotated[int,
        Field(ge=1, le=64, description="Copies of the model per GPU; without a GPU: per machine.")] = 2
    queue: Annotated[int,
        Field(ge=1, le=100_000, description="Most waiting requests; more are refused.")] = 256
    delay_us: Annotated[int,
        Field(ge=0, le=1_000_000, description="Microseconds to wait for a full batch.")] = 1000
    fp16: Annotated[bool,
        Field(description="Also write <name>-fp16, computed in half precision.")] = False
    # fmt: on
