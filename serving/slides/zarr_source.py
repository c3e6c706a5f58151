"""OME-Zarr slides (NGFF 0.4 and 0.5): a folder with a pyramid of chunked arrays, through zarr."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...artifacts.files import read_json
from ...artifacts.unread import ZARR
from ...errors import BadInput, BrokenFile, HistoseekError, need
from .overview import Source

UNITS = {"nanometer": 1e-3, "micrometer": 1.0, "millimeter": 1e3, "centimeter": 1e4, "meter": 1e6}
LAYOUT = "bioformats2raw.layout"
"""Attribute of a folder with several images, numbered from 0."""
TOGETHER = 4
"""Regions are read at once if the box around them has at most this many times their pixels."""


def reads_zarr() -> bool:
    """Whether zarr is installed."""
    return importlib.util.find_spec("zarr") is not None


def is_ome_zarr(path: Path) -> bool:
    """Whether a folder is an OME-Zarr image, by its name and its attributes."""
    if path.suffix.lower() != ZARR or not path.is_dir():
        return False
    attributes = _attributes(path)
    return "multiscales" in attributes or LAYOUT in attributes


def _attributes(path: Path) -> dict[str, Any]:
    """Return the OME attributes of a group; empty if it has none."""
    for name in (".zattrs", "zarr.json"):
        if (path / name).is_file():
            try:
                document = read_json(path / name)
            except HistoseekError:
                return {}
            inner = document.get("attributes", document) if isinstance(document, dict) else {}
            found = inner.get("ome", inner) if isinstance(inner, dict) else {}
            return dict(found) if isinstance(found, dict) else {}
    return {}


class ZarrSource(Source):
    """One image of 8-bit RGB or grey in an OME-Zarr folder."""

    def __init__(self, path: Path, series: int | None = None) -> None:
        """Open an image; ``series`` is its number in a folder with several, 0 when None.

        Raises:
            MissingPart: zarr is not installed.
            BadInput: the folder is no OME-Zarr image, is damaged, or has other pixels.
        """
        zarr = need("zarr", "zarr")
        self._path = path
        image, attributes = path, _attributes(path)
        if LAYOUT in attributes:
            image = path / str(series or 0)
            attributes = _attributes(image)
        try:
            first = attributes["multiscales"][0]
            axes = [axis if isinstance(axis, str) else axis["name"] for axis in first["axes"]]
            self._arrays = [
                zarr.open_array(str(image / row["path"]), mode="r") for row in first["datasets"]
            ]
        except Exception as error:  # whatever is wrong with the folder
            raise BrokenFile(
                f"{image} is not a readable OME-Zarr image ({type(error).__name__}: {error}); copy it "
                "again, or choose an image with --series"
            ) from error
        self._axes = axes
        self._check()
        y, x = axes.index("y"), axes.index("x")
        widths = [array.shape[x] for array in self._arrays]
        self.levels: tuple[tuple[float, tuple[int, int]], ...] = tuple(
            (widths[0] / array.shape[x], (array.shape[x], array.shape[y])) for array in self._arrays
        )
        self.properties = _scale(first, axes)
        chunk = self._arrays[0].chunks
        self.block_px = tuple(max(1, 1024 // side) * side for side in (chunk[x], chunk[y]))

    def _check(self) -> None:
        """Refuse what is not one image of 8-bit RGB or grey."""
        array = self._arrays[0]
        sizes = dict(zip(self._axes, array.shape, strict=False))
        channels = sizes.get("c", 1)
        several = [
            f"{n} of axis {axis}" for axis, n in sizes.items() if axis not in "xyc" and n > 1
        ]
        known = {"x", "y"} <= set(sizes) and len(sizes) == len(array.shape)
        if not known or several or channels not in {1, 3} or array.dtype != np.uint8:
            found = ", ".join(
                [f"axes {''.join(self._axes)}", f"shape {array.shape}", str(array.dtype)]
            )
            raise BadInput(
                f"{self._path} has {found}; expected one image of 8-bit RGB or grey (fluorescence is not "
                "read)"
            )

    def _cut(self, level: int, left: int, top: int, right: int, bottom: int) -> NDArray[np.uint8]:
        """Read a box of a level, inside the level: (H, W, 3)."""
        box = {"x": slice(left, right), "y": slice(top, bottom), "c": slice(None)}
        array = self._arrays[level]
        found = np.asarray(array[tuple(box.get(axis, 0) for axis in self._axes)])
        order = [axis for axis in self._axes if axis in "yxc"]
        if "c" not in order:
            found, order = found[..., None], [*order, "c"]
        found = found.transpose([order.index(axis) for axis in "yxc"])
        return found if found.shape[2] == 3 else found.repeat(3, axis=2)

    def regions(
        self, corners: Sequence[tuple[int, int]], level: int, out: NDArray[np.uint8]
    ) -> dict[int, BadInput]:
        """See :class:`.overview.Source`."""
        down = self.levels[level][0]
        scaled = np.array([(round(x / down), round(y / down)) for x, y in corners])
        height, width = out.shape[1:3]
        low, high = scaled.min(0), scaled.max(0) + (width, height)
        whole = int(np.prod(high - low))
        if len(corners) > 1 and whole <= TOGETHER * len(corners) * width * height:
            try:  # neighbours share chunks, so they are read together
                box = self._padded(level, *low.tolist(), *(high - low).tolist())
            except Exception:  # then each is read alone, to find the unreadable ones
                pass
            else:
                for number, (x, y) in enumerate((scaled - low).tolist()):
                    out[number] = box[y : y + height, x : x + width]
                return {}
        failed: dict[int, BadInput] = {}
        for number, (x, y) in enumerate(scaled.tolist()):
            try:
                out[number] = self._padded(level, x, y, width, height)
            except Exception as error:  # a damaged chunk can fail in any way
                at = corners[number]
                failed[number] = BadInput(
                    f"{self._path}: the region at x={at[0]}, y={at[1]} cannot be read "
                    f"({type(error).__name__}: {error}); copy the folder again"
                )
        return failed

    def _padded(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """Read a box of a level, white outside the image."""
        across, down = self.levels[level][1]
        box = np.full((height, width, 3), 255, dtype=np.uint8)
        left, top = max(0, x), max(0, y)
        right, bottom = min(across, x + width), min(down, y + height)
        if left < right and top < bottom:
            inside = self._cut(level, left, top, right, bottom)
            box[top - y : bottom - y, left - x : right - x] = inside
        return box

    def close(self) -> None:
        """No file is held open."""


def _scale(image: Mapping[str, Any], axes: Sequence[str]) -> dict[str, str]:
    """Return µm per pixel of the finest level, under OpenSlide's names; empty if it is not stated."""
    try:
        scales = [np.ones(len(axes))]
        for row in (*image["datasets"][0]["coordinateTransformations"],
                    *image.get("coordinateTransformations", ())):  # fmt: skip
            if row["type"] == "scale":
                scales.append(np.array(row["scale"], dtype=float))
        whole = np.prod(scales, axis=0)
        units = {axis["name"]: axis.get("unit") for axis in image["axes"]}
        return {
            f"openslide.mpp-{axis}": repr(float(whole[axes.index(axis)]) * UNITS[units[axis]])
            for axis in "xy"
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}
