"""Arguments shared by several commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

AtlasPath = Annotated[Path, typer.Argument(help="Folder of the atlas.")]
Where = Annotated[
    str | None, typer.Option(help="Metadata filter: \"organ = 'colon' and patient != 'P7'\".")
]
ENGINE_HELP = "Search there instead: milvus://host:19530/collection, after `index push`."
