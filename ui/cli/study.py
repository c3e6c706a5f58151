"""Commands that measure an atlas: evaluate, duplicates, leakage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ... import console
from ...console import Json
from .arguments import AtlasPath, Where

if TYPE_CHECKING:
    from ...index.studies.scores import RetrievalOptions


def evaluate(
    atlas: AtlasPath,
    label: Annotated[str, typer.Option(help="Column to predict from the hits.")] = "label",
    leave_out: Annotated[
        str,
        typer.Option(
            help="Leave out hits with the query's value in this column: patient, slide, …"
        ),
    ] = "patient",
    without_patients: Annotated[
        bool, typer.Option("--without-patients", help="Continue even if tiles have no patient.")
    ] = False,
    unit: Annotated[str, typer.Option(help="tile, or slide by its mosaic.")] = "tile",
    queries: Annotated[int, typer.Option(help="Maximum number of query tiles.")] = 20_000,
    bootstrap: Annotated[
        int, typer.Option(help="Bootstrap samples for the confidence intervals.")
    ] = 1_000,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    json: Json = False,
) -> None:
    """Search with every labelled tile among other patients, and count hits with the same label."""
    import numpy as np

    from ...index.atlas import Atlas
    from ...index.studies.retrieval import evaluate as run
    from ...index.studies.scores import RetrievalOptions

    opened = Atlas(atlas)
    options = RetrievalOptions(label, leave_out, without_patients, unit, queries, bootstrap, seed)  # type: ignore[arg-type]
    encode = None
    if not opened.manifest.external:
        from ...serving.encoders.open import open_encoder

        encoder = open_encoder(str(opened.encoder_bundle), expect=opened.manifest)
        size = opened.manifest.size_px
        noise = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), dtype=np.uint8)
        encode = lambda: encoder.embed(noise)  # noqa: E731
    with console.working("asking every tile"):
        report = run(opened, options, encode)

    console.emit(report, lambda: _show_evaluation(report, options))


def _show_evaluation(report: dict[str, Any], options: RetrievalOptions) -> None:
    for warning in report["warnings"]:
        console.say(f"NOTE: {warning}")
    rows = [
        (
            name,
            m["value"],
            "{:.3f} to {:.3f}".format(*m["interval_95"]),
            m["random"],
            m["majority"],
        )
        for name, m in report["metrics"].items()
    ]
    title = (
        f"{report['queries']} {options.unit}s of {report['owners']} {options.leave_out}s, encoder "
        f"{report['encoder']['name']}"
    )
    console.table(title, ("metric", "value", "95 %", "random", "majority"), rows)
    classes = [
        (
            c["class"],
            c["queries"],
            c["recall"],
            "{:.3f} to {:.3f}".format(*c["recall_interval_95"]),
            c["precision"],
            c["f1"],
        )
        for c in report["per_class_mmv5"]
    ]
    names = ("class", "queries", "recall", "95 %", "precision", "F1")
    console.table("majority of 5", names, classes)
    latency = report["latency"]
    both = latency["end_to_end_ms"]
    console.say(
        f"one query: search {latency['search_ms']} ms"
        + ("" if both is None else f", with encoding {both} ms")
    )


def duplicates(
    atlas: AtlasPath,
    least: Annotated[
        float | None, typer.Option(help="Score from which two tiles are the same. [cosine .999]")
    ] = None,
    where: Where = None,
    json: Json = False,
) -> None:
    """Find groups of tiles that are nearly the same image."""
    from ...index.atlas import Atlas
    from ...index.studies.duplicates import duplicates as run

    with console.progress("comparing") as progress:
        report = run(Atlas(atlas), least, where, progress)

    def human() -> None:
        rows = [
            (n, g["size"], g["slides"], ", ".join(_short(t) for t in g["tiles"][:4]))
            for n, g in enumerate(report["shown"][:20], start=1)
        ]
        console.table("largest groups", ("group", "tiles", "slides", "such as"), rows)
        console.say(
            f"{report['groups']} groups of {report['tiles_in_groups']} tiles with a score of at least "
            f"{report['least']:g}; {report['across_slides']} groups lie on several slides"
        )

    console.emit(report, human)


def leakage(
    atlas: AtlasPath,
    split: Annotated[str, typer.Option(help="Column that names the part, such as train and test.")],
    least: Annotated[
        float | None, typer.Option(help="Score from which two tiles are the same. [cosine .999]")
    ] = None,
    json: Json = False,
) -> None:
    """Check that the parts of a data set share no patients and no images; exit code 1 if they do."""
    from ...index.atlas import Atlas
    from ...index.studies.duplicates import leakage as run

    with console.progress("comparing") as progress:
        report = run(Atlas(atlas), split, least, progress)

    def human() -> None:
        rows = [
            (
                " and ".join(p["parts"]),
                p["patients_in_both"],
                p["near_duplicates"],
                "; ".join(" = ".join(_short(t) for t in pair) for pair in p["examples"][:2]),
            )
            for p in report["parts"]
        ]
        console.table("", ("parts", "patients in both", "near-duplicates", "such as"), rows)
        if report["tiles_without_patient"]:
            console.say(f"NOTE: {report['tiles_without_patient']} tiles have no patient")
        console.say("they LEAK" if report["leaks"] else "no leak was found")

    console.emit(report, human)
    if report["leaks"]:
        raise typer.Exit(console.EXIT_FAILED)


def _short(tile: dict[str, Any]) -> str:
    place = tile["file"] or f"{tile['x']},{tile['y']}"
    return f"{tile['slide']} {place}"
