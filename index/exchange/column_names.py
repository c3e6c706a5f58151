"""Names of exported columns: unique, and allowed by the format; renamed columns are recorded."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from itertools import chain, count

from ...artifacts.spreadsheets import inert

LONGEST = 200
"""Maximum bytes of a name in AnnData; Zarr creates a folder for each column."""


def unique_names(
    names: Iterable[str],
    allowed: Callable[[str], str] = lambda name: name,
    taken: Collection[str] = (),
) -> dict[str, str]:
    """Return an allowed and unique name for every column; a name that is already allowed stays.

    Args:
        names: of the columns, each once.
        allowed: turns any name into one that the format allows.
        taken: names that the format reserves.

    Returns:
        The new name of each column. Unchanged names take precedence; a new name that is already in use
        gets ``_2``, then ``_3``, and so on.
    """
    cleaned = {name: allowed(name) or "column" for name in names}
    result = {name: name for name, clean in cleaned.items() if name == clean and name not in taken}
    used = {*taken, *result}
    for name, clean in cleaned.items():
        if name not in result:
            numbered = (f"{clean}_{number}" for number in count(2))
            result[name] = next(c for c in chain([clean], numbered) if c not in used)
            used.add(result[name])
    return {name: result[name] for name in cleaned}


def for_anndata(name: str) -> str:
    """Return a name that HDF5 and Zarr do not read as a path, and that is not too long for a folder."""
    short = for_numpy(name).encode("utf-8", "replace")[:LONGEST].decode("utf-8", "ignore")
    return f"_{short}" if short.startswith(".") else short


def for_numpy(name: str) -> str:
    """Return a name that a zip archive does not read as a path."""
    return re.sub(r"[/\\\0]", "_", name)


def for_tsv(name: str) -> str:
    """Return a name that fits in one cell and that no spreadsheet reads as a formula."""
    return str(inert(one_cell(name)))


def one_cell(text: str) -> str:
    """Return a text without tabs and line breaks."""
    return re.sub(r"[\t\r\n]", " ", text)
