"""Options of ``histoseek tissue train``; imports no torch."""

from __future__ import annotations

from typing import Annotated

from ...artifacts.option_models import Field, options


@options
class TissueOptions:
    """How a network that finds tissue is trained; every field is a flag of ``histoseek tissue train``."""

    # fmt: off
    steps: Annotated[int, Field(ge=1, description="Number of training steps.")] = 4000
    batch: Annotated[int, Field(ge=1, le=256, description="Number of scenes per step.")] = 8
    side_px: Annotated[int,
        Field(ge=64, le=1024, multiple_of=32, description="Side of a scene, and of the network's input, in "
        "pixels; a multiple of 32.")] = 256
    lr: Annotated[float, Field(ge=1e-9, le=1, description="Highest learning rate.")] = 2e-3
    seed: Annotated[int, Field(ge=0, description="Random seed of the scenes and the weights.")] = 0
    # fmt: on
