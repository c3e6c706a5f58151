"""The command group ``histoseek index``: creates, fills and maintains an atlas."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ... import console
from ...console import Json
from ...errors import BadInput
from . import clusters as cluster_commands
from . import exchange as exchange_commands
from . import search as search_commands

index_app = typer.Typer(
    help="Keep embeddings in an atlas: search it, cluster it, check it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
AtlasPath = Annotated[Path, typer.Argument(help="Folder of the atlas.")]
Slides = Annotated[list[str], typer.Argument(help="Names of slides or tile sets.")]


@index_app.command()
def create(
    atlas: AtlasPath,
    encoder: Annotated[str, typer.Option(help="Encoder bundle, or 'default'.")] = "default",
    json: Json = False,
) -> None:
    """Create an empty atlas for one encoder. It keeps a copy of the encoder's bundle."""
    from ...index.atlas import Atlas
    from ...serving.encoders.open import bundle_path

    made = Atlas.create(atlas, bundle_path(encoder))
    document = {"atlas": str(atlas), "encoder": made.manifest.name, "sha256": made.manifest.sha256}
    console.emit(document, lambda: console.say(f"{atlas}: empty, encoder {made.manifest.name}"))


@index_app.command()
def add(
    atlas: AtlasPath,
    features: Annotated[list[Path], typer.Argument(help="Feature files, or folders of them.")],
    metadata: Annotated[
        Path | None, typer.Option(help="CSV with slide, label, patient and any other column.")
    ] = None,
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Replace the features of slides already in the atlas."),
    ] = False,
    mixed_scales: exchange_commands.MixedScales = False,
    json: Json = False,
) -> None:
    """Add feature files to the atlas. Each file is added completely or not at all, and only once."""
    from ...index.atlas import Atlas
    from ...index.inputs import find_feature_files, read_metadata, rows_of

    files, left_out = find_feature_files(features)
    table = read_metadata(metadata)
    rows = rows_of(table)
    with console.progress("adding") as progress:
        results = Atlas(atlas).add(files, rows, replace, progress, mixed_scales)
    exchange_commands.report_added(results, table, left_out)


@index_app.command()
def remove(atlas: AtlasPath, slides: Slides, json: Json = False) -> None:
    """Remove slides or tile sets, all or none. Tile ids are never reused."""
    from ...index.atlas import Atlas

    tiles = Atlas(atlas).remove(slides)
    document = {"removed": sorted(set(slides)), "tiles": tiles}
    console.emit(
        document, lambda: console.say(f"{atlas}: {len(set(slides))} slides, {tiles} tiles removed")
    )


@index_app.command()
def relabel(
    atlas: AtlasPath,
    metadata: Annotated[
        Path, typer.Option(help="CSV: slide (and file, for a tile), then the columns to set.")
    ],
    json: Json = False,
) -> None:
    """Set labels, patients and other columns from a CSV, all rows or none. An empty value clears one."""
    from ...artifacts.tables import read_csv
    from ...index.atlas import Atlas

    table = read_csv(metadata, "slide", within="file")
    opened = Atlas(atlas)
    changed = opened.relabel(table.rows)
    without = opened.slides_without_row({row["slide"] for row in table.rows})
    document = {"changed": changed, "slides_without_row": without, "notes": list(table.notes)}

    def human() -> None:
        for note in table.notes:
            console.say(note)
        exchange_commands.say_names("slides without a row, left as they are", without)
        console.say(f"{atlas}: {changed} slides have new labels")

    console.emit(document, human)


@index_app.command()
def relocate(
    atlas: AtlasPath,
    old: Annotated[str | None, typer.Option("--from", help="Folder where slides were.")] = None,
    new: Annotated[Path | None, typer.Option("--to", help="Folder where they are now.")] = None,
    slides: Annotated[
        list[Path] | None, typer.Option(help="Folder to look for slides in; repeatable.")
    ] = None,
    json: Json = False,
) -> None:
    """Update the paths of moved slides. A new path is accepted only if the file's content is the same."""
    from ...index.atlas import Atlas

    if (old is None) != (new is None) or (old is None) == (not slides):
        raise BadInput("expected --from OLD --to NEW, or --slides FOLDER")
    opened = Atlas(atlas)
    with console.working("comparing"):
        found = opened.relocate(old, new, slides or [])
    refused = [one for one in found if one.state not in {"moved", "there"}]

    def human() -> None:
        rows = [(one.slide, one.state, one.source, one.reason) for one in found]
        console.table("", ("slide", "state", "source", "reason"), rows)

    document = {"ok": not refused, "slides": [one._asdict() for one in found]}
    console.emit(document, human)
    if refused:
        raise typer.Exit(console.EXIT_FAILED)


@index_app.command()
def stats(atlas: AtlasPath, json: Json = False) -> None:
    """Count slides, tiles, labels and clusters."""
    from ...index.atlas import Atlas
    from ...index.store.scales import scales_line

    facts = Atlas(atlas).stats()

    def human() -> None:
        encoder = facts["encoder"]
        rows = [
            ("slides and tile sets", facts["slides"]),
            ("of them without tiles", facts["slides_without_tiles"]),
            ("tiles", facts["tiles"]),
            ("scale of the tiles", scales_line(facts["scales"])),
            ("encoder", f"{encoder['name']} ({encoder['sha256'][:12]}…), {encoder['dim']}-d"),
            ("index", _index_line(facts["index"])),
            ("columns to filter by", ", ".join(facts["fields"])),
            *((f"label {label}", count) for label, count in facts["labels"].items()),
            *((f"clusters {c['name']}", c["clusters"]) for c in facts["clusterings"]),
        ]
        console.table(facts["atlas"], ("what", "how many"), rows)

    console.emit(facts, human)


