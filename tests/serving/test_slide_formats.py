"""Every reader returns OpenSlide's pixels; TIFF files that it rejects are read, or rejected clearly."""

import tarfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import numpy as np
import openslide
import pytest
import tifffile

from histoseek.errors import BadInput
from histoseek.serving.slides.openslide_source import OpenSlideSource
from histoseek.serving.slides.slide import open_slide
from histoseek.serving.slides.tiff_source import TiffSource


@pytest.fixture
def opened():
    """Open a source that is closed when the test ends."""
    with ExitStack() as stack:
        yield lambda kind, *args, **options: stack.enter_context(closing(kind(*args, **options)))


def read(source, places, level, width, height):
    """Tiles, or in their place why they cannot be read."""
    out = np.empty((len(places), height, width, 3), np.uint8)
    failed = source.regions(places, level, out)
    return [failed.get(number, tile) for number, tile in enumerate(out)]


def by_openslide(path, x, y, level, side):
    with openslide.OpenSlide(str(path)) as slide:
        picture = slide.read_region((x, y), level, (side, side))
        assert picture.getextrema()[3] == (255, 255)  # nothing transparent
        return np.asarray(picture.convert("RGB"))


def pyramid(path, pixels, levels=3, photometric="rgb", **options):
    """Write a tiled pyramid of ``pixels``, each level half as large as the one before."""
    with tifffile.TiffWriter(path) as out:
        for level in range(levels):
            out.write(
                np.ascontiguousarray(pixels[:: 2**level, :: 2**level]),
                photometric=photometric,
                tile=(128, 128),
                subfiletype=1 if level else 0,
                resolution=(2e4, 2e4),
                resolutionunit="CENTIMETER",
                metadata=None,
                **options,
            )
    return path


