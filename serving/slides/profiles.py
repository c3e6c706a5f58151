"""The colour profile (ICC) of a slide: its name, and whether it was applied.

Pixels of slides are not converted: OpenSlide returns them as stored, and TRIDENT, CLAM and others embed
them so. A plain image with a profile is converted to sRGB when it is decoded.
"""

from __future__ import annotations

from typing import Any

from ...artifacts.colour_profiles import profile_name

ICC = "histoseek.icc-profile"
"""Property of a slide: the name of its colour profile."""

APPLIED = "histoseek.icc-applied"
"""Property of a slide: its pixels were converted to sRGB with its profile."""

_TAG = "InterColorProfile"


def of_openslide(slide: Any) -> dict[str, str]:
    """Return the property :data:`ICC` of a slide that OpenSlide opened; empty without a profile."""
    try:
        icc = slide.color_profile
        profile = None if icc is None else icc.tobytes()
    except Exception:  # a profile exists, but it is damaged
        return {ICC: "unnamed"}
    name = profile_name(profile)
    return {} if name is None else {ICC: name}


def of_page(page: Any) -> dict[str, str]:
    """Return the property :data:`ICC` of a TIFF page of tifffile; empty without a profile."""
    value = page.tags.valueof(_TAG)
    name = profile_name(bytes(value)) if value else None
    return {} if name is None else {ICC: name}


def of_image(name: str | None) -> dict[str, str]:
    """Return the properties of a plain image to which the profile of that name was applied."""
    return {} if name is None else {ICC: name, APPLIED: "yes"}


def about_profile(properties: dict[str, str]) -> dict[str, Any]:
    """Return the entries for a feature file: ``icc_profile`` (name or None) and ``icc_applied``."""
    return {"icc_profile": properties.get(ICC), "icc_applied": APPLIED in properties}
