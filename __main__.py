"""The command line: parse, call, print. Every command imports its modules when it runs."""

from __future__ import annotations

from .ui.cli import start

if __name__ == "__main__":
    start.begin()  # before the slow imports below, so that Ctrl-C works during them

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__, console, outlets, stopping
from .console import Json
from .errors import HistoseekError
from .ui.cli.index import index_app
from .ui.cli.lazy import lazy, nothing

# Medical data: no library may send telemetry. Set before any of them is imported.
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
LAZY = {
    "embed": (".embed", "embed_app", "Embed slides and tile sets into feature files."),
    "train": (".model", "train_app", "Train an encoder."),
    "reproduce": (".model", "reproduce_app", "Reproduce a paper's table."),
    "export": (".model", "export_app", "Export a run to an encoder bundle."),
    "triton": (".model", "triton_app", "Serve encoders by NVIDIA Triton."),
}
"""Commands whose flags are made from option models: module, app, and what the list of commands shows."""
for _name, (_module, _holder, _help) in LAZY.items():
    app.command(_name, cls=lazy(_module, _holder), help=_help)(nothing)


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
    """Try everything on one real slide: embed, index, cluster, search, and open the page."""
    from .ui.cli.demo import run_demo

    atlas, found = run_demo(dir)
    if not no_ui:
        from .ui.server import ServeOptions

        _open_page(atlas, ServeOptions(port=port), quiet=json, browser=True)
    if not found:
        raise typer.Exit(console.EXIT_FAILED)


def _hash_password(wanted: bool) -> None:
    if not wanted:
        return
    from .ui.access.users import ask_password, hash_password

    made = hash_password(ask_password())
    console.emit({"hash": made}, lambda: print(made))
    raise typer.Exit


HashPassword = Annotated[
    bool,
    typer.Option(
        "--hash-password",
        callback=_hash_password,
        is_eager=True,
        help="Ask for a password, print its hash for --users, and stop.",
    ),
]


@app.command()
def ui(
    atlas: Annotated[Path, typer.Argument(help="Folder of the atlas.")],
    hash_password: HashPassword = False,
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
        str, typer.Option(help="Header with the user's name, set by the trusted proxy.")
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
    """Serve an atlas as a web page and an HTTP API (API documentation: /docs)."""
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
    stopping.leave(console.EXIT_DONE)  # a library's thread may still be computing a map


def _open_page(atlas: Path, options: Any, quiet: bool = False, browser: bool = False) -> None:
    from .ui.server import Running

    running = Running(atlas, options)
    document = {"atlas": str(atlas), "address": running.address, "notes": running.notes}
    text = "\n".join([*running.notes, f"histoseek is at {running.address} (Ctrl-C stops it)"])
    if quiet:  # the caller has already printed its one JSON document
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
        stopping.settle()  # SIGTERM is how a service manager ends a server: nothing was interrupted
    finally:
        running.close()


@app.command()
def doctor(json: Json = False) -> None:
    """Show what is installed, which accelerators were found, and how to install what is missing."""
    from .ui.cli.doctor import examine, show

    report = examine()
    console.emit(report, lambda: show(report))
    if not report["ok"]:
        raise typer.Exit(console.EXIT_FAILED)


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; exit codes: 1 for our errors, 2 for wrong usage, 130 for Ctrl-C."""
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
        console.mode.json = before  # a program may call this and then print text


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
        usage = hasattr(error, "format_message")  # an error of click: wrong usage
        if not usage and not stopping.requested():
            raise
        console.fail(error)
        code = console.EXIT_USAGE if usage else console.EXIT_FAILED
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    main()
