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
"""Largest profile that is read; those of displays and cameras have a few kilobytes."""

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


def to_srgb(image: Image.Image, label: str) -> Image.Image:
    """Return an image converted to sRGB by its embedded profile.

    An image without a profile, or with an sRGB profile, is returned unchanged. An unusable profile is
    ignored, as in viewers, with a warning in the log ``histoseek``.

    Args:
        image: grey, RGB or with a palette; alpha is kept.
        label: name of the image in the warning.
    """
    profile = image.info.get("icc_profile")
    if not profile:
        return image
    try:
        if len(profile) > MAX_BYTES:
            raise Unusable(f"it has {len(profile):,} bytes; at most {MAX_BYTES:,} are read")
        return _converted(image, bytes(profile))
    except Unusable as error:
        text = f"{label}: its colour profile ({profile_name(profile)}) cannot be used ({error})"
        _warn_once(text)
        return image


@lru_cache(maxsize=10_000)
def _warn_once(text: str) -> None:
    """Log a warning, but not again: training decodes each image many times."""
    LOG.warning("%s; its colours were read as sRGB", text)


def _converted(image: Image.Image, profile: bytes) -> Image.Image:
    space = _space(profile)
    if space == "GRAY" and image.mode in {"1", "L", "LA"}:
        mode = "L"
    elif space == "RGB":
        mode = "RGB"
    else:
        kind = f"for {space} images" if space else "for an unknown colour space"
        raise Unusable(f"it is {kind}, but the image is {image.mode}")
    transform = _transform(profile, mode)
    if transform is None:
        return image
    alpha = None
    if image.mode in {"RGBA", "LA", "PA"} or "transparency" in image.info:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    converted: Image.Image = transform.apply(image.convert(mode))
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


@lru_cache(maxsize=8)
def _space(profile: bytes) -> str:
    """Return a profile's colour space, such as ``RGB``, ``GRAY`` or ``CMYK``."""
    try:
        opened: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return str(opened.profile.xcolor_space).strip()
    except (OSError, ImageCms.PyCMSError) as error:
        raise Unusable(f"it is damaged: {error}") from error


@lru_cache(maxsize=8)
def _transform(profile: bytes, mode: str) -> Any:
    """Return the (perceptual) transform from a profile to sRGB; None if it changes nothing visible."""
    try:
        opened: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        srgb: Any = ImageCms.createProfile("sRGB")
        intent = ImageCms.Intent.PERCEPTUAL
        transform: Any = ImageCms.buildTransform(opened, srgb, mode, "RGB", intent)
    except (OSError, ImageCms.PyCMSError, ValueError) as error:
        raise Unusable(str(error)) from error
    steps = np.linspace(0, 255, _STEPS).round().astype(np.uint8)
    cube = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
    if mode == "L":
        cube = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    probe = Image.fromarray(np.ascontiguousarray(cube)).convert(mode)
    difference = np.abs(np.asarray(transform.apply(probe)).astype(int) - cube).max()
    return None if difference <= NEAR else transform
