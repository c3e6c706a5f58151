"""Every picture is untrusted: what is read, what is refused, and why."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from histoseek.errors import BadInput
from histoseek.images import decode, square


def encoded(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def test_grey_and_rgb_become_rgb(tissue):
    assert np.array_equal(decode(encoded(Image.fromarray(tissue))), tissue)
    grey = decode(encoded(Image.fromarray(tissue).convert("L")))
    assert grey.shape == tissue.shape and np.array_equal(grey[..., 0], grey[..., 2])


def test_alpha_is_laid_over_white(tissue):
    layered = Image.fromarray(tissue).convert("RGBA")
    layered.putalpha(0)
    assert (decode(encoded(layered)) == 255).all()


def test_exif_rotation_is_applied(tissue):
    picture = Image.fromarray(tissue[:100, :200])
    exif = picture.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees to see it upright
    upright = decode(encoded(picture, "JPEG", exif=exif, quality=95))
    assert upright.shape == (200, 100, 3)
    rotated = np.rot90(tissue[:100, :200], -1).astype(int)
    assert np.abs(upright.astype(int) - rotated).mean() < 8


@pytest.mark.parametrize(
    ("blob", "says"),
    [
        (lambda t: encoded(Image.fromarray(t[..., 0].astype(np.uint16) * 200)), "8 bits"),
        (lambda t: encoded(Image.fromarray(t[..., 0].astype(np.uint16) * 200), "TIFF"), "8 bits"),
        (lambda t: encoded(Image.fromarray(t[..., 0].astype(np.float32)), "TIFF"), "8 bits"),
        (lambda t: rgb48_png(t), "8 bits"),
        (lambda t: encoded(Image.fromarray(t).convert("CMYK"), "JPEG"), "CMYK"),
        (lambda t: animated(t, "GIF"), "animated"),
        (lambda t: animated(t, "PNG"), "animated"),
        (lambda t: animated(t, "WEBP"), "animated"),
        (lambda t: encoded(Image.fromarray(t), "JPEG")[:4000], "truncated"),
        (lambda t: b"", "0 bytes"),
        (lambda t: b"no picture at all", "not a picture"),
        (lambda t: bomb_png(60_000, 60_000), "pixels"),
    ],
    ids=[
        "16-bit png", "16-bit tiff", "float tiff", "48-bit png", "cmyk", "gif", "apng", "webp",
        "truncated", "empty", "text", "bomb",
    ],
)  # fmt: skip
def test_what_has_no_single_reading_is_refused_with_the_reason(tissue, blob, says):
    with pytest.raises(BadInput, match=says) as caught:
        decode(blob(tissue), name="patient-7.png")
    assert "patient-7.png" in str(caught.value)


def animated(tissue, kind):
    first, second = Image.fromarray(tissue[:64, :64]), Image.fromarray(tissue[64:128, :64])
    return encoded(first, kind, save_all=True, append_images=[second], duration=100)


def chunk(kind, data):
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def bomb_png(width, height):
    """A PNG of a few bytes whose header claims many pixels."""
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    body = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def rgb48_png(tissue):
    height, width = 8, 8
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    deep = np.repeat(tissue[:8, :8].astype(">u2") * 257, 1).tobytes()
    rows = b"".join(b"\0" + deep[n * 48 : (n + 1) * 48] for n in range(8))
    body = zlib.compress(rows)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def test_missing_file_and_wrong_arrays_are_refused(tmp_path):
    with pytest.raises(BadInput, match="does not exist"):
        decode(tmp_path / "none.png")
    with pytest.raises(BadInput, match="uint8"):
        decode(np.zeros((4, 4, 3)))
    with pytest.raises(BadInput, match="shape"):
        decode(np.zeros((4, 4, 2), np.uint8))


def test_square_keeps_the_centre_and_leaves_a_fitting_tile_alone(tissue):
    assert square(tissue, 512) is tissue
    tall = np.zeros((60, 20, 3), np.uint8)
    tall[20:40] = 200
    assert (square(tall, 20) == 200).all()
