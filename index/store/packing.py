"""How the catalog stores the columns of a slide's tiles: one little-endian blob per column.

Coordinates are int32 (level-0 pixels). Repeated values (labels, patients) are indices into a list of
names. Texts are JSON. The last two are deflated. A million tiles are read in a few milliseconds.
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
REMEDY = "restore the database from a copy"


def seal(row: Mapping[str, Any]) -> bytes:
    """Return a checksum of a catalog row (16 bytes), since SQLite keeps none.

    It leaves out the row's id, which SQLite assigns, and columns without a value.
    """
    digest = hashlib.blake2b(digest_size=16)
    for key in sorted(row):
        if key not in {SEAL, "id"} and row[key] is not None:
            value = row[key]
            if isinstance(value, (int, float)):
                value = float(value)  # SQLite returns 1.0 for a 1 in a REAL column
            digest.update(f"{key}\0".encode())
            digest.update(value if isinstance(value, bytes) else repr(value).encode())
    return digest.digest()


def pack_numbers(values: Any, dtype: str) -> bytes:
    """Encode numbers (N,)."""
    return np.ascontiguousarray(values, dtype=np.dtype(dtype)).tobytes()


def unpack_numbers(blob: bytes, dtype: str) -> NDArray[Any]:
    """Decode what :func:`pack_numbers` encoded; the array is read-only.

    Raises:
        Damaged: the blob does not hold a whole number of values.
    """
    try:
        return np.frombuffer(blob, dtype=np.dtype(dtype))
    except ValueError as error:
        raise Damaged(
            f"a tile column in the atlas's database is incomplete ({error}); {REMEDY}"
        ) from error


def pack_places(places: Any) -> bytes:
    """Encode level-0 coordinates (N, 2) as int32.

    Raises:
        BadInput: a coordinate is out of range.
    """
    wide = np.asarray(places, dtype=np.int64).reshape(-1, 2)
    if len(wide) and (wide.min() < -(2**31) or wide.max() >= 2**31):
        raise BadInput(
            f"tiles have coordinates from {wide.min()} to {wide.max()} px; expected -2^31 to 2^31 - 1"
        )
    return wide.astype("<i4").tobytes()


def unpack_places(blob: bytes) -> NDArray[np.int32]:
    """Decode what :func:`pack_places` encoded: (N, 2)."""
    numbers = unpack_numbers(blob, "<i4")
    if len(numbers) % 2:
        raise Damaged(f"the tile coordinates in the atlas's database are incomplete; {REMEDY}")
    return numbers.reshape(-1, 2)


def pack_texts(values: Sequence[str | None] | None) -> bytes | None:
    """Encode texts (N,), some of which may be missing; None if all are missing."""
    if values is None or all(v is None for v in values):
        return None
    return zlib.compress(json.dumps(list(values), ensure_ascii=False).encode(), 1)


def unpack_texts(blob: bytes) -> list[str | None]:
    """Decode what :func:`pack_texts` encoded."""
    texts: list[str | None] = json.loads(_inflate(blob))
    return texts


def pack_coded(values: Sequence[str | None] | None) -> bytes | None:
    """Encode repeated values (N,); "" and None count as missing. Return None if all are missing."""
    if values is None or not any(values):
        return None
    names = sorted({v for v in values if v})
    number = {name: code for code, name in enumerate(names)}
    codes = np.array([number.get(v or "", MISSING) for v in values], dtype="<i4")
    text = json.dumps(names, ensure_ascii=False)
    return zlib.compress(text.encode() + b"\0" + codes.tobytes(), 1)


def unpack_coded(blob: bytes) -> tuple[list[str], Codes]:
    """Decode what :func:`pack_coded` encoded: the names, and the index of each value (N,)."""
    names, _, codes = _inflate(blob).partition(b"\0")
    return json.loads(names), unpack_numbers(codes, "<i4")


def _inflate(blob: bytes) -> bytes:
    try:
        return zlib.decompress(blob)
    except zlib.error as error:
        raise Damaged(
            f"a tile column in the atlas's database cannot be read ({error}); {REMEDY}"
        ) from error
