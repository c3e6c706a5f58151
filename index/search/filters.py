"""Metadata filters such as ``organ = 'colon' and patient != 'P7'``: parsed, and applied to the columns.

The text never reaches a database. A grammar parses it into a tree; each comparison runs once per distinct
value of a column, and the result is looked up for each tile.

Fields: ``slide``, ``kind``, ``label``, ``patient``, ``file``, ``tile``, ``x``, ``y``, ``mpp``,
``target_mpp`` (of the tiles), ``cluster`` (of the newest clustering), ``cluster.NAME`` (of another), and
every user-defined column of the metadata. ``sharpness``, ``pen``, ``dark``, ``glass`` and ``density`` were
measured on the tiles by ``embed``; a column of the metadata hides its namesake. ``annotation.label``,
``annotation.note`` and ``annotation.author`` are of the annotations around the centre of a tile; one of
them must pass.

Operators: ``= != < <= > >=``, ``in (…)``, ``not in (…)``, ``like`` (``%`` any text, ``_`` one character),
``is null``, ``is not null``, ``and``, ``or``, ``not``, brackets. Write texts in single or double quotes;
double a quote inside. Write a column name of several words in backticks. A tile without a value
equals nothing, so ``!=`` and ``not in`` are true for it.
"""

from __future__ import annotations

import fnmatch
import operator as operators
import re
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...artifacts.feature_files import QUALITY
from ...artifacts.tables import number_of
from ...errors import BadInput, unknown_name
from ..store.annotation import FIELDS as ANNOTATION_FIELDS
from .columns import NOT_PLACED, Columns

Mask = NDArray[np.bool_]
Value = str | float
LENGTH_LIMIT = 10_000
_DATE = re.compile(r"(\d{1,2}[./-]\d{1,2}[./-]\d{4}|\d{2}[./-]\d{2}[./-]\d{2})(?!\d)")
"""A date whose texts do not sort by time; 1.2.10 is a version."""
_ISO_DATE = re.compile(r"\d{4}-\d{2}")
_THOUSANDS = re.compile(r"\d{1,3}(,\d{3})+")
"""A number with commas, which could be a decimal comma or groups of digits."""
_KEYWORDS = ("and", "or", "not", "in", "like", "is", "null")


@dataclass(frozen=True)
class Compare:
    """Compares a field with values by one of the operators above."""

    field: str
    operator: str
    values: tuple[Value, ...] = ()

    def has(self, name: str) -> bool:
        """Whether a name is one of the values; numbers are compared as numbers."""
        if name in self._texts:
            return True
        return bool(self._numbers) and _number(name) in self._numbers

    def is_like(self, name: str) -> bool:
        """Whether a name matches the pattern of ``like``."""
        return self._pattern.fullmatch(name) is not None

    @cached_property
    def _texts(self) -> frozenset[str]:
        return frozenset(value for value in self.values if isinstance(value, str))

    @cached_property
    def _numbers(self) -> frozenset[float]:
        return frozenset(value for value in self.values if not isinstance(value, str))

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        """The pattern as a regular expression without backtracking."""
        signs = {"%": "*", "_": "?", "*": "[*]", "?": "[?]", "[": "[[]"}
        pattern = "".join(signs.get(sign, sign) for sign in str(self.values[0]))
        return re.compile(fnmatch.translate(pattern), re.IGNORECASE)


@dataclass(frozen=True)
class Not:
    """True if its part is false."""

    part: Filter


@dataclass(frozen=True)
class Every:
    """True if all parts are true."""

    parts: tuple[Filter, ...]


@dataclass(frozen=True)
class Some:
    """True if at least one part is true."""

    parts: tuple[Filter, ...]


@dataclass(frozen=True)
class Always:
    """True for every tile, or false for every tile."""

    value: bool


Filter = Compare | Not | Every | Some | Always


