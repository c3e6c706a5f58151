"""The first moments of the command line: before anything large is imported or any file is opened."""

from __future__ import annotations

import os

from ... import stopping


class _Process:
    """Whether this process is the command line, not a program that uses histoseek as a library."""

    ours = False


def begin() -> None:
    """Make this process the command line: standard streams there, Ctrl-C taken over."""
    fill_descriptors()
    stopping.arm()
    _Process.ours = True


def is_command_line() -> bool:
    """Whether :func:`begin` was called in this process."""
    return _Process.ours


def fill_descriptors() -> None:
    """Open the null device where standard input, output or error is closed.

    Else the next file that is opened, such as a database, would take the number, and what any library
    prints would be written into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)


def run() -> None:
    """Run the command ``histoseek``: take over Ctrl-C before anything large is imported."""
    begin()
    from ...__main__ import main

    main()
