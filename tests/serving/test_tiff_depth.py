"""Every reader checks a slide's bits, samples and colours, and records its colour profile."""

import tarfile
from types import SimpleNamespace

import h5py
import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
from colour import DISPLAY_P3, rgb_profile
from PIL import Image

from histoseek.artifacts.feature_files import read_about
from histoseek.errors import BadInput
from histoseek.serving.slides.openslide_source import OpenSlideSource
from histoseek.serving.slides.slide import open_slide
from histoseek.serving.slides.tiff_depth import check_source

SCALE = {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER", "metadata": None}
APERIO = "Aperio Image Library v11.2.1\r\n512x512 [0,0 512x512] (128x128) {}|AppMag = 20|MPP = 0.5"
WIDE = rgb_profile(DISPLAY_P3, "srgb", "Scanner P3")


def levels(pixels):
    return [np.ascontiguousarray(pixels[:: 2**n, :: 2**n]) for n in range(2)]


def tiled(path, pages, tile=(128, 128), bigtiff=False, byteorder=None, **options):
    """Write pages as a tiled pyramid; an option that is a list holds one value per page."""
    options = {"photometric": "rgb", "compression": "zlib", **SCALE, **options}
    with tifffile.TiffWriter(path, bigtiff=bigtiff, byteorder=byteorder) as out:
        for number, page in enumerate(pages):
            own = {k: v[number] if isinstance(v, list) else v for k, v in options.items()}
            out.write(page, tile=tile, subfiletype=1 if number else 0, **own)
    return path


def grey_of(tissue):
    return np.ascontiguousarray(tissue[..., 1])


def cmyk_of(tissue):
    return np.asarray(Image.fromarray(tissue).convert("CMYK"))


DEEP = {
    "16": (lambda t: t.astype(np.uint16) * 257, {}, "16 bits"),
    "12 in 16": (lambda t: t.astype(np.uint16) * 16, {}, "16 bits"),
    "10 in 16": (lambda t: t.astype(np.uint16) * 4, {"compression": "lzw"}, "16 bits"),
    "bigtiff": (lambda t: t.astype(np.uint16), {"bigtiff": True}, "16 bits"),
    "planar": (
        lambda t: np.moveaxis(t.astype(np.uint16), 2, 0),
        {"planarconfig": "separate"},
        "16 bits",
    ),
    "grey": (
        lambda t: grey_of(t).astype(np.uint16) * 16,
        {"photometric": "minisblack"},
        "16 bits",
    ),
    "float": (lambda t: (t / 255).astype(np.float32), {}, "32 bits"),
    "signed": (lambda t: (t // 2).astype(np.int8), {}, "int8"),
    "cmyk": (cmyk_of, {"photometric": "separated"}, "SEPARATED"),
    "lab": (
        lambda t: np.asarray(Image.fromarray(t).convert("LAB")),
        {"photometric": "cielab"},
        "CIELAB",
    ),
    "two channels": (
        lambda t: np.ascontiguousarray(t[..., :2]),
        {"photometric": "minisblack", "extrasamples": ["unspecified"] * 2},
        "2 channels",
    ),
    "five channels": (
        lambda t: np.ascontiguousarray(np.dstack([t, t[..., :2]])),
        {"extrasamples": [("unspecified",) * 2] * 2},
        "5 channels",
    ),
}


@pytest.mark.parametrize("vendor", ["generic", "aperio"])
@pytest.mark.parametrize("kind", DEEP)
def test_a_tiled_slide_without_one_reading_is_refused(tissue, tmp_path, vendor, kind):
    make, options, says = DEEP[kind]
    pages = [make(level) for level in levels(tissue)]
    if vendor == "aperio":
        options = {**options, "description": [APERIO.format("Q=0")] * 2}
    path = tiled(tmp_path / f"{vendor}.svs", pages, **options)
    assert openslide.OpenSlide.detect_format(path) == (
        "aperio" if vendor == "aperio" else "generic-tiff"
    )
    with pytest.raises(BadInput, match=says) as caught:
        open_slide(path)
    assert str(path) in str(caught.value) and "expected" in str(caught.value)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda t: t, {}),
        (lambda t: t, {"compression": "jpeg"}),
        (lambda t: t, {"bigtiff": True, "byteorder": ">"}),
        (grey_of, {"photometric": "minisblack"}),
        (lambda t: 255 - grey_of(t), {"photometric": "miniswhite"}),
        (
            grey_of,
            {
                "photometric": "palette",
                "colormap": [np.repeat(np.arange(256, dtype=np.uint16)[None] * 257, 3, 0)] * 2,
            },
        ),
        (lambda t: np.dstack([t, np.full_like(t[..., :1], 255)]), {"extrasamples": ["unassalpha"] * 2}),
    ],
    ids=["rgb", "jpeg", "big", "grey", "white is zero", "palette", "alpha"],
)  # fmt: skip
def test_eight_bits_in_every_colour_model_are_read_as_before(tissue, tmp_path, make, options):
    path = tiled(tmp_path / "good.tiff", [make(level) for level in levels(tissue)], **options)
    with open_slide(path) as slide:
        tile = slide.read_tile(64, 64, 128, 128).astype(int)
    right = tissue[64:192, 64:192].astype(int)
    if options.get("photometric", "rgb") != "rgb":
        right = np.repeat(right[..., 1:2], 3, axis=2)
    near = 4 if options.get("compression") == "jpeg" else 0
    assert np.abs(tile - right).mean() <= near


