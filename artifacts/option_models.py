"""Options of a stage as a frozen pydantic dataclass: one line per option.

::

    @options
    class EmbedOptions:
        jobs: Annotated[int | None, Field(ge=1, le=512, description="Decoder workers.")] = None

``EmbedOptions(jobs=0)`` raises BadInput: "--jobs is 0; expected 1 to 512 (Decoder workers)". The module
:mod:`cli_options` makes command-line flags from the same model.
"""

from __future__ import annotations

import types
import typing
from dataclasses import MISSING, dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from ..errors import BadInput

Model = TypeVar("Model")


@dataclass(frozen=True)
class Flag:
    """How an option appears on the command line; a marker in its ``Annotated`` type.

    Attributes:
        name: of the flag, if it differs from the option's name.
        hidden: whether ``--help`` leaves it out.
        offered: whether the option has a flag.
    """

    name: str = ""
    hidden: bool = False
    offered: bool = True


HIDDEN = Flag(hidden=True)
PYTHON_ONLY = Flag(offered=False)


@dataclass(frozen=True)
class Option:
    """One option of a model.

    Attributes:
        name: of the field.
        flag: as typed, such as ``--min-tissue``.
        type: without None: int, float, str, bool, Path, a Literal or a tuple.
        default: ``MISSING`` if a value is required.
        meaning: one sentence.
        expected: range or choices, in words; empty if any value of the type is valid.
        cli: the marker that describes the flag.
    """

    name: str
    flag: str
    type: Any
    default: Any
    meaning: str
    expected: str
    cli: Flag

    @property
    def type_name(self) -> str:
        """The type in one word; a Literal is a str."""
        return "str" if get_origin(self.type) is Literal else getattr(self.type, "__name__", "str")

    @property
    def help(self) -> str:
        """The meaning, and the range in brackets."""
        return f"{self.meaning} [{self.expected}]" if self.expected else self.meaning


@typing.dataclass_transform(frozen_default=True)
def options(model: type[Model]) -> type[Model]:
    """Make a class a frozen pydantic dataclass that raises BadInput for a wrong value.

    A subclass sets another default by ``name: type = value``; range and meaning are inherited.
    """
    inherited: Any = next((base for base in model.__mro__[1:] if is_options(base)), None)
    if inherited is not None:
        hints = typing.get_type_hints(inherited, include_extras=True)
        annotations = model.__annotations__
        for name, hint in annotations.items():
            if name in inherited.__dataclass_fields__ and "Annotated" not in str(hint):
                annotations[name] = hints[name]
    config = ConfigDict(allow_inf_nan=False, extra="forbid")
    result: Any = pydantic_dataclass(model, frozen=True, config=config)
    checked = result.__init__

    def __init__(self: Any, *values: Any, **named: Any) -> None:
        try:
            checked(self, *values, **named)
        except ValidationError as error:
            raise explain(error, result) from error

    result.__init__ = __init__
    return result  # type: ignore[no-any-return]


def is_options(model: Any) -> bool:
    """Whether a class was made by :func:`options`."""
    return isinstance(model, type) and hasattr(model, "__pydantic_fields__")


def read_options(model: type[Any]) -> list[Option]:
    """Return the options of a model in order, inherited ones included."""
    read = []
    for name, info in model.__pydantic_fields__.items():
        cli = next((m for m in info.metadata if isinstance(m, Flag)), Flag())
        kind = info.annotation
        if get_origin(kind) in (typing.Union, types.UnionType):
            kind = next(part for part in get_args(kind) if part is not type(None))
        bounds = {key: getattr(m, key) for m in info.metadata for key in _BOUNDS if hasattr(m, key)}
        default = MISSING if info.is_required() else info.default
        flag = cli.name or f"--{name.replace('_', '-')}"
        text = info.description or ""
        read.append(Option(name, flag, kind, default, text, _expected(kind, bounds), cli))
    return read


_BOUNDS = ("ge", "gt", "le", "lt")


def _expected(kind: Any, bounds: dict[str, float]) -> str:
    if get_origin(kind) is Literal:
        return "one of: " + ", ".join(str(choice) or "'' (none)" for choice in get_args(kind))
    if {"ge", "le"} <= bounds.keys():
        return f"{bounds['ge']:,} to {bounds['le']:,}"
    words = {"ge": "at least", "gt": "over", "le": "at most", "lt": "under"}
    return " and ".join(f"{words[key]} {bounds[key]:,}" for key in _BOUNDS if key in bounds)


def explain(error: ValidationError, model: type[Any]) -> BadInput:
    """Translate pydantic's error; the message gives each option's flag, value and expected range."""
    options = {option.name: option for option in read_options(model)}
    lines = []
    for detail in error.errors(include_url=False):
        option = options.get(str(detail["loc"][0])) if detail["loc"] else None
        if option is None or detail["type"].startswith("missing"):
            name = ".".join(map(str, detail["loc"]))
            flags = ", ".join(o.flag for o in options.values())
            lines.append(f"option {name!r}: {detail['msg']}; the options are: {flags}")
            continue
        expected = option.expected
        if detail["type"].endswith(("_parsing", "_type", "_from_float")):
            expected = f"a value of type {option.type_name}" + (expected and f", {expected}")
        meaning = option.meaning.split(";")[0].split(". ")[0].rstrip(".")
        hint = f" ({meaning})" if meaning and not expected.startswith("one of") else ""
        lines.append(
            f"{option.flag} is {detail['input']!r}; expected {expected or detail['msg']}{hint}"
        )
    return BadInput("\n".join(lines))


__all__ = ["HIDDEN", "PYTHON_ONLY", "Field", "Flag", "Option", "explain", "is_options", "options",
           "read_options"]  # fmt: skip
