"""Start of the command line, before any large import and before any file is opened."""

from __future__ import annotations

import os

from ... import stopping

_begun = False
"""Whether this process is the command line, and not a program that uses histoseek as a library."""


def begin() -> None:
    """Make this process the command line: open missing standard streams, and take over Ctrl-C."""
    global _begun
    fill_descriptors()
    stopping.arm()
    _begun = True


def is_command_line() -> bool:
    """Whether :func:`begin` was called in this process."""
    return _begun


def fill_descriptors() -> None:
    """Open the null device in place of a closed standard input, output or error.

    Otherwise the next opened file, such as a database, would get its descriptor, and a library's output
    would be written into that file.
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
    """Run the command ``histoseek``; Ctrl-C is handled before the slow imports."""
    begin()
    from ...__main__ import main

    main()
