"""How the catalog stores what is known of a slide's tiles: one blob per column, little-endian.

Coordinates are int32 (level-0 pixels), values that repeat (labels, patients) are numbers into a list of
names, texts are JSON; the last two are deflated. A million tiles are read in some milliseconds.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import BadInput, Damaged

Codes = NDArray[np.int32]
MISSING = -1
"""Code of a tile without a value."""
SEAL = "seal"


def seal(row: Mapping[str, Any]) -> bytes:
    """Return a checksum of a row of the catalog, which SQLite itself does not keep (16 bytes).

    A row's own id and a column that is not there yet do not count: they are NULL or given by SQLite.
    """
    digest = hashlib.blake2b(digest_size=16)
    for key in sorted(row):
        if key not in {SEAL, "id"} and row[key] is not None:
            value = row[key]
            if isinstance(value, (int, float)):
                value = float(value)  # SQLite gives 1.0 back for 1 in a REAL column
            digest.update(f"{key}\0".encode())
            digest.update(value if isinstance(value, bytes) else repr(value).encode())
    return digest.digest()


def pack_numbers(values: Any, dtype: str) -> bytes:
    """Encode numbers (N,)."""
    return np.ascontiguousarray(values, dtype=np.dtype(dtype)).tobytes()


def unpack_numbers(blob: bytes, dtype: str) -> NDArray[Any]:
    """Undo :func:`pack_numbers`; read-only.

    Raises:
        Damaged: not a whole number of values.
    """
    try:
        return np.frombuffer(blob, dtype=np.dtype(dtype))
    except ValueError as error:
        raise Damaged(
            f"a column of tiles is cut ({error}); restore the atlas's database"
        ) from error


def pack_places(places: Any) -> bytes:
    """Encode level-0 places (N, 2) as int32.

    Raises:
        BadInput: a coordinate that no slide has.
    """
    wide = np.asarray(places, dtype=np.int64).reshape(-1, 2)
    if len(wide) and (wide.min() < -(2**31) or wide.max() >= 2**31):
        raise BadInput(f"a tile lies at {wide.max()} px; expected coordinates below 2^31")
    return wide.astype("<i4").tobytes()


def unpack_places(blob: bytes) -> NDArray[np.int32]:
    """Undo :func:`pack_places`: (N, 2)."""
    numbers = unpack_numbers(blob, "<i4")
    if len(numbers) % 2:
        raise Damaged("a column of places is cut; restore the atlas's database")
    return numbers.reshape(-1, 2)


def pack_texts(values: Sequence[str | None] | None) -> bytes | None:
    """Encode texts (N,), one of which may be missing; None if all are."""
    if values is None or all(v is None for v in values):
        return None
    return zlib.compress(json.dumps(list(values), ensure_ascii=False).encode(), 1)


def unpack_texts(blob: bytes) -> list[str | None]:
    """Undo :func:`pack_texts`."""
    found: list[str | None] = json.loads(_inflate(blob))
    return found


def pack_coded(values: Sequence[str | None] | None) -> bytes | None:
    """Encode values that repeat (N,), "" and None being missing; None if all are."""
    if values is None or not any(values):
        return None
    names = sorted({v for v in values if v})
    number = {name: code for code, name in enumerate(names)}
    codes = np.array([number.get(v or "", MISSING) for v in values], dtype="<i4")
    return zlib.compress(
        json.dumps(names, ensure_ascii=False).encode() + b"\0" + codes.tobytes(), 1
    )


def unpack_coded(blob: bytes) -> tuple[list[str], Codes]:
    """Undo :func:`pack_coded`: the names, and their numbers (N,)."""
    names, _, codes = _inflate(blob).partition(b"\0")
    return json.loads(names), unpack_numbers(codes, "<i4")


def _inflate(blob: bytes) -> bytes:
    try:
        return zlib.decompress(blob)
    except zlib.error as error:
        raise Damaged(
            f"a column of tiles cannot be read ({error}); restore the atlas's database"
        ) from error
