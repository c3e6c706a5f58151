"""Console output: text and progress for people, or one JSON document for programs.

With ``--json`` a command prints exactly one JSON document on standard output; everything else goes to
standard error. An error is printed as ``{"error": {...}}``, and the exit code is not 0.

Exit codes: 0 done; 1 failed, wholly or in part; 2 wrong usage; 74 done, but writing to standard output
failed (full disk, closed); 75 busy, such as another process that writes (try again); 129 stopped because
the terminal closed (SIGHUP); 130 stopped by Ctrl-C; 141 done, but the reader of the pipe closed it; 143
stopped by SIGTERM.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from . import outlets, stopping

Progress = Callable[[int, int, str], None]


def no_progress(done: int, total: int, text: str) -> None:
    """Report nothing; the default where a function takes a :data:`Progress`."""


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun, in the plural (by default with an s) unless the number is 1."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


FEW = 10
"""Number of names that a line lists."""
EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_STOPPED = 130
EXIT_BUSY = 75
"""Exit code if something is busy, such as an atlas that another process writes (EX_TEMPFAIL)."""
EXIT_NOT_PRINTED = 74
"""Exit code if writing to standard output failed (EX_IOERR in sysexits.h)."""
EXIT_NO_READER = 141
"""Exit code if the reader closed the pipe; a shell shows the same for SIGPIPE."""


STOPPED = "stopped; repeat the command to continue from here"


@dataclass
class _Mode:
    json: bool = False
    stopped: str = STOPPED


mode = _Mode()


def emit(document: Any, human: Callable[[], None]) -> None:
    """Print ``document`` in JSON mode, else call ``human`` to print text."""
    if mode.json:
        _print_json(document, indent=2)
    else:
        human()


def _print_json(document: Any, indent: int | None = None) -> None:
    """Print JSON that any encoding of standard output can represent."""
    escape = not outlets.speaks_unicode(sys.stdout)
    text = json.dumps(document, ensure_ascii=escape, indent=indent, allow_nan=False, default=str)
    print(text, flush=True)


def tell_stop(done: bool) -> None:
    """Print that the command was stopped, or that it was already ``done`` when the stop request came."""
    if done:
        text = "the stop request came after the last step: the answer is complete"
    else:
        text = mode.stopped
        if mode.json:
            _print_json({"error": {"type": "Stopped", "message": text}})
    print(text, file=sys.stderr, flush=True)


def exit_code(code: int) -> int:
    """Return the process's exit code for a command that ended with ``code``; flushes its output first.

    A failed write changes the exit code only of a command that succeeded.
    """
    error = outlets.failure(sys.stdout)
    outlets.failure(sys.stderr)  # flush; a failure of stderr cannot be reported and is ignored
    if error is None or code != 0:
        return code
    if error.errno == errno.EPIPE:
        return EXIT_NO_READER
    text = f"the answer could not be written to standard output ({os.strerror(error.errno or 0)}); the "
    text += "command's results are stored: repeat it with another output to see the answer"
    print(text, file=sys.stderr, flush=True)
    return EXIT_NOT_PRINTED


def log_to_stderr(everything: bool) -> None:
    """Write the package's log to standard error: warnings only, or all messages."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    ours = logging.getLogger("histoseek")
    ours.addHandler(handler)
    ours.setLevel(logging.INFO if everything else logging.WARNING)


def say(text: str) -> None:
    """Print a line of text: on stdout, or on stderr when stdout carries JSON."""
    from rich.console import Console

    Console(stderr=mode.json, soft_wrap=True, highlight=False).print(text, markup=False)


def say_names(title: str, names: Sequence[str]) -> None:
    """Print the number of names and the first few; nothing if there are none."""
    if names:
        few = ", ".join(names[:FEW]) + (" …" if len(names) > FEW else "")
        say(f"{title}: {len(names)} ({few})")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; columns that hold only numbers are aligned right."""
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


def fail(error: Exception, text: str = "") -> None:
    """Print an error: as text on stderr, or as a JSON document in JSON mode; ``text`` replaces its own."""
    kind, text = type(error).__name__, text or str(error)
    if mode.json:
        _print_json({"error": {"type": kind, "message": text}})
    else:
        from rich.console import Console
        from rich.text import Text

        message = Text(f"{kind}: ", style="bold red") + Text(text, style="")
        Console(stderr=True, soft_wrap=True).print(message)


@contextmanager
def progress(title: str) -> Iterator[Progress]:
    """Yield ``report(done, total, text)``, drawn as a bar with rate and time left on a terminal.

    If stderr is not a terminal, a line is printed every ten seconds instead. Each call of ``report`` also
    checks for Ctrl-C and stops the loop.
    """
    if not _on_terminal():
        yield _line_reporter(title)
        return
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.fields[title]}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.description}", style="dim"),
    )
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", title=title, total=None)

        def report(done: int, total: int, text: str) -> None:
            stopping.check()
            bar.update(task, completed=done, total=total, description=text[:100])

        yield report


@contextmanager
def working(text: str) -> Iterator[None]:
    """Show a spinner on a terminal while a task of unknown duration runs; elsewhere print nothing."""
    if not _on_terminal():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


def _on_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _line_reporter(title: str) -> Progress:
    last = time.monotonic()
    before, first, started = math.inf, 0, last

    def report(done: int, total: int, text: str) -> None:
        nonlocal last, before, first, started
        stopping.check()
        now = time.monotonic()
        if done < before:  # other work, or the first report: measure the rate from here
            first, started = done, now
        before = done
        if now - last >= 10:
            last = now
            rate = (done - first) / (now - started) if now > started else 0.0
            left = f", {(total - done) / rate:.0f} s left" if rate and done < total else ""
            print(f"{title}: {done}/{total}{left}, {text}", file=sys.stderr, flush=True)

    return report
