"""What slides are read through: OpenSlide, or a plain picture; both as regions of pyramid levels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from PIL import Image

from ..errors import BadInput, Damaged
from ..images import SUFFIXES, decode

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
BLOCK_PX = 1024
SMALLEST_PX = 128
UNREADABLE = "#ff00ff"
"""Colour of unreadable places on a thumbnail. It counts as tissue, so that the tiles there are tried,
and recorded as unreadable, instead of vanishing as background."""


class Source(Protocol):
    """What a slide is read through.

    Attributes:
        levels: downsample and (width, height) of each level, finest first.
    """

    levels: tuple[tuple[float, tuple[int, int]], ...]

    def region(self, x: int, y: int, level: int, width: int, height: int) -> Image.Image:
        """Return RGB at level-0 x, y; size in pixels of the level; beyond the slide is background."""
        ...

    def thumbnail(self, longest: int) -> Image.Image:
        """Return the whole slide in RGB, at most ``longest`` pixels on its longer side."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...


class OpenSlideSource:
    """OpenSlide, reopened after every error, because its handle is useless from then on."""

    def __init__(self, path: Path) -> None:
        """Open a slide.

        Raises:
            BadInput: OpenSlide does not know it, or finds it damaged.
        """
        import openslide

        self._openslide = openslide
        self._path = path
        try:
            self._slide = openslide.OpenSlide(str(path))
        except openslide.OpenSlideUnsupportedFormatError as error:
            raise BadInput(
                f"{path} is not a slide that OpenSlide reads (.svs .ndpi .mrxs .scn .bif .tiff .dcm …); "
                "if it should be one, it was cut short: copy it again"
            ) from error
        except openslide.OpenSlideError as error:
            raise BadInput(
                f"{path} cannot be opened ({error}); it is truncated or damaged: copy it again"
            ) from error
        sizes = self._slide.level_dimensions
        self.levels = tuple(zip(self._slide.level_downsamples, sizes, strict=True))
        self.properties: dict[str, str] = dict(self._slide.properties)
        self._background = f"#{self.properties.get('openslide.background-color', 'ffffff')}"

    def region(self, x: int, y: int, level: int, width: int, height: int) -> Image.Image:
        """Read one region; see :class:`Source`.

        Raises:
            BadInput: the region cannot be decoded.
        """
        try:
            picture = self._slide.read_region((x, y), level, (width, height))
        except self._openslide.OpenSlideError as error:
            self._reopen()
            raise BadInput(
                f"{self._path}: the region at x={x}, y={y} cannot be read ({error}); the file is "
                "truncated or damaged: copy it again"
            ) from error
        flat = Image.new("RGB", picture.size, self._background)
        flat.paste(picture, mask=picture.getchannel("A"))
        return flat

    def _reopen(self) -> None:
        self._slide.close()
        try:
            self._slide = self._openslide.OpenSlide(str(self._path))
        except self._openslide.OpenSlideError as error:
            raise Damaged(
                f"{self._path} can no longer be opened ({error}): copy it again"
            ) from error

    def thumbnail(self, longest: int) -> Image.Image:
        """Shrink the best level block by block, so that memory does not grow with the slide."""
        width, height = self.levels[0][1]
        level = self._slide.get_best_level_for_downsample(max(1.0, max(width, height) / longest))
        across, down = self.levels[level][1]
        if across * down > MAX_OVERVIEW:
            raise BadInput(
                f"{self._path}: its smallest usable level is {across} x {down} pixels; at most "
                f"{MAX_OVERVIEW:,} are read to find tissue: save it as a pyramid"
            )
        factor = max(1.0, max(across, down) / longest)
        small = Image.new("RGB", (max(1, round(across / factor)), max(1, round(down / factor))))
        self._broken: BadInput | None = None
        readable = False
        for left, top, right, bottom in blocks_of(across, down):
            x0, y0 = round(left / factor), round(top / factor)
            size = max(1, round(right / factor) - x0), max(1, round(bottom / factor) - y0)
            block, whole = self._block(level, left, top, right - left, bottom - top)
            readable = readable or whole
            small.paste(block.resize(size, Image.Resampling.BOX), (x0, y0))
        if not readable and self._broken is not None:
            raise self._broken
        return small

    def _block(
        self, level: int, left: int, top: int, width: int, height: int
    ) -> tuple[Image.Image, bool]:
        """Read a block of a level; where that fails, its quarters, down to 128 pixels.

        Returns:
            The block, with what is unreadable painted over, and whether any of it was readable.
        """
        downsample = self.levels[level][0]
        place = round(left * downsample), round(top * downsample)
        try:
            return self.region(*place, level, width, height), True
        except BadInput as error:
            self._broken = self._broken or error
        block, readable = Image.new("RGB", (width, height), UNREADABLE), False
        if min(width, height) >= 2 * SMALLEST_PX:
            half = width // 2, height // 2
            for x, w in ((0, half[0]), (half[0], width - half[0])):
                for y, h in ((0, half[1]), (half[1], height - half[1])):
                    part, fine = self._block(level, left + x, top + y, w, h)
                    block.paste(part, (x, y))
                    readable = readable or fine
        return block, readable

    def close(self) -> None:
        """Close the file."""
        self._slide.close()


