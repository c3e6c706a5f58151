"""ICC colour profiles of images: their names, and conversion to sRGB.

Cameras, phones and Mac screenshots store colours of a wider colour space and embed its profile. Viewers
and browsers convert them to sRGB; an encoder must see the same colours.
"""

from __future__ import annotations

import io
import logging
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

LOG = logging.getLogger("histoseek")
NEAR = 2
"""A profile counts as sRGB, whatever its name, if it changes no colour by more than this (of 255)."""

MAX_BYTES = 4 * 2**20
"""Largest profile that is read, in bytes; those of displays and cameras have a few kilobytes."""

_STEPS = 9


class Unusable(Exception):
    """The profile is damaged, or has another colour space than the image."""


def profile_name(profile: bytes | None) -> str | None:
    """Return the name in a profile; None without a profile, ``unnamed`` if it cannot be read."""
    if not profile:
        return None
    try:
        opened: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        name = str(opened.profile.profile_description or "")
    except (OSError, ImageCms.PyCMSError):
        name = ""
    return "".join(c for c in name if c.isprintable()).strip()[:200] or "unnamed"


def to_srgb(picture: Image.Image, label: str) -> Image.Image:
    """Return an image converted to sRGB by its embedded profile.

    An image without a profile, or with an sRGB profile, is returned unchanged. An unusable profile is
    ignored, as in viewers, with a warning in the log ``histoseek``.

    Args:
        picture: grey, RGB or with a palette; alpha is kept.
        label: name of the image in the warning.
    """
    profile = picture.info.get("icc_profile")
    if not profile:
        return picture
    try:
        if len(profile) > MAX_BYTES:
            raise Unusable(f"it has {len(profile):,} bytes; at most {MAX_BYTES:,} are read")
        return _converted(picture, bytes(profile))
    except Unusable as error:
        _tell(label, profile_name(profile), error)
        return picture


@lru_cache(maxsize=10_000)
def _told(label: str) -> list[str]:
    """Return the warnings already given for an image; training decodes each image many times."""
    return []


def _tell(label: str, name: str | None, error: Unusable) -> None:
    text = f"{label}: its colour profile ({name}) cannot be used ({error}); "
    if text not in _told(label):
        _told(label).append(text)
        LOG.warning("%sits colours were taken as sRGB", text)


def _converted(picture: Image.Image, profile: bytes) -> Image.Image:
    grey = picture.mode in {"1", "L", "LA"}
    space = _space(profile)
    if space == "GRAY" and grey:
        mode = "L"
    elif space == "RGB":
        mode = "RGB"
    else:
        raise Unusable(f"it is for {space or 'no known colours'}, the picture is {picture.mode}")
    change = _transform(profile, mode)
    if change is None:
        return picture
    alpha = None
    if picture.mode in {"RGBA", "LA", "PA"} or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        alpha, picture = layer.getchannel("A"), layer
    found: Image.Image = change.apply(picture.convert(mode))
    if alpha is not None:
        found.putalpha(alpha)
    return found


@lru_cache(maxsize=8)
def _space(profile: bytes) -> str:
    """Return a profile's colour space, such as ``RGB``, ``GRAY`` or ``CMYK``.

    Raises:
        Unusable: the profile is damaged.
    """
    try:
        opened: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return str(opened.profile.xcolor_space).strip()
    except (OSError, ImageCms.PyCMSError) as error:
        raise Unusable(f"it is damaged: {error}") from error


@lru_cache(maxsize=8)
def _transform(profile: bytes, mode: str) -> Any:
    """Return the transform from a profile to sRGB (perceptual intent); None if it changes nothing visible.

    Raises:
        Unusable: the profile has no usable transform.
    """
    try:
        opened: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        change: Any = ImageCms.buildTransform(
            opened,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.PERCEPTUAL,
        )
    except (OSError, ImageCms.PyCMSError, ValueError) as error:
        raise Unusable(str(error)) from error
    steps = np.linspace(0, 255, _STEPS).round().astype(np.uint8)
    cube = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
    if mode == "L":
        cube = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    probe = Image.fromarray(np.ascontiguousarray(cube)).convert(mode)
    moved = np.abs(np.asarray(change.apply(probe)).astype(int) - cube).max()
    return None if moved <= NEAR else change
