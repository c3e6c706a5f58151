"""Micrometres per pixel of a slide: supplied by the user, else from its file, else assumed."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

from ...errors import BadInput
from .tiff_source import BY_TAG

PRINT_MPP = 10.0
"""µm per pixel; a coarser scale from TIFF resolution tags alone is taken for a print resolution."""
SQUARE = 1.05
"""Maximum ratio of a pixel's sides for it to count as square."""
SAME = 0.01
"""Maximum relative difference at which two values of µm per pixel count as equal."""

Sides = tuple[float, float]


class Scale(NamedTuple):
    """Micrometres per pixel of level 0, where the value comes from, and which other one was overridden."""

    mpp: float | None
    origin: Literal["file", "stated", "assumed"] | None
    notes: tuple[str, ...] = ()


def sides_of(properties: dict[str, str]) -> Sides | None:
    """Return width and height of a pixel in µm from the file; None if it holds no usable value."""
    try:
        sides = float(properties["openslide.mpp-x"]), float(properties["openslide.mpp-y"])
    except (KeyError, ValueError):
        return None
    if not all(0.01 <= side <= 100 for side in sides):
        return None  # resolution of a screen (72 dpi = 353 µm), not of a microscope
    return sides


def is_of_a_print(sides: Sides | None, properties: dict[str, str]) -> bool:
    """Whether a file's scale is a print resolution from its TIFF resolution tags (300 dpi = 85 µm)."""
    return sides is not None and BY_TAG in properties and max(sides) > PRINT_MPP


def choose_mpp(
    path: Path,
    sides: Sides | None,
    of_a_print: bool,
    assume_mpp: float | None,
    stated_mpp: float | None,
) -> Scale:
    """Choose a slide's scale: stated by the user, else from the file, else assumed.

    ``sides`` are those of a pixel in µm, from the file; ``of_a_print``: an assumption overrides them.

    Raises:
        BadInput: the file's pixels are not square, and the user supplied no value.
    """
    size = "" if sides is None else f"{sides[0]:.4g} x {sides[1]:.4g}"
    if stated_mpp is not None:
        note = (
            f"µm per pixel is {stated_mpp:g} (from the manifest or an option); the file's {size} was "
            "overridden"
        )
        differs = sides is not None and not _agree(stated_mpp, sides)
        return Scale(stated_mpp, "stated", (note,) if differs else ())
    if sides is None:
        return Scale(assume_mpp, "assumed" if assume_mpp else None)
    if of_a_print and assume_mpp:
        note = (
            f"µm per pixel is {assume_mpp:g} (from --assume-mpp); the file's resolution tags say {size}, "
            "which is the scale for printing"
        )
        return Scale(assume_mpp, "assumed", (note,))
    if max(sides) / min(sides) > SQUARE:
        raise BadInput(
            f"{path} states pixels of {size} µm; expected square pixels: if that is wrong, state the "
            "correct value with --override-mpp or in the manifest's column mpp; if it is right, resample "
            "the slide"
        )
    mpp = sum(sides) / 2
    if assume_mpp is None or _agree(assume_mpp, sides):
        return Scale(mpp, "file")
    note = (
        f"µm per pixel is {size} (from the file); --assume-mpp {assume_mpp:g} was not used: it is only for "
        "files that do not state it (--override-mpp replaces the value of any file)"
    )
    return Scale(mpp, "file", (note,))


def _agree(mpp: float, sides: Sides) -> bool:
    return all(abs(mpp - side) <= SAME * mpp for side in sides)
