"""Reads CSV tables from users, as Excel, LibreOffice, pandas or R write them.

A table needs a header, and no item may occur twice. The separator, the encoding and cells that mean *no
value* are detected. Anything other than plain comma-separated UTF-8 is reported in :attr:`Table.notes`.
"""

from __future__ import annotations

import csv
import io
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..console import counted
from ..errors import BadInput

NO_VALUE = frozenset({
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>",
    "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
})  # fmt: skip
"""Texts that mean *no value*: the default list of pandas' ``read_csv``, and Excel's ``#N/A``."""

COLUMNS = ("slide", "file", "label", "patient", "mpp")
"""Columns with a meaning in every table. In a CSV table they may be written in any case."""

SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}


@dataclass(frozen=True)
class Table:
    """A table that was read.

    Attributes:
        origin: name of the table in messages.
        key: the column that names the items.
        rows: one dictionary per row; *no value* becomes the empty text.
        notes: what was detected or left out while reading, one sentence each.
    """

    origin: str
    key: str
    rows: tuple[dict[str, str], ...]
    notes: tuple[str, ...] = ()


def same_text(text: str) -> str:
    """Return text in Unicode's composed form (NFC), so that equal names compare equal."""
    return unicodedata.normalize("NFC", text)


def value_of(given: Any) -> str:
    """Return a cell as text; the empty text if it means *no value* (None, NaN, NaT, ``N/A`` …)."""
    text = "" if given is None else str(given)
    missing_time = text == "NaT" and not isinstance(given, str)
    return "" if missing_time or text in NO_VALUE else text


def clean_row(row: Mapping[Any, Any]) -> dict[str, str]:
    """Return a row with its values as texts; see :func:`value_of`."""
    return {str(key): value_of(value) for key, value in row.items()}


def own_name(name: str, taken: Iterable[str], names: Iterable[str] = COLUMNS) -> str:
    """Return the one of ``names`` that a column means if only the case differs; else the column's name.

    If a column of that very name is ``taken``, no other one means it.
    """
    meant = name.strip().casefold()
    return meant if meant in names and meant not in taken else name


def number_of(text: str) -> float | None:
    """Return the number in a cell, also with a decimal comma; None if there is no number."""
    try:
        return float(text.replace(",", ".", 1) if "." not in text else text)
    except ValueError:
        return None


def read_csv(path: Path, *keys: str, within: str | None = None, also: Sequence[str] = ()) -> Table:
    """Read a CSV file; see :func:`parse_table`.

    Raises:
        BadInput: the file cannot be read, or for the reasons in :func:`parse_table`.
    """
    try:
        return parse_table(path.read_bytes(), str(path), *keys, within=within, also=also)
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}); check the path") from error


def parse_table(
    blob: bytes, origin: str, *keys: str, within: str | None = None, also: Sequence[str] = ()
) -> Table:
    """Read the bytes of a CSV table.

    Args:
        blob: the file: UTF-8, UTF-16 or Windows' cp1252; separated by comma, semicolon, tab or ``|``.
        origin: name of the table in messages.
        keys: possible names of the column that identifies the rows; the first one in the table is used.
        within: optional second column that identifies rows with the same key.
        also: columns with a meaning besides :data:`COLUMNS` and the keys.

    Raises:
        BadInput: the bytes are not text, the key column is missing, a row has no value in it, or an item
            occurs twice. The message gives the detected encoding and separator.
    """
    text, encoding = _decoded(blob, origin)
    lines = list(io.StringIO(text, newline=""))
    first = lines[0].rstrip("\r\n") if lines else ""
    if (
        first.lower().startswith("sep=") and len(first) == 5
    ):  # Excel's separator line, not the header
        separator, lines = first[4], ["\n", *lines[1:]]
    else:
        separator = _separator(lines, keys)
    try:
        reader = csv.reader(lines, delimiter=separator)
        cells = [(reader.line_num, row) for row in reader if any(map(str.strip, row))]
    except csv.Error as error:
        raise BadInput(f"{origin} is not a CSV table ({error}); save it as CSV again") from error
    columns = [same_text(name.strip()) for name in cells[0][1]] if cells else []
    written = columns
    columns = [own_name(name, columns, {*COLUMNS, *keys, *also}) for name in columns]
    key = next((name for name in keys if name in columns), None)
    separated = f"separated by {SEPARATORS.get(separator, repr(separator))}"
    if key is None:
        expected = " or ".join(map(repr, keys))
        if not columns:
            raise BadInput(f"{origin} is empty; expected a table with a column {expected}")
        raise BadInput(
            f"{origin} has columns {written}; expected a column {expected} (read as {encoding}, "
            f"{separated})"
        )
    notes = [] if separator == "," else [f"{origin}: {separated}"]
    if encoding == "cp1252":
        notes.append(f"{origin}: not UTF-8; read as Windows' cp1252: check names with accents")
    for name, meant in zip(written, columns, strict=True):
        if name != meant:
            notes.append(f"{origin}: column {name!r} is read as {meant!r}")
    columns, dropped = _without_empty_columns(columns, [row for _, row in cells[1:]])
    if dropped:
        notes.append(f"{origin}: {dropped} empty column(s) without a name left out")
    if len(set(columns)) < len(columns):
        raise BadInput(f"{origin} has two columns of the same name: {columns}")
    no_values: Counter[str] = Counter()
    rows = _rows(cells[1:], columns, key, within, origin, no_values)
    if no_values:
        each = ", ".join(f"{text} {count}" for text, count in sorted(no_values.items()))
        notes.append(f"{origin}: {no_values.total()} cell(s) read as no value ({each})")
    return Table(origin, key, tuple(rows), tuple(notes))


