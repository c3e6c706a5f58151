"""Slides through OpenSlide, with the tiles of plain TIFF pyramids decoded directly where that is exact.

OpenSlide opens the file and reports its levels and scale. For SVS and generic TIFF, decoding the file's
segments directly gives the same pixels several times faster; this is checked on every level of every
slide when it is opened.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...artifacts.images import Rgb
from ...errors import BadInput, Damaged, HistoseekError
from .overview import Source
from .profiles import of_openslide
from .tiff_pixels import Level, TiffPixels, decodes_exactly, level_of
from .tiff_source import BY_TAG, whole_segments

_UNSUPPORTED = re.compile(
    "unsupported|not supported|transfer syntax|bitsallocated|samplesperpixel|photometric|image flavor",
    re.IGNORECASE,
)
MAX_COARSEST_PX = 64_000_000
"""Maximum pixels of the coarsest level for which the scanned area is determined."""
_DIRECT = {"aperio", "generic-tiff"}
_NEAR = 1e-3
"""Maximum distance of coordinates on a level from a whole pixel for a direct read."""


class OpenSlideSource(Source):
    """OpenSlide, reopened after every error, because an error makes its handle unusable."""

    def __init__(self, path: Path, direct: bool = True) -> None:
        """Open a slide; ``direct``: decode TIFF segments directly where that gives OpenSlide's pixels.

        Raises:
            BadInput: OpenSlide does not know the format, or reports damage.
        """
        import openslide

        self._openslide = openslide
        self._path = path
        self._lock = threading.Lock()
        try:
            self._slide = openslide.OpenSlide(str(path))
        except openslide.OpenSlideUnsupportedFormatError as error:
            dicom = path.suffix.lower() == ".dcm"
            hint = " (a segmentation, an annotation, or another modality?)" if dicom else ""
            raise BadInput(
                f"{path} is not a slide that OpenSlide reads (.svs .ndpi .mrxs .scn .bif .tiff .dcm …)"
                f"{hint}; if it is one, the file is truncated: copy it again"
            ) from error
        except openslide.OpenSlideError as error:
            raise BadInput(_why(path, error)) from error
        sizes = self._slide.level_dimensions
        self.levels: tuple[tuple[float, tuple[int, int]], ...] = tuple(
            zip(self._slide.level_downsamples, sizes, strict=True)
        )
        self.properties: dict[str, str] = dict(self._slide.properties)
        if self.properties.get("openslide.vendor") == "generic-tiff":
            self.properties[BY_TAG] = "yes"
        self.properties |= of_openslide(self._slide)
        self._background = f"#{self.properties.get('openslide.background-color', 'ffffff')}"
        self.block_px = (1024, 1024)
        self._pixels: TiffPixels | None = None
        self._direct: dict[int, int] = {}
        if direct and self.properties.get("openslide.vendor") in _DIRECT:
            self._open_directly()

    @property
    def reads_directly(self) -> tuple[int, ...]:
        """Levels whose segments are decoded without OpenSlide."""
        return tuple(sorted(self._direct))

    def _open_directly(self) -> None:
        """Find each level's page in the file, and keep the pages whose pixels equal OpenSlide's."""
        import tifffile

        try:
            with tifffile.TiffFile(self._path) as opened:
                whole = [page.aspage() for page in opened.pages]
                pages = [page for page in whole if page.is_tiled]
                levels = [self._level(pages, size) for _, size in self.levels]
        except Exception:  # OpenSlide can read what tifffile cannot
            return
        matched = [(number, level) for number, level in enumerate(levels) if level is not None]
        if not matched:
            return
        pixels = TiffPixels(self._path, [level for _, level in matched])
        same = [n for n, (number, _) in enumerate(matched) if self._is_same(pixels, n, number)]
        if not same:
            pixels.close()
            return
        self._pixels = pixels
        self._direct = {matched[n][0]: n for n in same}
        self.block_px = whole_segments(matched[same[0]][1])

    def _level(self, pages: list[Any], size: tuple[int, int]) -> Level | None:
        fitting = [page for page in pages if (page.imagewidth, page.imagelength) == size]
        if len(fitting) != 1:
            return None
        try:
            level = level_of(fitting[0], self._path)
        except HistoseekError:
            return None
        return level if decodes_exactly(level) else None

    def _is_same(self, pixels: TiffPixels, number: int, level: int) -> bool:
        """Whether the middle segment of a level, or its first, equals what OpenSlide reads."""
        at, down = pixels.levels[number], self.levels[level][0]
        left, top = at.across // 2 * at.tile_width, at.down // 2 * at.tile_height
        if not (_is_whole(left * down) and _is_whole(top * down)):
            left = top = 0
        size = min(at.tile_width, at.width - left), min(at.tile_height, at.height - top)
        mine = np.empty((1, size[1], size[0], 3), dtype=np.uint8)
        failed = pixels.squares(number, [(left, top)], mine)
        try:
            other = self._read(round(left * down), round(top * down), level, *size)
        except BadInput:
            return bool(failed)
        return not failed and np.array_equal(mine[0], other)

    def regions(
        self, corners: Sequence[tuple[int, int]], level: int, out: NDArray[np.uint8]
    ) -> dict[int, BadInput]:
        """Read several regions; see ``overview.Source``."""
        down = self.levels[level][0]
        scaled = [(x / down, y / down) for x, y in corners]
        exact = all(_is_whole(value) for corner in scaled for value in corner)
        if self._pixels is not None and level in self._direct and exact:
            whole = [(round(x), round(y)) for x, y in scaled]
            return self._pixels.squares(self._direct[level], whole, out)
        failed: dict[int, BadInput] = {}
        height, width = out.shape[1:3]
        for number, (x, y) in enumerate(corners):
            try:
                out[number] = self._read(x, y, level, width, height)
            except BadInput as error:
                failed[number] = error
        return failed

    def _read(self, x: int, y: int, level: int, width: int, height: int) -> Rgb:
        shared = self._slide
        try:
            region = shared.read_region((x, y), level, (width, height))
        except (self._openslide.OpenSlideError, ValueError):
            region = self._read_again(shared, x, y, level, width, height)
        flat = Image.new("RGB", region.size, self._background)
        flat.paste(region, mask=region.getchannel("A"))
        return np.asarray(flat)

    def _read_again(
        self, broken: Any, x: int, y: int, level: int, width: int, height: int
    ) -> Image.Image:
        """Read with a separate handle: the shared one may have failed on another thread's tile."""
        try:
            with self._reopened() as separate:
                region: Image.Image = separate.read_region((x, y), level, (width, height))
                return region
        except (self._openslide.OpenSlideError, ValueError) as error:
            raise BadInput(
                f"{self._path}: the region at x={x}, y={y} cannot be read ({error}); the file is "
                "truncated or damaged: copy it again"
            ) from error
        finally:
            with self._lock:
                if self._slide is broken:  # threads that still use the old handle may finish
                    self._slide = self._reopened()

    def _reopened(self) -> Any:
        try:
            return self._openslide.OpenSlide(str(self._path))
        except self._openslide.OpenSlideError as error:
            raise Damaged(
                f"{self._path} can no longer be opened ({error}): copy it again"
            ) from error

    def scanned(self) -> NDArray[np.bool_] | None:
        """Return where the coarsest level is opaque; see ``overview.Source``."""
        level = len(self.levels) - 1
        width, height = self.levels[level][1]
        if width * height > MAX_COARSEST_PX:
            return None
        try:
            whole = self._slide.read_region((0, 0), level, (width, height))
        except (self._openslide.OpenSlideError, ValueError):
            self._slide = self._reopened()
            return None
        opaque: NDArray[np.bool_] = np.asarray(whole.getchannel("A")) > 0
        return opaque

    def forget(self) -> None:
        """Free the segments that were decoded directly."""
        if self._pixels is not None:
            self._pixels.forget()

    def close(self) -> None:
        """Close the file."""
        self._slide.close()
        if self._pixels is not None:
            self._pixels.close()


def _why(path: Path, error: Exception) -> str:
    """Return why OpenSlide cannot open a file: an unsupported format, or damage."""
    if _UNSUPPORTED.search(str(error)):
        return (
            f"{path} has a format that OpenSlide does not read ({error}); convert it to 8-bit RGB in a "
            "tiled TIFF (JPEG) or an SVS"
        )
    return f"{path} cannot be opened ({error}); it is truncated or damaged: copy it again"


def _is_whole(coordinate: float) -> bool:
    return abs(coordinate - round(coordinate)) < _NEAR
