"""The command line: parse, call, print. Every verb imports what it needs when it is called."""

from __future__ import annotations

from .ui.cli import start

if __name__ == "__main__":
    start.begin()  # before the imports below, during which Ctrl-C may come already

import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__, console, outlets, stopping
from .console import Json
from .errors import BadInput, HistoseekError, MissingPart
from .ui.cli.embed import embed
from .ui.cli.index import index_app

# Medical data: no part of this program reports to anyone. Set before any of them is imported.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

app = typer.Typer(
    name="histoseek",
    help="Find similar cases and clusters in whole slides.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(index_app, name="index")
app.command()(embed)
triton_app = typer.Typer(help="Serve encoders by NVIDIA Triton.", no_args_is_help=True)
app.add_typer(triton_app, name="triton")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"histoseek {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    """Find similar cases and clusters in whole slides."""


@app.command()
def demo(
    dir: Annotated[Path, typer.Option(help="Folder for the demo's files.")] = Path(
        "histoseek-demo"
    ),
    no_ui: Annotated[bool, typer.Option("--no-ui", help="Do not open the page.")] = False,
    port: Annotated[int, typer.Option(help="Port of the page.")] = 7860,
    json: Json = False,
) -> None:
    """Run the whole path on one real slide: embed, index, cluster, search, page."""
    from .ui.cli.demo import run_demo

    atlas, found = run_demo(dir)
    if not no_ui:
        from .ui.server import ServeOptions

        _open_page(atlas, ServeOptions(port=port), quiet=json, browser=True)
    if not found:
        raise typer.Exit(console.EXIT_FAILED)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="Name of a recipe; --list shows them.")] = "",
    data: Annotated[
        Path | None, typer.Argument(help="Folder, .csv manifest, .tar or .npz of labelled tiles.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run.")] = None,
    also: Annotated[
        list[Path] | None, typer.Option(help="More data, trained on together; repeatable.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Leave out COLUMN=VALUE[,VALUE…]; repeatable.")
    ] = None,
    label_from: Annotated[
        str, typer.Option(help="Manifest columns that make the label, joined by comma.")
    ] = "label",
    cross_validate: Annotated[
        bool, typer.Option("--cross-validate", help="Train every fold, into OUT/fold-<n>.")
    ] = False,
    list_recipes: Annotated[
        bool, typer.Option("--list", help="List recipes, models and options.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the model's layers and the cost; train nothing."),
    ] = False,
    json: Json = False,
) -> None:
    """Train an encoder: histoseek train RECIPE DATA --out RUN [--option value …]."""
    _need_torch()
    from .training import commands

    if list_recipes:
        commands.show_recipes()
        return
    rules, columns = exclude or [], label_from.split(",")
    words = list(context.args)
    if data is not None and str(data).startswith("--"):  # an option of the recipe, and no DATA
        words, data = [str(data), *words], None
    if dry_run and recipe:
        sources = [data, *(also or [])] if data else []
        commands.dry_run(
            recipe, sources, lambda given: commands.select(given, rules, columns), words
        )
        return
    if data is None or out is None:
        raise BadInput("expected: histoseek train RECIPE DATA --out RUN (or --list, or --dry-run)")
    sources = [data, *(also or [])]
    commands.train(recipe, sources, out, rules, columns, cross_validate, words)


@app.command()
def reproduce(
    protocol: Annotated[str, typer.Argument(help="breast-ae, ae-dac, p4m-deepcluster, …")],
    data: Annotated[
        Path, typer.Option(help="The paper's data in its own layout, or any labelled set.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the report and its runs.")],
    also: Annotated[list[Path] | None, typer.Option(help="More data; repeatable.")] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Leave out COLUMN=VALUE[,VALUE…]; repeatable.")
    ] = None,
    label_from: Annotated[
        str, typer.Option(help="Manifest columns that make the label.")
    ] = "label",
    quick: Annotated[
        bool, typer.Option("--quick", help="Few epochs and seeds: shows that it runs.")
    ] = False,
    preset: Annotated[
        str, typer.Option(help="authors (their code) or paper (the text).")
    ] = "authors",
    seeds: Annotated[int, typer.Option(help="Seeds or folds; 0: the protocol's own.")] = 0,
    epochs: Annotated[int, typer.Option(help="Of every training; 0: the protocol's own.")] = 0,
    limit: Annotated[int, typer.Option(help="Most tiles, drawn by group; 0: all.")] = 0,
    limit_large: Annotated[int, typer.Option(help="Likewise for nets over 2 GMACs.")] = 0,
    split: Annotated[
        str, typer.Option(help="group, or tile as some papers have it (leaky).")
    ] = "group",
    positive: Annotated[str, typer.Option(help="Label that counts as positive in F1.")] = "",
    parts: Annotated[
        str,
        typer.Option(
            help="Parts: table4,grid (ae-dac); lite0 (arcface); AE or CAE (topology-sweep)."
        ),
    ] = "",
    size_px: Annotated[int, typer.Option(help="Side of a tile, where it is open.")] = 0,
    widths: Annotated[str, typer.Option(help="Of the P4M CNN: published, 32, 16, 8.")] = "",
    accelerator: Annotated[str, typer.Option(help="cpu, cuda, mps or auto.")] = "auto",
    precision: Annotated[
        str, typer.Option(help="Lightning's name, such as bf16-mixed.")
    ] = "32-true",
    json: Json = False,
) -> None:
    """Run a paper's table: published number, ours, trivial baseline, side by side."""
    _need_torch()
    from .training import commands
    from .training.reproduce import StudyOptions

    options = StudyOptions(
        out, f"histoseek {shlex.join(sys.argv[1:])}", preset, quick, seeds, epochs, limit, limit_large,
        split, positive, parts, size_px, widths, accelerator, precision,
    )  # fmt: skip
    rules, columns = exclude or [], label_from.split(",")
    commands.reproduce(
        protocol,
        [data, *(also or [])],
        lambda given: commands.select(given, rules, columns),
        options,
    )


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    out: Annotated[Path, typer.Option(help="Folder of the bundle; must not exist.")],
    tiles: Annotated[
        Path | None,
        typer.Option(help="Real tiles for the parity test; the run's data if left out."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the encoder.")] = None,
    mpp: Annotated[float | None, typer.Option(help="µm per pixel to read slides at.")] = None,
    pca: Annotated[
        float | None, typer.Option(help="Keep this share of the variance by PCA in the graph.")
    ] = None,
    whiten: Annotated[
        float, typer.Option(help="With --pca: 0 keeps the components' scale, 1 makes all alike.")
    ] = 0.0,
    views: Annotated[
        int,
        typer.Option(
            help="Average over 2 half turns, 4 quarter turns, 8 with mirror images; 1: none."
        ),
    ] = 1,
    licence: Annotated[str, typer.Option(help="Licence of the weights.")] = "not stated",
    notes: Annotated[
        Path | None, typer.Option(help="Markdown file to add to the model card.")
    ] = None,
    json: Json = False,
) -> None:
    """Export a run to an encoder bundle: ONNX graph, manifest, parity proof, model card."""
    _need_torch()
    from .artifacts.files import read_text
    from .export.bundle import export_run, parity_tiles
    from .training.layouts import open_data
    from .training.models import build

    source = parity_tiles(run, tiles, open_data)
    about = read_text(notes) if notes else ""
    with console.working("exporting, and proving parity on real tiles"):
        manifest = export_run(
            run, out, source, build, name, mpp, pca, whiten, views, licence, about
        )
    document = {"bundle": str(out), **manifest.model_dump()}
    console.emit(
        document,
        lambda: console.say(
            f"{out}: encoder {manifest.name}, {manifest.dim}-d, sha256 {manifest.sha256[:12]}…, "
            f"parity proven ({out / 'parity.json'})"
        ),
    )


@triton_app.callback()
def triton() -> None:
    """Serve encoders by NVIDIA Triton."""


@triton_app.command()
def repository(
    bundles: Annotated[list[str], typer.Argument(help="Encoder bundles, or 'default'.")],
    out: Annotated[Path, typer.Option(help="Folder of the model repository.")],
    fp16: Annotated[
        bool, typer.Option("--fp16", help="Also write <name>-fp16, computed in half precision.")
    ] = False,
    tiles: Annotated[
        Path | None, typer.Option(help="Real tiles to measure the loss of --fp16 on.")
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Most tiles per run.")] = 64,
    instances: Annotated[int, typer.Option(help="Copies per GPU; without a GPU: cores.")] = 2,
    queue: Annotated[int, typer.Option(help="Most requests that wait.")] = 256,
    delay_us: Annotated[int, typer.Option(help="Wait this long to fill a batch.")] = 1000,
    json: Json = False,
) -> None:
    """Write a Triton model repository: one model per bundle; a changed encoder adds a version."""
    from dataclasses import asdict

    from .artifacts.tileset_files import open_tiles
    from .export.triton import TritonOptions, write_repository
    from .serving.encoders.open import bundle_path

    options = TritonOptions(max_batch, instances, queue, delay_us, fp16)
    with console.working("writing the repository, and measuring parity"):
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


def _hash_password(wanted: bool) -> None:
    if not wanted:
        return
    from .ui.access.users import ask_password, hash_password

    made = hash_password(ask_password())
    console.emit({"hash": made}, lambda: print(made))
    raise typer.Exit


@app.command()
def ui(
    atlas: Annotated[Path, typer.Argument(help="Folder of the atlas.")],
    hash_password: Annotated[
        bool,
        typer.Option(
            "--hash-password",
            callback=_hash_password,
            is_eager=True,
            help="Ask for a password, print its hash for --users, and stop.",
        ),
    ] = False,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 7860,
    encoder: Annotated[
        str | None, typer.Option(help="Where the atlas's encoder runs, such as triton://….")
    ] = None,
    slides: Annotated[
        list[Path] | None, typer.Option(help="Folder to add slides from by path; repeatable.")
    ] = None,
    users: Annotated[
        Path | None,
        typer.Option(help="File with lines user:HASH or user:HASH:ROLE, readable by you only."),
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Further name it is asked for by, as of a proxy.")
    ] = None,
    root_path: Annotated[
        str, typer.Option(help="Path under which a proxy shows the page, such as /histo.")
    ] = "",
    trusted_proxy: Annotated[
        list[str] | None,
        typer.Option(help="Address or network whose X-Forwarded-… headers count; repeatable."),
    ] = None,
    user_header: Annotated[
        str, typer.Option(help="Header by which the trusted proxy names the user.")
    ] = "",
    editor: Annotated[
        list[str] | None,
        typer.Option(help="User of that header who may change the atlas, * for all; repeatable."),
    ] = None,
    audit_log: Annotated[
        Path | None, typer.Option(help="File of the audit log; in the atlas if left out.")
    ] = None,
    no_page: Annotated[bool, typer.Option("--no-page", help="Serve the API only.")] = False,
    log_requests: Annotated[
        bool, typer.Option("--log-requests", help="Log every request, not only refused ones.")
    ] = False,
    json: Json = False,
) -> None:
    """Serve the page and the HTTP API of an atlas (API: /docs)."""
    from .ui.access.policy import access_for
    from .ui.access.proxies import proxies_for
    from .ui.server import ServeOptions

    proxies = proxies_for(trusted_proxy or (), root_path, user_header, editor or ())
    access = access_for(host, users, tuple(allow_host or ()), proxies=proxies)
    console.log_to_stderr(log_requests)
    options = ServeOptions(
        host, port, access, encoder, tuple(slides or ()), audit_log, page=not no_page
    )
    _open_page(atlas, options)
    stopping.leave(console.EXIT_DONE)  # a map may still be computed by a foreign thread


def _need_torch() -> None:
    from importlib.util import find_spec

    parts = ("torch", "lightning_fabric", "safetensors", "onnx", "onnxscript")
    missing = [part for part in parts if find_spec(part) is None]
    if missing:
        raise MissingPart(
            f"training and export need {', '.join(missing)}: pip install 'histoseek[train]'"
        )


def _open_page(atlas: Path, options: Any, quiet: bool = False, browser: bool = False) -> None:
    from .ui.server import Running

    running = Running(atlas, options)
    document = {"atlas": str(atlas), "address": running.address, "notes": running.notes}
    text = "\n".join([*running.notes, f"histoseek is at {running.address} (Ctrl-C stops it)"])
    if quiet:  # the caller has printed its one JSON document already
        console.say(text)
    else:
        console.emit(document, lambda: console.say(text))
    sys.stdout.flush()
    if browser:
        import webbrowser

        webbrowser.open(running.address)
    try:
        stopping.wait_for_signal()
    except stopping.Stopped as stopped:
        if stopped.number != signal.SIGTERM:
            raise
        stopping.settle()  # this is how a service manager ends a server: nothing was cut short
    finally:
        running.close()


@app.command()
def doctor(json: Json = False) -> None:
    """Say what is installed, which accelerators there are, and how to get what is missing."""
    from .ui.cli.doctor import examine, show

    report = examine()
    console.emit(report, lambda: show(report))
    if not report["ok"]:
        raise typer.Exit(console.EXIT_FAILED)


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; errors of ours exit 1, wrong usage 2, Ctrl-C 130, each with a message."""
    before = console.mode.json
    console.mode.json = "--json" in (sys.argv[1:] if arguments is None else arguments)
    if start.is_command_line():
        outlets.take_over()
    try:
        code = _run(arguments)
        if stopping.requested() or code == console.EXIT_STOPPED:
            console.tell_stop(done=code == console.EXIT_DONE)
            stopping.leave(stopping.exit_code())
        sys.exit(console.exit_code(code))
    finally:
        console.mode.json = before  # a program may call this and then print for a person


def _run(arguments: list[str] | None) -> int:
    """Run the command line; return the exit code."""
    try:
        code = app(arguments, standalone_mode=False)
    except HistoseekError as error:
        console.fail(error)
        code = console.EXIT_FAILED
    except (KeyboardInterrupt, typer.Abort):
        code = console.EXIT_STOPPED
    except Exception as error:
        usage = hasattr(error, "format_message")  # click's own: wrong usage
        if not usage and not stopping.requested():
            raise
        console.fail(error)
        code = console.EXIT_USAGE if usage else console.EXIT_FAILED
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    main()
