"""The command ``histoseek``, as it is installed."""

from __future__ import annotations

from . import start


def run() -> None:
    """Take over Ctrl-C before anything large is imported, then run the command line."""
    start.begin()
    from .__main__ import main

    main()
