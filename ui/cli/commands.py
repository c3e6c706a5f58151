"""The Typer apps of the command line: the same settings for all, and ``--json`` for every command."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from copy import copy
from functools import wraps
from importlib import import_module
from pathlib import Path
from textwrap import wrap
from typing import Annotated, Any, TypeVar, get_args, get_origin

import typer
from typer.core import TyperCommand

from ...errors import BadInput

Function = TypeVar("Function", bound=Callable[..., Any])
ALL_ASKED = "histoseek.help-all"
"""Where a context notes that rarely used options are to be explained."""


def _help_all(ctx: typer.Context, value: bool) -> None:
    """Print the help with rarely used options, and exit."""
    if value:
        ctx.meta[ALL_ASKED] = True
        typer.echo(ctx.get_help())
        ctx.exit()


JSON = inspect.Parameter(
    "json",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[bool, typer.Option("--json", help="Print one JSON document.")],
)

HELP_ALL = inspect.Parameter(
    "help_all",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[
        bool,
        typer.Option(
            "--help-all",
            is_eager=True,
            callback=_help_all,
            help="Also explain rarely used options, and exit.",
        ),
    ],
)
COMMON = {
    "atlas": "Folder of the atlas.",
    "also": "Another folder or file to use in addition to DATA. Repeatable.",
    "clusters": "Name of the clustering. Default: the newest.",
    "engine": "Milvus collection to search in, such as milvus://host:19530/cases. Run `index push` first.",
    "exclude": "COLUMN=VALUE[,VALUE...]: leave out tiles with one of these values in this manifest column. "
    "Repeatable.",
    "label_from": "Columns of the manifest that form the label, separated by commas.",
    "least": "Minimum score at which two tiles count as the same. Default: "
    "0.999 for cosine; for l2 the equivalent distance, negated.",
    "link_encoder": "Refer to the encoder's bundle by its path and sha256 instead of copying its graphs.",
    "metadata": "CSV with the columns slide, label, patient and any others.",
    "mixed_scales": "Allow, from now on, tiles in this atlas whose µm per pixel differ by more than 5 %.",
    "replace": "Replace the features of slides that are already in the atlas.",
    "seed": "Random seed.",
    "where": "Metadata filter, such as \"organ = 'colon' and patient != 'P7'\".",
}
"""Help texts of parameters that several commands have; a docstring may describe them differently."""
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")
"""How a URL begins, also after pathlib shortened it."""
HELP = re.compile(r"^    (\w+): (.*(?:\n {8}.*)*)", re.M)
"""An option and its help text in a docstring."""


class Commands(typer.Typer):
    """A group of commands, whose help texts are in the functions' docstrings, in a section ``Options:``.

    Each command has ``--json``; ``__main__.main`` looks for that word before it parses any argument.
    """

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
        register = super().command(name, *args, **{"cls": Command, **settings})

        def add(function: Function) -> Function:
            register(_command_line_form(function))
            return function

        return add


class Command(TyperCommand):
    """A command whose ``--help`` names its rarely used options, and whose ``--help-all`` explains them."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options, and the rarely used ones as requested."""
        super().format_options(ctx, formatter)
        write_rare(self.params, ctx, formatter)


def write_rare(params: Sequence[Any], ctx: Any, formatter: Any) -> None:
    """Write the rarely used options: with their help after ``--help-all``, else only their names."""
    rare = [param for param in params if getattr(param, "hidden", False) and param.help]
    if not rare:
        return
    if not ctx.meta.get(ALL_ASKED):
        names = ", ".join("/".join([*param.opts, *param.secondary_opts]) for param in rare)
        with formatter.section("Rarely used (--help-all explains them)"):
            for line in wrap(names, formatter.width - 2, break_on_hyphens=False):
                formatter.write(f"  {line}\n")
        return
    shown = [copy(param) for param in rare]
    for param in shown:
        param.hidden = False
    with formatter.section("Rarely used"):
        formatter.write_dl([param.get_help_record(ctx) for param in shown])


def _command_line_form(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with ``--json``, and with the help texts of its docstring."""

    @wraps(function)
    def run(json: bool = False, help_all: bool = False, **values: Any) -> Any:
        _refuse_urls(values)
        return function(**values)

    text, _, options = inspect.cleandoc(function.__doc__ or "").partition("\nOptions:\n")
    helps = {found[1]: " ".join(found[2].split()) for found in HELP.finditer(options)}
    signature = inspect.signature(function, eval_str=True)
    parameters = [_with_help(p, helps.get(p.name)) for p in signature.parameters.values()]
    parameters += [JSON, HELP_ALL]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__doc__ = text
    return run


def _refuse_urls(values: dict[str, Any]) -> None:
    """Raise BadInput for a URL given for a local path; pathlib makes ``s3:/bucket`` of ``s3://bucket``."""
    for value in values.values():
        for path in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(path, Path) and (found := SCHEME.match(str(path))):
                url = f"{found[1]}://{str(path)[found.end() :]}"
                raise BadInput(
                    f"{url}: a path on this machine is needed here, not a URL; copy it first"
                )


def _with_help(parameter: inspect.Parameter, text: str | None) -> inspect.Parameter:
    """Add a help text; a parameter without default is an argument, a switch has no form ``--no-…``."""
    kind, info = parameter.annotation, None
    if get_origin(kind) is Annotated:
        kind, info = get_args(kind)
    text = text or getattr(info, "help", None) or COMMON.get(parameter.name)
    if text is None:
        return parameter
    if info is None:
        flag = [f"--{parameter.name.replace('_', '-')}"] if kind is bool else []
        required = parameter.default is inspect.Parameter.empty
        info = typer.Argument() if required else typer.Option(*flag)
    info.help = text
    return parameter.replace(annotation=Annotated[kind, info])


def lazy(module: str) -> type[TyperCommand]:
    """Return the class of a command that is imported from ``module.app`` when it is called."""

    class Lazy(TyperCommand):
        """A command without parameters; the real command parses the arguments."""

        def make_context(
            self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
        ) -> Any:
            """Import the real command and let it parse the arguments."""
            group = typer.main.get_group(import_module(module, __package__).app)
            return group.commands[self.name or ""].make_context(info_name, args, parent, **extra)

    return Lazy
