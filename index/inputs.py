"""Reads the inputs of an atlas that a user gives: feature files, folders of them, tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..artifacts.tables import Table, read_csv
from ..artifacts.walking import LeftOut, once, walk
from ..errors import BadInput

PICKLES = frozenset({".pt", ".pth", ".pkl"})


def read_metadata(path: Path | None) -> Table | None:
    """Read a CSV of slides.

    Raises:
        BadInput: the file cannot be read, or has no column ``slide`` (or ``file``).
    """
    return None if path is None else read_csv(path, "slide", "file")


def rows_of(table: Table | None) -> dict[str, dict[str, str]]:
    """Return the rows of a table by slide name as written there."""
    return {} if table is None else {row[table.key]: row for row in table.rows}


def find_feature_files(inputs: Sequence[Path]) -> tuple[list[Path], list[LeftOut]]:
    """Expand folders to the feature files in them; also return the entries that were left out.

    Raises:
        BadInput: a path does not exist, or a folder has no feature files.
    """
    files: list[Path] = []
    left_out: list[LeftOut] = []
    for path in inputs:
        if not path.exists():
            raise BadInput(f"{path} does not exist; check the path")
        if not path.is_dir():
            files.append(path)
            continue
        walked = walk(path)
        inside = [file for file in walked.files if file.suffix.lower() == ".h5"]
        pickles = [file for file in walked.files if file.suffix.lower() in PICKLES]
        if not inside:
            hint = " (its pickle files, such as .pt, are not read)" if pickles else ""
            raise BadInput(
                f"{path} has no .h5 files{hint}; run `histoseek embed` first, or give a folder of "
                "another tool's feature files"
            )
        files += inside
        left_out += walked.left_out
        left_out += [LeftOut(str(file), "a pickle, which can run code") for file in pickles]
    unique = set(once(files).files)
    return [file for file in dict.fromkeys(files) if file in unique], left_out