def test_every_level_that_is_used_is_checked_and_nothing_else(tissue, tmp_path):
    first, second = levels(tissue)
    path = tiled(tmp_path / "second.tiff", [first, second.astype(np.uint16)])
    with pytest.raises(BadInput, match="16 bits"):
        open_slide(path)
    turned = tiled(tmp_path / "big-endian.tiff", [first.astype(np.uint16)], byteorder=">")
    with pytest.raises(BadInput, match="16 bits"):  # OpenSlide does not know it
        open_slide(turned)
    mask = tmp_path / "mask.tiff"
    with tifffile.TiffWriter(mask) as out:
        for page in (first, grey_of(tissue).astype(np.uint16)):  # a page of its own, of no level
            colours = "rgb" if page.ndim == 3 else "minisblack"
            out.write(page, photometric=colours, tile=(128, 128), **SCALE)
    with open_slide(mask) as slide:
        assert np.array_equal(slide.read_tile(0, 0, 64, 64), tissue[:64, :64])
    # Leica's and Ventana's levels are larger than their pages: every tiled page counts then.
    stitched = SimpleNamespace(
        properties={"openslide.vendor": "leica"}, levels=((1.0, (9000, 9000)),)
    )
    with pytest.raises(BadInput, match="16 bits"):
        check_source(mask, stitched)


