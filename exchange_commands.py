"""An atlas and other tools: ``index import``, ``export`` and ``push``; reading metadata for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import console
from .console import Json
from .errors import BadInput
from .tables import read_csv

if TYPE_CHECKING:
    from .index.records import Added

AtlasPath = Annotated[Path, typer.Argument(help="Folder of the atlas.")]
MixedScales = Annotated[
    bool,
    typer.Option(
        "--mixed-scales",
        help="Let the atlas hold tiles of different µm per pixel (over 5 % apart), from now on.",
    ),
]


def read_metadata(path: Path | None) -> dict[str, dict[str, str]]:
    """Read a CSV of slides; by slide.

    Raises:
        BadInput: it cannot be read, or has no column ``slide``.
    """
    if path is None:
        return {}
    return {row["slide"]: row for row in read_csv(path, "slide")}


def report_added(
    results: Sequence[Added], table: dict[str, dict[str, str]], encoder: str = ""
) -> None:
    """Say what became of each file; exit code 1 if one failed.

    Args:
        results: of each file.
        table: the metadata, by slide.
        encoder: that a person named, for files of other tools.
    """
    failed = [r for r in results if r.state == "failed"]
    names = {r.slide for r in results}
    unused = sorted(key for key in table if not {key, Path(key).stem} & names)
    document = {
        "ok": not failed,
        "added": [asdict(r) for r in results],
        "metadata_of_other_slides": unused,
    }
    unsaid = sum(r.encoder_by == "your word" for r in results)
    if encoder:
        document["files_that_say_no_encoder"] = unsaid

    def human() -> None:
        rows = [(r.slide, r.state, r.tiles, r.reason) for r in results]
        console.table("", ("slide", "state", "tiles", "reason"), rows)
        if unused:
            console.say(f"metadata of slides that were not added now: {', '.join(unused[:10])}")
        if unsaid:
            files = "1 file does not say its" if unsaid == 1 else f"{unsaid} files do not say their"
            console.say(f"{files} encoder; your word {encoder!r} was taken")

    console.emit(document, human)
    if failed:
        raise typer.Exit(console.EXIT_FAILED)


def import_(
    atlas: AtlasPath,
    features: Annotated[
        list[Path], typer.Argument(help=".h5 files of TRIDENT, CLAM or STAMP, or folders of them.")
    ],
    encoder: Annotated[
        str, typer.Option(help="Name of the encoder that made them, such as uni_v1.")
    ],
    metadata: Annotated[
        Path | None, typer.Option(help="CSV with slide, label, patient, mpp and any other column.")
    ] = None,
    mpp: Annotated[
        float | None, typer.Option(help="Micrometres per pixel of level 0, where no file says.")
    ] = None,
    tile_px: Annotated[
        int | None, typer.Option(help="Side of a tile in pixels of level 0, where no file says.")
    ] = None,
    metric: Annotated[
        str, typer.Option(help="cosine or l2, for an atlas that is made.")
    ] = "cosine",
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Put new features of a known slide in place of the old."),
    ] = False,
    mixed_scales: MixedScales = False,
    json: Json = False,
) -> None:
    """Take in features of any encoder that other tools made; makes the atlas if it is not there."""
    from .index.imports import import_features

    files: list[Path] = []
    for path in features:
        inside = sorted(p for p in path.rglob("*.h5") if not p.name.startswith("."))
        files += inside if path.is_dir() else [path]
        if path.is_dir() and not inside:
            pickles = any(path.rglob("*.pt"))
            hint = "; its .pt files are pickles, which are not read" if pickles else ""
            raise BadInput(f"{path} holds no .h5 files{hint}")
    table = read_metadata(metadata)
    with console.progress("importing") as progress:
        _, results = import_features(
            atlas, files, encoder, table, mpp, tile_px, metric, replace, mixed_scales, progress
        )
    report_added(results, table, encoder)


def export(
    atlas: AtlasPath,
    out: Annotated[Path, typer.Option(help="File, or folder for projector and geojson.")],
    to: Annotated[
        str, typer.Option(help="numpy, parquet, anndata (.h5ad, .zarr), projector or geojson.")
    ] = "numpy",
    where: Annotated[str | None, typer.Option(help="Metadata filter.")] = None,
    clusters: Annotated[
        str | None, typer.Option(help="geojson: the clustering to draw; the newest if left out.")
    ] = None,
    like: Annotated[
        int | None, typer.Option(help="geojson: draw the similarity to this tile instead.")
    ] = None,
    json: Json = False,
) -> None:
    """Write vectors and metadata for other tools, or tiles with their clusters for QuPath."""
    from .index.atlas import Atlas
    from .index.exports import without_size, write

    more: dict[str, Any] = {"clustering": clusters, "like": like} if to == "geojson" else {}
    if clusters and like is not None:
        raise BadInput("--clusters and --like say two things; give one")
    if to != "geojson" and (clusters or like is not None):
        raise BadInput("--clusters and --like are for --to geojson")
    with console.working(f"writing {out}"):
        opened = Atlas(atlas)
        wrote = write(opened, out, to, where, **more)
    left_out = without_size(opened, where) if to == "geojson" else {}
    document = {
        "out": str(out),
        "to": to,
        "tiles": wrote.tiles,
        "left_out": left_out,
        "renamed_columns": wrote.renamed,
    }

    def human() -> None:
        console.say(f"{out}: {wrote.tiles:,} tiles")
        for column, called in wrote.renamed.items():
            console.say(f"the column {column!r} is named {called!r} there")
        if left_out:
            few = ", ".join(list(left_out)[:5]) + (" …" if len(left_out) > 5 else "")
            count = sum(left_out.values())
            console.say(
                f"left out, for nothing says how large they are on a slide: {count:,} of {few}"
            )

    console.emit(document, human)


def push(
    atlas: AtlasPath,
    milvus: Annotated[
        str, typer.Argument(help="milvus://host:19530/collection, or milvus:///folder/file.db")
    ],
    index: Annotated[
        str | None,
        typer.Option(help="Milvus's index for a new collection: FLAT, HNSW, AUTOINDEX …"),
    ] = None,
    json: Json = False,
) -> None:
    """Copy the atlas to Milvus, only what changed; then search with --engine."""
    from .index.atlas import Atlas
    from .index.milvus import push as copy

    with console.progress("pushing") as progress:
        report = copy(Atlas(atlas), milvus, index, progress)
    console.emit(
        report,
        lambda: console.say(
            f"{milvus}: revision {report['revision']}, {report['tiles']} tiles ({report['index']}); "
            f"{report['slides_pushed']} slides sent, {report['slides_removed']} removed"
        ),
    )


COMMANDS = {"import": import_, "export": export, "push": push}
