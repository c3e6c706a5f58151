"""Standard output and error that never make a command fail: any encoding, closed, full, or no reader.

A command prints its outcome after its work is done, so a failed write must not undo that work. The first
failure of a stream is stored, later output is dropped, and the exit code reports it (:func:`failure`).
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import sys
from contextlib import suppress
from typing import Any, TextIO

PLAIN = "histoseek-plain"
"""Name of the codec error handler for characters that a stream's encoding lacks."""
_LOOKALIKES = {
    "–": "-", "—": "-", "−": "-", "…": "...", "µ": "u", "μ": "u", "×": "x", "█": "#", "·": ".",
    "•": "*", "→": "->", "≥": ">=", "≤": "<=", "±": "+-", "’": "'", "‘": "'", "“": '"', "”": '"',
}  # fmt: skip


class _Outlet(io.FileIO):
    """A file descriptor that stores its first failure and drops everything written after it.

    Attributes:
        error: the first failure; None before that.
    """

    def __init__(self, descriptor: int, closed: bool = False) -> None:
        """Write to a descriptor, which is not closed; ``closed``: it was already closed at the start."""
        super().__init__(descriptor, "w", closefd=False)
        self.error: OSError | None = None
        self._was_closed = closed

    def write(self, data: Any, /) -> int:
        """Write all of ``data``, or store the error."""
        view = memoryview(data).cast("B")
        done = 0
        if self._was_closed and self.error is None:
            self.error = OSError(errno.EBADF, os.strerror(errno.EBADF))
        while self.error is None and done < len(view):
            try:
                written = super().write(view[done:])
            except OSError as error:
                self.error = error
                break
            if written is None:  # a non-blocking pipe that is full: wait here
                select.select([], [self.fileno()], [])
            done += written or 0
        return len(view)


def plain(error: UnicodeError) -> tuple[str, int]:
    """Replace a character that an encoding lacks by a similar one, else by its escape sequence."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    plain = (
        _LOOKALIKES.get(c) or c.encode("ascii", "backslashreplace").decode() for c in characters
    )
    return "".join(plain), error.end


def take_over() -> None:
    """Replace ``sys.stdout`` and ``sys.stderr`` by streams that never raise; for the command line only."""
    codecs.register_error(PLAIN, plain)
    sys.stdout = _careful(sys.stdout, 1)
    sys.stderr = _careful(sys.stderr, 2)


def _careful(stream: TextIO | None, descriptor: int) -> TextIO:
    """Return a stream like ``stream`` that never raises; None: it was closed when Python started."""
    raw = _Outlet(descriptor, closed=stream is None)
    if stream is not None:
        with suppress(OSError):
            stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding if stream is not None else "utf-8",
        errors=PLAIN,
        line_buffering=descriptor == 2 or raw.isatty(),
        write_through=isinstance(stream, io.TextIOWrapper) and stream.write_through,
    )


def failure(stream: TextIO | None) -> OSError | None:
    """Flush a stream; return its first write error, or None."""
    if stream is None:
        return None
    try:
        stream.flush()
    except OSError as error:
        return error
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw.error if isinstance(raw, _Outlet) else None


def speaks_unicode(stream: TextIO | None) -> bool:
    """Whether a stream's encoding has every character."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return encoding.lower().replace("_", "-").startswith(("utf-8", "utf8", "utf-16", "utf-32"))
