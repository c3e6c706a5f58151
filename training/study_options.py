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
        Field(description="Folder for the report and its runs. After an interruption, the same command "
        "continues.")]
    command: Annotated[str, Field(description="As it was typed, for the report."), PYTHON_ONLY] = ""
    preset: Annotated[Literal["authors", "paper"],
        Field(description="Settings of breast-ae: as in the authors' code, or as in the text of the "
        "paper.")] = "authors"
    quick: Annotated[bool,
        Field(description="Use few epochs and seeds, to test that the protocol runs.")] = False
    seeds: Annotated[int, Field(ge=0, description="Number of seeds or folds; 0: as in the protocol.")] = 0
    folds: Annotated[int,
        Field(ge=0, description="Number of folds into which arcface or breast-ae splits the tiles, at "
        "least 3; 0: as in the paper."), HIDDEN] = 0
    epochs: Annotated[int,
        Field(ge=0, description="Number of epochs of each training; 0: as in the protocol.")] = 0
    limit: Annotated[int, Field(ge=0, description="Maximum number of tiles; whole groups are drawn. "
        "0: all.")] = 0
    limit_large: Annotated[int,
        Field(ge=0, description="Maximum number of tiles for networks over 2 GMACs (breast-ae); 0: as "
        "--limit."), HIDDEN] = 0
    split: Annotated[Literal["group", "tile"],
        Field(description="Split between training and test. group: tiles of one patient or source "
        "image stay together; tile: they do not (as in some papers), so near-copies leak.")] = "group"
    positive: Annotated[str,
        Field(description="Label that counts as positive in F1 (breast-ae). Empty: the last "
        "label."), HIDDEN] = ""
    parts: Annotated[str,
        Field(description="Parts of the protocol: to add, table4,grid,switches (ae-dac), lite0 (arcface), "
        "settings (topology-sweep: other optimisers, losses and layers) or relu (topology-sweep: a ReLU "
        "after the AE's code); to run alone, AE or CAE (topology-sweep)."), HIDDEN] = ""
    size_px: Annotated[int,
        Field(ge=0, description="Side of a tile, if the protocol lets you choose it; 0: as in the "
        "protocol."), HIDDEN] = 0
    widths: Annotated[str,
        Field(description="Widths of the P4M CNN: published, 32, 16 or 8; empty: as in the "
        "protocol."), HIDDEN] = ""
    train_only: Annotated[bool,
        Field(description="Train what no other process with the same --out trains, and write no report. "
        "Run it several times at once, then once without this option."), HIDDEN] = False
    accelerator: Annotated[str, Field(description="Device: cpu, cuda, mps or auto.")] = "auto"
    precision: Annotated[str,
        Field(description="Precision as Lightning names it, such as bf16-mixed."), HIDDEN] = "32-true"
    # fmt: on
