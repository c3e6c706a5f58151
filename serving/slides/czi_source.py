"""Zeiss CZI slides through Zeiss's own library (pylibCZIrw, the extra ``czi``)."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...artifacts.images import Rgb, resample
from ...errors import BadInput, BrokenFile, HistoseekError, need
from .overview import Source

SUFFIX = ".czi"
TYPES = ("Bgr24", "Gray8")
ALIKE = 12.0
"""Largest mean difference (grey levels) between a level of the pyramid and the reduced finest level."""
_PROBE_PX, _READ_PX = 128, 4096
_WHITE = (1.0, 1.0, 1.0)


def reads_czi() -> bool:
    """Whether the library is installed."""
    return importlib.util.find_spec("pylibCZIrw") is not None


class CziSource(Source):
    """All scenes of a CZI file as one slide, white between them.

    The library combines the scenes. Each thread has a reader of its own, so they decode at the same time.
    """

    def __init__(self, path: Path) -> None:
        """Open a file.

        Raises:
            MissingPart: the library is not installed.
            BadInput: the file is damaged, or not one image of 8-bit RGB or grey.
        """
        self._library = need("pylibCZIrw.czi", "czi")
        self._path = path
        self._lock = threading.Lock()
        self._closing = ExitStack()
        self._per_thread = threading.local()
        try:
            self._open()
        except HistoseekError:
            self._closing.close()
            raise
        except Exception as error:  # a damaged file can make the library fail in any way
            self._closing.close()
            raise BrokenFile(
                f"{path} is not a readable CZI file ({type(error).__name__}: {error}); it is truncated or "
                "damaged: copy it again"
            ) from error

    def _open(self) -> None:
        reader = self._reader()
        self._check(reader)
        box = reader.total_bounding_rectangle
        self._left, self._top = box.x, box.y
        self.levels = ((1.0, (box.w, box.h)),)
        self.properties = _scale(reader.metadata)
        self.block_px = (1024, 1024)
        for factor in _factors(reader):
            size = box.w // factor, box.h // factor
            if min(size) >= 1 and self._is_like_level_0(factor, size):
                self.levels = (*self.levels, (float(factor), size))

    def _check(self, reader: Any) -> None:
        """Refuse what is not one image of 8-bit RGB or grey."""
        ranges = reader.total_bounding_box
        counts = {axis: end - start for axis, (start, end) in ranges.items() if axis in "CZT"}
        names = {"C": "channels", "Z": "depths", "T": "times"}
        several = [f"{count} {names[axis]}" for axis, count in counts.items() if count > 1]
        types = sorted(set(reader.pixel_types.values()))
        if several or len(types) != 1 or types[0] not in TYPES:
            found = ", ".join([*several, *types])
            raise BadInput(
                f"{self._path} has {found}; expected one image of 8-bit RGB (Bgr24) or grey (fluorescence "
                "is not read)"
            )

    def _reader(self) -> Any:
        """Return this thread's reader."""
        if not hasattr(self._per_thread, "reader"):
            with self._lock:
                opened = self._library.open_czi(str(self._path))
                self._per_thread.reader = self._closing.enter_context(opened)
        return self._per_thread.reader

    def _is_like_level_0(self, factor: int, size: tuple[int, int]) -> bool:
        """Whether the middle of a level looks like the same part of the finest level."""
        side = min(*size, _PROBE_PX, max(1, _READ_PX // factor))
        x, y = (size[0] - side) // 2 * factor, (size[1] - side) // 2 * factor
        coarse = self._read(x, y, factor, side, side)
        fine = resample(self._read(x, y, 1, side * factor, side * factor), side)
        difference = np.abs(coarse.astype(np.int16) - fine.astype(np.int16)).mean()
        return float(difference) <= ALIKE

    def _read(self, x: int, y: int, factor: int, width: int, height: int) -> Rgb:
        """Read a region of ``width`` x ``height`` pixels of a level from (x, y) of level 0."""
        roi = (self._left + x, self._top + y, width * factor, height * factor)
        found = self._reader().read(roi=roi, zoom=1 / factor, background_pixel=_WHITE)
        if found.shape[2] == 1:
            found = found.repeat(3, axis=2)
        out = np.full((height, width, 3), 255, dtype=np.uint8)
        part = found[:height, :width, ::-1]  # the library's order is blue, green, red
        out[: part.shape[0], : part.shape[1]] = part
        return out

    def regions(
        self, corners: Sequence[tuple[int, int]], level: int, out: NDArray[np.uint8]
    ) -> dict[int, BadInput]:
        """See :class:`.overview.Source`."""
        factor = round(self.levels[level][0])
        height, width = out.shape[1:3]
        failed: dict[int, BadInput] = {}
        for number, (x, y) in enumerate(corners):
            try:
                out[number] = self._read(x, y, factor, width, height)
            except Exception as error:  # damage makes the library fail in any way
                failed[number] = BadInput(
                    f"{self._path}: the region at x={x}, y={y} cannot be read ({error}); the file is "
                    "truncated or damaged: copy it again"
                )
        return failed

    def close(self) -> None:
        """Close the file."""
        self._closing.close()


def _factors(reader: Any) -> list[int]:
    """Return by how much the stored levels are reduced, ascending, without the finest."""
    zooms: set[float] = set()

    def look(number: int, block: Any) -> bool:
        zooms.add(round(float(block.get_zoom()), 6))
        return True

    reader.enumerate_subblocks(look)
    return sorted({round(1 / zoom) for zoom in zooms if 0 < zoom < 0.75})


def _scale(metadata: Any) -> dict[str, str]:
    """Return µm per pixel from a file's metadata, under OpenSlide's names; empty if they are not stated."""
    try:
        rows = metadata["ImageDocument"]["Metadata"]["Scaling"]["Items"]["Distance"]
        metres = {row["@Id"]: float(row["Value"]) for row in rows}
        return {f"openslide.mpp-{axis.lower()}": repr(metres[axis] * 1e6) for axis in "XY"}
    except (KeyError, TypeError, ValueError):
        return {}