@pytest.mark.parametrize(
    ("photometric", "options"),
    [
        ("rgb", {"compression": "zlib"}),
        ("rgb", {"compression": "lzw"}),
        ("rgb", {}),
        ("rgb", {"compression": "jpeg", "compressionargs": {"level": 80}}),
        ("ycbcr", {"compression": "jpeg", "compressionargs": {"level": 80}}),
        ("ycbcr", {"compression": "jpeg", "compressionargs": {"level": 70}, "subsampling": (2, 2)}),
    ],
)
def test_direct_decoding_gives_openslides_pixels_on_every_level(
    tissue, tmp_path, photometric, options, opened
):
    path = pyramid(tmp_path / "p.tiff", tissue, photometric=photometric, **options)
    source = opened(OpenSlideSource, path)
    assert source.reads_directly == (0, 1, 2)
    rng = np.random.default_rng(0)
    for level in range(3):
        down = 2**level
        places = [
            tuple(int(v) * down for v in rng.integers(0, 512 // down - 60, 2)) for _ in "1234"
        ]
        for (x, y), tile in zip(places, read(source, places, level, 60, 60), strict=True):
            assert np.array_equal(tile, by_openslide(path, x, y, level, 60))


@pytest.mark.shared
def test_the_real_slide_reads_the_same_with_and_without_openslide(cmu_slide, opened):
    direct, plain = (
        opened(OpenSlideSource, cmu_slide),
        opened(OpenSlideSource, cmu_slide, direct=False),
    )
    assert direct.reads_directly == (0,) and plain.reads_directly == ()
    places = [(x, y) for y in range(0, 2967 - 224, 301) for x in range(0, 2220 - 224, 283)]
    both = (read(source, places, 0, 224, 224) for source in (direct, plain))
    assert all(np.array_equal(a, b) for a, b in zip(*both, strict=True))


def test_places_between_the_pixels_of_a_level_are_left_to_openslide(tissue, tmp_path, opened):
    path = pyramid(tmp_path / "p.tiff", tissue, compression="zlib")
    (tile,) = read(opened(OpenSlideSource, path), [(101, 50)], 1, 60, 60)
    assert np.array_equal(tile, by_openslide(path, 101, 50, 1, 60))


def test_a_level_with_empty_segments_is_left_to_openslide(tissue, tmp_path, opened):
    path = pyramid(tmp_path / "p.tiff", tissue, levels=1, compression="zlib")
    with tifffile.TiffFile(path, mode="r+") as file:
        tag = file.pages[0].tags["TileByteCounts"]
        tag.overwrite([0, *tag.value[1:]])
    assert opened(OpenSlideSource, path).reads_directly == ()


def test_damaged_segments_cost_only_their_tiles_whoever_reads_beside(tissue, tmp_path, opened):
    """Direct and by OpenSlide, whose handle is lost to all threads when one meets damage."""
    path = pyramid(
        tmp_path / "p.tiff", np.tile(tissue, (2, 2, 1)), levels=1, photometric="ycbcr",
        compression="jpeg", compressionargs={"level": 80},
    )  # fmt: skip
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        spans = [(page.dataoffsets[n], page.databytecounts[n]) for n in (9, 30)]
    whole = opened(OpenSlideSource, path, direct=False)
    blob = bytearray(path.read_bytes())
    for offset, size in spans:  # in the middle of the entropy-coded data
        blob[offset + size // 2 : offset + size // 2 + 60] = b"\xff\xd9" * 30
    broken = tmp_path / "broken.tiff"
    broken.write_bytes(blob)
    places = [(x * 128, y * 128) for y in range(8) for x in range(8)]
    for direct in (True, False):
        source = opened(OpenSlideSource, broken, direct=direct)
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda xy, s=source: read(s, [xy], 0, 128, 128)[0], places * 3))
        for number, tile in enumerate(found):
            place = number % 64
            if place in (9, 30):
                assert isinstance(tile, BadInput) and "copy it again" in str(tile)
            else:
                (right,) = read(whole, [places[place]], 0, 128, 128)
                assert np.array_equal(tile, right)


def test_ome_tiff_has_its_scale_and_its_pyramid(tissue, tmp_path):
    path = tmp_path / "case.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as out:
        options = {"photometric": "rgb", "tile": (128, 128), "compression": "zlib"}
        about = {"axes": "YXS", "PhysicalSizeX": 250.0, "PhysicalSizeXUnit": "nm",
                 "PhysicalSizeY": 0.25, "PhysicalSizeYUnit": "µm"}  # fmt: skip
        out.write(tissue, subifds=1, metadata=about, **options)
        out.write(tissue[::2, ::2], subfiletype=1, **options)
    with open_slide(path) as slide:
        assert slide.mpp == pytest.approx(0.25) and len(slide._source.levels) == 2
        assert np.array_equal(slide.read_tile(30, 40, 100, 100), tissue[40:140, 30:130])
        assert np.array_equal(slide.read_tile(20, 40, 200, 100), tissue[::2, ::2][20:120, 10:110])
        assert slide.grid(100, 0.25).candidates == 25


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_striped_grey_planar_and_alpha_tiff_is_read(tissue, tmp_path, planar, opened):
    options = {"photometric": "rgb", "rowsperstrip": 50, "metadata": None, "planarconfig": planar}
    pixels = tissue if planar == "contig" else np.moveaxis(tissue, 2, 0)
    tifffile.imwrite(tmp_path / "strips.tif", pixels, **options)
    source = opened(TiffSource, tmp_path / "strips.tif")
    (tile,) = read(source, [(7, 40)], 0, 100, 130)
    assert np.array_equal(tile, tissue[40:170, 7:107])
    grey = tissue[:, :, 1]
    tifffile.imwrite(tmp_path / "grey.tif", grey, photometric="minisblack", tile=(64, 64))
    (tile,) = read(opened(TiffSource, tmp_path / "grey.tif"), [(-10, 480)], 0, 64, 64)
    assert np.array_equal(tile[:32, 10:], np.repeat(grey[480:, :54, None], 3, 2))
    assert (tile[32:] == 255).all() and (tile[:, :10] == 255).all()
    alpha = np.dstack([tissue, np.zeros_like(grey)])
    tifffile.imwrite(tmp_path / "a.tif", alpha, photometric="rgb", extrasamples=["unassalpha"])
    (tile,) = read(opened(TiffSource, tmp_path / "a.tif"), [(0, 0)], 0, 64, 64)
    assert (tile == 255).all()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p, t: tifffile.imwrite(p, t.astype(np.uint16) * 256, photometric="rgb"), "16 bits"),
        (lambda p, t: tifffile.imwrite(p, np.stack([t[..., 0]] * 5)), "5 planes"),
        (lambda p, t: tifffile.imwrite(p, t[..., 0], photometric="miniswhite"), "MINISWHITE"),
        (lambda p, t: tifffile.imwrite(p, t.astype(np.float32), photometric="rgb"), "float32"),
        (lambda p, t: tifffile.imwrite(p, t, extratags=[(274, 3, 1, 6, True)]), "orientation 6"),
        (lambda p, t: p.write_bytes(b"II*\0" + bytes(range(200))), "copy it again"),
        (lambda p, t: p.write_bytes(b""), "0 bytes"),
    ],
)  # fmt: skip
def test_tiff_without_one_reading_is_refused_with_its_reason(tissue, tmp_path, make, says):
    path = tmp_path / "odd.ome.tif"
    make(path, tissue)
    with pytest.raises(BadInput, match=says) as caught:
        open_slide(path)
    assert "odd.ome.tif" in str(caught.value)


