"""Talking to a person and to a program: progress and text on stderr/stdout, one JSON document on demand.

With ``--json`` a command prints exactly one JSON document on standard output; everything else goes to
standard error. An error becomes ``{"error": {...}}`` there, and the exit code is not 0.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import typer

Report = Callable[[int, int, str], None]

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_STOPPED = 130


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
        print(json.dumps(document, ensure_ascii=False, indent=2, allow_nan=False, default=str))
    else:
        human()


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
        print(json.dumps({"error": {"type": kind, "message": str(error)}}, ensure_ascii=False))
    else:
        from rich.console import Console
        from rich.text import Text

        message = Text(f"{type(error).__name__}: ", style="bold red") + Text(str(error), style="")
        Console(stderr=True, soft_wrap=True).print(message)


@contextmanager
def progress(title: str) -> Iterator[Report]:
    """Yield ``report(done, total, text)``, drawn as a bar with rate and time left on a terminal.

    Where stderr is no terminal a line is printed every ten seconds instead.
    """
    if not sys.stderr.isatty():
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
            bar.update(task, completed=done, total=total, description=text[:100])

        yield report


@contextmanager
def working(text: str) -> Iterator[None]:
    """Show that something of unknown length goes on: a spinner on a terminal, else nothing."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


def _line_reporter(title: str) -> Report:
    import time

    started = last = time.monotonic()

    def report(done: int, total: int, text: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= 10:
            last = now
            left = f", {(now - started) / done * (total - done):.0f} s left" if done else ""
            print(f"{title}: {done}/{total}{left}, {text}", file=sys.stderr, flush=True)

    return report
