"""Commands for exchange with other tools: ``index import``, ``export`` and ``push``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ... import console
from ...artifacts.tables import Table
from ...artifacts.walking import LeftOut, summarised
from ...console import counted
from ...errors import BadInput, HistoseekError
from .bind import TILES, bound

if TYPE_CHECKING:
    from ...index.store.metadata import AddedSlides

Binding = tuple[dict[str, Any], Callable[[], None]] | HistoseekError | None
"""What :func:`~histoseek.ui.cli.bind.bound` returned, or why it failed; None if it was not called."""


def report_added(
    results: AddedSlides,
    table: Table | None,
    left_out: Sequence[LeftOut] = (),
    encoder: str = "",
    binding: Binding = None,
) -> None:
    """Print the result of each file and table row; exit code 1 if a file failed.

    ``left_out`` are the other files in the folders, ``encoder`` is the name that the user gave for the
    encoder of imported files, ``binding`` the report of binding the atlas to a bundle, or why that failed
    (then the exit code is 1 too).
    """
    failed = [r for r in results if r.state == "failed"]
    rows = results.rows
    notes = [*(table.notes if table else ()), *results.notes]
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
    unnamed = sum(r.encoder_by == "--encoder" for r in results)
    if encoder:
        document["files_that_say_no_encoder"] = unnamed
    refused = binding if isinstance(binding, Exception) else None
    if refused is not None:
        document |= {"ok": False, "not_bound": str(refused)}
    elif isinstance(binding, tuple):
        document["bound"] = binding[0]

    def human() -> None:
        shown = [(r.slide, r.state, r.tiles, r.reason) for r in results]
        console.table("", ("slide", "state", "tiles", "reason"), shown)
        for line in [*notes, *summarised(left_out)]:
            console.say(line)
        console.say_names("rows of the metadata that match no slide", rows.unused)
        console.say_names(
            "rows of slides that were not added now (to use them, run `index relabel`)",
            rows.of_others,
        )
        console.say_names("slides without a row in the metadata", rows.without)
        console.say_names(
            "rows matched by the slide's name only, because its features do not contain its path",
            rows.by_name_only,
        )
        if unnamed:
            console.say(
                f"files that do not name their encoder: {unnamed}; used --encoder {encoder!r}"
            )
        if refused is not None:
            console.say(f"the features were imported, but the atlas was not bound: {refused}")
        elif isinstance(binding, tuple):
            binding[1]()

    console.emit(document, human)
    if failed or refused is not None:
        raise typer.Exit(console.EXIT_FAILED)


def import_(
    atlas: Path,
    features: list[Path],
    encoder: Annotated[str, typer.Option()],
    metadata: Path | None = None,
    mpp: float | None = None,
    tile_px: int | None = None,
    metric: str = "cosine",
    replace: bool = False,
    mixed_scales: bool = False,
    project: Path | None = None,
    bundle: Path | None = None,
    slides: list[Path] | None = None,
    link_encoder: bool = False,
) -> None:
    """Import feature files of other tools, made by any encoder. Creates the atlas if it does not exist.

    Options:
        features: .h5 files of TRIDENT, CLAM or STAMP, or folders of such files.
        encoder: Name of the encoder that computed the features, such as uni_v1.
        mpp: µm per pixel of level 0, for slides whose value is neither in their file nor in the metadata
            (column mpp).
        tile_px: Side of a tile in pixels of level 0, for files that do not contain it.
        metric: Metric of the atlas, if it is new: cosine or l2.
        project: Bundle of the encoder (conch), whose last map the features are multiplied by: other tools
            store CONCH's features before it, and only behind it can they be compared with text.
        bundle: Bundle of the encoder. Binds the atlas to it afterwards, as `index bind` does.
        slides: Slide files, or folders with them, that `index bind` reads. Repeatable.
    """
    from ...artifacts.manifest import read_manifest, read_projection
    from ...index.exchange.imports import import_features
    from ...index.inputs import find_feature_files, read_metadata, rows_of

    if bundle is None and (slides or link_encoder):
        raise BadInput("--slides and --link-encoder are used to bind the atlas; give --bundle too")
    manifest = None if bundle is None else read_manifest(bundle)
    files, left_out = find_feature_files(features)
    table = read_metadata(metadata)
    projection = None if project is None else read_projection(project, read_manifest(project))
    with console.progress("importing") as progress:
        made, results = import_features(
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
            projection,
        )
    binding: Binding = None
    if bundle is not None and manifest is not None and made.manifest.sha256 != manifest.sha256:
        try:
            binding = bound(atlas, bundle, slides or [], TILES, link_encoder)
        except HistoseekError as error:
            binding = error
    report_added(results, table, left_out, encoder, binding)


def export(
    atlas: Path,
    out: Annotated[Path, typer.Option()],
    to: str = "numpy",
    where: str | None = None,
    clusters: str | None = None,
    like: int | None = None,
) -> None:
    """Export vectors, metadata or clusters for other tools. For QuPath, use --to geojson.

    Options:
        out: New file; for projector and geojson a folder.
        to: Format: numpy, parquet, anndata (.h5ad or .zarr), projector or geojson.
        clusters: For geojson: clustering to draw. Default: the newest.
        like: For geojson: id of a tile. Draws the similarity to it instead of clusters.
    """
    from ...index.atlas import Atlas
    from ...index.exchange.exports import export as write
    from ...index.exchange.qupath import origins, without_size

    more: dict[str, Any] = {"clustering": clusters, "like": like} if to == "geojson" else {}
    if clusters and like is not None:
        raise BadInput("--clusters and --like cannot be combined; give one of them")
    if to != "geojson" and (clusters or like is not None):
        raise BadInput("--clusters and --like are only for --to geojson")
    with console.working(f"writing {out}"):
        opened = Atlas(atlas)
        wrote = write(opened, out, to, where, **more)
    for note in opened.view().notes(where):
        console.say(note)
    left_out = without_size(opened.view(), where) if to == "geojson" else {}
    corners = origins(opened.view(), where) if to == "geojson" else {}
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
        for column, new_name in wrote.renamed.items():
            console.say(f"the column {column!r} is named {new_name!r} in the file")
        if left_out:
            console.say(
                f"left out {sum(left_out.values()):,} tiles: their size on the slide is unknown"
            )
        console.say_names("slides of these tiles", list(left_out))
        console.say_names(
            "slides whose scanned area is unknown; their coordinates are level-0 pixels. QuPath has "
            "another origin for .mrxs, .scn and .bif; embed such slides again",
            unknown,
        )

    console.emit(document, human)


def push(atlas: Path, milvus: str, index: str | None = None) -> None:
    """Copy the atlas, or its changes since the last push, to Milvus.

    Afterwards, `index search --engine` and `index assign --engine` can search there, and `index search
    ATLAS milvus://…` searches it together with other atlases.

    Options:
        milvus: milvus://host:19530/collection, or milvus:///folder/file.db for a local file.
        index: Index type of a new Milvus collection, such as FLAT, HNSW or AUTOINDEX. Default: FLAT (exact
            search) up to 100,000 tiles, else AUTOINDEX.
    """
    from ...index.atlas import Atlas
    from ...index.exchange.milvus_push import push as copy

    with console.progress("pushing") as progress:
        report = copy(Atlas(atlas), milvus, index, progress)
    console.emit(
        report,
        lambda: console.say(
            f"{milvus}: revision {report['revision']}, {counted(report['tiles'], 'tile')} "
            f"({report['index']}); {counted(report['slides_pushed'], 'slide')} sent, "
            f"{report['slides_removed']} removed"
        ),
    )
