"""Every image is untrusted: which images are read, which are rejected, and why."""

import io
import os
import threading
import zlib

import numpy as np
import pytest
import tifffile
from colour import ADOBE, DISPLAY_P3, SRGB, grey_profile, rgb_profile
from PIL import Image, ImageCms

from histoseek.artifacts.images import decode, square
from histoseek.errors import BadInput
from histoseek.serving.encoders.open import open_encoder


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
        (lambda t: b"no picture at all", "not an image"),
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


def test_an_image_may_come_through_a_pipe(tissue, tmp_path):
    """As a shell's <(…) does; a pipe has no size."""
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    blob = io.BytesIO()
    Image.fromarray(tissue[:32, :40]).save(blob, "PNG")
    writer = threading.Thread(target=pipe.write_bytes, args=(blob.getvalue(),))
    writer.start()
    assert np.array_equal(decode(pipe), tissue[:32, :40])
    writer.join()


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


def test_of_a_phones_mpo_the_first_picture_is_taken(tissue):
    first, second = Image.fromarray(tissue[:96, :96]), Image.fromarray(255 - tissue[:48, :48])
    blob = encoded(first, "MPO", save_all=True, append_images=[second], quality=95)
    alone = encoded(first, "JPEG", quality=95)
    assert b"MPF\0" in blob and Image.open(io.BytesIO(blob)).n_frames == 2
    assert np.array_equal(decode(blob), decode(alone))


def test_jpeg_tiles_of_a_tiff_that_are_named_rgb_are_read(tissue, tmp_path, capfd):
    """As Bio-Formats writes them, and so QuPath: the tiles are YCbCr."""
    path, profile, image = tmp_path / "region.ome.tif", WIDE, tissue[:300, :400]
    tifffile.imwrite(path, image, tile=(256, 256), compression="jpeg", iccprofile=profile)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        assert tiff.pages[0].photometric == tifffile.PHOTOMETRIC.YCBCR
        tiff.pages[0].tags["PhotometricInterpretation"].overwrite(2)
    with Image.open(path) as plain, pytest.raises(OSError, match="decoder error"):
        plain.load()
    capfd.readouterr()  # libtiff's message
    found = decode(path)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", icc_profile=profile)
    expected = decode(buffer.getvalue()).astype(int)
    assert found.shape == expected.shape and np.abs(found - expected).mean() < 4
    shift = np.abs([each.mean((0, 1)) - expected.mean((0, 1)) for each in (found, image)]).max(1)
    assert shift[0] < 0.7 < 2 < shift[1], "the profile counts"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("fault", ["cut", "zeros", "start", "bomb", "segments"])
