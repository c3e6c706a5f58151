"""TIFF slides that OpenSlide does not read: OME-TIFF, QPTIFF and plain TIFF, through tifffile."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from ...artifacts.slide_names import TIFF_SUFFIXES
from ...errors import BadInput, BrokenFile, HistoseekError
from .overview import Source
from .profiles import of_page
from .tiff_pixels import Level, TiffPixels, level_of

_UNITS = {"nm": 1e-3, "µm": 1.0, "μm": 1.0, "um": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6}
_ORIENTATIONS = {0, 1}
SERIES = "histoseek.series"
"""Property: which image of a TIFF was used and how many it holds, if there are several."""
BY_TAG = "histoseek.mpp-by-resolution-tag"
"""Property of slides whose only scale is a coarse print resolution (72 or 300 dpi)."""


class TiffImage(NamedTuple):
    """Name and size in pixels of an image in a TIFF."""

    name: str
    width: int
    height: int


class TiffSource(Source):
    """An image of a TIFF file with its pyramid, if it has one."""

    def __init__(self, path: Path, series: int = 0) -> None:
        """Open a TIFF; ``series`` is the index of the image that is the slide.

        Raises:
            BadInput: the file is not a TIFF or is damaged, its pixels do not convert to 8-bit RGB
                unambiguously, or no image has that index.
        """
        try:
            with open_tiff(path) as opened:
                pages = _pyramid(opened, path, series)
                levels = [level_of(page, path) for page in pages]
                self.properties = {
                    **_properties(opened, pages[0], path.name, series),
                    **of_page(pages[0]),
                }
        except HistoseekError:
            raise
        except Exception as error:  # a damaged header can make the parser fail in any way
            raise BrokenFile(
                f"{path} is not a readable TIFF slide ({type(error).__name__}: {error}); it is truncated "
                "or damaged: copy it again"
            ) from error
        self._pixels = TiffPixels(path, levels)
        first = levels[0]
        self.block_px = whole_segments(first)
        self.levels: tuple[tuple[float, tuple[int, int]], ...] = tuple(
            (first.width / at.width, (at.width, at.height)) for at in levels
        )

    def regions(
        self, corners: Sequence[tuple[int, int]], level: int, out: NDArray[np.uint8]
    ) -> dict[int, BadInput]:
        """See :class:`.overview.Source`."""
        down = self.levels[level][0]
        scaled = [(round(x / down), round(y / down)) for x, y in corners]
        return self._pixels.squares(level, scaled, out)

    def forget(self) -> None:
        """Free the decoded segments."""
        self._pixels.forget()

    def close(self) -> None:
        """Close the file."""
        self._pixels.close()


def open_tiff(path: Path) -> Any:
    """Open this file alone: OME-XML may name other files, which are separate slides."""
    import tifffile

    return tifffile.TiffFile(path, _multifile=False)


def whole_segments(level: Level, about: int = 1024) -> tuple[int, int]:
    """Return width and height of blocks of whole segments, so that no segment is decoded twice.

    Strips are as wide as the image; a block of strips is lower, to limit its pixels.
    """
    wide = max(1, about // level.tile_width) * level.tile_width
    high = min(about, about * about // wide)
    return wide, max(1, high // level.tile_height) * level.tile_height


def _pyramid(opened: Any, path: Path, number: int) -> list[Any]:
    if not opened.series:
        raise BrokenFile(f"{path} contains no image; copy it again")
    if not 0 <= number < len(opened.series):
        raise BadInput(
            f"{path} has no series {number}; it has {len(opened.series)} image(s), numbered from 0"
        )
    series = opened.series[number]
    first = series.levels[0]
    if len(first.pages) != 1:
        raise BadInput(
            f"{path} has {len(first.pages)} planes (axes {first.axes}, shape {first.shape}): channels, "
            "depths or times; expected one image of 8-bit RGB (fluorescence is not read)"
        )
    pages = [level.pages[0] for level in series.levels if len(level.pages) == 1]
    orientation = int(pages[0].tags.valueof("Orientation", 1))
    if orientation not in _ORIENTATIONS:
        raise BadInput(
            f"{path} is stored rotated or mirrored (TIFF orientation {orientation}), so coordinates "
            "would be ambiguous; save it upright"
        )
    pages = [page.aspage() for page in pages]
    widths = [page.imagewidth for page in pages]
    return [p for n, p in enumerate(pages) if n == 0 or p.imagewidth < min(widths[:n])]


def _properties(opened: Any, page: Any, name: str, number: int) -> dict[str, str]:
    count = len(opened.series)
    properties = {SERIES: f"{number} of 0 to {count - 1}"} if count > 1 else {}
    image = TiffImage(str(opened.series[number].name), page.imagewidth, page.imagelength)
    sizes = _ome_mpp(opened.ome_metadata, name, image) if opened.is_ome else None
    if sizes is None:
        sizes = _tag_mpp(page)
        if sizes is None:
            return properties
        properties[BY_TAG] = "yes"
    return {**properties, "openslide.mpp-x": repr(sizes[0]), "openslide.mpp-y": repr(sizes[1])}


def _ome_mpp(document: str | None, file: str, image: TiffImage) -> tuple[float, float] | None:
    """Return µm per pixel of an image in a file; None if the OME-XML does not state it unambiguously.

    Images are identified by size and name: if the document also describes images in other files, its
    order differs from the file's.
    """
    if not document or "<!DOCTYPE" in document:
        return None
    try:
        entries = [
            (element.get("Name", ""), pixels)
            for element in ElementTree.fromstring(document).iter()
            if element.tag.endswith("Image")
            for pixels in element
            if pixels.tag.endswith("Pixels")
        ]
        of_file = [
            (name, pixels)
            for name, pixels in entries
            if any(child.get("FileName") == file for child in pixels.iter())
        ]
        entries = of_file or entries
        if len(entries) > 1:
            size = str(image.width), str(image.height)
            entries = [(n, p) for n, p in entries if (p.get("SizeX"), p.get("SizeY")) == size]
        named = [(n, p) for n, p in entries if n == image.name]
        sizes = {_physical_size(pixels) for _, pixels in named or entries}
    except (ElementTree.ParseError, KeyError, ValueError):
        return None
    return sizes.pop() if len(sizes) == 1 else None


def _physical_size(pixels: ElementTree.Element) -> tuple[float, float]:
    x, y = (
        float(pixels.attrib[f"PhysicalSize{axis}"])
        * _UNITS[pixels.get(f"PhysicalSize{axis}Unit", "µm")]
        for axis in "XY"
    )
    return x, y


def _tag_mpp(page: Any) -> tuple[float, float] | None:
    """Return µm per pixel from the TIFF resolution tags, or None if they have no unit of length."""
    per_unit = {2: 25_400.0, 3: 10_000.0}.get(int(page.tags.valueof("ResolutionUnit", 1)))
    if per_unit is None:
        return None
    values = []
    for name in ("XResolution", "YResolution"):
        above, below = page.tags.valueof(name, (0, 1))
        if above <= 0 or below <= 0:
            return None
        values.append(per_unit * below / above)
    return values[0], values[1]


def looks_like_tiff(path: Path) -> bool:
    """Whether a file name has a TIFF suffix."""
    return path.name.lower().endswith(TIFF_SUFFIXES)


def is_ome(path: Path) -> bool:
    """Whether a TIFF contains OME-XML; False for an unreadable file."""
    try:
        with open_tiff(path) as opened:
            return bool(opened.is_ome)
    except Exception:  # opening the slide reports the error
        return False
