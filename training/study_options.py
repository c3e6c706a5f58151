"""Options of ``histoseek reproduce``; imports no torch, because the command line loads it at start."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from ..artifacts.option_models import HIDDEN, PYTHON_ONLY, Field, options


@options
class StudyOptions:
    """Options common to all protocols; each is a flag of ``histoseek reproduce``."""

    # fmt: off
    out: Annotated[Path,
        Field(description="Folder of the report and its runs; a killed protocol resumes there.")]
    command: Annotated[str, Field(description="As it was typed, for the report."), PYTHON_ONLY] = ""
    preset: Annotated[Literal["authors", "paper"],
        Field(description="What the authors' code does, or what the text says (breast-ae).")] = "authors"
    quick: Annotated[bool, Field(description="Few epochs and seeds: shows that it runs.")] = False
    seeds: Annotated[int, Field(ge=0, description="Seeds or folds; 0: the protocol's own.")] = 0
    epochs: Annotated[int,
        Field(ge=0, description="Epochs of every training; 0: the protocol's own.")] = 0
    limit: Annotated[int, Field(ge=0, description="Most tiles, drawn by group; 0: all.")] = 0
    limit_large: Annotated[int,
        Field(ge=0, description="Most tiles for nets over 2 GMACs; 0: as --limit."), HIDDEN] = 0
    split: Annotated[Literal["group", "tile"],
        Field(description="Split by group, or by tile as some papers do (leaky).")] = "group"
    positive: Annotated[str,
        Field(description="Label that counts as positive in F1; the last if empty."), HIDDEN] = ""
    parts: Annotated[str,
        Field(description="Parts: table4,grid (ae-dac); lite0 (arcface); AE or CAE "
        "(topology-sweep)."), HIDDEN] = ""
    size_px: Annotated[int,
        Field(ge=0, description="Side of a tile, if the protocol allows it; 0: its own."), HIDDEN] = 0
    widths: Annotated[str,
        Field(description="Widths of the P4M CNN: published, 32, 16 or 8; the preset's if "
        "empty."), HIDDEN] = ""
    accelerator: Annotated[str, Field(description="cpu, cuda, mps or auto.")] = "auto"
    precision: Annotated[str,
        Field(description="Lightning's name, such as bf16-mixed."), HIDDEN] = "32-true"
    # fmt: on