def blocks_of(width: int, height: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield left, top, right, bottom of the blocks that cover a level."""
    for top in range(0, height, BLOCK_PX):
        for left in range(0, width, BLOCK_PX):
            yield left, top, min(width, left + BLOCK_PX), min(height, top + BLOCK_PX)


class PictureSource:
    """A plain picture as a slide of one level, held in memory."""

    def __init__(self, path: Path) -> None:
        """Decode the picture."""
        self._picture = Image.fromarray(decode(path, max_pixels=MAX_SLIDE_PICTURE))
        self.levels: tuple[tuple[float, tuple[int, int]], ...] = ((1.0, self._picture.size),)

    def region(self, x: int, y: int, level: int, width: int, height: int) -> Image.Image:
        """Cut out one region; see :class:`Source`."""
        flat = Image.new("RGB", (width, height), "#ffffff")
        box = (x, y, min(x + width, self._picture.width), min(y + height, self._picture.height))
        left, top = max(0, x), max(0, y)
        if box[2] > left and box[3] > top:
            flat.paste(self._picture.crop((left, top, *box[2:])), (left - x, top - y))
        return flat

    def thumbnail(self, longest: int) -> Image.Image:
        """Shrink the picture."""
        return shrink(self._picture, longest)

    def close(self) -> None:
        """Free the pixels."""
        self._picture.close()


def shrink(picture: Image.Image, longest: int) -> Image.Image:
    """Return a picture averaged down to at most ``longest`` pixels on its longer side."""
    factor = longest / max(picture.size)
    if factor >= 1:
        return picture
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return picture.resize(size, Image.Resampling.BOX)


def open_source(path: Path) -> tuple[Source, dict[str, str]]:
    """Open a file by OpenSlide if that knows it, else as a plain picture; returns its properties too.

    Raises:
        BadInput: neither can read it.
    """
    if is_openslide(path) or path.suffix.lower() in SLIDE_SUFFIXES:
        source = OpenSlideSource(path)
        return source, source.properties
    if path.suffix.lower() not in SUFFIXES:
        raise BadInput(
            f"{path} is neither a slide that OpenSlide reads nor a picture "
            f"({', '.join(sorted(SUFFIXES))})"
        )
    return PictureSource(path), {}


def is_openslide(path: Path) -> bool:
    """Whether OpenSlide knows the file's format."""
    import openslide

    try:
        return openslide.OpenSlide.detect_format(str(path)) is not None
    except openslide.OpenSlideError:
        return True  # it knows the format and found a fault, which opening will tell


def is_slide(path: Path) -> bool:
    """Whether a file is a slide by its name, or a TIFF that OpenSlide knows."""
    suffix = path.suffix.lower()
    if suffix in SLIDE_SUFFIXES:
        return True
    return suffix in {".tif", ".tiff"} and is_openslide(path)
