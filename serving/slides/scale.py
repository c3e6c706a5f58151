"""Micrometres per pixel of a slide: what people say, else what its file says, else what is assumed."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

from ...errors import BadInput
from .tiff_source import BY_TAG

PRINT_MPP = 10.0
"""A coarser scale that only a TIFF's resolution tags name is that of a print, not of a microscope."""
SQUARE = 1.05
"""Ratio of a pixel's sides up to which it counts as square."""
SAME = 0.01
"""Relative difference up to which two values of µm per pixel are the same."""

Sides = tuple[float, float]


class Scale(NamedTuple):
    """The scale of a slide.

    Attributes:
        mpp: micrometres per pixel of level 0; None if nobody says.
        said_by: ``file``, ``stated``, ``assumed`` or None.
        notes: which other value was overruled.
    """

    mpp: float | None
    said_by: Literal["file", "stated", "assumed"] | None
    notes: tuple[str, ...] = ()


def sides_of(properties: dict[str, str]) -> Sides | None:
    """Return width and height of a pixel in µm as the file says; None if it says nothing usable."""
    try:
        sides = float(properties["openslide.mpp-x"]), float(properties["openslide.mpp-y"])
    except (KeyError, ValueError):
        return None
    if not all(0.01 <= side <= 100 for side in sides):
        return None  # resolution of a screen (72 dpi = 353 µm), not of a microscope
    return sides


def is_of_a_print(sides: Sides | None, properties: dict[str, str]) -> bool:
    """Whether a file's scale is only that of a print, by its resolution tags (300 dpi = 85 µm)."""
    return sides is not None and BY_TAG in properties and max(sides) > PRINT_MPP


def choose_mpp(
    path: Path,
    sides: Sides | None,
    of_a_print: bool,
    assume_mpp: float | None,
    stated_mpp: float | None,
) -> Scale:
    """Choose between what is said of a slide's scale.

    Args:
        path: of the slide, for messages.
        sides: of a pixel, as the file says.
        of_a_print: whether the file's value gives way to an assumption.
        assume_mpp: for files that do not say.
        stated_mpp: what a person says of this very slide; wins over the file.

    Raises:
        BadInput: the file says that its pixels are not square, and nobody says otherwise.
    """
    said = "" if sides is None else f"{sides[0]:.4g} x {sides[1]:.4g}"
    if stated_mpp is not None:
        note = (
            f"µm per pixel is {stated_mpp:g} as stated; the file says {said}, which was overruled"
        )
        differs = sides is not None and not _agree(stated_mpp, sides)
        return Scale(stated_mpp, "stated", (note,) if differs else ())
    if sides is None:
        return Scale(assume_mpp, "assumed" if assume_mpp else None)
    if of_a_print and assume_mpp:
        note = (
            f"µm per pixel is {assume_mpp:g} as assumed; the file's resolution tags say {said}, which is "
            "the scale of a print"
        )
        return Scale(assume_mpp, "assumed", (note,))
    if max(sides) / min(sides) > SQUARE:
        raise BadInput(
            f"{path} says that its pixels are {said} µm; expected square ones: if that is wrong, state the "
            "right value by --override-mpp, or in the manifest's column mpp; if it is right, resample the "
            "slide"
        )
    mpp = sum(sides) / 2
    if assume_mpp is None or _agree(assume_mpp, sides):
        return Scale(mpp, "file")
    note = (
        f"µm per pixel is {said} as the file says; --assume-mpp {assume_mpp:g} is for files that do not "
        "say (--override-mpp overrules them)"
    )
    return Scale(mpp, "file", (note,))


def _agree(mpp: float, sides: Sides) -> bool:
    return all(abs(mpp - side) <= SAME * mpp for side in sides)
