"""The interface for reading slides, and the whole slide as one small image."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...errors import BadInput

MAX_OVERVIEW = 4_000_000_000
SMALLEST_PX = 128
UNREADABLE = "#ff00ff"
"""Colour of unreadable areas on a thumbnail. It counts as tissue, so that the tiles there are read and
recorded as unreadable instead of being dropped as background."""


class Source(ABC):
    """Reads the pixels of a slide; safe to use from several threads.

    Attributes:
        levels: downsample and (width, height) of each level, finest first.
        properties: the file's metadata, under OpenSlide's names (``openslide.mpp-x``, …).
        block_px: width and height of the blocks in which a whole level is read fastest.
    """

    levels: tuple[tuple[float, tuple[int, int]], ...]
    properties: dict[str, str]
    block_px: tuple[int, int]

    @abstractmethod
    def regions(
        self, corners: Sequence[tuple[int, int]], level: int, out: NDArray[np.uint8]
    ) -> dict[int, BadInput]:
        """Read regions of one size.

        Args:
            corners: left and top of each region in level-0 pixels.
            level: number of the level.
            out: (N, height, width, 3), sizes in pixels of the level; filled with RGB, outside the slide
                with the background colour. Unreadable regions are left unchanged.

        Returns:
            The error of each unreadable region, by its index in ``corners``; empty if all were read.
        """

    def scanned(self) -> NDArray[np.bool_] | None:
        """Return True where the slide was scanned, (H, W) over the whole slide; None if everywhere."""
        return None

    def forget(self) -> None:  # noqa: B027  # most sources cache nothing
        """Free the pixels cached for neighbouring regions."""

    @abstractmethod
    def close(self) -> None:
        """Close the file."""


class _Overview:
    """A whole level, downsampled block by block, so that memory use does not depend on the slide's size."""

    def __init__(self, source: Source, level: int) -> None:
        self._source, self._level = source, level
        self.error: BadInput | None = None
        self.readable = False

    def shrink(self, longest: int) -> Image.Image:
        across, down = self._source.levels[self._level][1]
        factor = max(1.0, max(across, down) / longest)
        small = Image.new("RGB", (max(1, round(across / factor)), max(1, round(down / factor))))
        wide, high = self._source.block_px
        for top, left in itertools.product(range(0, down, high), range(0, across, wide)):
            right, bottom = min(across, left + wide), min(down, top + high)
            x0, y0 = round(left / factor), round(top / factor)
            size = max(1, round(right / factor) - x0), max(1, round(bottom / factor) - y0)
            block = self._block(left, top, right - left, bottom - top)
            small.paste(block.resize(size, Image.Resampling.BOX), (x0, y0))
        return small

    def _block(self, left: int, top: int, width: int, height: int) -> Image.Image:
        """Read a block; if that fails, its quarters, down to 128 pixels; paint what remains unreadable."""
        downsample = self._source.levels[self._level][0]
        corner = round(left * downsample), round(top * downsample)
        pixels = np.empty((1, height, width, 3), dtype=np.uint8)
        failed = self._source.regions([corner], self._level, pixels)
        if not failed:
            self.readable = True
            return Image.fromarray(pixels[0])
        self.error = self.error or failed[0]
        block = Image.new("RGB", (width, height), UNREADABLE)
        if min(width, height) >= 2 * SMALLEST_PX:
            half = width // 2, height // 2
            for x, w in ((0, half[0]), (half[0], width - half[0])):
                for y, h in ((0, half[1]), (half[1], height - half[1])):
                    block.paste(self._block(left + x, top + y, w, h), (x, y))
        return block


def overview(source: Source, longest: int, path: Path) -> Image.Image:
    """Return the whole slide in RGB, at most ``longest`` pixels on its longer side.

    Raises:
        BadInput: no part of the slide can be read, or its smallest usable level is too large.
    """
    most = max(1.0, max(source.levels[0][1]) / longest)
    level = max(n for n, (down, _) in enumerate(source.levels) if n == 0 or down <= most)
    across, down = source.levels[level][1]
    if across * down > MAX_OVERVIEW:
        raise BadInput(
            f"{path}: its smallest usable level is {across} x {down} pixels; at most {MAX_OVERVIEW:,} are "
            "read to find tissue: save it as a pyramid"
        )
    whole = _Overview(source, level)
    small = whole.shrink(longest)
    source.forget()
    if not whole.readable and whole.error is not None:
        raise whole.error
    return small
