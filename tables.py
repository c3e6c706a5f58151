"""CSV tables from people: a header, one row per item, no item twice."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from .errors import BadInput


def read_table(
    stream: Iterable[str], origin: str, key: str = "file", within: str | None = None
) -> list[dict[str, str]]:
    """Read CSV rows as dictionaries; the header must have the column ``key``.

    Args:
        stream: lines.
        origin: what messages call it.
        key: column that tells rows apart, never empty.
        within: further column, if it is there, whose value tells rows of one key apart.

    Raises:
        BadInput: no header, no such column, a row without a value there, or a value given twice.
    """
    reader = csv.reader(stream)
    names = [name.strip() for name in next(reader, [])]
    if key not in names:
        raise BadInput(f"{origin} has columns {names}; expected a column {key!r}")
    if len(set(names)) < len(names):
        raise BadInput(f"{origin} names a column twice: {names}")
    rows: list[dict[str, str]] = []
    seen: set[tuple[str, str]] = set()
    for cells in reader:
        number = reader.line_num
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(names):
            raise BadInput(
                f"{origin}, line {number}: {len(cells)} values for {len(names)} columns; put a value with "
                "a comma in double quotes"
            )
        clean = {name: cell.strip() for name, cell in zip(names, cells, strict=True)}
        if not clean[key]:
            raise BadInput(f"{origin}, line {number}: no value for {key!r}")
        item = clean[key], clean.get(within or "", "")
        if item in seen:
            text = " ".join(filter(None, item))
            raise BadInput(f"{origin}, line {number}: {text!r} appears twice")
        seen.add(item)
        rows.append(clean)
    return rows


def read_csv(path: Path, key: str = "file", within: str | None = None) -> list[dict[str, str]]:
    """Read a CSV file by :func:`read_table`."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            return read_table(stream, str(path), key, within)
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}); check the path") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path} is not a UTF-8 CSV table ({error})") from error
