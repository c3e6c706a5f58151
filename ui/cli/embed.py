"""The command ``embed``: turns slides and tile sets into feature files."""

from __future__ import annotations

from dataclasses import asdict, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from ... import console
from ...errors import BadInput
from ...serving.embedding.results import EmbedOptions, EncoderChoice, RayOptions, Result
from .commands import Commands
from .options import with_flags

if TYPE_CHECKING:
    from ...serving.embedding.estimate import Estimate

app = Commands("Embed.")


class Kind(StrEnum):
    """What the images in a folder are."""

    auto = "auto"
    slides = "slides"
    tiles = "tiles"


@app.command()
@with_flags
def embed(
    inputs: list[str],
    out: Annotated[str, typer.Option()],
    choice: EncoderChoice,
    options: EmbedOptions,
    cluster: RayOptions,
    magnification: float | None = None,
    metrics: str | None = None,
    kind: Annotated[Kind, typer.Option("--as", hidden=True)] = Kind.auto,
) -> None:
    """Embed slides and tile sets into feature files. Run the command again to finish an interrupted run.

    Options:
        inputs: Slides, folders of slides or tiles, or packed tiles (.tar, .npz, .csv); also URLs (s3://...).
        out: Folder or URL (s3://...) to write feature files to.
        magnification: Another way to give --mpp: 20 means 0.5 µm per pixel, 40 means 0.25.
        metrics: [HOST:]PORT at which Prometheus can read metrics during the run.
        kind: What a folder of images contains.
    """
    from ...serving.embedding.jobs import find_inputs
    from ...serving.embedding.regions import unused_regions, with_regions
    from ...serving.embedding.remote_out import check_writable
    from ...serving.embedding.report import record_end, report_results
    from ...serving.embedding.run import run_here
    from ...serving.embedding.tissue_network import open_network

    options = replace(options, mpp=_scale(options.mpp, magnification))
    open_network(options.tissue_model)
    check_writable(out)
    given = find_inputs(inputs, kind.value, options.manifest)
    jobs = with_regions(given.jobs, options.regions)
    facts = {**given.as_dict(), "regions_unused": unused_regions(jobs, options.regions)}
    ended: list[Result] = []

    def tell(estimate: Estimate) -> None:
        facts["estimate"] = asdict(estimate)
        console.say(estimate.text)

    try:
        with console.progress("embedding") as progress:
            if cluster.address is not None:
                from ...serving.embedding.ray import run_on_ray

                ran = run_on_ray(jobs, choice, out, options, cluster, progress, metrics, ended)
            else:
                ran = run_here(jobs, choice, out, options, progress, metrics, ended, tell)
    except BaseException as error:
        record_end(error, ended, len(jobs), out, facts)
        raise
    if not report_results(ran, out, facts):
        raise typer.Exit(console.EXIT_FAILED)


def _scale(mpp: float | None, magnification: float | None) -> float | None:
    """Return µm per pixel of either option; a 10x objective has 1 µm per pixel."""
    if magnification is None:
        return mpp
    if mpp is not None:
        raise BadInput("--mpp and --magnification both set the scale; give only one of them")
    if not 0.1 <= magnification <= 200:
        raise BadInput(f"--magnification is {magnification}; expected 0.1 to 200")
    return 10 / magnification