def test_damaged_jpeg_tiles_that_are_named_rgb_are_refused(tissue, tmp_path, fault):
    path = tmp_path / "region.ome.tif"
    tifffile.imwrite(path, tissue[:300, :400], tile=(256, 256), compression="jpeg")
    with tifffile.TiffFile(path, mode="r+") as tiff:
        page = tiff.pages[0]
        page.tags["PhotometricInterpretation"].overwrite(2)
        start, size = page.dataoffsets[-1], page.databytecounts[-1]
        if fault == "segments":  # the tiles of a smaller image
            page.tags["ImageWidth"].overwrite(700)
    blob = bytearray(path.read_bytes())
    if fault == "cut":
        del blob[start + size - 100 :]
    elif fault == "zeros":
        blob[start + size // 2 : start + size] = bytes(size - size // 2)
    elif fault == "start":
        blob[start : start + 300] = bytes(300)
    elif fault == "bomb":
        frame = blob.index(b"\xff\xc0", start)
        blob[frame + 5 : frame + 9] = (60_000).to_bytes(2, "big") * 2
    says = "truncated or damaged|is not an image"  # a cut may remove the header, too
    with pytest.raises(BadInput, match=says):
        decode(bytes(blob))


def test_a_tiff_of_true_rgb_planes_is_read(tissue, tmp_path):
    path = tmp_path / "planes.tif"
    tifffile.imwrite(
        path,
        np.moveaxis(tissue[:64, :96], 2, 0),
        planarconfig="separate",
        photometric="rgb",
        compression="jpeg",
    )
    assert np.abs(decode(path).astype(int) - tissue[:64, :96]).mean() < 4


def test_a_multi_page_tiff_is_still_refused(tissue):
    first, second = Image.fromarray(tissue[:96, :96]), Image.fromarray(tissue[:48, :48])
    with pytest.raises(BadInput, match="2 pages"):
        decode(encoded(first, "TIFF", save_all=True, append_images=[second]))


def in_space(tissue, profile):
    """The same colours as in ``tissue``, stored in the space of a profile."""
    stored = ImageCms.profileToProfile(
        Image.fromarray(tissue),
        ImageCms.createProfile("sRGB"),
        ImageCms.ImageCmsProfile(io.BytesIO(profile)),
        ImageCms.Intent.PERCEPTUAL,
    )
    return Image.fromarray(np.asarray(stored))  # without the profile, which Pillow would save


WIDE = rgb_profile(DISPLAY_P3, "srgb", "Display P3")
LARGE = rgb_profile(ADOBE, 2.19921875, "large RGB")


@pytest.mark.parametrize("profile", [WIDE, LARGE], ids=["p3", "large"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_a_colour_profile_is_converted_to_srgb(tissue, profile, kind):
    stored = in_space(tissue, profile)
    exact = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    exact = {"lossless": True} if kind == "WEBP" else exact
    found = decode(encoded(stored, kind, icc_profile=profile, **exact)).astype(int)
    without = decode(encoded(stored, kind, **exact)).astype(int)
    assert np.abs(found - tissue).mean() < 1
    assert np.abs(without - tissue).mean() > 2  # so the profile did matter


def test_a_photograph_of_wide_gamut_embeds_like_the_original(tissue):
    encoder = open_encoder("default")
    size = encoder.manifest.size_px
    for profile in (WIDE, LARGE):
        stored = in_space(tissue, profile)
        with_profile = encoded(stored, "JPEG", icc_profile=profile, quality=95)
        pictures = [tissue, decode(with_profile), decode(encoded(stored, "JPEG", quality=95))]
        original, photograph, unread = encoder.embed(np.stack([square(p, size) for p in pictures]))
        apart = 1 - original @ photograph
        assert apart < 0.001 and 1 - original @ unread > 10 * apart


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA"])
def test_without_a_profile_and_with_srgb_nothing_changes(tissue, mode):
    picture = Image.fromarray(tissue).convert(mode)
    plain = decode(encoded(picture))
    if mode == "RGB":
        assert np.array_equal(plain, tissue)
    builtin = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (builtin, rgb_profile(SRGB, "srgb", "a name that says nothing")):
        assert np.array_equal(decode(encoded(picture, icc_profile=profile)), plain)


def test_grey_profiles_alpha_and_rotation_go_with_the_conversion(tissue):
    grey = Image.fromarray(tissue).convert("L")
    found = decode(encoded(grey, icc_profile=grey_profile(1.0, "linear grey")))
    linear = np.asarray(grey)[..., None] / 255
    expected = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    assert np.abs(found - 255 * expected).max() <= 2
    stored = in_space(tissue, WIDE).convert("RGBA")
    stored.putalpha(Image.fromarray(np.where(tissue[..., 0] > 128, 255, 0).astype(np.uint8)))
    laid = decode(encoded(stored, icc_profile=WIDE)).astype(int)
    kept = tissue[..., 0] > 128
    assert (laid[~kept] == 255).all() and np.abs(laid[kept] - tissue[kept]).mean() < 1
    exif = stored.getexif()
    exif[0x0112] = 6
    upright = decode(encoded(in_space(tissue, WIDE), icc_profile=WIDE, exif=exif))
    assert np.abs(upright.astype(int) - np.rot90(tissue, -1)).mean() < 1


@pytest.mark.parametrize(
    ("mode", "profile"),
    [
        ("RGB", b"no profile at all"),
        ("RGB", WIDE[:200]),
        ("RGB", grey_profile(2.2, "grey")),
        ("RGB", WIDE + b"\0" * 5_000_000),
    ],
    ids=["text", "cut", "of grey", "large"],
)
def test_a_profile_that_cannot_be_used_is_ignored_and_said(tissue, caplog, mode, profile):
    picture = Image.fromarray(tissue).convert(mode)
    name = f"scan-{len(profile)}.tif"
    found = decode(encoded(picture, "TIFF", icc_profile=profile), name=name)
    assert np.array_equal(found, tissue)
    (said,) = [r.getMessage() for r in caplog.records if r.name == "histoseek"]
    assert name in said and "cannot be used" in said and "read as sRGB" in said