def _decoded(blob: bytes, origin: str) -> tuple[str, str]:
    """Return the text of a table and the name of its encoding."""
    if blob[:4] == b"PK\x03\x04" or blob[:8] == b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1":
        raise BadInput(f"{origin} is a workbook, not a CSV table; save it as CSV UTF-8")
    if blob[:2] in {b"\xff\xfe", b"\xfe\xff"}:
        encoding = "utf-16"
    elif b"\0" in blob[:64]:
        encoding = "utf-16-be" if blob[:1] == b"\0" else "utf-16-le"
    else:
        encoding = "utf-8-sig"
    try:
        text = blob.decode(encoding)
    except UnicodeDecodeError as error:
        try:
            text, encoding = blob.decode("cp1252" if encoding == "utf-8-sig" else "ascii"), "cp1252"
        except UnicodeDecodeError:
            raise BadInput(
                f"{origin} is not text in UTF-8, UTF-16 or cp1252 ({error}); save it as CSV UTF-8"
            ) from error
    if "\0" in text:
        raise BadInput(f"{origin} is not a CSV table (it contains NUL bytes); save it as CSV UTF-8")
    return text, encoding.removesuffix("-sig")


def _separator(lines: Sequence[str], keys: Sequence[str]) -> str:
    """Return the separator that gives a header with one of ``keys``, else the most frequent one."""
    header = next((line for line in lines if line.strip()), "")
    for separator in SEPARATORS:
        try:
            names = {
                name.strip().casefold()
                for name in next(csv.reader([header], delimiter=separator), [])
            }
        except csv.Error:  # the actual reading reports the error
            continue
        if names & {key.casefold() for key in keys}:
            return separator
    return max(SEPARATORS, key=header.count)


def _without_empty_columns(names: list[str], rows: Sequence[list[str]]) -> tuple[list[str], int]:
    """Drop trailing columns without name and values, as Excel writes them; also return their number."""
    count = len(names)
    while (
        count
        and not names[count - 1]
        and not any("".join(row[count - 1 : count]).strip() for row in rows)
    ):
        count -= 1
    return names[:count], len(names) - count


def _rows(
    cells: Sequence[tuple[int, list[str]]],
    names: Sequence[str],
    key: str,
    within: str | None,
    origin: str,
    no_values: Counter[str],
) -> list[dict[str, str]]:
    """Return rows as dictionaries; count in ``no_values`` the texts that mean *no value*."""
    rows: list[dict[str, str]] = []
    seen: set[tuple[str, str]] = set()
    for number, row in cells:
        while len(row) > len(names) and not row[-1].strip():
            row = row[:-1]
        if len(row) != len(names):
            values, columns = counted(len(row), "value"), counted(len(names), "column")
            raise BadInput(
                f"{origin}, line {number}: {values} for {columns}; if a value contains the separator, put "
                "the value in double quotes"
            )
        clean: dict[str, str] = {}
        for name, cell in zip(names, row, strict=True):
            clean[name] = value_of(cell.strip())
            if not clean[name] and cell.strip():
                no_values[cell.strip()] += 1
        if not clean[key]:
            raise BadInput(f"{origin}, line {number}: no value for {key!r}; fill it in")
        item = same_text(clean[key]), same_text(clean.get(within or "", ""))
        if item in seen:
            text = " ".join(filter(None, item))
            raise BadInput(
                f"{origin}, line {number}: {text!r} appears twice; remove one of the rows"
            )
        seen.add(item)
        rows.append(clean)
    return rows
