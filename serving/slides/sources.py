"""Opening a slide with the reader for its format: OpenSlide, tifffile, Zeiss's, or that of plain images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...artifacts.images import SUFFIXES, decode, profile_of
from ...artifacts.slide_names import SLIDE_SUFFIXES
from ...artifacts.unread import UNREAD_FORMATS, ZARR, is_dicom, why_unread
from ...errors import BadInput, BrokenFile
from .czi_source import SUFFIX as CZI
from .czi_source import CziSource, reads_czi
from .openslide_source import OpenSlideSource
from .overview import Source
from .profiles import of_image
from .tiff_series import is_largest, the_slide
from .tiff_source import BY_TAG, TiffSource, is_ome, looks_like_tiff
from .zarr_source import ZarrSource

MAX_IMAGE_PX = 170_000_000


class ImageSource(Source):
    """A plain image as a slide with one level, held in memory."""

    def __init__(self, path: Path) -> None:
        """Decode the image."""
        self._image = decode(path, max_pixels=MAX_IMAGE_PX)
        height, width = self._image.shape[:2]
        self.levels: tuple[tuple[float, tuple[int, int]], ...] = ((1.0, (width, height)),)
        self.properties: dict[str, str] = of_image(profile_of(path))
        self.block_px = (width, height)

    def regions(
        self, corners: Sequence[tuple[int, int]], level: int, out: NDArray[np.uint8]
    ) -> dict[int, BadInput]:
        """Cut out regions; see :class:`Source`."""
        for number, (x, y) in enumerate(corners):
            height, width = out.shape[1:3]
            out[number] = 255
            left, top = max(0, x), max(0, y)
            part = self._image[top : max(0, y + height), left : max(0, x + width)]
            high, wide = part.shape[:2]
            out[number, top - y : top - y + high, left - x : left - x + wide] = part
        return {}

    def close(self) -> None:
        """Free the pixels."""
        self._image = np.zeros((0, 0, 3), dtype=np.uint8)


def open_source(path: Path, series: int | None = None) -> Source:
    """Open a file with OpenSlide if it knows the format, else as TIFF, else as a plain image.

    tifffile always reads OME-TIFF: OpenSlide reads some of them, but neither their scale nor their
    pyramid. tifffile also reads a TIFF in which OpenSlide would take a small first image (a label, a
    macro) for the slide.

    Args:
        path: the file.
        series: index of the TIFF image that is the slide; detected when None.

    Raises:
        BadInput: no reader can open the file.
    """
    if path.is_dir():
        return ZarrSource(path, series)
    if series is not None:
        return TiffSource(path, series)
    if looks_like_tiff(path) and is_ome(path):
        return TiffSource(path, the_slide(path))
    if path.suffix.lower() == ".mrxs" and not path.with_suffix("").is_dir():
        raise BadInput(
            f"{path} needs the folder {path.with_suffix('').name}/ beside it, which contains its pixels "
            "and is missing; copy it too"
        )
    if is_openslide(path):
        try:
            source = OpenSlideSource(path)
        except BadInput as error:
            if path.suffix.lower() == CZI:
                return _by_zeiss(path, error)
            if not looks_like_tiff(path):
                raise
            return _by_tifffile(path)
        if BY_TAG in source.properties and not is_largest(path, source.levels[0][1]):
            source.close()
            return TiffSource(path, the_slide(path))
        return source
    if looks_like_tiff(path):
        return TiffSource(path, the_slide(path))
    if path.suffix.lower() in SLIDE_SUFFIXES:
        return OpenSlideSource(path)
    if path.suffix.lower() not in SUFFIXES:
        if path.suffix.lower() in UNREAD_FORMATS.keys() - {CZI, ZARR}:  # those are read if whole
            raise BadInput(f"{path}: {why_unread(path)}")
        raise BadInput(
            f"{path} is neither a slide that OpenSlide reads nor an image "
            f"({', '.join(sorted(SUFFIXES))})"
        )
    return ImageSource(path)


def _by_zeiss(path: Path, error: BadInput) -> Source:
    """Open a CZI file that OpenSlide recognises but cannot read."""
    if not reads_czi():
        raise BadInput(
            f"{error}; if it is whole, Zeiss's library may read it: pip install 'histoseek[czi]'"
        ) from error
    return CziSource(path)


def _by_tifffile(path: Path) -> Source:
    """Open a TIFF that OpenSlide recognises but cannot read, such as one with another compression."""
    try:
        return TiffSource(path, the_slide(path))
    except BadInput as error:
        try:
            return OpenSlideSource(path)
        except BadInput as openslide_error:
            # tifffile reports unsupported formats better, OpenSlide reports damage better
            raise (openslide_error if isinstance(error, BrokenFile) else error) from openslide_error


def is_openslide(path: Path) -> bool:
    """Whether OpenSlide knows the file's format."""
    import openslide

    try:
        return openslide.OpenSlide.detect_format(str(path)) is not None
    except openslide.OpenSlideError:
        return True  # the format is known but the file has a fault; opening it reports the fault


def is_slide(path: Path) -> bool:
    """Whether a file is a slide: by its name, by OpenSlide for TIFF and CZI, or as a DICOM file."""
    suffix = path.suffix.lower()
    if suffix in SLIDE_SUFFIXES:
        return True
    if looks_like_tiff(path):
        return is_openslide(path) or is_ome(path)
    if suffix == CZI:
        return is_openslide(path)
    return suffix not in SUFFIXES and is_dicom(path) and is_openslide(path)
