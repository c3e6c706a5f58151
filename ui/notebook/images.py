"""Images from a notebook: a path, bytes, an open file, an array or a PIL image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from ...artifacts.images import Rgb, decode, square
from ...errors import BadInput

Image: TypeAlias = str | Path | bytes | NDArray[np.uint8] | Pillow.Image


def is_one(images: Image | Sequence[Image]) -> bool:
    """Whether the argument is a single image."""
    if isinstance(images, np.ndarray):
        return images.ndim < 4
    alone = isinstance(images, str | Path | bytes | Pillow.Image) or hasattr(images, "read")
    return alone or not isinstance(images, Iterable)


def read_images(images: Image | Sequence[Image], size_px: int) -> list[Rgb]:
    """Return images in the encoder's format, each (S, S, 3).

    Args:
        images: one or several paths, bytes, open files, arrays (H, W, 3) of uint8, or PIL images.
        size_px: side of a tile.

    Raises:
        BadInput: an image cannot be read; the message names it.
    """
    several: Any = [images] if is_one(images) else images
    return [square(_pixels(image), size_px) for image in several]


def _pixels(image: Image) -> Rgb:
    if isinstance(image, str | Path):
        return decode(Path(image))
    if hasattr(image, "read") and not isinstance(image, Pillow.Image):
        image = image.read()  # an open file
        if not isinstance(image, bytes):
            raise BadInput("an image is a file that is open as text; open it with mode 'rb'")
    if isinstance(image, bytes | np.ndarray | Pillow.Image):
        return decode(image)
    raise BadInput(
        f"an image is of type {type(image).__name__}; expected a path, bytes, an open "
        "file, a uint8 array or a PIL image"
    )
