"""Command-line flags made from option models.

A command takes a model as one parameter and gets a flag, with type, range, default and help, for each of
the model's options::

    @app.command()
    @with_flags
    def embed(inputs: list[Path], options: EmbedOptions) -> None: ...
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from dataclasses import MISSING
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import typer

from ...artifacts.option_models import Option, is_options, read_options
from ...errors import BadInput

Model = TypeVar("Model")


def with_flags(command: Callable[..., Any], text: bool = False) -> Callable[..., Any]:
    """Replace each parameter that is a model by one flag per option, for Typer.

    Args:
        command: function with one or more models among its parameters.
        text: let Typer pass every value as text, so that all errors come from the model; also add the
            ``--no-…`` form of every switch.
    """
    hints = get_type_hints(command, include_extras=True)
    models = {name: hint for name, hint in hints.items() if is_options(hint)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in models:
            offered = [option for option in read_options(models[name]) if option.cli.offered]
            parameters += [_parameter(option, text) for option in offered]
        else:
            kind = inspect.Parameter.KEYWORD_ONLY
            parameters.append(parameter.replace(annotation=hints[name], kind=kind))

    def run(**given: Any) -> Any:
        for name, model in models.items():
            values = {o.name: given.pop(o.name) for o in read_options(model) if o.name in given}
            given[name] = model(**{key: v for key, v in values.items() if v is not None})
        return command(**given)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _parameter(option: Option, text: bool) -> inspect.Parameter:
    """Return the parameter that Typer turns into the option's flag."""
    kind, default, flag = option.type, option.default, option.flag
    extra: dict[str, Any] = {"help": option.help, "hidden": option.cli.hidden}
    if kind is bool:
        flag = f"{flag}/--no-{flag[2:]}" if text or default is True else flag
    elif get_origin(kind) is tuple:
        kind, default = list[get_args(kind)[0]] | None, None  # type: ignore[misc]
    elif get_origin(kind) is Literal:
        kind, extra["metavar"] = str, f"<{'|'.join(filter(None, get_args(option.type)))}>"
        extra["help"] = option.meaning
    elif text:
        kind, extra["metavar"] = str, f"<{option.type_name}>"
        default = default if default is MISSING or default is None else str(default)
    if default is None and get_origin(kind) not in (Union, types.UnionType):
        kind = kind | None
    return inspect.Parameter(
        option.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is MISSING else default,
        annotation=Annotated[kind, typer.Option(flag, **extra)],
    )


def command_for(model: type[Any], name: str) -> Any:
    """Return a command whose flags are the options of a model; :func:`parse` runs it."""

    def collect(options: Any) -> Any:
        return options

    collect.__annotations__["options"] = model
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(name, help="")(with_flags(collect, text=True))
    return typer.main.get_command(app)


def parse(model: type[Model], words: list[str], name: str) -> Model:
    """Turn ``--flag value`` words into a model.

    Raises:
        BadInput: an option is unknown, or a value is missing or out of range.
    """
    command = command_for(model, name)
    try:
        found: Model = command.main(list(words), prog_name=name, standalone_mode=False)
    except Exception as error:
        if not hasattr(error, "format_message"):  # not a click error (unknown option, no value)
            raise
        flags = ", ".join(option.flag for option in read_options(model))
        raise BadInput(f"{error.format_message()} The options of {name} are: {flags}") from error
    return found
