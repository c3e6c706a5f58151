"""Decodes and resizes images: the only module that turns image files into uint8 RGB arrays.

Every input is untrusted: size and format are read from the header and checked before any pixel is
allocated. Images that can become 8-bit RGB in several ways (16-bit, CMYK, animated) are refused, and the
message names the remedy. Transparent pixels are blended with white (the background of a slide), an EXIF
rotation is applied, and an embedded colour profile is converted to sRGB.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from ..errors import BadInput, TooLarge, Unsupported
from .colour_profiles import profile_name, to_srgb
from .jpeg_segments import JPEG, RGB, decode_segment

Rgb = NDArray[np.uint8]

MAX_PIXELS = 64_000_000
"""Largest image decoded as a whole, in pixels; larger images are slides and are read tile by tile."""

MAX_SEGMENT_PX = 16_000_000
"""Largest segment of a TIFF that is decoded here, in pixels."""

MAX_BYTES = 256 * 2**20
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF")
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp"})
_COMPRESSION, _PHOTOMETRIC, _ORIENTATION, _PLANES = 259, 262, 274, 284
"""Tags of TIFF."""
_END_OF_JPEG = b"\xff\xd9"
_EIGHT_BIT = {"1", "L", "P", "RGB", "RGBA", "LA", "PA", "RGBX", "YCbCr"}


def decode(
    source: Path | bytes | Rgb | Image.Image, name: str | None = None, max_pixels: int = MAX_PIXELS
) -> Rgb:
    """Decode one image; of an MPO file (from phones and stereo cameras), the first image.

    Args:
        source: a file, its bytes, an array (H, W), (H, W, 3) or (H, W, 4) of uint8, or a PIL image.
        name: name of the image in messages; None for the file's path.
        max_pixels: refuse images with more pixels, before decoding.

    Returns:
        uint8 sRGB, shape (H, W, 3), upright. Without a colour profile the file's values are unchanged.

    Raises:
        BadInput: the image is missing, empty or truncated.
        TooLarge: it has too many bytes or pixels.
        Unsupported: it is not an image, or is 16-bit, CMYK or animated.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, name or "array")
    if isinstance(source, Image.Image):
        _check_header(source, b"", name or "PIL image", max_pixels)
        return _to_rgb(source, name or "PIL image")
    label = name or (str(source) if isinstance(source, Path) else "image")
    blob = _read(source, label) if isinstance(source, Path) else source
    _check_size(len(blob), label)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(blob), formats=FORMATS) as image:
                _check_header(image, blob, label, max_pixels)
                return _to_rgb(_loaded(image, blob), label)
    except UnidentifiedImageError as error:
        raise Unsupported(
            f"{label} is not an image that can be read; expected {', '.join(FORMATS)}"
        ) from error
    except Image.DecompressionBombError as error:
        raise TooLarge(f"{label} has too many pixels ({error}); crop or downsample it") from error
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(
            f"{label} cannot be decoded ({error}); it is truncated or damaged: export it again"
        ) from error


def _loaded(image: Image.Image, blob: bytes) -> Image.Image:
    """Return the image; a TIFF whose JPEG segments are named RGB is decoded here, not by libtiff.

    Bio-Formats, with which QuPath exports regions, names its YCbCr segments RGB; libtiff refuses them. The
    header of the image was checked before.
    """
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    kind = tags.get(_COMPRESSION), tags.get(_PHOTOMETRIC), tags.get(_PLANES, 1)
    if kind != (JPEG, RGB, 1) or image.mode != "RGB":
        return image
    decoded = Image.fromarray(_segments(blob, image.height, image.width))
    if profile := image.info.get("icc_profile"):
        decoded.info["icc_profile"] = profile
    decoded.getexif()[_ORIENTATION] = image.getexif().get(_ORIENTATION, 1)
    return decoded


