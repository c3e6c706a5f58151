"""The Typer apps of the command line: the same settings for all, and ``--json`` for every command."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand

Function = TypeVar("Function", bound=Callable[..., Any])
JSON = inspect.Parameter(
    "json",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[bool, typer.Option("--json", help="Print one JSON document.")],
)


class Commands(typer.Typer):
    """A group of commands. Each gets ``--json``; ``main`` looks for that word before it parses any."""

    def __init__(self, help: str) -> None:
        """Create a group without commands; ``help`` describes it."""
        super().__init__(
            help=help,
            no_args_is_help=True,
            add_completion=False,
            pretty_exceptions_enable=False,
            rich_markup_mode=None,
        )

    def command(
        self, name: str | None = None, *args: Any, **settings: Any
    ) -> Callable[[Function], Function]:
        """Register a function as a command with ``--json``; the function itself stays as it is."""
        register = super().command(name, *args, **settings)

        def add(function: Function) -> Function:
            register(_with_json(function))
            return function

        return add


def _with_json(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def run(json: bool = False, **values: Any) -> Any:
        return function(**values)

    signature = inspect.signature(function, eval_str=True)
    parameters = [*signature.parameters.values(), JSON]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def lazy(module: str) -> type[TyperCommand]:
    """Return a class of commands that are imported when they are called, so that ``--help`` is quick.

    Args:
        module: module in this package, such as ``.embed``; its :class:`Commands` are called ``app``.
    """

    class Lazy(TyperCommand):
        """A command without parameters; the real command parses the arguments."""

        def make_context(
            self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
        ) -> Any:
            """Import the real command and let it parse the arguments."""
            group = typer.main.get_group(import_module(module, __package__).app)
            return group.commands[self.name or ""].make_context(info_name, args, parent, **extra)

    return Lazy
