"""Commands that measure an atlas: evaluate, duplicates, leakage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ... import console

if TYPE_CHECKING:
    from ...index.studies.scores import RetrievalOptions


def evaluate(
    atlas: Path,
    label: str = "label",
    leave_out: str = "patient",
    without_patients: bool = False,
    unit: str = "tile",
    queries: int = 20000,
    bootstrap: int = 1000,
    seed: int = 0,
) -> None:
    """Measure how often hits have the label of the query.

    Searches with each labelled tile among the tiles of other patients.

    Options:
        label: Column that is predicted from the hits.
        leave_out: Column, such as patient or slide. Hits with the same value as the query are left out.
        without_patients: Evaluate although some tiles have no value in the column --leave-out; for these,
            leave out hits of the same slide.
        unit: What is a query: tile, or slide (by its mosaic: a few representative tiles).
        queries: Maximum number of query tiles.
        bootstrap: Number of bootstrap samples for the confidence intervals.
    """
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
    with console.working("searching with every tile"):
        report = run(opened, options, encode)

    console.emit(report, lambda: _show_evaluation(report, options))


def _show_evaluation(report: dict[str, Any], options: RetrievalOptions) -> None:
    for warning in report["warnings"]:
        console.say(f"NOTE: {warning}")
    rows = [
        (name, m["value"], _interval(m["interval_95"]), m["random"], m["majority"])
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
            _interval(c["recall_interval_95"]),
            c["precision"],
            c["f1"],
        )
        for c in report["per_class_mmv5"]
    ]
    names = ("class", "queries", "recall", "95 %", "precision", "F1")
    console.table("majority of 5", names, classes)
    latency = report["latency"]
    console.say(f"time of one query: search {latency['search_ms']} ms")
    if latency["end_to_end_ms"] is not None:
        console.say(f"time of one query: embed and search {latency['end_to_end_ms']} ms")


def _interval(bounds: Sequence[float]) -> str:
    return "{:.3f} to {:.3f}".format(*bounds)


def duplicates(atlas: Path, least: float | None = None, where: str | None = None) -> None:
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
        console.table("largest groups", ("group", "tiles", "slides", "examples"), rows)
        console.say(
            f"{report['groups']} groups of {report['tiles_in_groups']} tiles with a score of at least "
            f"{report['least']:g}; {report['across_slides']} groups have tiles of several slides"
        )
        for note in report["notes"]:
            console.say(note)

    console.emit(report, human)


def agreement(
    atlas: Path,
    other: Path,
    k: Annotated[int, typer.Option("-k")] = 10,
    leave_out: str = "patient",
    queries: int = 2000,
    bootstrap: int = 1000,
    seed: int = 0,
) -> None:
    """Compare the nearest tiles of two encoders, such as a teacher and its student.

    The atlases must hold the same tiles. Each query tile is searched in both, among other patients' tiles.

    Options:
        atlas: Atlas whose nearest tiles count as right.
        other: Atlas of the same tiles by another encoder.
        k: Number of nearest tiles.
        leave_out: patient, slide or tile: what may not be found from a tile.
        queries: Maximum number of query tiles.
        bootstrap: Number of bootstrap samples for the confidence intervals.
    """
    from ...errors import unknown_name
    from ...index.atlas import Atlas
    from ...index.search.query import LEAVE_OUT
    from ...index.studies.agreement import agreement as run

    if leave_out not in LEAVE_OUT:
        raise unknown_name("--leave-out", leave_out, LEAVE_OUT)
    with console.working("searching in both atlases"):
        report = run(Atlas(atlas), Atlas(other), k, queries, leave_out, bootstrap, seed)

    def human() -> None:
        one, two = (report[side]["encoder"] for side in ("one", "other"))
        rows = [
            (
                text,
                report[name]["value"],
                _interval(report[name]["interval_95"]),
                report[name]["random"],
            )
            for name, text in (
                ("overlap", f"of the {k} nearest of {one}, {two} finds"),
                ("nearest_found", f"the nearest of {one} is among the {k} of {two}"),
            )
        ]
        title = (
            f"{report['queries']} tiles of {report['owners']} {leave_out}s, searched "
            f"among {report['tiles']} common tiles"
        )
        console.table(title, ("share", "value", "95 %", "random"), rows)
        if report["only_in_one"] or report["only_in_other"]:
            console.say(
                f"NOTE: not compared: {report['only_in_one']} tiles only in {atlas}, "
                f"{report['only_in_other']} only in {other}"
            )
        if report["without_candidates"]:
            console.say(f"NOTE: {report['without_candidates']} tiles have no candidate")

    console.emit(report, human)


def leakage(atlas: Path, split: Annotated[str, typer.Option()], least: float | None = None) -> None:
    """Check that parts of a data set share no patients or images. Exit code 1: they share some.

    Options:
        split: Column with the part of each slide or tile, such as train or test.
    """
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
        console.table("", ("parts", "patients in both", "near-duplicates", "examples"), rows)
        if report["tiles_without_patient"]:
            console.say(f"NOTE: {report['tiles_without_patient']} tiles have no patient")
        console.say(
            "LEAK: parts share patients or images" if report["leaks"] else "no leak was found"
        )

    console.emit(report, human)
    if report["leaks"]:
        raise typer.Exit(console.EXIT_FAILED)


def _short(tile: dict[str, Any]) -> str:
    place = tile["file"] or f"{tile['x']},{tile['y']}"
    return f"{tile['slide']} {place}"