def _index_line(facts: dict[str, Any]) -> str:
    plan = facts.get("plan")
    if plan is None:
        return "none written; search is exact"
    if plan["kind"] == "flat":
        return f"generation {facts['generation']}, exact"
    recall = facts["measured"].get("recall")
    coding = "" if plan["coding"] == "none" else f" {plan['coding']}"
    return (
        f"generation {facts['generation']}, {plan['cells']} lists{coding}, {plan['probes']} read, "
        f"recall {recall} when built"
    )


@index_app.command()
def verify(
    atlas: AtlasPath,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Rebuild derived files; stored features stay unchanged."),
    ] = False,
    json: Json = False,
) -> None:
    """Check every file, row and count of an atlas; exit code 1 if a problem remains."""
    from ...index.atlas import Atlas

    opened = Atlas(atlas)
    done: list[str] = []
    if repair:
        with console.working("repairing"):
            done = opened.repair()
    with console.working("checking every file"):
        found = opened.verify()

    def human() -> None:
        for line in [*done, *found]:
            console.say(line)
        console.say(f"{atlas}: {len(found)} problem(s)" if found else f"{atlas}: all is well")

    console.emit({"ok": not found, "problems": found, "repaired": done}, human)
    if found:
        raise typer.Exit(console.EXIT_FAILED)


@index_app.command()
def snapshot(
    atlas: AtlasPath,
    out: Annotated[Path, typer.Option(help="New folder for the copy, which is a complete atlas.")],
    json: Json = False,
) -> None:
    """Copy one committed state of an atlas and check the copy. Searches can continue."""
    from ...index.atlas import Atlas

    with console.working("copying and checking"):
        report = Atlas(atlas).snapshot(out)
    console.emit(
        report,
        lambda: console.say(f"{out}: revision {report['revision']}, {report['bytes']:,} bytes"),
    )


@index_app.command()
def restore(
    snapshot: Annotated[Path, typer.Argument(help="Folder written by `index snapshot`.")],
    atlas: AtlasPath,
    json: Json = False,
) -> None:
    """Replace an atlas by a snapshot. The old atlas is kept in the same parent folder."""
    from ...index.care.snapshots import restore as put_back

    with console.working("copying and checking"):
        report = put_back(snapshot, atlas)

    def human() -> None:
        console.say(f"{atlas}: revision {report['revision']} is back")
        if report["kept"]:
            console.say(f"what was there before is now {report['kept']}")

    console.emit(report, human)


@index_app.command()
def audit(
    atlas: AtlasPath,
    queries: Annotated[int, typer.Option(help="Number of query tiles.")] = 500,
    k: Annotated[int, typer.Option("-k", help="Neighbours.")] = 10,
    where: Annotated[str | None, typer.Option(help="Metadata filter for the measurement.")] = None,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 1,
    json: Json = False,
) -> None:
    """Measure the index's recall of the true neighbours, its speed and its memory use."""
    from ...index.atlas import Atlas

    with console.working("asking"):
        report = Atlas(atlas).audit(queries, k, seed, where)

    def human() -> None:
        plan = report["plan"]
        size = sum(report["bytes"].values())
        rows = [
            (f"recall@{report['k']} on {report['queries']} tiles", report["recall"]),
            ("one query, ms", report["index_ms_per_query"]),
            ("the same, compared with every tile", report["exact_ms_per_query"]),
            ("tiles", report["tiles"]),
            *([(f"of them pass {where}", report["passing"])] if where else []),
            ("of them since the index was written", report["tiles_since_the_index_was_written"]),
            ("index", plan["kind"] + ("" if plan["coding"] == "none" else f", {plan['coding']}")),
            ("lists, and how many a query reads", f"{plan['cells']}, {plan['probes']}"),
            ("index files, MB", f"{size / 1e6:.3g}"),
            ("vectors as they are, MB", f"{report['bytes_of_the_vectors'] / 1e6:.3g}"),
        ]
        console.table(str(atlas), ("what", "measured"), rows)

    console.emit(report, human)


@index_app.command()
def tune(
    atlas: AtlasPath,
    recall: Annotated[
        float | None, typer.Option(help="Share of the true neighbours to find; 1 is exact. [0.99]")
    ] = None,
    memory_mb: Annotated[
        float | None,
        typer.Option(
            help="Memory limit of the index in MB; compressed candidates are then re-ranked."
        ),
    ] = None,
    exact_up_to: Annotated[
        int | None, typer.Option(help="Tiles up to which search is exact. [100000]")
    ] = None,
    k: Annotated[int | None, typer.Option("-k", help="Neighbours the recall is of. [10]")] = None,
    json: Json = False,
) -> None:
    """Set new targets for recall or memory and rebuild the index. The targets are stored."""
    from ...index.atlas import Atlas

    with console.working("building and measuring"):
        report = Atlas(atlas).tune(recall, memory_mb, exact_up_to, k)

    def human() -> None:
        plan, measured = report["plan"], report["measured"]
        if plan["kind"] == "flat":
            console.say(f"{atlas}: exact search")
            return
        reached = "" if measured["reached"] else " (the aim was not reached)"
        console.say(
            f"{atlas}: {plan['cells']} lists ({plan['coding']}), {plan['probes']} read per query, recall "
            f"{measured['recall']} on {measured['queries']} held-out tiles{reached}"
        )

    console.emit(report, human)


for _commands in (search_commands, cluster_commands, exchange_commands):
    for _name, _function in _commands.COMMANDS.items():
        index_app.command(_name)(_function)
