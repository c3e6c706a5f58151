"""Whose row: which row of a table of slides belongs to which slide of an atlas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...artifacts.feature_files import name_in
from ...artifacts.slide_names import SlideName, match
from ...artifacts.tables import clean_row
from ...artifacts.walking import LeftOut
from ...errors import NotFound, unknown_name
from .rows import Added

Row = dict[str, str]
Metadata = Mapping[str, Mapping[str, Any]]
"""Rows by the name that each gives its slide; see :mod:`histoseek.artifacts.slide_names`."""
TABLE = "the metadata"


@dataclass(frozen=True)
class Rows:
    """The rows of a table, by the feature files whose slides they mean.

    Attributes:
        by_file: by feature file, the row of its slide.
        unused: names of rows that mean no slide at all, sorted.
        of_others: names of rows that mean slides of the atlas which are not being added.
        without: names of slides that are being added and that no row means.
        by_name_only: names of rows with folders in them, whose slides are known by their name only.
    """

    by_file: dict[Path, Row] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    of_others: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    by_name_only: tuple[str, ...] = ()

    def of(self, file: Path) -> Row:
        """Return the row of a feature file's slide; empty if it has none."""
        return self.by_file.get(file, {})


class AddedSlides(list[Added]):
    """What became of each feature file that was to be added.

    Attributes:
        rows: which rows of the metadata were used.
        left_out: what the folders hold beside feature files.
        notes: what was read of the table in its own way, such as cells without value.
    """

    def __init__(self, results: Iterable[Added], rows: Rows) -> None:
        """Keep the results, and the rows they had."""
        super().__init__(results)
        self.rows = rows
        self.left_out: list[LeftOut] = []
        self.notes: list[str] = []


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
    # Two files of one name and place are one slide (at two magnifications); of two places they are two.
    files_of: dict[SlideName, list[Path]] = {}
    for file in files:
        files_of.setdefault(name_in(file), []).append(file)
    added = list(files_of)
    names = {slide.name for slide in added}
    others = [slide for slide in names_in_atlas(slides) if slide.name not in names]
    every = [*added, *others]
    found = match(metadata, every, TABLE, "row")
    return Rows(
        {
            file: clean_row(metadata[row])
            for number, row in found.by_slide.items()
            if number < len(added)
            for file in files_of[every[number]]
        },
        tuple(found.unused),
        tuple(sorted(row for number, row in found.by_slide.items() if number >= len(added))),
        tuple(sorted(every[number].name for number in found.without if number < len(added))),
        tuple(
            sorted(
                row
                for number, row in found.by_slide.items()
                if not every[number].paths and row.replace("\\", "/").strip("./").count("/")
            )
        ),
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
