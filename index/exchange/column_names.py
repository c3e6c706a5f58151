"""Names of exported columns: unique, and allowed by the format; renamed columns are recorded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

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
    wanted = {name: allowed(name) or "column" for name in names}
    found = {n: n for n, made in wanted.items() if n == made and n not in taken}
    used = {*taken, *found}
    for name, made in wanted.items():
        if name in found:
            continue
        candidate, number = made, 2
        while candidate in used:
            candidate, number = f"{made}_{number}", number + 1
        found[name] = candidate
        used.add(candidate)
    return {name: found[name] for name in wanted}


def for_anndata(name: str) -> str:
    """Return a name that HDF5 and Zarr do not read as a path, and that is not too long for a folder."""
    flat = name.replace("/", "_").replace("\\", "_").replace("\0", "_")
    short = flat.encode("utf-8", "replace")[:LONGEST].decode("utf-8", "ignore")
    return f"_{short}" if short.startswith(".") else short


def for_numpy(name: str) -> str:
    """Return a name that a zip archive does not read as a path."""
    return name.replace("/", "_").replace("\\", "_").replace("\0", "_")


def for_tsv(name: str) -> str:
    """Return a name that fits in one cell and that no spreadsheet reads as a formula."""
    return str(inert(one_cell(name)))


def one_cell(text: str) -> str:
    """Return a text without tabs and line breaks."""
    for mark in "\t\r\n":
        text = text.replace(mark, " ")
    return text
