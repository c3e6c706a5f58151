"""The command ``embed``: turns slides and tile sets into feature files."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ... import console
from ...console import Json
from ...errors import BadInput
from ...serving.embedding.results import EmbedOptions, EncoderChoice, Result
from .options import with_flags


class Kind(StrEnum):
    """What the images in a folder are."""

    auto = "auto"
    slides = "slides"
    tiles = "tiles"


@with_flags
def embed(
    inputs: Annotated[list[Path], typer.Argument(help="Slides, folders, tile packs.")],
    out: Annotated[
        str, typer.Option(help="Folder of the feature files; with --ray also a URL (s3://…).")
    ],
    choice: EncoderChoice,
    options: EmbedOptions,
    magnification: Annotated[
        float | None, typer.Option(help="Instead of --mpp: 20 is 0.5 µm per pixel, 40 is 0.25.")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help="[HOST:]PORT for Prometheus while it runs.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(help="Spread slides over a Ray cluster: its address, or 'local'."),
    ] = None,
    kind: Annotated[
        Kind, typer.Option("--as", help="What a folder of pictures holds.", hidden=True)
    ] = Kind.auto,
    json: Json = False,
) -> None:
    """Embed slides and tile sets into feature files. Repeat the command to finish an interrupted run."""
    from ...serving.embedding.jobs import find_inputs
    from ...serving.embedding.regions import unused_regions, with_regions
    from ...serving.embedding.report import record_end, report_results
    from ...serving.embedding.run import run_here

    options = replace(options, mpp=_scale(options.mpp, magnification))
    if ray is not None and metrics is not None:
        raise BadInput("--metrics tells of this process; with --ray the work is elsewhere")
    given = find_inputs(inputs, kind.value, options.manifest)
    found = with_regions(given.jobs, options.regions)
    facts = {**given.as_dict(), "regions_unused": unused_regions(found, options.regions)}
    if ray is None and "://" in out:
        raise BadInput(f"--out {out!r}: expected a folder; URLs are for --ray")
    ended: list[Result] = []
    try:
        with console.progress("embedding") as progress:
            if ray is not None:
                from ...serving.embedding.ray import run_on_ray

                ran = run_on_ray(found, choice, out, options, ray, progress, ended)
            else:
                ran = run_here(found, choice, Path(out), options, progress, metrics, ended)
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


embed_app = typer.Typer(add_completion=False, rich_markup_mode=None)
embed_app.command("embed")(embed)
