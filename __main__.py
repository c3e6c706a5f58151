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
from .errors import Busy, HistoseekError
from .ui.cli.commands import Commands, lazy
from .ui.cli.index import index_app

# Medical data: no library may send telemetry. Set before any of them is imported.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

app = Commands("Find similar cases and clusters in whole slides.")
app.add_typer(index_app, name="index")
LAZY = {
    "embed": (".embed", "Embed slides and tile sets into feature files."),
    "train": (".model", "Train an encoder."),
    "reproduce": (".model", "Reproduce the table of a paper."),
    "export": (".model", "Export a training run to an encoder bundle."),
    "triton": (".model", "Prepare encoders for NVIDIA Triton."),
    "tissue": (".tissue", "Make networks that find tissue on slides."),
}
"""Commands that are imported when they are called: their module, and their line in the list of commands."""
for _name, (_module, _help) in LAZY.items():
    app.command(_name, cls=lazy(_module), help=_help)(lambda: None)


def _version(requested: bool) -> None:
    if requested:
        print(f"histoseek {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Find similar cases and clusters in whole slides."""


@app.command()
def demo(dir: Path = Path("histoseek-demo"), no_ui: bool = False, port: int = 7860) -> None:
    """Try all steps on one real slide, then open the page.

    Options:
        dir: Folder for the demo's files.
        no_ui: Do not open the page.
        port: Port of the page.
    """
    from .ui.cli.demo import run_demo

    atlas, found = run_demo(dir)
    if not no_ui:
        from .ui.server import ServeOptions

        _open_page(atlas, ServeOptions(port=port), after_demo=True)
    if not found:
        raise typer.Exit(console.EXIT_FAILED)


def _hash_password(requested: bool) -> None:
    if not requested:
        return
    from .ui.access.users import ask_password, hash_password

    hashed = hash_password(ask_password())
    console.emit({"hash": hashed}, lambda: print(hashed))
    raise typer.Exit


@app.command()
def ui(
    atlas: Path,
    others: Annotated[list[str] | None, typer.Argument()] = None,
    hash_password: Annotated[
        bool, typer.Option("--hash-password", callback=_hash_password, is_eager=True)
    ] = False,
    host: str = "127.0.0.1",
    port: int = 7860,
    encoder: str | None = None,
    slides: list[Path] | None = None,
    users: Path | None = None,
    allow_host: list[str] | None = None,
    root_path: str = "",
    trusted_proxy: list[str] | None = None,
    user_header: str = "",
    editor: list[str] | None = None,
    audit_log: Path | None = None,
    no_page: bool = False,
    log_requests: bool = False,
) -> None:
    """Serve an atlas as a web page and an HTTP API. The API's documentation is at /docs.

    Options:
        others: Further atlases of the same encoder (folders, or Milvus collections) to search together with
            the first one. The page shows maps, clusters and slides of the first one only.
        hash_password: Ask for a password, print its hash for the --users file, and exit.
        host: Address to listen on.
        port: Port to listen on.
        encoder: Address of a Triton server that runs the atlas's encoder: triton://HOST:PORT/MODEL.
            Default: run it in this process.
        slides: Folder from which users may add slides by their path. Repeatable.
        users: File of users, one user:HASH or user:HASH:ROLE per line. No other account of
            this machine may have access to the file.
        allow_host: Another host name under which clients reach this server, for example through a proxy.
            Repeatable.
        root_path: URL path under which a proxy publishes the page, such as /histo.
        trusted_proxy: Address or network of a proxy whose X-Forwarded-* headers are trusted. Repeatable.
        user_header: Header in which the trusted proxy sends the user's name.
        editor: Name of a user (as in --user-header) who may change the atlas; * for all users. Repeatable.
        audit_log: File of the audit log. Default: a file in the atlas.
        no_page: Serve only the API, without the page.
        log_requests: Log all requests. Default: only refused requests.
    """
    from .ui.access.policy import access_for
    from .ui.access.proxies import proxies_for
    from .ui.server import ServeOptions

    proxies = proxies_for(trusted_proxy or (), root_path, user_header, editor or ())
    access = access_for(host, users, tuple(allow_host or ()), proxies=proxies)
    console.log_to_stderr(log_requests)
    options = ServeOptions(
        host, port, access, encoder, tuple(slides or ()), audit_log, page=not no_page,
        others=tuple(others or ()),
    )  # fmt: skip
    _open_page(atlas, options)
    stopping.leave(console.EXIT_DONE)  # a library's thread may still be computing a map


def _open_page(atlas: Path, options: Any, after_demo: bool = False) -> None:
    """Serve until Ctrl-C; after the demo, which printed its JSON document, also open a browser."""
    from .ui.server import Running

    running = Running(atlas, options)
    document = {"atlas": str(atlas), "address": running.address, "notes": running.notes}
    text = "\n".join([*running.notes, f"histoseek is at {running.address} (press Ctrl-C to stop)"])
    if after_demo:
        console.say(text)
    else:
        console.emit(document, lambda: console.say(text))
    sys.stdout.flush()
    if after_demo:
        import webbrowser

        webbrowser.open(running.address)
    console.mode.stopped = "the server was stopped"
    try:
        stopping.wait_for_signal()
    except stopping.Stopped as stopped:
        if stopped.number != signal.SIGTERM:
            raise
        stopping.settle()  # SIGTERM is how a service manager ends a server: nothing was interrupted
    finally:
        running.close()


@app.command()
def mcp(atlas: Path, encoder: str | None = None, audit_log: Path | None = None) -> None:
    """Serve an atlas to an assistant on this machine by MCP.

    MCP is the Model Context Protocol, here over standard input and output.

    The assistant's program starts this command. Its tools search, compare slides, and show clusters, tiles
    and annotations; none changes the atlas.

    Options:
        encoder: Address of a Triton server that runs the atlas's encoder: triton://HOST:PORT/MODEL.
            Default: run it in this process.
        audit_log: File of the audit log. Default: a file in the atlas.
    """
    from .errors import need

    need("mcp", "mcp")
    from .ui.assistant import serve

    console.mode.json = True  # standard output carries the protocol
    console.log_to_stderr(False)
    try:
        serve(atlas, encoder, audit_log)
    except stopping.Stopped as stopped:
        if stopped.number != signal.SIGTERM:  # the way a client ends a server
            stopping.leave(stopping.exit_code())
    stopping.leave(console.EXIT_DONE)


@app.command()
def doctor() -> None:
    """Show installed parts and accelerators. For missing parts, show how to install them."""
    from .ui.cli.doctor import examine, show

    report = examine()
    console.emit(report, lambda: show(report))
    if not report["ok"]:
        raise typer.Exit(console.EXIT_FAILED)


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; :mod:`histoseek.console` lists the exit codes."""
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
        console.mode.stopped = console.STOPPED


def _run(arguments: list[str] | None) -> int:
    """Run the command line; return the exit code."""
    try:
        code = app(arguments, standalone_mode=False)
    except HistoseekError as error:
        console.fail(error)
        code = console.EXIT_BUSY if isinstance(error, Busy) else console.EXIT_FAILED
    except (KeyboardInterrupt, typer.Abort):
        code = console.EXIT_STOPPED
    except Exception as error:
        usage = getattr(error, "format_message", None)  # click raises it for wrong usage
        if usage is None and not stopping.requested():
            raise
        if (
            type(error).__name__ == "NoArgsIsHelpError"
        ):  # a group without a command: its text is the help
            print(error, file=sys.stderr)
        else:
            console.fail(error, usage() if usage else "")
        code = console.EXIT_USAGE if usage else console.EXIT_FAILED
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    main()
