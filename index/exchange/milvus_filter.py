"""Translates our filter language into a Milvus expression."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...errors import BadInput, unknown_name
from ..search.columns import NOT_PLACED
from ..search.filters import Always, Compare, Every, Filter, Not, check_order, holds
from ..store.packing import MISSING
from ..vectors.scan import Metric

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
        columns: for each column, the names in the order of their codes; the order never changes.
        slides: by code of the slide's name: id, checksum, size_px_level0, mpp and target_mpp (which is
            missing for slides that an older histoseek pushed).
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

    def field_of(self, column: str) -> str:
        """Return the name of the Milvus field that holds a column's codes."""
        return f"c{list(self.columns).index(column)}"


def expression_of(about: About, part: Filter) -> str:
    """Return a filter as a Milvus expression that contains only field names and numbers.

    Raises:
        BadInput: the collection lacks a field, or cannot filter by it.
    """
    if isinstance(part, Always):
        return "tile >= 0" if part.value else "tile < 0"
    if isinstance(part, Not):
        return f"not ({expression_of(about, part.part)})"
    if not isinstance(part, Compare):
        word = " and " if isinstance(part, Every) else " or "
        return word.join(f"({expression_of(about, inner)})" for inner in part.parts)
    name = part.field
    if name in {"x", "y", "tile", "cluster"}:
        return _number_expression(about, part)
    if name == "mpp" or (name == "target_mpp" and name not in about.columns):
        _check_numbers(part)
        position = {"mpp": 3, "target_mpp": 4}[name]
        values = {code: [*slide, None][position] for code, slide in about.slides.items()}
        texts = {c: None if v is None else repr(float(v)) for c, v in values.items()}
        return (
            f"{about.field_of('slide')} in {[c for c, text in texts.items() if holds(text, part)]}"
        )
    if name not in about.columns:
        raise unknown_name("field of the Milvus collection", name, about.columns)
    check_order(part, about.columns[name])
    codes = [code for code, text in enumerate(about.columns[name]) if holds(text, part)]
    codes += [MISSING] * holds(None, part)
    return f"{about.field_of(name)} in {codes}"


def _check_numbers(compare: Compare) -> None:
    name, operator = compare.field, compare.operator
    if any(isinstance(value, str) for value in compare.values):
        raise BadInput(f"{name} is a number; the filter compares it with {compare.values}")
    if operator in {"like", "not like"}:
        raise BadInput(f"{name} is a number; {operator!r} compares texts only")


def _number_expression(about: About, compare: Compare) -> str:
    _check_numbers(compare)
    name, operator = compare.field, compare.operator
    if name == "cluster" and not about.clustering:
        raise BadInput(
            "the atlas had no clusters when it was pushed; run `histoseek index fit` and push it again"
        )
    missing = f"{name} == {NOT_PLACED}" if name == "cluster" else "tile < 0"
    if operator in {"is null", "is not null"}:
        return missing if operator == "is null" else f"not ({missing})"
    numbers = [float(value) for value in compare.values]
    if operator in {"in", "not in"}:
        whole = [int(v) for v in numbers if v.is_integer() and abs(v) < 2**53 and v != NOT_PLACED]
        return f"{name} in {whole}" if operator == "in" else f"not ({name} in {whole})"
    compared = f"{name} {'==' if operator == '=' else operator} {numbers[0]!r}"
    return compared if operator == "!=" else f"({compared}) and not ({missing})"
