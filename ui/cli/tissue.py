"""Commands that make networks that find tissue: ``tissue train`` and ``tissue export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ... import console
from ...export.options import TissueExportOptions
from ...training.tissue.options import TissueOptions
from .commands import Commands
from .model import need_torch
from .options import with_flags

app = Commands("Tissue.")
tissue_app = Commands("Make networks that find tissue on slides.")
app.add_typer(tissue_app, name="tissue")


@tissue_app.command()
@with_flags
def train(
    data: Path,
    options: TissueOptions,
    out: Annotated[Path, typer.Option()],
    also: list[Path] | None = None,
    exclude: list[str] | None = None,
    shared_groups: bool = False,
) -> None:
    """Train a small network that finds tissue, on made scenes with the textures of your tiles.

    Glass, pen, edges of coverslips, bubbles, dust and shading are drawn; no labels are needed. Run the
    command again to finish an interrupted run. Then use `histoseek tissue export`.

    Options:
        data: Tiles of tissue of any stain and scale: a folder, .csv manifest, .tar or .npz file.
        out: Folder to write the run to.
        shared_groups: Groups of the same name in several DATA are the same source image or patient.
    """
    need_torch()
    from ...training.commands import select
    from ...training.tissue.fit import fit

    sources, rules = [data, *(also or [])], exclude or []
    tiles = select(sources, rules, ["label"], shared_groups)
    selection = {
        "sources": [str(source) for source in sources],
        "exclude": rules,
        "shared_groups": shared_groups,
    }
    with console.progress("training") as progress:
        record = fit(options, tiles, out, progress, selection)

    def human() -> None:
        metrics, count = record["metrics"], record["data"]["tiles"]
        console.say(
            f"{out}: trained on scenes with {count} tiles, {record['seconds']:.0f} s; pixels of "
            f"{metrics['scenes']} held-out scenes: precision {metrics['precision']:.3f}, recall "
            f"{metrics['recall']:.3f}"
        )
        for file, reason in record["data"]["unreadable"].items():
            console.say(f"left out: {file}: {reason}")

    console.emit(record, human)


@tissue_app.command()
@with_flags
def export(
    source: Path,
    options: TissueExportOptions,
    out: Annotated[Path, typer.Option()],
) -> None:
    """Export a network that finds tissue to a bundle for `embed --tissue-model`.

    Options:
        source: Folder of a run of `tissue train`, or an .onnx file of another program's segmentation
            network (with --mpp, --mean, --std, and --class if it has several classes).
        out: New folder for the bundle.
    """
    need_torch()
    from ...export.tissue import export_tissue_onnx, export_tissue_run
    from ...training.tissue.net import TissueNet

    with console.working("exporting and testing parity"):
        if source.is_file():
            manifest = export_tissue_onnx(source, out, options)
        else:
            manifest = export_tissue_run(source, out, TissueNet, options)
    document = {"bundle": str(out), **manifest.model_dump()}

    def human() -> None:
        console.say(
            f"{out}: tissue network {manifest.name}, {manifest.size_px} pixels at {manifest.mpp:g} µm, "
            f"sha256 {manifest.sha256[:12]}…; use it by `histoseek embed --tissue-model {out}`"
        )

    console.emit(document, human)
