"""Matches the rows of a metadata table to the slides of an atlas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...artifacts.feature_files import name_in
from ...artifacts.slide_names import SlideName, match
from ...artifacts.walking import LeftOut
from ...errors import NotFound, unknown_name
from .rows import Added, check_types, checked_row

Row = dict[str, str]
Metadata = Mapping[str, Mapping[str, Any]]
"""Rows by slide name as written in the table; see :mod:`histoseek.artifacts.slide_names`."""
TABLE = "the metadata"


@dataclass(frozen=True)
class Rows:
    """The rows of a table, matched to feature files.

    Attributes:
        by_file: the row of each feature file's slide.
        unused: names of rows that match no slide, sorted.
        of_others: names of rows that match slides already in the atlas, which are not being added.
        without: names of slides being added that no row matches.
        by_name_only: names of rows that contain folders but were matched by file name only, because the
            path of the slide is not known.
    """

    by_file: dict[Path, Row] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    of_others: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    by_name_only: tuple[str, ...] = ()

    def of(self, file: Path) -> Row:
        """Return the row of a feature file's slide; an empty row if none matches."""
        return self.by_file.get(file, {})


class AddedSlides(list[Added]):
    """The result for each feature file to add.

    Attributes:
        rows: the metadata rows that were used.
        left_out: entries of the folders that are not feature files.
        notes: how unusual content of the table was read, such as cells that count as empty.
    """

    def __init__(self, results: Iterable[Added], rows: Rows) -> None:
        """Store the results and their metadata rows."""
        super().__init__(results)
        self.rows = rows
        self.left_out: list[LeftOut] = []
        self.notes: list[str] = []


def _names_in_atlas(slides: Iterable[Any]) -> list[SlideName]:
    """Return the names and paths by which the slides of an atlas (rows of its table) can be matched."""
    return [SlideName(row["name"], (row["source"],) if row["source"] else ()) for row in slides]


def match_rows(metadata: Metadata, files: Sequence[Path], slides: Iterable[Any]) -> Rows:
    """Find the row of each slide that is to be added.

    Args:
        metadata: rows by name.
        files: feature files.
        slides: rows of the atlas's table; a name that matches one of these and a new slide is ambiguous.

    Raises:
        BadInput: a row matches two slides, two rows match one slide, or a row is no dictionary of texts.
    """
    if not metadata:
        return Rows()
    for row in metadata.values():
        check_types(row)
    # Feature files with the same name and source path belong to one slide (at two magnifications).
    # With different source paths they belong to two slides.
    files_of: dict[SlideName, list[Path]] = {}
    for file in files:
        files_of.setdefault(name_in(file), []).append(file)
    names = {slide.name for slide in files_of}
    others = [slide for slide in _names_in_atlas(slides) if slide.name not in names]
    every = [*files_of, *others]
    matches = match(metadata, every, TABLE, "row")
    by_slide = {every[number]: row for number, row in matches.by_slide.items()}
    return Rows(
        {
            file: checked_row(metadata[row])
            for slide, row in by_slide.items()
            for file in files_of.get(slide, [])
        },
        tuple(matches.unused),
        tuple(sorted(row for slide, row in by_slide.items() if slide not in files_of)),
        tuple(
            sorted(every[number].name for number in matches.without if every[number] in files_of)
        ),
        tuple(
            sorted(row for slide, row in by_slide.items() if not slide.paths and _has_folder(row))
        ),
    )


def _has_folder(name: str) -> bool:
    return "/" in name.replace("\\", "/").strip("./")


def matches_of(
    names: Iterable[str], slides: Sequence[Any], source: str, kind: str
) -> tuple[dict[str, str], list[str]]:
    """Return the slide of the atlas that each name matches, and the names that match none.

    Args:
        names: to match; see :mod:`histoseek.artifacts.slide_names`.
        slides: rows of the atlas's table.
        source: what the names are from, for messages.
        kind: what one of them is, such as a row or a file.

    Raises:
        BadInput: a name matches two slides, or two names match one slide.
    """
    every = _names_in_atlas(slides)
    matches = match(sorted(names), every, source, kind)
    return {name: every[n].name for n, name in matches.by_slide.items()}, matches.unused


def slides_meant(names: Iterable[str], slides: Sequence[Any]) -> dict[str, str]:
    """Return the slide of the atlas that each name matches.

    Raises:
        BadInput: a name matches two slides, or two names match one slide.
        NotFound: names match no slide; the message lists them all.
    """
    found, unused = matches_of(names, slides, TABLE, "row")
    if unused:
        first = unknown_name("slide", unused[0], [row["name"] for row in slides])
        if len(unused) == 1:
            raise first
        raise NotFound(
            f"{len(unused)} rows match no slide of the atlas ({', '.join(map(repr, unused))}); nothing was "
            f"changed; {first}"
        )
    return found
