"""Decodes the JPEG segments (tiles, strips) of a TIFF, whose headers may state other sizes and colours."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

JPEG = 7
"""Compression of a TIFF (tag 259)."""
GREY, RGB = 1, 2
"""Photometric interpretations of a TIFF (tag 262)."""
_ADOBE_RGB = bytes.fromhex("ffee000e41646f626500640000000000")
"""Adobe's marker: the components are RGB, not YCbCr."""


def decode_segment(
    blob: bytes, tables: bytes | None, photometric: int, height: int, width: int
) -> NDArray[np.uint8]:
    """Return the pixels (H, W, 1 or 3) of a segment.

    Args:
        blob: the segment.
        tables: the TIFF's common JPEG tables.
        photometric: of the TIFF. If it says RGB, a segment with a JFIF header is YCbCr all the same, as
            Bio-Formats writes it.
        height: largest height that the segment may state.
        width: largest width that it may state.

    Raises:
        ValueError: the segment is damaged or truncated, or states a larger size.
    """
    import simplejpeg

    marker = _ADOBE_RGB if photometric == RGB and b"JFIF" not in blob[:32] else b""
    if tables or marker:
        blob = blob[:2] + marker + (tables[2:-2] if tables else b"") + blob[2:]
    high, wide, _, _ = simplejpeg.decode_jpeg_header(blob)
    if high > height or wide > width:
        raise ValueError(f"it states {wide} x {high} pixels")
    colours = "GRAY" if photometric == GREY else "RGB"
    return np.asarray(simplejpeg.decode_jpeg(blob, colorspace=colours))
