"""Checks bit depth, channels and colours of a TIFF by its tags, whichever library reads the pixels.

OpenSlide and libtiff convert pixels silently: they keep the upper 8 of 16 bits and the first of several
channels, and turn CMYK into some RGB. Such a slide must be refused instead.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import BadInput, HistoseekError
from .overview import Source

LOG = logging.getLogger("histoseek")
_MAGIC = {b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"}
_UNSIGNED = 1
_WHITE_IS_ZERO, _GREY, _RGB, _PALETTE, _YCBCR = 0, 1, 2, 3, 6
COLOURS = {(_RGB, 3), (_RGB, 4), (_YCBCR, 3), (_GREY, 1), (_WHITE_IS_ZERO, 1), (_PALETTE, 1)}
"""Pairs of photometric interpretation and samples per pixel that convert to RGB unambiguously."""

_REDUCED, _MASK = 1, 4
_JPEG = {6, 7}
_JPEG_2000 = {33003, 33004, 33005, 34712}
_HEAD = 64 * 1024
"""Bytes at the start of a segment that must contain its header."""


def check_page(page: Any, path: Path) -> None:
    """Check that a page, tifffile's TiffPage with its file open, converts to 8-bit RGB unambiguously.

    Raises:
        BadInput: more than 8 bits, signed or floating-point numbers, other channels or colours.
    """
    bits, kinds = _numbers(page.bitspersample), _numbers(page.sampleformat)
    if max(bits) > 8 or set(kinds) != {_UNSIGNED}:
        kind = "" if page.dtype is None else f" ({page.dtype})"
        raise BadInput(
            f"{path} has {max(bits)} bits per channel{kind}; expected 8-bit RGB: rescale it to 0-255 "
            "over the brightness range that you need"
        )
    samples, photometric = int(page.samplesperpixel), int(page.photometric)
    if (photometric, samples) not in COLOURS:
        name = getattr(page.photometric, "name", photometric)
        raise BadInput(
            f"{path} has {samples} channels as {name}; expected RGB, YCbCr or grey (fluorescence is "
            "not read): convert it to 8-bit RGB"
        )
    stored = _stored_bits(page)
    if stored > 8:
        raise BadInput(
            f"{path} states 8 bits per channel, but its compressed pixels have {stored}; "
            "expected 8-bit RGB: rescale it to 0-255 over the brightness range that you need"
        )


def check_source(path: Path, source: Source) -> None:
    """Check every level of a TIFF slide that OpenSlide opened; the other readers make their own checks."""
    vendor = source.properties.get("openslide.vendor")
    if vendor is None or not path.is_file() or _magic(path) not in _MAGIC:
        return
    import tifffile

    sizes = [size for _, size in source.levels]
    try:
        with tifffile.TiffFile(path, _multifile=False) as opened:
            pages = [page.aspage() for page in opened.pages]
            for page in _levels(pages, sizes, vendor):
                check_page(page, path)
    except HistoseekError:
        raise
    except Exception as error:  # OpenSlide reads some files whose tags tifffile cannot parse
        LOG.warning(
            "%s: its bits per channel could not be checked (%s: %s)",
            path,
            type(error).__name__,
            error,
        )


def _levels(pages: Sequence[Any], sizes: Sequence[tuple[int, int]], vendor: str) -> list[Any]:
    """Return the pages that hold levels; all tiled pages if no page is as large as a level."""
    images = [page for page in pages if not int(page.subfiletype) & _MASK]
    if vendor == "generic-tiff":  # OpenSlide takes the first page and its downsampled copies
        images = [p for n, p in enumerate(images) if n == 0 or int(p.subfiletype) & _REDUCED]
    fitting = [page for page in images if (page.imagewidth, page.imagelength) in set(sizes)]
    return fitting or [page for page in images if page.is_tiled]


def _magic(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(4)


def _numbers(value: Any) -> tuple[int, ...]:
    """Return the numbers of a tag that holds one number, or one per sample."""
    return tuple(int(v) for v in value) if isinstance(value, tuple) else (int(value),)


def _stored_bits(page: Any) -> int:
    """Return the bits per channel in the header of the first stored segment; 0 if it has none."""
    compression = int(page.compression)
    if compression not in _JPEG | _JPEG_2000:
        return 0
    first = next((n for n, size in enumerate(page.databytecounts) if size), None)
    file = page.parent.filehandle
    if first is None or file.closed:
        return 0
    file.seek(page.dataoffsets[first])
    head = file.read(min(_HEAD, page.databytecounts[first]))
    return _jpeg_bits(head) if compression in _JPEG else _jpeg_2000_bits(head)


def _jpeg_2000_bits(head: bytes) -> int:
    """Return the bits of the deepest component from the SIZ marker of a JPEG 2000 codestream."""
    at = head.find(b"\xff\x4f\xff\x51")
    if at < 0 or len(head) < at + 42:
        return 0
    count = int.from_bytes(head[at + 40 : at + 42], "big")
    depths = head[at + 42 : at + 42 + 3 * count : 3]
    return max(((depth & 0x7F) + 1 for depth in depths), default=0)


def _jpeg_bits(head: bytes) -> int:
    """Return the precision in bits from the SOF marker of a JPEG."""
    at = 2
    while at + 5 <= len(head) and head[at] == 0xFF:
        marker = head[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in {0xC4, 0xC8, 0xCC}:
            return head[at + 4]
        if marker == 0xDA:
            return 0
        at += 2 + int.from_bytes(head[at + 2 : at + 4], "big")
    return 0
