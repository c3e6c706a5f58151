"""The verb ``embed``: slides and tile sets through an encoder, into feature files."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ... import console
from ...console import Json
from ...errors import BadInput


class Kind(StrEnum):
    """What the pictures of a folder are."""

    auto = "auto"
    slides = "slides"
    tiles = "tiles"


def embed(
    inputs: Annotated[list[Path], typer.Argument(help="Slides, folders, tile packs.")],
    out: Annotated[
        str, typer.Option(help="Folder of the feature files; with --ray also a URL (s3://…).")
    ],
    encoder: Annotated[
        str,
        typer.Option(help="Bundle, 'default', or triton://HOST:PORT/MODEL[@VERSION][?shm=1]."),
    ] = "default",
    bundle: Annotated[
        Path | None, typer.Option(help="Bundle that a server's encoder must be equal to.")
    ] = None,
    engine: Annotated[
        str, typer.Option(help="In this process: auto (measured once), onnxruntime, openvino.")
    ] = "auto",
    precision: Annotated[
        str, typer.Option(help="f32, or bf16 on CPUs that have it (with OpenVINO).")
    ] = "f32",
    batch: Annotated[
        int | None, typer.Option(help="Tiles per call of the encoder; chosen if left out.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Decoder workers; one per core if left out.")
    ] = None,
    mpp: Annotated[
        float | None, typer.Option(help="µm per pixel of the tiles; the encoder's if left out.")
    ] = None,
    magnification: Annotated[
        float | None, typer.Option(help="Instead of --mpp: 20 is 0.5 µm per pixel, 40 is 0.25.")
    ] = None,
    assume_mpp: Annotated[
        float | None,
        typer.Option(help="µm per pixel of slides whose file and manifest do not say."),
    ] = None,
    override_mpp: Annotated[
        float | None,
        typer.Option(help="µm per pixel of all slides of this run, whatever their files say."),
    ] = None,
    series: Annotated[
        int | None,
        typer.Option(help="Number of the picture that is the slide, in a TIFF with several."),
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(help="CSV: file, label, group; for slides file, mpp, series, label, patient."),
    ] = None,
    overlap: Annotated[int, typer.Option(help="Overlap of tiles, in pixels.")] = 0,
    min_tissue: Annotated[float, typer.Option(help="Least share of tissue in a tile.")] = 0.25,
    regions: Annotated[
        Path | None,
        typer.Option(
            help="GeoJSON (QuPath) of what to embed: a file for one slide, or a folder of <slide>.geojson."
        ),
    ] = None,
    region_class: Annotated[
        list[str] | None, typer.Option(help="Only annotations of this class; repeatable.")
    ] = None,
    geojson: Annotated[
        bool, typer.Option("--geojson", help="Write tissue outlines and tiles for QuPath.")
    ] = False,
    overlays: Annotated[
        bool, typer.Option(help="Write a picture per slide of its tissue and tiles.")
    ] = True,
    metrics: Annotated[
        str | None, typer.Option(help="[HOST:]PORT for Prometheus while it runs.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(help="Spread slides over a Ray cluster: its address, or 'local'."),
    ] = None,
    kind: Annotated[
        Kind, typer.Option("--as", help="What a folder of pictures holds.")
    ] = Kind.auto,
    json: Json = False,
) -> None:
    """Embed slides and tile sets into feature files; a repeated run finishes what is not done."""
    from ...serving.embedding.jobs import find_inputs
    from ...serving.embedding.regions import unused_regions, with_regions
    from ...serving.embedding.report import record_end, report_results
    from ...serving.embedding.results import EmbedOptions, Result
    from ...serving.embedding.run import EncoderChoice, run_here

    options = EmbedOptions(
        mpp=_scale(mpp, magnification),
        assume_mpp=assume_mpp,
        override_mpp=override_mpp,
        series=series,
        overlap_px=overlap,
        min_tissue=min_tissue,
        manifest=manifest,
        regions=regions,
        region_classes=tuple(region_class or ()),
        overlays=overlays,
        geojson=geojson,
        jobs=jobs,
    )
    if batch is not None and batch < 1:
        raise BadInput(f"--batch is {batch}; expected 1 or more tiles")
    if "://" in encoder and (engine, precision) != ("auto", "f32"):
        raise BadInput(
            "--engine and --precision are for an encoder in this process; a server has its own "
            "(for half precision name its model <name>-fp16)"
        )
    if ray is not None and metrics is not None:
        raise BadInput("--metrics tells of this process; with --ray the work is elsewhere")
    chosen = EncoderChoice(encoder, bundle, engine, precision, batch)
    given = find_inputs(inputs, kind.value, manifest)
    found = with_regions(given.jobs, regions)
    facts = {**given.as_dict(), "regions_unused": unused_regions(found, regions)}
    if ray is None and "://" in out:
        raise BadInput(f"--out {out!r}: expected a folder; URLs are for --ray")
    ended: list[Result] = []
    try:
        with console.progress("embedding") as progress:
            if ray is not None:
                from ...serving.embedding.ray import run_on_ray

                ran = run_on_ray(found, chosen, out, options, ray, progress, ended)
            else:
                ran = run_here(found, chosen, Path(out), options, progress, metrics, ended)
    except BaseException as error:
        record_end(error, ended, len(found), out, facts)
        raise
    if not report_results(ran, out, facts):
        raise typer.Exit(console.EXIT_FAILED)


def _scale(mpp: float | None, magnification: float | None) -> float | None:
    """Return µm per pixel of either option; a 10x objective has 1 µm per pixel."""
    if magnification is None:
        return mpp
    if mpp is not None:
        raise BadInput("--mpp and --magnification say the same thing; pass one of them")
    if not 0.1 <= magnification <= 200:
        raise BadInput(f"--magnification is {magnification}; expected 0.1 to 200")
    return 10 / magnification
