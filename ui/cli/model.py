"""The commands that make encoders: train, reproduce, export, triton repository."""

from __future__ import annotations

import itertools
import shlex
import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ... import console
from ...errors import BadInput, MissingPart
from ...export.options import ExportOptions, TritonOptions
from ...training.study_options import StudyOptions
from .commands import Command, Commands, write_rare
from .options import command_for, parse, with_flags

if TYPE_CHECKING:
    from ...artifacts.manifest import Manifest
    from .against import Comparison

TILES_AGAINST = 16
ANY_FLAG = {"allow_extra_args": True, "ignore_unknown_options": True}
app = Commands("Train, reproduce and export.")
triton_app = Commands("Prepare encoders for NVIDIA Triton.")
app.add_typer(triton_app, name="triton")


class TrainCommand(Command):
    """The command ``train``, whose ``--help`` also lists the options of the named recipe."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Store the arguments for the help text, which is printed before they are parsed."""
        ctx.meta["words"] = list(args)
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the command's options, then the recipe's."""
        super().format_options(ctx, formatter)
        if len(ctx.meta.get("words", [])) < 2:
            return
        need_torch()
        from ...training.recipes import RECIPES

        for name in [word for word in ctx.meta["words"] if word in RECIPES][:1]:
            params = command_for(RECIPES[name].options, name).params
            rows = [param.get_help_record(ctx) for param in params]
            with formatter.section(f"Options of recipe {name}"):
                formatter.write_dl([row for row in rows if row and row[0] != "--help"])
            write_rare(params, ctx, formatter)


@app.command(cls=TrainCommand, context_settings=ANY_FLAG)
def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument()] = "",
    data: Annotated[Path | None, typer.Argument()] = None,
    out: Path | None = None,
    also: list[Path] | None = None,
    exclude: list[str] | None = None,
    label_from: list[str] | None = None,
    shared_groups: bool = False,
    cross_validate: bool = False,
    list_recipes: Annotated[bool, typer.Option("--list")] = False,
    dry_run: bool = False,
) -> None:
    """Train an encoder: histoseek train RECIPE DATA... --out RUN [--option value ...].

    Options:
        recipe: Name of a recipe. `train RECIPE --help` (or --help-all) also lists the recipe's options.
        data: Labelled tiles: folders, .csv manifests, .tar or .npz files; several are joined.
        out: Folder to write the run to.
        shared_groups: Groups of the same name in several DATA are the same source image or patient.
        cross_validate: Train once per fold, in the folders OUT/fold-<n>.
        list_recipes: List all recipes, models and options.
        dry_run: Print the model's layers and computing cost, without training.
    """
    need_torch()
    from ...training import commands
    from ...training.recipes import find_recipe

    if list_recipes:
        commands.show_recipes()
        return
    rules, columns = exclude or [], ",".join(label_from or ["label"]).split(",")
    words = [*([str(data)] if data else []), *context.args]  # DATA..., then the recipe's options
    sources = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    words = words[len(sources) :]
    if not recipe or ((not sources or out is None) and not dry_run):
        raise BadInput(
            "expected `histoseek train RECIPE DATA --out RUN`, or --list, or RECIPE --dry-run"
        )
    options = parse(find_recipe(recipe).options, words, f"recipe {recipe}")
    tiles = [*map(Path, sources), *(also or [])]
    if dry_run:
        choose = lambda given: commands.select(given, rules, columns, shared_groups)  # noqa: E731
        commands.dry_run(recipe, options, tiles, choose)
    elif out is not None:
        commands.train(recipe, options, tiles, out, rules, columns, cross_validate, shared_groups)


@app.command()
@with_flags
def reproduce(
    protocol: str,
    data: Annotated[Path, typer.Option()],
    options: StudyOptions,
    also: list[Path] | None = None,
    exclude: list[str] | None = None,
    label_from: str = "label",
) -> None:
    """Reproduce the table of a paper: its numbers, ours, and those of a trivial baseline, side by side.

    Options:
        protocol: Name of the protocol, such as breast-ae, ae-dac or p4m-deepcluster.
        data: The paper's data in its original layout, or any set of labelled tiles.
    """
    need_torch()
    from ...training import commands

    rules, columns = exclude or [], label_from.split(",")
    commands.reproduce(
        protocol,
        [data, *(also or [])],
        lambda given: commands.select(given, rules, columns),
        replace(options, command=f"histoseek {shlex.join(sys.argv[1:])}"),
    )


@app.command()
@with_flags
def export(
    source: Annotated[Path | None, typer.Argument()] = None,
    out: Path | None = None,
    options: ExportOptions = ExportOptions(),  # noqa: B008
    tiles: Path | None = None,
    against: Path | None = None,
    slides: list[Path] | None = None,
    list_encoders: Annotated[bool, typer.Option("--list")] = False,
) -> None:
    """Export a training run, a checkpoint of a published encoder, or an ONNX encoder, to a bundle.

    The bundle holds an ONNX graph, a manifest, the parity test of the graph and a model card. With
    --stain-normalise, an encoder with stain normalisation is made from a bundle.

    Options:
        source: Folder of a finished training run, a checkpoint (with --as or --arch), or an .onnx file
            (with --mean and --std). With --stain-normalise: folder of a bundle, or 'default'.
        out: New folder for the bundle. With --against it may be left out.
        tiles: Tiles for the parity test (ONNX against PyTorch). Default: the run's data; for a file,
            a pattern and noise.
        against: Features of a slide (.h5) that another tool made with this checkpoint. Some tiles are
            embedded again; if the authors' settings do not give the same features, others are tried. The
            bundle gets the settings that do. Exit code 1: none does.
        slides: With --against: the slide, or a folder with it.
        list_encoders: List the published encoders that --as knows.
    """
    if source is not None and _is_bundle(source):
        if out is None or tiles or against or slides or list_encoders:
            raise BadInput(
                f"{source} is a bundle; expected `histoseek export {source} --stain-normalise METHOD --out "
                "NEW`, and at most --name"
            )
        _export_bundle(source, out, options)
        return
    need_torch()
    if list_encoders:
        show_published()
        return
    if source is None or (out is None and against is None):
        raise BadInput("expected `histoseek export SOURCE --out BUNDLE`, or --list")
    if options.stain_normalise:
        raise BadInput(
            f"--stain-normalise makes an encoder from a bundle, and {source} is not a bundle; export it "
            "without, then give the bundle"
        )
    if slides and against is None:
        raise BadInput("--slides is for --against; leave it out")
    from .against import as_json, show

    compared = None
    if against is not None:
        compared = _against(source, options, against, slides or [])
        same = compared.trials[0].same
        if out is None or not same:
            console.emit(as_json(compared), partial(show, compared))
            if not same:
                raise typer.Exit(console.EXIT_FAILED)
            return
        options = compared.options(options)
    assert out is not None
    from ...artifacts.files import read_json
    from ...artifacts.manifest import CHECKPOINT

    manifest = (_export_file if source.is_file() else _export_run)(source, out, options, tiles)
    record = out / CHECKPOINT
    source_record = read_json(record) if record.is_file() else {}
    loaded = source_record.get("checkpoint", {})
    document = {"bundle": str(out), **manifest.model_dump(), "loaded": source_record}
    if compared is not None:
        document["against"] = as_json(compared)

    def human() -> None:
        if compared is not None:
            show(compared)
        console.say(
            f"{out}: encoder {manifest.name}, {manifest.dim}-d, sha256 {manifest.sha256[:12]}…, "
            f"parity test passed ({out / 'parity.json'})"
        )
        if source_record.get("unconfirmed"):
            console.say(f"no source confirmed {source_record['unconfirmed']}")
        for note in loaded.get("notes", []):
            console.say(f"{source.name}: {note}")
        console.say_names(
            f"parameters of {source.name} that embedding does not need", loaded.get("dropped", [])
        )

    console.emit(document, human)


def _is_bundle(source: Path) -> bool:
    from ...artifacts.manifest import MANIFEST
    from ...serving.encoders.open import DEFAULT

    return str(source) == DEFAULT or (source / MANIFEST).is_file()


def _export_bundle(source: Path, out: Path, options: ExportOptions) -> None:
    """Make an encoder with stain normalisation from a bundle."""
    from ...export.normalising import export_normalising
    from ...serving.encoders.open import bundle_path

    manifest = export_normalising(bundle_path(str(source)), out, options)
    console.emit(
        {"bundle": str(out), **manifest.model_dump()},
        lambda: console.say(
            f"{out}: encoder {manifest.name} with stain normalisation ({manifest.stain_normalise}), sha256 "
            f"{manifest.sha256[:12]}…; pass it to `histoseek embed --encoder` and `histoseek index create "
            "--encoder`"
        ),
    )


def _against(
    source: Path, options: ExportOptions, features: Path, slides: list[Path]
) -> Comparison:
    from .against import against

    if not source.is_file() or source.suffix == ".onnx" or not (options.published or options.arch):
        raise BadInput("--against is for a checkpoint: pass --as or --arch too")
    if not slides:
        raise BadInput("--against reads tiles of the slide; pass --slides with it or its folder")
    return against(source, options, features, slides, TILES_AGAINST)


def _export_run(run: Path, out: Path, options: ExportOptions, tiles: Path | None) -> Manifest:
    from ...export.bundle import export_run, parity_tiles
    from ...training.layouts import open_data
    from ...training.models import build

    data = parity_tiles(run, tiles, open_data)
    with console.working("exporting and testing parity"):
        return export_run(run, out, data, build, options)


def _export_file(
    checkpoint: Path, out: Path, options: ExportOptions, tiles: Path | None
) -> Manifest:
    from ...export.from_checkpoint import export_checkpoint
    from ...export.from_onnx import export_onnx
    from ...training.layouts import open_data

    data = open_data(tiles) if tiles else None
    if checkpoint.suffix == ".onnx":
        with console.working("exporting and testing parity"):
            return export_onnx(checkpoint, out, options, data)
    if not (options.published or options.arch):
        raise BadInput(
            f"{checkpoint} is a file: name its encoder by --as (`histoseek export --list` shows them), or "
            "its architecture by --arch vit"
        )
    with console.working("exporting and testing parity"):
        return export_checkpoint(checkpoint, out, options, data)


def show_published() -> None:
    """Print the published encoders: licence, size, embedding, scale and computing cost."""
    from ...export.from_checkpoint import describe
    from ...export.published import PUBLISHED

    rows = [describe(name, known) for name, known in PUBLISHED.items()]

    def human() -> None:
        columns = ("name", "million", "length", "µm/px", "GMAC", "gated", "licence")
        console.table(
            f"{len(rows)} encoders: parameters, embedding, scale, cost per tile",
            columns,
            [
                (
                    row["name"],
                    f"{row['parameters'] / 1e6:.0f}",
                    row["dim"], row["mpp"] or "–",
                    f"{row['macs'] / 1e9:.1f}", "yes" if row["gated"] else "no",
                    row["licence"],
                )
                for row in rows
            ],
        )  # fmt: skip

    console.emit(rows, human)


@triton_app.command()
@with_flags
def repository(
    bundles: list[str],
    out: Annotated[Path, typer.Option()],
    options: TritonOptions,
    tiles: Path | None = None,
) -> None:
    """Write a Triton model repository with one model per bundle. A changed encoder gets a new version.

    Options:
        bundles: Folders of encoder bundles, or 'default'.
        out: Folder of the model repository.
        tiles: Tiles on which to measure the error of --fp16.
    """
    from dataclasses import asdict

    from ...artifacts.tileset_files import open_tiles
    from ...export.triton import write_repository
    from ...serving.encoders.open import bundle_path

    with console.working("writing the repository and measuring parity"):
        written = write_repository(
            [bundle_path(b) for b in bundles], out, options, open_tiles(tiles) if tiles else None
        )
    rows = [(w.model, w.version, w.precision, f"{w.cosine_error:.1e}") for w in written]
    console.emit(
        {"repository": str(out), "models": [asdict(w) for w in written]},
        lambda: console.table(
            str(out), ("model", "version", "precision", "1 - cosine to the bundle"), rows
        ),
    )


def need_torch() -> None:
    """Raise MissingPart if the packages for training and export are not installed."""
    parts = ("torch", "lightning_fabric", "safetensors", "onnx", "onnxscript")
    missing = [part for part in parts if find_spec(part) is None]  # without a slow import
    if missing:
        raise MissingPart(
            f"training and export need {', '.join(missing)}; run: pip install 'histoseek[train]'"
        )
