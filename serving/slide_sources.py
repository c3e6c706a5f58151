"""What slides are read through: OpenSlide, tifffile or a plain picture, as regions of levels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import BadInput, BrokenFile
from ..images import SUFFIXES, decode
from .openslide_source import OpenSlideSource
from .tiff_source import TiffSource, is_ome, looks_like_tiff

SLIDE_SUFFIXES = frozenset(
    {
        ".svs",
        ".ndpi",
        ".mrxs",
        ".scn",
        ".bif",
        ".vms",
        ".vmu",
        ".svslide",
        ".dcm",
        ".czi",
        ".qptiff",
    }
)
MAX_SLIDE_PICTURE = 170_000_000
MAX_OVERVIEW = 4_000_000_000
SMALLEST_PX = 128
UNREADABLE = "#ff00ff"
"""Colour of unreadable places on a thumbnail. It counts as tissue, so that the tiles there are tried,
and recorded as unreadable, instead of vanishing as background."""


class Source(Protocol):
    """What a slide is read through; safe to use from several threads.

    Attributes:
        levels: downsample and (width, height) of each level, finest first.
        properties: what the file says, under OpenSlide's names (``openslide.mpp-x``, …).
        block_px: width and height of the blocks in which a whole level is best read.
    """

    levels: tuple[tuple[float, tuple[int, int]], ...]
    properties: dict[str, str]
    block_px: tuple[int, int]

    def regions(
        self, places: Sequence[tuple[int, int]], level: int, out: NDArray[np.uint8]
    ) -> dict[int, BadInput]:
        """Read regions of one size.

        Args:
            places: left and top of each region in level-0 pixels.
            level: number of the level.
            out: (N, height, width, 3), sizes in pixels of the level; filled with RGB, and with the
                background beyond the slide. What cannot be read is left as it was.

        Returns:
            By number of the place why it cannot be read; empty if all was well.
        """
        ...

    def forget(self) -> None:
        """Free what is kept for neighbouring regions."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...


class _Overview:
    """A whole level, averaged down block by block, so that memory does not grow with the slide."""

    def __init__(self, source: Source, level: int) -> None:
        self._source, self._level = source, level
        self.broken: BadInput | None = None
        self.readable = False

    def shrink(self, longest: int) -> Image.Image:
        across, down = self._source.levels[self._level][1]
        factor = max(1.0, max(across, down) / longest)
        small = Image.new("RGB", (max(1, round(across / factor)), max(1, round(down / factor))))
        for left, top, right, bottom in blocks_of(across, down, self._source.block_px):
            x0, y0 = round(left / factor), round(top / factor)
            size = max(1, round(right / factor) - x0), max(1, round(bottom / factor) - y0)
            block = self._block(left, top, right - left, bottom - top)
            small.paste(block.resize(size, Image.Resampling.BOX), (x0, y0))
        return small

    def _block(self, left: int, top: int, width: int, height: int) -> Image.Image:
        """Read a block; where that fails, its quarters, down to 128 pixels; the rest is painted."""
        downsample = self._source.levels[self._level][0]
        place = round(left * downsample), round(top * downsample)
        found = np.empty((1, height, width, 3), dtype=np.uint8)
        failed = self._source.regions([place], self._level, found)
        if not failed:
            self.readable = True
            return Image.fromarray(found[0])
        self.broken = self.broken or failed[0]
        block = Image.new("RGB", (width, height), UNREADABLE)
        if min(width, height) >= 2 * SMALLEST_PX:
            half = width // 2, height // 2
            for x, w in ((0, half[0]), (half[0], width - half[0])):
                for y, h in ((0, half[1]), (half[1], height - half[1])):
                    block.paste(self._block(left + x, top + y, w, h), (x, y))
        return block


