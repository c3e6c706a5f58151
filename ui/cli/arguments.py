"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

AtlasPath = Annotated[Path, typer.Argument(help="Folder of the atlas.")]
Metadata = Annotated[
    Path | None, typer.Option(help="CSV with the columns slide, label, patient and any others.")
]
Where = Annotated[
    str | None,
    typer.Option(help="Metadata filter, such as \"organ = 'colon' and patient != 'P7'\"."),
]
Clustering = Annotated[
    str | None, typer.Option("--clusters", help="Name of the clustering. Default: the newest.")
]
Engine = Annotated[
    str | None,
    typer.Option(
        help="Search in this Milvus collection (milvus://host:19530/collection), which `index push` filled."
    ),
]
Seed = Annotated[int, typer.Option(help="Random seed.")]
Least = Annotated[
    float | None,
    typer.Option(
        help="Minimum score at which two tiles count as the same. Default for cosine: 0.999."
    ),
]
MixedScales = Annotated[
    bool,
    typer.Option(
        "--mixed-scales",
        help="From now on, the atlas may hold tiles whose µm per pixel differ by more than 5 %.",
    ),
]
Replace = Annotated[
    bool,
    typer.Option("--replace", help="Replace the features of slides that are already in the atlas."),
]
