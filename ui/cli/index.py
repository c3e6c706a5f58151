"""The command group ``histoseek index``: creates, fills and maintains an atlas."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from ... import console
from ...artifacts.walking import LeftOut
from ...console import counted
from ...errors import BadInput
from . import annotation, bind, clusters, exchange, search, study
from .commands import Commands

index_app = Commands("Build, search, cluster and check an atlas.")


@index_app.command()
def create(atlas: Path, encoder: str = "default", link_encoder: bool = False) -> None:
    """Create an empty atlas for one encoder. The atlas stores a copy of the encoder's bundle.

    Options:
        encoder: Folder of an encoder bundle, or 'default'.
    """
    from ...index.atlas import Atlas
    from ...serving.encoders.open import bundle_path

    made = Atlas.create(atlas, bundle_path(encoder), link_encoder)
    link = made.store.encoder_link
    document = {
        "atlas": str(atlas),
        "encoder": made.manifest.name,
        "sha256": made.manifest.sha256,
        "encoder_link": None if link is None else str(link),
    }
    where = "" if link is None else f", linked to {link}"
    console.emit(
        document, lambda: console.say(f"{atlas}: empty, encoder {made.manifest.name}{where}")
    )


@index_app.command()
def add(
    atlas: Path,
    features: list[str],
    metadata: Path | None = None,
    replace: bool = False,
    mixed_scales: bool = False,
) -> None:
    """Add feature files to the atlas. A file is added completely or not at all, and only once.

    Options:
        features: Feature files, or folders with feature files; also URLs (s3://...).
    """
    from ...index.atlas import Atlas
    from ...index.inputs import find_feature_files, local_copies, read_metadata, rows_of

    with local_copies(features) as copies:
        files, left_out = find_feature_files(copies.paths)
        table = read_metadata(metadata)
        with console.progress("adding") as progress:
            results = Atlas(atlas).add(files, rows_of(table), replace, progress, mixed_scales)
    results[:] = [
        dataclasses.replace(r, file=copies.named(r.file), reason=copies.named(r.reason))
        for r in results
    ]
    left_out = [LeftOut(copies.named(left.path), left.reason) for left in left_out]
    exchange.report_added(results, table, left_out)


@index_app.command()
def remove(atlas: Path, slides: list[str]) -> None:
    """Remove slides or tile sets, with their annotations. If one fails, none is removed.

    Tile ids are never reused.

    Options:
        slides: Names of slides or tile sets.
    """
    from ...index.atlas import Atlas

    opened, removed = Atlas(atlas), sorted(set(slides))
    marked = sum(item.slide in removed for item in opened.annotations())
    tiles = opened.remove(slides)
    also = f" and {counted(marked, 'annotation')}" if marked else ""
    gone = f"{counted(len(removed), 'slide')} with {counted(tiles, 'tile')}{also}"
    console.emit(
        {"removed": removed, "tiles": tiles, "annotations": marked},
        lambda: console.say(
            f"{atlas}: {gone} {'was' if len(removed) == 1 and not marked else 'were'} removed"
        ),
    )


@index_app.command()
def relabel(atlas: Path, metadata: Annotated[Path, typer.Option()]) -> None:
    """Set labels, patients and other columns from a CSV.

    If one row fails, nothing is changed. An empty cell deletes the value in the atlas.

    Options:
        metadata: CSV with the column slide and the columns to set. A row with a value in the column file
            sets them for that tile only.
    """
    from ...artifacts.tables import read_csv
    from ...index.atlas import Atlas

    table = read_csv(metadata, "slide", within="file")
    opened = Atlas(atlas)
    changed = opened.relabel(table.rows)
    without = opened.slides_without_row({row["slide"] for row in table.rows})
    notes = [*table.notes, *changed.notes]
    document = {"changed": changed, "slides_without_row": without, "notes": notes}

    def human() -> None:
        for note in notes:
            console.say(note)
        console.say_names("slides without a row in the CSV; they were not changed", without)
        console.say(f"{atlas}: the metadata of {counted(changed, 'slide')} was changed")

    console.emit(document, human)


@index_app.command()
def relocate(
    atlas: Path,
    old: Annotated[str | None, typer.Option("--from")] = None,
    new: Annotated[Path | None, typer.Option("--to")] = None,
    slides: list[Path] | None = None,
    encoder: Path | None = None,
) -> None:
    """Update the paths of moved slides. A new path is accepted only if the content of the file is the same.

    Give either --from and --to, or --slides, or --encoder.

    Options:
        old: Old folder of the slides.
        new: New folder of the slides.
        slides: Folder in which to search for the slides. Repeatable.
        encoder: Folder of the bundle that the atlas was linked to by --link-encoder.
    """
    from ...index.atlas import Atlas

    if encoder is not None:
        if old is not None or new is not None or slides:
            raise BadInput("--encoder cannot be combined with --from, --to or --slides")
        linked = Atlas(atlas)
        linked.relocate_encoder(encoder)
        document = {"atlas": str(atlas), "encoder_link": str(linked.store.encoder_link)}
        console.emit(document, lambda: console.say(f"{atlas}: linked to {encoder.resolve()}"))
        return
    if (old is None) != (new is None) or (old is None) == (not slides):
        raise BadInput(
            "expected either --from OLD --to NEW, or --slides FOLDER, or --encoder BUNDLE"
        )
    with console.working("comparing"):
        results = Atlas(atlas).relocate(old, new, slides or [])
    ok = all(result.state in {"moved", "there"} for result in results)
    rows = [(result.slide, result.state, result.source, result.reason) for result in results]
    console.emit(
        {"ok": ok, "slides": [result._asdict() for result in results]},
        lambda: console.table("", ("slide", "state", "source", "reason"), rows),
    )
    if not ok:
        raise typer.Exit(console.EXIT_FAILED)


@index_app.command()
def stats(atlas: Path) -> None:
    """Show numbers of slides, tiles, labels and clusters. Also show encoder and index."""
    from ...index.atlas import Atlas
    from ...index.store.scales import scales_line

    facts = Atlas(atlas).stats()

    def human() -> None:
        encoder = facts["encoder"]
        rows = [
            ("slides and tile sets", facts["slides"]),
            ("slides without tiles", facts["slides_without_tiles"]),
            ("tiles", facts["tiles"]),
            ("scale of the tiles", scales_line(facts["scales"])),
            ("encoder", f"{encoder['name']} ({encoder['sha256'][:12]}…), {encoder['dim']}-d"),
            ("stain normalisation", encoder["stain_normalise"] or "none"),
            ("index", _index_line(facts["index"])),
            ("columns to filter by", ", ".join(facts["fields"])),
            *((f"label {label}", count) for label, count in facts["labels"].items()),
            *((f"clusters {c['name']}", c["clusters"]) for c in facts["clusterings"]),
        ]
        console.table(facts["atlas"], ("property", "value"), rows)

    console.emit(facts, human)


def _index_line(facts: dict[str, Any]) -> str:
    plan = facts.get("plan")
    if plan is None:
        return "no index is stored; search is exact"
    if plan["kind"] == "flat":
        return f"generation {facts['generation']}, exact"
    recall = facts["measured"].get("recall")
    coding = "" if plan["coding"] == "none" else f" {plan['coding']}"
    return (
        f"generation {facts['generation']}, {plan['cells']} lists{coding}, a query reads "
        f"{plan['probes']} lists, recall {recall} at the time of building"
    )


@index_app.command()
def verify(atlas: Path, repair: bool = False) -> None:
    """Check every file, row and count of an atlas. Exit code 1: there are problems.

    Options:
        repair: First rebuild the files that can be rebuilt from the features.
    """
    from ...index.atlas import Atlas

    opened = Atlas(atlas)
    repaired: list[str] = []
    if repair:
        with console.working("repairing"):
            repaired = opened.repair()
    with console.working("checking every file"):
        problems = opened.verify()

    def human() -> None:
        for line in [*repaired, *problems]:
            console.say(line)
        console.say(f"{atlas}: {len(problems) or 'no'} problem(s) found")

    console.emit({"ok": not problems, "problems": problems, "repaired": repaired}, human)
    if problems:
        raise typer.Exit(console.EXIT_FAILED)


@index_app.command()
def snapshot(
    atlas: Path, out: Annotated[str, typer.Option()], without_uploads: bool = False
) -> None:
    """Copy an atlas to a new folder and check the copy. Searches can continue meanwhile.

    Uploaded slides are copied, other slides and the audit log are not.

    Options:
        out: New folder or URL (s3://...) for the copy.
        without_uploads: Leave out the files of slides that were uploaded to a server.
    """
    from ...index.atlas import Atlas

    with console.working("copying and checking"):
        report = Atlas(atlas).snapshot(out, not without_uploads)

    def human() -> None:
        console.say(f"{out}: revision {report['revision']}, {report['bytes']:,} bytes")
        if report["encoder_link"]:
            console.say(
                f"the encoder was not copied: the snapshot refers to {report['encoder_link']}"
            )
        if report["uploads"]:
            console.say(f"with the files of {counted(report['uploads'], 'uploaded slide')}")
        for what in report["not_copied"]:
            console.say(f"not copied: {what}")

    console.emit(report, human)


@index_app.command()
def restore(snapshot: str, atlas: Path) -> None:
    """Replace an atlas by a snapshot. The old atlas stays in the same parent folder, under a new name.

    Options:
        snapshot: Folder or URL written by `index snapshot`.
    """
    from ...index.care.snapshots import restore as put_back

    with console.working("copying and checking"):
        report = put_back(snapshot, atlas)

    def human() -> None:
        console.say(f"{atlas}: restored to revision {report['revision']}")
        if report["kept"]:
            console.say(f"the old atlas is now in {report['kept']}")
        console.say_names("slides that came back", report["slides_back"])
        console.say_names("slides that went", report["slides_gone"])

    console.emit(report, human)


@index_app.command()
def audit(
    atlas: Path,
    queries: int = 500,
    k: Annotated[int, typer.Option("-k")] = 10,
    where: str | None = None,
    seed: int = 1,
) -> None:
    """Measure recall, speed and memory of the index.

    Recall is the share of the true neighbours that the index finds.

    Options:
        queries: Number of query tiles.
        k: Number of neighbours per query.
    """
    from ...index.atlas import Atlas

    with console.working("measuring"):
        report = Atlas(atlas).audit(queries, k, seed, where)

    def human() -> None:
        plan = report["plan"]
        size = sum(report["bytes"].values())
        rows = [
            (f"recall@{report['k']} on {report['queries']} tiles", report["recall"]),
            ("one query, ms", report["index_ms_per_query"]),
            ("one exact query (compared with every tile), ms", report["exact_ms_per_query"]),
            ("tiles", report["tiles"]),
            *([(f"tiles that pass {where}", report["passing"])] if where else []),
            (
                "tiles added since the index was written",
                report["tiles_since_the_index_was_written"],
            ),
            ("index", plan["kind"] + ("" if plan["coding"] == "none" else f", {plan['coding']}")),
            ("lists in the index, lists read per query", f"{plan['cells']}, {plan['probes']}"),
            ("index files, MB", f"{size / 1e6:.3g}"),
            ("uncompressed vectors, MB", f"{report['bytes_of_the_vectors'] / 1e6:.3g}"),
        ]
        console.table(str(atlas), ("property", "value"), rows)
        for note in report["notes"]:
            console.say(note)

    console.emit(report, human)


@index_app.command()
def tune(
    atlas: Path,
    recall: float | None = None,
    memory_mb: float | None = None,
    exact_up_to: int | None = None,
    k: Annotated[int | None, typer.Option("-k")] = None,
) -> None:
    """Set targets for recall or memory and rebuild the index. The atlas stores the targets.

    Options:
        recall: Target for recall, the share of the true neighbours that a search finds. 1 means exact
            search. Default: 0.99.
        memory_mb: Memory limit of the index in MB. A small limit means short codes; candidates are then
            ranked again by the exact vectors.
        exact_up_to: Search exactly while the atlas has at most this many tiles. Default: 100000.
        k: Number of neighbours for which recall is measured. Default: 10.
    """
    from ...index.atlas import Atlas

    with console.working("building and measuring"):
        report = Atlas(atlas).tune(recall, memory_mb, exact_up_to, k)

    def human() -> None:
        plan, measured = report["plan"], report["measured"]
        if plan["kind"] == "flat":
            console.say(f"{atlas}: exact search")
            return
        reached = "" if measured["reached"] else " (the target was not reached)"
        console.say(
            f"{atlas}: {plan['cells']} lists ({plan['coding']}), a query reads {plan['probes']} lists; "
            f"recall {measured['recall']} on {measured['queries']} held-out tiles{reached}"
        )

    console.emit(report, human)


for _command in (
    search.search, search.assign, search.similar, study.evaluate, study.agreement, study.duplicates,
    study.leakage,
    clusters.fit, clusters.map_, clusters.curve, clusters.clusters, clusters.name, clusters.drift,
    exchange.import_, exchange.export, exchange.push, bind.bind, annotation.annotate,
    annotation.annotations_,
):  # fmt: skip
    index_app.command(_command.__name__.rstrip("_"))(_command)