def _grammar() -> Any:
    import pyparsing as pp

    pp.ParserElement.enable_packrat()
    word = pp.Regex(r"[^\W\d][\w.\-]*")
    keywords = pp.MatchFirst([pp.CaselessKeyword(word) for word in _KEYWORDS])
    exact: Any = {"multiline": True, "convert_whitespace_escapes": False}
    field = (~keywords + word) | pp.QuotedString("`", esc_quote="``", **exact)
    number = pp.Regex(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?").set_parse_action(
        lambda t: float(t[0])
    )
    text = pp.QuotedString("'", esc_quote="''", **exact) | pp.QuotedString(
        '"', esc_quote='""', **exact
    )
    value = text | number
    several = pp.Suppress("(") + pp.DelimitedList(value) + pp.Suppress(")")
    lower = pp.CaselessKeyword
    not_in = (lower("not") + lower("in")).set_parse_action(lambda: "not in")
    not_like = (lower("not") + lower("like")).set_parse_action(lambda: "not like")
    is_not = (lower("is") + lower("not") + lower("null")).set_parse_action(lambda: "is not null")
    is_null = (lower("is") + lower("null")).set_parse_action(lambda: "is null")
    sign = pp.one_of("= == != <> < <= > >=")
    tail = (
        is_not | is_null | (not_in | lower("in")) + several | (not_like | lower("like")) + text
        | sign - value
    )  # fmt: skip

    def compare(tokens: Any) -> Compare:
        name, operator, *values = tokens
        operator = {"==": "=", "<>": "!="}.get(operator, operator)
        return Compare(name, operator, tuple(values))

    comparison = (field - tail).set_parse_action(compare)

    def fold(kind: Callable[[tuple[Filter, ...]], Filter]) -> Callable[[Any], Filter]:
        return lambda tokens: kind(tuple(tokens[0][::2]))

    infix: Any = pp.infix_notation
    grammar = infix(
        comparison,
        [
            (lower("not"), 1, pp.OpAssoc.RIGHT, lambda tokens: Not(tokens[0][1])),
            (lower("and"), 2, pp.OpAssoc.LEFT, fold(Every)),
            (lower("or"), 2, pp.OpAssoc.LEFT, fold(Some)),
        ],
    )
    return grammar.parse_with_tabs()  # otherwise a tab in a text becomes spaces


def quoted(text: str) -> str:
    """Return a text quoted for a filter."""
    return "'" + text.replace("'", "''") + "'"


def quoted_field(name: str) -> str:
    """Return the name of a column as written in a filter: in backticks if it is not a single word."""
    plain = re.fullmatch(r"[^\W\d]\w*", name) and name.lower() not in _KEYWORDS
    return name if plain else "`" + name.replace("`", "``") + "`"


def parse(text: str) -> Filter:
    """Parse a filter.

    Raises:
        BadInput: the text does not follow the grammar; the message says where.
    """
    import pyparsing as pp

    if not text.strip():
        raise BadInput("the filter is empty; omit it, or write one such as label = 'tumour'")
    if len(text) > LENGTH_LIMIT:
        raise BadInput(f"the filter has {len(text)} characters; at most {LENGTH_LIMIT} are allowed")
    try:
        parsed: Filter = _grammar().parse_string(text, parse_all=True)[0]
    except (pp.ParseBaseException, RecursionError) as error:
        column = getattr(error, "column", 1)
        raise BadInput(
            f"the filter {text!r} cannot be read at character {column}; expected a filter such as "
            "label = 'tumour' and patient not in ('P1', 'P2'); put a column name with spaces in backticks: "
            "`tumour size` > 2"
        ) from error
    return parsed


def fields_of(wanted: Filter) -> set[str]:
    """Return the fields that a filter compares."""
    if isinstance(wanted, Compare):
        return {wanted.field}
    if isinstance(wanted, Not):
        return fields_of(wanted.part)
    parts = () if isinstance(wanted, Always) else wanted.parts
    return {name for part in parts for name in fields_of(part)}