def test_a_tiff_cut_anywhere_is_read_or_refused_but_never_crashes(tissue, tmp_path):
    path = tmp_path / "whole.ome.tif"
    tifffile.imwrite(path, tissue, photometric="rgb", tile=(64, 64), compression="jpeg")
    blob = path.read_bytes()
    cut = tmp_path / "cut.ome.tif"
    for share in np.linspace(0.01, 0.99, 25):
        cut.write_bytes(blob[: int(len(blob) * share)])
        try:
            with open_slide(cut, assume_mpp=0.5) as slide:
                tiles = slide.read_tiles(
                    [(0, 0), (288, 288)], 224, np.empty((2, 224, 224, 3), np.uint8)
                )
                assert tiles  # something is missing
        except BadInput as error:
            assert "cut.ome.tif" in str(error) and len(str(error)) > 40


@pytest.mark.shared
def test_other_projects_ome_tiffs_are_read(shared, tmp_path):
    with tarfile.open(shared / "formats.tar") as pack:
        pack.extractall(tmp_path, filter="data")
    sizes = {}
    for path in sorted((tmp_path / "2022-qupath-cell-detection").glob("*.ome.tif")):
        with open_slide(path) as slide:
            sizes[path.name] = (slide.width, slide.mpp_from, slide.mpp and 0.1 < slide.mpp < 1)
            assert slide.thumbnail(256).std() > 10
    assert {s[0] for s in sizes.values()} == {1101, 2202, 1445}
    assert all(s[1:] == ("file", True) for s in sizes.values()), sizes


def test_a_file_of_an_ome_set_is_read_alone_and_at_its_own_scale(tissue, tmp_path, opened):
    """OME-XML may name other files; their offsets and scale are not this file's."""
    names = ("A.ome.tif", "B.ome.tif")
    images = "".join(
        f'<Image ID="Image:{n}"><Pixels ID="Pixels:{n}" DimensionOrder="XYCZT" Type="uint8" SizeX="512" '
        f'SizeY="512" SizeC="3" SizeZ="1" SizeT="1" PhysicalSizeX="{0.25 * (n + 1)}" PhysicalSizeY='
        f'"{0.25 * (n + 1)}"><Channel ID="Channel:{n}:0" SamplesPerPixel="3"/><TiffData IFD="0" '
        f'PlaneCount="1"><UUID FileName="{name}">urn:uuid:{n}</UUID></TiffData></Pixels></Image>'
        for n, name in enumerate(names)
    )
    space = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
    for number, name in enumerate(names):
        tifffile.imwrite(
            tmp_path / name, np.roll(tissue, 40 * number, 0), photometric="rgb", tile=(64, 64),
            compression="zlib", metadata=None,
            description=f'<OME xmlns="{space}" UUID="urn:uuid:{number}">{images}</OME>',
        )  # fmt: skip
    for number, name in enumerate(names):
        with open_slide(tmp_path / name) as slide:
            assert slide.mpp == pytest.approx(0.25 * (number + 1))
            tile = slide.read_tile(10, 20, 100, 100)
            assert np.array_equal(tile, np.roll(tissue, 40 * number, 0)[20:120, 10:110])


