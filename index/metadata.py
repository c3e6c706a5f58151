"""Whose row: which row of a table of slides belongs to which slide of an atlas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import NotFound, unknown_name
from ..feature_files import name_in
from ..slide_names import SlideName, match
from ..tables import clean_row
from .records import Added

Row = dict[str, str]
Metadata = Mapping[str, Mapping[str, Any]]
"""Rows by the name that each gives its slide; see :mod:`histoseek.slide_names`."""
TABLE = "the metadata"


@dataclass(frozen=True)
class Rows:
    """The rows of a table, by the slides that they mean.

    Attributes:
        by_slide: by the slide's name in the atlas, its row.
        unused: names of rows that mean no slide at all, sorted.
        of_others: names of rows that mean slides of the atlas which are not being added.
        without: names of slides that are being added and that no row means.
    """

    by_slide: dict[str, Row] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    of_others: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


class AddedSlides(list[Added]):
    """What became of each feature file that was to be added.

    Attributes:
        rows: which rows of the metadata were used.
    """

    def __init__(self, results: Iterable[Added], rows: Rows) -> None:
        """Keep the results, and the rows they had."""
        super().__init__(results)
        self.rows = rows


def names_in_atlas(slides: Iterable[Any]) -> list[SlideName]:
    """Return what the slides of an atlas (rows of its table) may be called."""
    return [SlideName(row["name"], (row["source"],) if row["source"] else ()) for row in slides]


def match_rows(metadata: Metadata, files: Sequence[Path], slides: Iterable[Any]) -> Rows:
    """Find the row of each slide that is to be added.

    Args:
        metadata: rows by name.
        files: feature files.
        slides: rows of the atlas's table; a name that means one of these as well means two slides.

    Raises:
        BadInput: a row that means two slides, or two rows that mean one.
    """
    if not metadata:
        return Rows()
    known = {slide.name: slide for slide in names_in_atlas(slides)}
    added: dict[str, SlideName] = {}
    for file in files:
        slide = name_in(file)
        before = added.get(slide.name)
        paths = dict.fromkeys([*(before.paths if before else ()), *slide.paths])
        added[slide.name] = SlideName(slide.name, tuple(paths))
    every = list((known | added).values())
    found = match(metadata, every, TABLE, "row")
    by_slide = {every[n].name: name for n, name in found.by_slide.items()}
    return Rows(
        {name: clean_row(metadata[row]) for name, row in by_slide.items()},
        tuple(found.unused),
        tuple(sorted(row for name, row in by_slide.items() if name not in added)),
        tuple(sorted(name for name in added if name not in by_slide)),
    )


def slides_meant(names: Iterable[str], slides: Sequence[Any]) -> dict[str, str]:
    """Return, by the names that rows give, the slides of an atlas that they mean.

    Raises:
        BadInput: a name that means two slides, or two names that mean one.
        NotFound: names that mean no slide; all of them are named.
    """
    every = names_in_atlas(slides)
    found = match(sorted(names), every, TABLE, "row")
    if found.unused:
        first = unknown_name("slide", found.unused[0], sorted(s.name for s in every)[:10])
        if len(found.unused) == 1:
            raise first
        raise NotFound(
            f"{len(found.unused)} rows mean no slide of the atlas ({', '.join(map(repr, found.unused))}); "
            f"nothing was changed; {first}"
        )
    return {name: every[n].name for n, name in found.by_slide.items()}