def without_fields(wanted: Filter, absent: Set[str]) -> Filter:
    """Return a filter for an atlas without some fields: none of its tiles has a value there."""
    if not absent or isinstance(wanted, Always):
        return wanted
    if isinstance(wanted, Compare):
        return Always(holds(None, wanted)) if wanted.field in absent else wanted
    if isinstance(wanted, Not):
        return Not(without_fields(wanted.part, absent))
    return type(wanted)(tuple(without_fields(part, absent) for part in wanted.parts))


def select(columns: Columns, wanted: Filter) -> Mask:
    """Return which tiles (N,) pass a filter.

    Raises:
        BadInput: the atlas lacks a field, or a value has the wrong type.
    """
    if isinstance(wanted, Always):
        return np.full(len(columns), wanted.value)
    if isinstance(wanted, Not):
        return ~select(columns, wanted.part)
    if isinstance(wanted, Every | Some):
        masks = [select(columns, part) for part in wanted.parts]
        join = np.logical_and if isinstance(wanted, Every) else np.logical_or
        mask: Mask = join.reduce(masks)
        return mask
    return _compare(columns, wanted)


def _compare(columns: Columns, wanted: Compare) -> Mask:
    field = wanted.field
    numbers = _numbers(columns, field)
    if numbers is not None:
        return _compare_numbers(numbers, wanted)
    if field == "file":
        return _files(columns, wanted)
    if field in ANNOTATION_FIELDS:
        return _annotations(columns, wanted)
    if field in QUALITY and field not in columns.names():
        raise BadInput(
            f"no slide of the atlas has the measure {field!r}: delete the features from an earlier "
            "version, embed the slides again, and add them with --replace"
        )
    if field not in columns.names():
        raise BadInput(str(unknown_name("field", field, columns.fields())))
    coded = columns.coded(field)
    check_order(wanted, coded.names)
    passing = np.array([holds(name, wanted) for name in (*coded.names, None)])
    mask: Mask = passing[coded.codes]
    return mask


def _numbers(columns: Columns, field: str) -> NDArray[np.float64] | None:
    """Return a numeric column (N,), NaN for no value; None if the field is not numeric."""
    if field in {"x", "y"}:
        return columns.places()[:, "xy".index(field)].astype(np.float64)
    if field == "tile":
        return columns.ids(np.arange(len(columns))).astype(np.float64)
    if field == "mpp" or (field == "target_mpp" and field not in columns.names()):
        per_slide = np.array([np.nan if s[field] is None else s[field] for s in columns.slides])
        return np.repeat(per_slide.astype(np.float64), np.diff(columns.starts))
    if field == "cluster" or field.startswith("cluster."):
        name = field.partition(".")[2] or None
        clusters = columns.clusters(name)
        if clusters is None:
            if name is not None:
                raise BadInput(str(unknown_name("clustering", name, columns.clusterings())))
            raise BadInput("the atlas has no clusters yet; run `histoseek index fit` first")
        return np.where(clusters == NOT_PLACED, np.nan, clusters)
    if field in columns.qualities():
        return columns.quality(field).astype(np.float64)
    return None


def _compare_numbers(numbers: NDArray[np.float64], wanted: Compare) -> Mask:
    if any(isinstance(v, str) for v in wanted.values):
        raise BadInput(
            f"{wanted.field} is a number; the filter compares it with a text: {wanted.values}"
        )
    missing = np.isnan(numbers)
    if wanted.operator == "is null":
        return missing
    if wanted.operator == "is not null":
        return ~missing
    if wanted.operator in {"in", "not in"}:
        inside = np.isin(numbers, np.array(wanted.values, dtype=np.float64))
        return inside if wanted.operator == "in" else ~inside
    if wanted.operator not in _ORDER:
        raise BadInput(f"{wanted.field} is a number; {wanted.operator!r} compares only texts")
    with np.errstate(invalid="ignore"):
        mask: Mask = _ORDER[wanted.operator](numbers, wanted.values[0])
    return mask


