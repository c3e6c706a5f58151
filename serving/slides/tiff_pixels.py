"""Pixels of tiled TIFF files, decoded segment by segment without OpenSlide, equal to OpenSlide's.

A segment is a TIFF tile or strip. libjpeg-turbo (simplejpeg) decodes JPEG and reports damaged data as
OpenSlide does; tifffile and imagecodecs decode every other compression.
"""

from __future__ import annotations

import io
import os
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...artifacts.images import Rgb
from ...artifacts.jpeg_segments import GREY, JPEG, RGB, decode_segment
from ...errors import BadInput, BrokenFile
from .tiff_depth import check_page

MAX_SEGMENT_PX = 64_000_000
CACHE_BYTES = 64 * 2**20
"""Bytes of decoded segments cached per file: about one row of segments across a large slide, so that
the next row of tiles need not decode them again."""

_YCBCR = 6
_LOSSLESS = {1, 5, 8, 32773, 32946, 34925, 50000}
"""Lossless compressions: none, LZW, Deflate, PackBits, LZMA, Zstandard."""

_WITH_HEADER = {33003, 33004, 33005, 34712, 34927, 34933, 50001}
"""JPEG 2000, WebP, PNG: their header holds the size, which is checked before decoding."""


@dataclass(frozen=True)
class Level:
    """One level of a pyramid, in segments of ``tile_width`` x ``tile_height`` pixels.

    Attributes:
        page: tifffile's page.
        planes: 3 if the file stores red, green and blue in separate planes, else 1.
        alpha: meaning of a fourth channel: ``over`` (blended over white), ``premultiplied`` or "" (none).
    """

    width: int
    height: int
    tile_width: int
    tile_height: int
    page: Any
    planes: int
    alpha: str = ""

    @property
    def across(self) -> int:
        """Segments per row."""
        return -(-self.width // self.tile_width)

    @property
    def down(self) -> int:
        """Rows of segments."""
        return -(-self.height // self.tile_height)


def level_of(page: Any, path: Path) -> Level:
    """Describe a page, tifffile's TiffPage, of 8-bit RGB or grey.

    Raises:
        BadInput: the pixels do not convert to 8-bit RGB unambiguously, or the segments do not fit.
    """
    width, height = int(page.imagewidth), int(page.imagelength)
    samples, photometric = int(page.samplesperpixel), int(page.photometric)
    check_page(page, path)
    bits = page.bitspersample
    if page.dtype != np.uint8 or bits != 8 or photometric not in {RGB, _YCBCR, GREY}:
        name = getattr(page.photometric, "name", photometric)
        raise BadInput(
            f"{path} has {bits} bits per channel as {name}; expected 8 bits as RGB, YCbCr or grey: "
            "convert it to 8-bit RGB"
        )
    compression = int(page.compression)
    if compression not in {JPEG, *_LOSSLESS, *_WITH_HEADER}:
        name = getattr(page.compression, "name", compression)
        raise BadInput(
            f"{path} is compressed by {name}, which is not supported; save it as JPEG, Deflate, LZW, "
            "Zstandard or JPEG 2000"
        )
    if photometric == _YCBCR and compression != JPEG:
        raise BadInput(
            f"{path} has YCbCr that is not JPEG, whose RGB values are ambiguous; convert it to RGB"
        )
    if int(getattr(page, "imagedepth", 1)) != 1:
        raise BadInput(f"{path} is a volume of {page.imagedepth} planes; expected one image")
    tiled = bool(page.is_tiled)
    tile_width = int(page.tilewidth) if tiled else width
    tile_height = int(page.tilelength) if tiled else min(height, int(page.rowsperstrip))
    if min(width, height, tile_width, tile_height) < 1:
        raise BrokenFile(f"{path} has {width} x {height} pixels; it is damaged: copy it again")
    if tile_width * tile_height > MAX_SEGMENT_PX:
        raise BadInput(
            f"{path} is stored in segments of {tile_width} x {tile_height} pixels; expected at most "
            f"{MAX_SEGMENT_PX:,} pixels each: save it tiled (256 to 1024 pixels)"
        )
    planes = samples if int(page.planarconfig) == 2 and samples > 1 else 1
    extra = int(page.extrasamples[0]) if samples == 4 and page.extrasamples else 0
    alpha = {1: "premultiplied", 2: "over"}.get(extra, "")
    level = Level(width, height, tile_width, tile_height, page, planes, alpha)
    expected = level.across * level.down * planes
    if min(len(page.dataoffsets), len(page.databytecounts)) < expected:
        raise BrokenFile(
            f"{path} lists {len(page.dataoffsets)} segments of its {width} x {height} pixels; expected "
            f"{expected}: it is damaged, copy it again"
        )
    return level


class TiffPixels:
    """Regions of the levels of one TIFF file; safe to use from several threads."""

    def __init__(self, path: Path, levels: Sequence[Level]) -> None:
        """Open the file for random access; it is closed at the latest when this object is freed."""
        self._path = path
        self.levels = tuple(levels)
        self._file = os.open(path, os.O_RDONLY)
        self._closer = weakref.finalize(self, os.close, self._file)
        self._cache: OrderedDict[tuple[int, int], Rgb] = OrderedDict()
        self._cached = 0
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the file, and free the decoded segments."""
        self._file = -1  # the system may reuse the descriptor for another file
        self._closer()
        self.forget()

    def forget(self) -> None:
        """Free the decoded segments."""
        with self._lock:
            self._cache.clear()
            self._cached = 0

    def squares(
        self, level: int, corners: Sequence[tuple[int, int]], out: NDArray[np.uint8]
    ) -> dict[int, BadInput]:
        """Read regions as :meth:`.overview.Source.regions` does, but with corners in pixels of the level.

        A segment that regions share is decoded once; pixels outside the image are white.
        """
        at = self.levels[level]
        height, width = out.shape[1:3]
        users: dict[int, list[int]] = {}
        for number, (x, y) in enumerate(corners):
            if x < 0 or y < 0 or x + width > at.width or y + height > at.height:
                out[number] = 255
            first_row, end_row = max(0, y) // at.tile_height, -(-(y + height) // at.tile_height)
            first_column, end_column = max(0, x) // at.tile_width, -(-(x + width) // at.tile_width)
            for row in range(first_row, min(at.down, end_row)):
                for column in range(first_column, min(at.across, end_column)):
                    users.setdefault(row * at.across + column, []).append(number)
        failed: dict[int, BadInput] = {}
        for segment, numbers in sorted(users.items()):  # in the order of the file
            try:
                pixels = self._cached_segment(level, segment)
            except BadInput as error:
                failed.update(dict.fromkeys(numbers, error))
                continue
            top = segment // at.across * at.tile_height
            left = segment % at.across * at.tile_width
            bottom, right = top + pixels.shape[0], left + pixels.shape[1]
            for number in numbers:
                x, y = corners[number]
                x0, x1 = max(x, left), min(x + width, right)
                y0, y1 = max(y, top), min(y + height, bottom)
                out[number, y0 - y : y1 - y, x0 - x : x1 - x] = pixels[
                    y0 - top : y1 - top, x0 - left : x1 - left
                ]
        return failed

    def _cached_segment(self, level: int, number: int) -> Rgb:
        key = (level, number)
        with self._lock:
            cached = self._cache.get(key)
            if cached is not None:
                self._cache.move_to_end(key)
                return cached
        pixels = self.segment(self.levels[level], number)
        if pixels.nbytes * 8 <= CACHE_BYTES:
            with self._lock:
                if key not in self._cache:
                    self._cache[key] = pixels
                    self._cached += pixels.nbytes
                while self._cached > CACHE_BYTES:
                    self._cached -= self._cache.popitem(last=False)[1].nbytes
        return pixels

    def segment(self, level: Level, number: int) -> Rgb:
        """Decode one segment, clipped to the image, (h, w, 3); raise BadInput if it is damaged."""
        row, column = divmod(number, level.across)
        high = min(level.tile_height, level.height - row * level.tile_height)
        wide = min(level.tile_width, level.width - column * level.tile_width)
        try:
            planes = [
                self._decode(level, number + plane * level.across * level.down)
                for plane in range(level.planes)
            ]
            pixels = planes[0] if level.planes == 1 else np.concatenate(planes, axis=2)
            if pixels.shape[0] < high or pixels.shape[1] < wide:
                raise ValueError(f"it contains {pixels.shape[1]} x {pixels.shape[0]} pixels")
            return _rgb(pixels[:high, :wide], level.alpha)
        except Exception as error:  # a damaged segment can make a decoder fail in any way
            raise BadInput(
                f"{self._path}: the segment at x={column * level.tile_width}, "
                f"y={row * level.tile_height} of its {level.width} x {level.height} level cannot be "
                f"read ({error}); the file is truncated or damaged: copy it again"
            ) from error

    def _decode(self, level: Level, index: int) -> NDArray[np.uint8]:
        page = level.page
        size, offset = int(page.databytecounts[index]), int(page.dataoffsets[index])
        if size == 0:
            raise ValueError("nothing is stored there")
        blob = os.pread(self._file, size, offset)
        if len(blob) < size:
            raise ValueError("the file ends before it")
        if int(page.compression) == JPEG and level.planes == 1:
            return decode_segment(
                blob, page.jpegtables, int(page.photometric), level.tile_height, level.tile_width
            )
        if int(page.compression) in _WITH_HEADER:
            _check_size(level, blob)
        decoded = np.asarray(page.decode(blob, index, jpegtables=page.jpegtables)[0])
        if decoded.dtype != np.uint8:
            raise ValueError(f"it contains {decoded.dtype}, not 8 bits per channel")
        return decoded.reshape(decoded.shape[-3:])


def _check_size(level: Level, blob: bytes) -> None:
    """Refuse a segment whose header states a larger size than a segment has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(blob)) as header:
            wide, high = header.size
    if high > level.tile_height or wide > level.tile_width:
        raise ValueError(f"it states {wide} x {high} pixels")


def _rgb(pixels: NDArray[np.uint8], alpha: str) -> Rgb:
    """Return RGB from grey, RGB or RGBA; alpha is blended over white, an unspecified channel dropped."""
    if pixels.shape[2] == 1:
        return np.repeat(pixels, 3, axis=2)
    if pixels.shape[2] == 4 and alpha:
        share = pixels[:, :, 3:].astype(np.uint16)
        colour = pixels[:, :, :3].astype(np.uint16)
        if alpha == "over":
            colour = (colour * share + 127) // 255
        blended: Rgb = np.minimum(colour + (255 - share), 255).astype(np.uint8)
        return blended
    colours: Rgb = pixels[:, :, :3]
    return colours


def decodes_exactly(level: Level) -> bool:
    """Whether our decoders and OpenSlide's always give the same pixels for this level's compression.

    False for a level with empty segments: OpenSlide fills them differently.
    """
    exact = int(level.page.compression) in {JPEG, *_LOSSLESS}
    return exact and all(level.page.databytecounts) and level.planes == 1
