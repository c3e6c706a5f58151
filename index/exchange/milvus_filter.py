"""Translates our filter language into a Milvus expression."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import BadInput, unknown_name
from ..search.columns import NOT_PLACED
from ..search.filters import Compare, Every, Filter, Not, holds
from ..store.packing import MISSING
from ..vectors.scan import Metric

Row = tuple[float, Mapping[str, Any]]
FORMAT = 1


@dataclass
class About:
    """Description of the collection of tiles, stored in the second collection.

    Attributes:
        atlas: id of the atlas.
        encoder: name of the encoder.
        sha256: of the encoder.
        dim: D.
        metric: cosine or l2.
        revision: of the atlas when it was pushed; -1 during a push or after an interrupted one.
        clustering: the clustering shown in hits; "" for none.
        index: type of Milvus's index.
        columns: for each column, the names in the order of their numbers; the order never changes.
        slides: by number of the slide's name: id, checksum, size_px_level0, mpp and target_mpp (the last
            is missing for slides that an older histoseek pushed).
    """

    atlas: str
    encoder: str
    sha256: str
    dim: int
    metric: Metric
    revision: int = -1
    clustering: str = ""
    index: str = "FLAT"
    columns: dict[str, list[str]] = field(default_factory=dict)
    slides: dict[int, list[Any]] = field(default_factory=dict)
    format: int = FORMAT


def expression_of(about: About, wanted: Filter) -> str:
    """Return a filter as a Milvus expression that contains only field names and numbers.

    Raises:
        BadInput: the collection lacks a field, or cannot filter by it.
    """
    if isinstance(wanted, Not):
        return f"not ({expression_of(about, wanted.part)})"
    if not isinstance(wanted, Compare):
        word = " and " if isinstance(wanted, Every) else " or "
        return word.join(f"({expression_of(about, part)})" for part in wanted.parts)
    if wanted.field in {"x", "y", "tile"} or wanted.field == "cluster":
        return _number_expression(about, wanted)
    if wanted.field == "mpp" or (
        wanted.field == "target_mpp" and "target_mpp" not in about.columns
    ):
        _check_numbers(wanted)
        place = {"mpp": 3, "target_mpp": 4}[wanted.field]
        values = {number: [*facts, None][place] for number, facts in about.slides.items()}
        numbers = [
            number
            for number, value in values.items()
            if holds(None if value is None else repr(float(value)), wanted)
        ]
        return f"c{list(about.columns).index('slide')} in {numbers}"
    if wanted.field not in about.columns:
        raise unknown_name("field of the Milvus collection", wanted.field, about.columns)
    names = about.columns[wanted.field]
    passing = [number for number, name in enumerate(names) if holds(name, wanted)]
    passing += [MISSING] * holds(None, wanted)
    return f"c{list(about.columns).index(wanted.field)} in {passing}"


def _check_numbers(wanted: Compare) -> None:
    if any(isinstance(value, str) for value in wanted.values):
        raise BadInput(f"{wanted.field} is a number; the filter compares it with {wanted.values}")
    if wanted.operator in {"like", "not like"}:
        raise BadInput(f"{wanted.field} is a number; {wanted.operator!r} is for texts")


def _number_expression(about: About, wanted: Compare) -> str:
    _check_numbers(wanted)
    if wanted.field == "cluster" and not about.clustering:
        raise BadInput("the atlas had no clusters when it was pushed; fit some and push again")
    missing = f"{wanted.field} == {NOT_PLACED}" if wanted.field == "cluster" else "tile < 0"
    if wanted.operator in {"is null", "is not null"}:
        return missing if wanted.operator == "is null" else f"not ({missing})"
    numbers = [float(value) for value in wanted.values]
    if wanted.operator in {"in", "not in"}:
        whole = [int(v) for v in numbers if v.is_integer() and abs(v) < 2**53 and v != NOT_PLACED]
        inside = f"{wanted.field} in {whole}"
        return inside if wanted.operator == "in" else f"not ({inside})"
    sign = {"=": "==", "!=": "!="}.get(wanted.operator, wanted.operator)
    compared = f"{wanted.field} {sign} {numbers[0]!r}"
    return compared if wanted.operator == "!=" else f"({compared}) and not ({missing})"
