"""Names of exported columns: each unique, each allowed by the format, and what was renamed is known."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from ...artifacts.spreadsheets import inert

LONGEST = 200
"""Bytes of a name in AnnData; Zarr makes a folder of each column."""


def unique_names(
    names: Iterable[str],
    allowed: Callable[[str], str] = lambda name: name,
    taken: Collection[str] = (),
) -> dict[str, str]:
    """Return a name of the format for every column; a name that is allowed as it is stays.

    Args:
        names: of the columns, each once.
        allowed: makes a name that the format allows of any.
        taken: names that the format keeps for itself.

    Returns:
        By column the name that it gets. Of several that would get one name, the first after those that
        stay gets ``_2``, the next ``_3``, and so on.
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
    """Return a name without what HDF5 and Zarr take for a path, and no longer than a folder's may be."""
    flat = name.replace("/", "_").replace("\\", "_").replace("\0", "_")
    short = flat.encode("utf-8", "replace")[:LONGEST].decode("utf-8", "ignore")
    return f"_{short}" if short.startswith(".") else short


def for_numpy(name: str) -> str:
    """Return a name without what a zip archive takes for a path."""
    return name.replace("/", "_").replace("\\", "_").replace("\0", "_")


def for_tsv(name: str) -> str:
    """Return a name that is one cell of a line, and no formula."""
    return str(inert(one_cell(name)))


def one_cell(text: str) -> str:
    """Return a text without tabs and ends of lines."""
    for mark in "\t\r\n":
        text = text.replace(mark, " ")
    return text