def _segments(blob: bytes, height: int, width: int) -> Rgb:
    """Return the pixels of a TIFF's first page, of JPEG segments with three interleaved components."""
    import tifffile

    pixels = np.empty((height, width, 3), dtype=np.uint8)
    with tifffile.TiffFile(io.BytesIO(blob)) as tiff:
        page = tiff.pages[0]
        if page.shape != pixels.shape:
            raise ValueError(f"its pixels are {page.shape}, its header says {pixels.shape}")
        high, wide = page.chunks[:2]
        if high * wide > MAX_SEGMENT_PX:
            raise ValueError(f"its segments have {wide} x {high} pixels")
        across, down = -(-width // wide), -(-height // high)
        if len(page.dataoffsets) != across * down:
            raise ValueError(f"it has {len(page.dataoffsets)} of {across * down} segments")
        for number, start in enumerate(page.dataoffsets):
            size = page.databytecounts[number]
            part = blob[start : start + size]
            if len(part) < size or not part.rstrip(b"\0").endswith(_END_OF_JPEG):
                raise ValueError(f"segment {number} has no end")
            top, left = number // across * high, number % across * wide
            place = pixels[top : top + high, left : left + wide]
            tile = decode_segment(part, page.jpegtables, RGB, high, wide)
            if tile.shape[0] < place.shape[0] or tile.shape[1] < place.shape[1]:
                raise ValueError(f"a segment has {tile.shape[:2]} pixels, not {place.shape[:2]}")
            place[:] = tile[: place.shape[0], : place.shape[1]]
    return pixels


def _check_size(size: int, label: str) -> None:
    if not size:
        raise BadInput(f"{label} is empty (0 bytes); copy or export it again")
    _refuse_large(size, label)


def _refuse_large(size: int, label: str) -> None:
    if size > MAX_BYTES:
        raise TooLarge(f"{label} has {size:,} bytes; expected at most {MAX_BYTES:,}: crop it")


def _read(path: Path, label: str) -> bytes:
    try:
        _refuse_large(path.stat().st_size, label)  # 0 for a pipe
        return path.read_bytes()
    except FileNotFoundError as error:
        raise BadInput(f"{label} does not exist; check the path") from error
    except IsADirectoryError as error:
        raise BadInput(f"{label} is a folder; expected an image") from error
    except OSError as error:
        raise BadInput(
            f"{label} cannot be read ({error.strerror}); check its permissions"
        ) from error


def _check_header(image: Image.Image, blob: bytes, label: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise TooLarge(
            f"{label} is {width} x {height} = {width * height:,} pixels; at most {max_pixels:,} are "
            "decoded as one image: crop it, or embed it as a slide"
        )
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # further MPO frames are previews or the other eye
        kind = f"has {frames} pages" if image.format == "TIFF" else "is animated"
        raise Unsupported(f"{label} {kind}; expected a single still image: export one of them")
    if image.mode in {"CMYK", "YCCK"}:
        raise Unsupported(
            f"{label} is CMYK (print colours), which can be converted to RGB in several ways; "
            "expected RGB: convert it with its colour profile first"
        )
    png_depth = blob[24] if image.format == "PNG" and len(blob) > 24 else 8
    bits = image.tag_v2.get(258, (8,)) if hasattr(image, "tag_v2") else (8,)
    deepest = max(bits) if isinstance(bits, tuple) else bits
    if image.mode.startswith(("I", "F")) or png_depth > 8 or deepest > 8:
        raise Unsupported(
            f"{label} has more than 8 bits per channel (mode {image.mode}); expected 8-bit RGB: "
            "rescale the range of values that you want to see to 0-255"
        )
    if image.mode not in _EIGHT_BIT:
        raise Unsupported(f"{label} has mode {image.mode}; expected 8-bit grey, RGB or RGBA")


def profile_of(path: Path) -> str | None:
    """Return the name of an image's colour profile, which :func:`decode` converts; None without one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path, formats=FORMATS) as image:
            return profile_name(image.info.get("icc_profile"))


def _to_rgb(image: Image.Image, label: str) -> Rgb:
    upright = to_srgb(ImageOps.exif_transpose(image), label)
    if upright.mode in {"RGBA", "LA", "PA"} or "transparency" in upright.info:
        layer = upright.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        upright = Image.alpha_composite(white, layer)
    return np.asarray(upright.convert("RGB"))


def _from_array(array: Rgb, label: str) -> Rgb:
    if array.dtype != np.uint8:
        raise BadInput(f"{label} is {array.dtype}; expected uint8 (0-255): rescale it first")
    if array.ndim == 2:
        return np.repeat(array[:, :, None], 3, axis=2)
    if array.ndim == 3 and array.shape[2] == 4:
        return _to_rgb(Image.fromarray(array), label)
    if array.ndim == 3 and array.shape[2] == 3 and array.size:
        return array
    raise BadInput(f"{label} has shape {array.shape}; expected (H, W), (H, W, 3) or (H, W, 4)")


def square(image: Rgb, size_px: int) -> Rgb:
    """Return the largest centred square, resampled to ``size_px`` x ``size_px`` as tiles of slides are."""
    height, width = image.shape[:2]
    if height != width:
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        image = image[top : top + side, left : left + side]
    return resample(image, size_px)


def resample(tile: Rgb, size_px: int) -> Rgb:
    """Return a square tile at ``size_px`` x ``size_px``.

    The filter is BOX if the side is a multiple of ``size_px``, LANCZOS if the tile otherwise shrinks, and
    BICUBIC if it grows. A tile that already has this size is returned unchanged.
    """
    side = tile.shape[0]
    if side == size_px:
        return tile
    how = Image.Resampling.BICUBIC
    if side > size_px:
        how = Image.Resampling.LANCZOS if side % size_px else Image.Resampling.BOX
    return np.asarray(Image.fromarray(tile).resize((size_px, size_px), how))


def encode_jpeg(image: Rgb, quality: int = 90) -> bytes:
    """Encode a uint8 RGB array (H, W, 3) as JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
