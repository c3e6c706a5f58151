"""Commands that are imported when they are called, so that ``histoseek --help`` is quick."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand


def lazy(module: str, holder: str) -> type[TyperCommand]:
    """Return the class of a command that stands in for another one until it is called.

    Args:
        module: the module of the real command, relative to this package, such as ``.embed``.
        holder: name of the :class:`typer.Typer` in it that holds the real command or group.
    """

    class Lazy(TyperCommand):
        """A command without parameters; the real one parses the words."""

        def make_context(
            self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
        ) -> Any:
            """Import the real command and let it parse the words."""
            real = typer.main.get_command(getattr(import_module(module, __package__), holder))
            return real.make_context(info_name, args, parent, **extra)

    return Lazy


def nothing() -> None:
    """Stand in for the function of a command that is imported when it is called."""