@pytest.mark.parametrize(("bits", "vendor"), [(12, "aperio"), (16, "aperio"), (12, "tifffile")])
def test_pixels_deeper_than_their_tags_are_refused(tissue, tmp_path, bits, vendor):
    def tiles(depth):
        scaled = tissue.astype(np.uint16) * (2**depth // 256) if depth > 8 else tissue
        for y in range(0, 512, 128):
            for x in range(0, 512, 128):
                part = np.ascontiguousarray(scaled[y : y + 128, x : x + 128])
                options = {"bitspersample": depth, "codecformat": "j2k", "reversible": True}
                yield imagecodecs.jpeg2k_encode(part, level=0, **options)

    code = 33005 if vendor == "aperio" else 34712
    description = APERIO.format("J2K/KAKADU-raw") if vendor == "aperio" else None
    for depth in (8, bits):
        path = tmp_path / f"{depth}.svs" if vendor == "aperio" else tmp_path / f"{depth}.tif"
        with tifffile.TiffWriter(path) as out:
            out.write(
                tiles(depth),
                shape=tissue.shape,
                dtype="uint8",
                tile=(128, 128),
                compression=code,
                photometric="rgb",
                metadata=None,
                description=description,
            )
    with open_slide(tmp_path / f"8{path.suffix}", 0.5) as slide:
        assert np.array_equal(slide.read_tile(0, 0, 64, 64), tissue[:64, :64])
    with pytest.raises(BadInput, match=f"compressed pixels have {bits}"):
        open_slide(path)


def test_tags_that_cannot_be_read_are_said_and_the_slide_is_read(
    tissue, tmp_path, caplog, monkeypatch
):
    path = tiled(tmp_path / "plain.tiff", levels(tissue))
    source = OpenSlideSource(path)
    monkeypatch.setattr(
        tifffile, "TiffFile", lambda *a, **k: (_ for _ in ()).throw(ValueError("odd"))
    )
    check_source(path, source)
    source.close()
    (said,) = [r.getMessage() for r in caplog.records if r.name == "histoseek"]
    assert "plain.tiff" in said and "could not be checked (ValueError: odd)" in said


def test_embed_refuses_deep_slides_by_name_and_does_the_others(tissue, tmp_path, cli_json):
    (tmp_path / "in").mkdir()
    tiled(tmp_path / "in/deep.tiff", levels(tissue.astype(np.uint16) * 257))
    tiled(tmp_path / "in/good.tiff", levels(tissue))
    report = cli_json("embed", tmp_path / "in", "--out", tmp_path / "f", expect=1)
    states = {r["name"]: (r["state"], r["reason"]) for r in report["results"]}
    assert states["good"][0] == "done"
    assert states["deep"][0] == "failed" and "16 bits" in states["deep"][1]
    assert not list((tmp_path / "f").rglob("deep.h5"))


@pytest.mark.shared
def test_real_scanner_and_dicom_files_keep_their_answers(shared, tmp_path):
    for name in ("formats.tar", "formats2.tar"):
        with tarfile.open(shared / name) as pack:
            pack.extractall(tmp_path, filter="data")
    with open_slide(tmp_path / "formats2/test3-TRITC_2_560.ndpi") as slide:
        assert (slide.width, slide.height) == (
            3968,
            4864,
        )  # fluorescence as 8-bit RGB: not told apart
    with pytest.raises(BadInput, match="BitsAllocated value 16"):
        open_slide(tmp_path / "highdicom/sm_image_grayscale.dcm")
    with open_slide(tmp_path / "openslide-python/boxes.tiff", 0.5) as slide:
        assert slide.colour_profile == {"icc_profile": "sRGB built-in", "icc_applied": False}


def test_a_slides_profile_is_recorded_and_its_pixels_are_as_stored(tissue, tmp_path, cli, cli_json):
    folder = tmp_path / "in"
    folder.mkdir()
    profile = {"iccprofile": [WIDE, None]}
    tiled(folder / "openslide.tiff", levels(tissue), **profile)
    tiled(folder / "none.tiff", levels(tissue))
    strips = {"photometric": "rgb", "rowsperstrip": 32, **SCALE}
    tifffile.imwrite(folder / "strips.tiff", tissue, iccprofile=WIDE, **strips)
    Image.fromarray(tissue).save(folder / "picture.png", icc_profile=WIDE)
    words = ("embed", *sorted(folder.iterdir()), "--out", tmp_path / "f", "--assume-mpp", 0.5)
    expected = {
        "openslide": ("Scanner P3", False),
        "none": (None, False),
        "strips": ("Scanner P3", False),
        "picture": ("Scanner P3", True),
    }
    for _ in range(2):  # also where it was done before
        report = cli_json(*words)
        found = {r["name"]: (r["icc_profile"], r["icc_applied"]) for r in report["results"]}
        assert found == expected
    vectors = {}
    for path in (tmp_path / "f").rglob("*.h5"):
        about = read_about(path)
        assert (about["icc_profile"], about["icc_applied"]) == expected[path.stem]
        with h5py.File(path) as stored:
            vectors[path.stem] = stored["features"][()]
    assert np.array_equal(vectors["openslide"], vectors["none"])
    assert np.array_equal(vectors["strips"], vectors["none"])
    assert not np.allclose(vectors["picture"], vectors["none"], atol=1e-3)
    said = cli(*words).stdout
    assert "colour profile 'Scanner P3' of 2 slides was not applied" in said
