"""Talking to a person and to a program: progress and text on stderr/stdout, one JSON document on demand.

With ``--json`` a command prints exactly one JSON document on standard output; everything else goes to
standard error. An error becomes ``{"error": {...}}`` there, and the exit code is not 0.

Exit codes: 0 done; 1 failed, or something in it failed; 2 wrong usage; 74 done, but standard output did
not take the answer (full disk, closed); 130 stopped by Ctrl-C; 141 done, but the reader of the pipe went
away; 143 stopped by SIGTERM.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from . import outlets, stopping

Report = Callable[[int, int, str], None]

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_STOPPED = 130
EXIT_NOT_SAID = 74
"""Standard output did not take the answer: sysexits' EX_IOERR."""
EXIT_NO_READER = 141
"""The reader of a pipe went away: what a shell shows for SIGPIPE."""


@dataclass
class _Mode:
    json: bool = False


mode = _Mode()


def set_json(wanted: bool) -> bool:
    """Switch to JSON; the callback of every ``--json`` option."""
    mode.json = mode.json or wanted
    return wanted


Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document.", callback=set_json),
]


def emit(document: Any, human: Callable[[], None]) -> None:
    """Print ``document`` as JSON if that was asked for, else call ``human`` to print text."""
    if mode.json:
        _print_json(document, indent=2)
    else:
        human()


def _print_json(document: Any, indent: int | None = None) -> None:
    """Print JSON that is valid in any encoding of standard output."""
    escape = not outlets.speaks_unicode(sys.stdout)
    print(
        json.dumps(document, ensure_ascii=escape, indent=indent, allow_nan=False, default=str),
        flush=True,
    )


def tell_stop(done: bool) -> None:
    """Say that the command was stopped, or that it was ``done`` by the time it was asked to stop."""
    if done:
        text = "asked to stop when all was done: the answer is complete"
    else:
        text = "stopped; repeat the command to go on where it was"
        if mode.json:
            _print_json({"error": {"type": "Stopped", "message": text}})
    print(text, file=sys.stderr, flush=True)


def exit_code(code: int) -> int:
    """Return the exit code of a command that ended with ``code``, once all its output is written.

    A failure to print changes only the code of a command that did what it was asked for.
    """
    error = outlets.failure(sys.stdout)
    outlets.failure(sys.stderr)  # who cannot hear it cannot be told; what was done is done
    if error is None or code != 0:
        return code
    if error.errno == errno.EPIPE:
        return EXIT_NO_READER
    reason = os.strerror(error.errno or 0)
    print(
        f"standard output did not take all of the answer ({reason}); what was done stays done; "
        "print it to another place to see it",
        file=sys.stderr,
        flush=True,
    )
    return EXIT_NOT_SAID


def log_to_stderr(everything: bool) -> None:
    """Write our log to standard error: warnings, or everything."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    ours = logging.getLogger("histoseek")
    ours.addHandler(handler)
    ours.setLevel(logging.INFO if everything else logging.WARNING)


def say(text: str) -> None:
    """Print a line for a person: on stdout, or on stderr when stdout carries JSON."""
    from rich.console import Console

    Console(stderr=mode.json, soft_wrap=True, highlight=False).print(text, markup=False)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; columns whose values are all numbers are set flush right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    sheet = Table(title=title or None, title_justify="left", header_style="bold")
    for number, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[number], int | float) for row in rows)
        sheet.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        sheet.add_row(*[Text(_cell(value)) for value in row])
    Console(stderr=mode.json, soft_wrap=False).print(sheet)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def fail(error: Exception) -> None:
    """Report an error: on stderr for a person, as a JSON document for a program."""
    if mode.json:
        kind = type(error).__name__
        _print_json({"error": {"type": kind, "message": str(error)}})
    else:
        from rich.console import Console
        from rich.text import Text

        message = Text(f"{type(error).__name__}: ", style="bold red") + Text(str(error), style="")
        Console(stderr=True, soft_wrap=True).print(message)


@contextmanager
def progress(title: str) -> Iterator[Report]:
    """Yield ``report(done, total, text)``, drawn as a bar with rate and time left on a terminal.

    Where stderr is no terminal a line is printed every ten seconds instead. A report is also the point
    where a loop stops after Ctrl-C.
    """
    if not _on_terminal():
        yield _line_reporter(title)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.fields[title]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", style="dim"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", title=title, total=None)

        def report(done: int, total: int, text: str) -> None:
            stopping.check()
            bar.update(task, completed=done, total=total, description=text[:100])

        yield report


@contextmanager
def working(text: str) -> Iterator[None]:
    """Show that something of unknown length goes on: a spinner on a terminal, else nothing."""
    if not _on_terminal():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


def _on_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _line_reporter(title: str) -> Report:
    import time

    started = last = time.monotonic()

    def report(done: int, total: int, text: str) -> None:
        nonlocal last
        stopping.check()
        now = time.monotonic()
        if now - last >= 10:
            last = now
            left = f", {(now - started) / done * (total - done):.0f} s left" if done else ""
            print(f"{title}: {done}/{total}{left}, {text}", file=sys.stderr, flush=True)

    return report