def test_colours_and_alpha_mean_what_the_file_says(tissue, tmp_path, opened):
    ycbcr = tmp_path / "ycbcr.ome.tif"
    tifffile.imwrite(ycbcr, tissue, photometric="ycbcr", compression="zlib", tile=(64, 64))
    with pytest.raises(BadInput, match="YCbCr that is not JPEG"):
        open_slide(ycbcr)
    half = np.full_like(tissue[..., :1], 128)
    expected = {
        "unspecified": tissue.astype(int),
        "assocalpha": np.minimum(tissue.astype(int) + 127, 255),
        "unassalpha": np.round(tissue * (128 / 255) + 127).astype(int),
    }
    for kind, right in expected.items():
        path = tmp_path / f"{kind}.ome.tif"
        four = np.concatenate([tissue, half], axis=2)
        tifffile.imwrite(path, four, photometric="rgb", extrasamples=[kind], tile=(64, 64))
        (tile,) = read(opened(TiffSource, path), [(0, 0)], 0, 64, 64)
        assert np.abs(tile.astype(int) - right[:64, :64]).max() <= 1, kind


@pytest.mark.parametrize("compression", ["jpeg2000", "webp", "png", "lzma"])
def test_plain_tiled_tiff_that_openslide_refuses_is_read(tissue, tmp_path, compression):
    path = tmp_path / "plain.tif"
    lossless = {"level": 0} if compression == "jpeg2000" else {}
    if compression == "webp":
        lossless = {"lossless": True}
    tifffile.imwrite(
        path, tissue, photometric="rgb", tile=(128, 128), compression=compression,
        compressionargs=lossless, resolution=(2e4, 2e4), resolutionunit="CENTIMETER", metadata=None,
    )  # fmt: skip
    with open_slide(path) as slide:
        assert slide.mpp == pytest.approx(0.5)
        assert np.array_equal(slide.read_tile(30, 40, 100, 100), tissue[40:140, 30:130])


def test_a_segment_that_claims_to_be_larger_than_its_place_is_not_decoded(tissue, tmp_path, opened):
    import imagecodecs

    path = tmp_path / "bomb.ome.tif"
    bomb = imagecodecs.jpeg2k_encode(np.zeros((3000, 3000, 3), np.uint8), level=50)
    tifffile.imwrite(
        path, iter([bomb] * 4), shape=(512, 512, 3), dtype=np.uint8, photometric="rgb",
        tile=(256, 256), compression=34712,
    )  # fmt: skip
    (tile,) = read(opened(TiffSource, path), [(0, 0)], 0, 64, 64)
    assert isinstance(tile, BadInput) and "states 3000 x 3000" in str(tile)


def test_wide_strips_are_read_in_low_blocks(tmp_path, opened):
    wide = np.zeros((300, 40_000, 3), np.uint8)
    tifffile.imwrite(tmp_path / "wide.tif", wide, photometric="rgb", rowsperstrip=1)
    block = opened(TiffSource, tmp_path / "wide.tif").block_px
    assert block[0] == 40_000 and block[1] <= 32


@pytest.mark.parametrize("dpi", [72, 300, 600])
def test_the_scale_of_a_print_gives_way_to_a_stated_one(tissue, tmp_path, dpi):
    path = tmp_path / "scan.tif"
    tifffile.imwrite(
        path, tissue, photometric="rgb", tile=(128, 128), resolution=(dpi, dpi), resolutionunit="INCH",
        compression="zlib", metadata=None,
    )  # fmt: skip
    with open_slide(path, assume_mpp=0.5) as slide:
        assert slide.mpp == 0.5 and slide.mpp_from == "assumed"
    with open_slide(path) as slide, pytest.raises(BadInput, match="--assume-mpp"):
        slide.grid(224, 0.5)


@pytest.mark.parametrize(
    ("name", "vendor"), [("a.vsi", "Olympus VSI"), ("b.isyntax", "Philips iSyntax")]
)
def test_a_format_that_no_library_reads_is_refused_by_its_name(tmp_path, name, vendor):
    (tmp_path / name).write_bytes(b"\0" * 1000)
    with pytest.raises(BadInput, match=rf"{vendor}\): convert it to SVS or OME-TIFF"):
        open_slide(tmp_path / name)
