"""Commands for exchange with other tools: ``index import``, ``export`` and ``push``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ... import console
from ...artifacts.tables import Table
from ...artifacts.walking import LeftOut, summarised
from ...console import Json
from ...errors import BadInput

if TYPE_CHECKING:
    from ...index.store.metadata import AddedSlides

FEW = 10

AtlasPath = Annotated[Path, typer.Argument(help="Folder of the atlas.")]
MixedScales = Annotated[
    bool,
    typer.Option(
        "--mixed-scales",
        help="Let the atlas hold tiles of different µm per pixel (over 5 % apart), from now on.",
    ),
]


def report_added(
    results: AddedSlides,
    table: Table | None,
    left_out: Sequence[LeftOut] = (),
    encoder: str = "",
) -> None:
    """Print the result of each file and table row; exit code 1 if a file failed.

    Args:
        results: result of each file, with its rows.
        table: the metadata.
        left_out: other files in the folders, which were not used.
        encoder: the encoder named by the user, for files of other tools.
    """
    failed = [r for r in results if r.state == "failed"]
    rows = results.rows
    notes = [] if table is None else list(table.notes)
    document = {
        "ok": not failed,
        "added": [asdict(r) for r in results],
        "metadata_of_other_slides": sorted([*rows.unused, *rows.of_others]),
        "rows_unused": list(rows.unused),
        "slides_without_row": list(rows.without),
        "rows_by_name_only": list(rows.by_name_only),
        "left_out": [left._asdict() for left in left_out],
        "notes": notes,
    }
    unsaid = sum(r.encoder_by == "--encoder" for r in results)
    if encoder:
        document["files_that_say_no_encoder"] = unsaid

    def human() -> None:
        shown = [(r.slide, r.state, r.tiles, r.reason) for r in results]
        console.table("", ("slide", "state", "tiles", "reason"), shown)
        for line in [*notes, *summarised(left_out)]:
            console.say(line)
        say_names("rows of the metadata that mean no slide", rows.unused)
        say_names("rows of slides that were not added now (see `index relabel`)", rows.of_others)
        say_names("slides without a row in the metadata", rows.without)
        say_names(
            "rows matched by the slide's name alone, as its features do not say where it lies",
            rows.by_name_only,
        )
        if unsaid:
            files = (
                "1 file does not name its" if unsaid == 1 else f"{unsaid} files do not name their"
            )
            console.say(f"{files} encoder; --encoder {encoder!r} was used")

    console.emit(document, human)
    if failed:
        raise typer.Exit(console.EXIT_FAILED)


def say_names(what: str, names: Sequence[str]) -> None:
    """Print the number of names and the first few; nothing if there are none."""
    if names:
        few = ", ".join(names[:FEW]) + (" …" if len(names) > FEW else "")
        console.say(f"{what}: {len(names)} ({few})")


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
    metric: Annotated[str, typer.Option(help="Metric of a new atlas: cosine or l2.")] = "cosine",
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Replace the features of slides already in the atlas."),
    ] = False,
    mixed_scales: MixedScales = False,
    json: Json = False,
) -> None:
    """Import feature files of other tools, from any encoder. Creates the atlas if it does not exist."""
    from ...index.exchange.imports import import_features
    from ...index.inputs import find_feature_files, read_metadata, rows_of

    files, left_out = find_feature_files(features)
    table = read_metadata(metadata)
    with console.progress("importing") as progress:
        _, results = import_features(
            atlas,
            files,
            encoder,
            rows_of(table),
            mpp,
            tile_px,
            metric,
            replace,
            mixed_scales,
            progress,
        )
    report_added(results, table, left_out, encoder)


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
    """Export vectors and metadata for other tools, or tiles with their clusters for QuPath."""
    from ...index.atlas import Atlas
    from ...index.exchange.exports import export as write
    from ...index.exchange.qupath import origins, without_size

    more: dict[str, Any] = {"clustering": clusters, "like": like} if to == "geojson" else {}
    if clusters and like is not None:
        raise BadInput("--clusters and --like say two things; give one")
    if to != "geojson" and (clusters or like is not None):
        raise BadInput("--clusters and --like are for --to geojson")
    with console.working(f"writing {out}"):
        opened = Atlas(atlas)
        wrote = write(opened, out, to, where, **more)
    left_out = without_size(opened.view(), where) if to == "geojson" else {}
    corners = origins(opened.store) if to == "geojson" else {}
    unknown = sorted(name for name, corner in corners.items() if corner is None)
    document = {
        "out": str(out),
        "to": to,
        "tiles": wrote.tiles,
        "left_out": left_out,
        "frame_unknown": unknown,
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
        say_names(
            "slides whose scanned area is not known, so their tiles are in level-0 pixels (not in "
            "QuPath's frame for .mrxs, .scn and .bif: embed these again)",
            unknown,
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
    """Copy the atlas to Milvus; later only its changes. Then search there with --engine."""
    from ...index.atlas import Atlas
    from ...index.exchange.milvus_push import push as copy

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