_DENIED = {"!=": "=", "not in": "in", "not like": "like", "is null": "is not null"}
"""Operators that are true where the other one is false."""


def _annotations(columns: Columns, wanted: Compare) -> Mask:
    """Return the tiles in an annotation that passes; of a negation, those in none that fails it."""
    positive = replace(wanted, operator=_DENIED.get(wanted.operator, wanted.operator))
    mask = np.zeros(len(columns), dtype=bool)
    for item, positions in columns.annotated():
        value = getattr(item, ANNOTATION_FIELDS[wanted.field]) or None
        if value is not None and holds(value, positive):
            mask[positions] = True
    return ~mask if wanted.operator in _DENIED else mask


def _files(columns: Columns, wanted: Compare) -> Mask:
    mask = np.zeros(len(columns), dtype=bool)
    for n in range(len(columns.slides)):
        names = columns.files(n)
        mask[columns.starts[n] : columns.starts[n + 1]] = (
            holds(None, wanted) if names is None else [holds(name, wanted) for name in names]
        )
    return mask


_ORDER: dict[str, Callable[[Any, Any], Any]] = {
    "=": operators.eq, "!=": operators.ne, "<": operators.lt, "<=": operators.le,
    ">": operators.gt, ">=": operators.ge,
}  # fmt: skip


def holds(name: str | None, wanted: Compare) -> bool:
    """Whether one value passes a comparison."""
    operator = wanted.operator
    if operator in {"is null", "is not null"}:
        return (name is None) == (operator == "is null")
    if name is None:
        return operator in {"!=", "not in", "not like"}
    if operator in {"in", "not in"}:
        return wanted.has(name) == (operator == "in")
    if operator in {"like", "not like"}:
        return wanted.is_like(name) == (operator == "like")
    return _ordered(name, operator, wanted.values[0])


def _ordered(name: str, operator: str, value: Value) -> bool:
    """Compare numerically if the value is a number, else as texts."""
    if isinstance(value, str):
        return bool(_ORDER[operator](name, value))
    number = _number(name)
    return operator == "!=" if number is None else bool(_ORDER[operator](number, value))


def _number(name: str) -> float | None:
    return None if _THOUSANDS.fullmatch(name) else number_of(name)


def notes_of(values_of: Callable[[str], list[str] | None], wanted: Filter) -> list[str]:
    """Return a note for each column that is compared with a number and has values that are none.

    Such values equal no number and are neither above nor below one, so they would be missed.

    Args:
        values_of: returns the different values of a column by its name; None if it has no texts.
        wanted: the filter.
    """
    if isinstance(wanted, Always):
        return []
    if not isinstance(wanted, Compare):
        parts = (wanted.part,) if isinstance(wanted, Not) else wanted.parts
        return list(dict.fromkeys(note for part in parts for note in notes_of(values_of, part)))
    found = wanted.operator in {*_ORDER, "in", "not in"} and wanted.operator != "!="
    numbers = [value for value in wanted.values if not isinstance(value, str)]
    names = (values_of(wanted.field) or []) if found and numbers else []
    strange = [name for name in names if _number(name) is None]
    if not strange:
        return []
    return [
        f"no numbers, so not compared with one: {len(strange)} of {len(names)} different values of "
        f"{wanted.field!r}, such as {strange[0]!r}"
    ]


def check_order(wanted: Compare, names: Iterable[str | None]) -> None:
    """Refuse to order dates whose texts do not sort by time.

    Raises:
        BadInput: the filter's value or one of the column's ``names`` is such a date.
    """
    value = wanted.values[0] if wanted.operator in {"<", "<=", ">", ">="} else None
    if not isinstance(value, str) or not (_DATE.match(value) or _ISO_DATE.match(value)):
        return
    wrong = next((name for name in (value, *names) if name and _DATE.match(name)), None)
    if wrong:
        raise BadInput(
            f"{wanted.field} is compared as text, and texts of dates such as {wrong!r} are not in order: "
            "write dates as 2024-01-31, in the table and in the filter"
        )