def overview(source: Source, longest: int, path: Path) -> Image.Image:
    """Return the whole slide in RGB, at most ``longest`` pixels on its longer side.

    Args:
        source: of the slide.
        longest: pixels of the longer side, at most.
        path: what messages call the slide.

    Raises:
        BadInput: no part of it can be read, or its smallest usable level is too large.
    """
    wanted = max(1.0, max(source.levels[0][1]) / longest)
    level = max(n for n, (down, _) in enumerate(source.levels) if n == 0 or down <= wanted)
    across, down = source.levels[level][1]
    if across * down > MAX_OVERVIEW:
        raise BadInput(
            f"{path}: its smallest usable level is {across} x {down} pixels; at most {MAX_OVERVIEW:,} are "
            "read to find tissue: save it as a pyramid"
        )
    whole = _Overview(source, level)
    small = whole.shrink(longest)
    source.forget()
    if not whole.readable and whole.broken is not None:
        raise whole.broken
    return small


def blocks_of(
    width: int, height: int, block: tuple[int, int]
) -> Iterator[tuple[int, int, int, int]]:
    """Yield left, top, right, bottom of the blocks (width, height) that cover a level."""
    for top in range(0, height, block[1]):
        for left in range(0, width, block[0]):
            yield left, top, min(width, left + block[0]), min(height, top + block[1])


class PictureSource:
    """A plain picture as a slide of one level, held in memory."""

    def __init__(self, path: Path) -> None:
        """Decode the picture."""
        self._picture = decode(path, max_pixels=MAX_SLIDE_PICTURE)
        height, width = self._picture.shape[:2]
        self.levels: tuple[tuple[float, tuple[int, int]], ...] = ((1.0, (width, height)),)
        self.properties: dict[str, str] = {}
        self.block_px = (width, height)

    def regions(
        self, places: Sequence[tuple[int, int]], level: int, out: NDArray[np.uint8]
    ) -> dict[int, BadInput]:
        """Cut out regions; see :class:`Source`."""
        for number, (x, y) in enumerate(places):
            height, width = out.shape[1:3]
            out[number] = 255
            left, top = max(0, x), max(0, y)
            part = self._picture[top : max(0, y + height), left : max(0, x + width)]
            high, wide = part.shape[:2]
            out[number, top - y : top - y + high, left - x : left - x + wide] = part
        return {}

    def forget(self) -> None:
        """Nothing is kept but the picture itself."""

    def close(self) -> None:
        """Free the pixels."""
        self._picture = np.zeros((0, 0, 3), dtype=np.uint8)


def open_source(path: Path) -> Source:
    """Open a file by OpenSlide if that knows it, else as TIFF, else as a plain picture.

    OME-TIFF always goes to tifffile: OpenSlide reads some, but neither their scale nor their pyramid.

    Raises:
        BadInput: none can read it.
    """
    if looks_like_tiff(path) and is_ome(path):
        return TiffSource(path)
    if is_openslide(path):
        try:
            return OpenSlideSource(path)
        except BadInput:
            if not looks_like_tiff(path):
                raise
            return _by_tifffile(path)
    if looks_like_tiff(path):
        return TiffSource(path)
    if path.suffix.lower() in SLIDE_SUFFIXES:
        return OpenSlideSource(path)
    if path.suffix.lower() not in SUFFIXES:
        raise BadInput(
            f"{path} is neither a slide that OpenSlide reads nor a picture "
            f"({', '.join(sorted(SUFFIXES))})"
        )
    return PictureSource(path)


def _by_tifffile(path: Path) -> Source:
    """Open a TIFF that OpenSlide knows and cannot read, such as one of another compression."""
    try:
        return TiffSource(path)
    except BadInput as error:
        try:
            return OpenSlideSource(path)
        except BadInput as other:
            # what tifffile knows to be unsupported is the better reason; of damage OpenSlide knows more
            raise (other if isinstance(error, BrokenFile) else error) from other


def is_openslide(path: Path) -> bool:
    """Whether OpenSlide knows the file's format."""
    import openslide

    try:
        return openslide.OpenSlide.detect_format(str(path)) is not None
    except openslide.OpenSlideError:
        return True  # it knows the format and found a fault, which opening will tell


def is_slide(path: Path) -> bool:
    """Whether a file is a slide by its name, or a TIFF that OpenSlide knows or that is OME-TIFF."""
    if path.suffix.lower() in SLIDE_SUFFIXES:
        return True
    return looks_like_tiff(path) and (is_openslide(path) or is_ome(path))
