"""Folders of slides as found in practice: matching rows, annotations and pixels; reported omissions."""

import json
import shutil
import tarfile
import unicodedata

import h5py
import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from histoseek.artifacts.feature_files import read_features
from histoseek.artifacts.tileset_files import open_tiles
from histoseek.errors import BadInput
from histoseek.serving.embedding.jobs import find_inputs, find_jobs
from histoseek.serving.embedding.pipeline import embed_jobs
from histoseek.serving.embedding.results import EmbedOptions
from histoseek.serving.encoders.open import open_encoder
from histoseek.serving.slides.slide import open_slide

TILE = {"tile": (224, 224), "photometric": "rgb", "compression": "jpeg", "metadata": None}
HALF_MICRON = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}


@pytest.fixture(scope="module")
def encoder():
    return open_encoder("default")


def embed(inputs, encoder, out, **options):
    chosen = EmbedOptions(overlays=False, **options)
    jobs = find_jobs(inputs, manifest=chosen.manifest)
    return embed_jobs(jobs, encoder, out, chosen, lambda *_: None)


@pytest.fixture
def two_patients(make_slide, tmp_path):
    """Two different slides of one file name, in a folder each."""
    for seed, patient in enumerate(("patientA", "patientB")):
        (tmp_path / "s" / patient).mkdir(parents=True)
        make_slide(tmp_path / "s" / patient / "slide.tiff", side=448, seed=seed)
    return tmp_path / "s"


def test_rows_find_slides_of_one_name_by_their_folder(two_patients, tmp_path):
    (tmp_path / "m.csv").write_text(
        "file,patient\npatientA/slide.tiff,PA\npatientB/slide,PB\nslide.2,PC\n"
    )
    found = find_inputs([two_patients], manifest=tmp_path / "m.csv")
    assert {j.source.parent.name: j.row["patient"] for j in found.jobs} == {
        "patientA": "PA", "patientB": "PB"
    }  # fmt: skip
    assert found.rows_unused == ("slide.2",) and found.slides_without_row == ()


def test_a_row_that_means_two_slides_stops_the_run(two_patients, cli, tmp_path):
    (tmp_path / "m.csv").write_text("file,mpp\nslide.tiff,0.25\n")
    done = cli("embed", two_patients, "--out", tmp_path / "out", "--manifest", tmp_path / "m.csv")
    assert done.returncode == 1 and "matches 2 slides" in done.stderr
    assert "patientA/slide.tiff" in done.stderr and not (tmp_path / "out").exists()


def test_no_ending_but_a_slides_is_cut_from_a_row(make_slide, tmp_path):
    slide = make_slide(tmp_path / "case.tiff", side=448)
    other = make_slide(tmp_path / "other.tiff", side=448)
    (tmp_path / "m.csv").write_text("slide,mpp,patient\ncase.2,9,P-WRONG\nother.tiff,0.5,P\n")
    found = find_inputs([slide, other], manifest=tmp_path / "m.csv")
    assert [job.row.get("patient") for job in found.jobs] == [None, "P"]
    assert found.rows_unused == ("case.2",) and found.slides_without_row == ("case",)


def test_names_are_compared_composed(make_slide, tmp_path):
    name = unicodedata.normalize("NFD", "Präparat")
    slide = make_slide(tmp_path / f"{name}.tiff", side=448)
    (tmp_path / "m.csv").write_text("file,patient\nPräparat.tiff,P7\n", encoding="cp1252")
    found = find_inputs([slide], manifest=tmp_path / "m.csv")
    assert found.jobs[0].row["patient"] == "P7" and "cp1252" in found.notes[0]


def test_a_link_beside_its_slide_is_the_same_slide(make_slide, tmp_path):
    slide = make_slide(tmp_path / "b.tiff", side=448)
    (tmp_path / "a.tiff").symlink_to(slide)
    for inputs in ([tmp_path], [tmp_path / "a.tiff", slide], [slide, tmp_path / "a.tiff"]):
        found = find_inputs(inputs)
        assert [(job.name, job.source.name) for job in found.jobs] == [("b", "b.tiff")]
        assert [left.reason for left in found.left_out] == [f"the same file as {slide}"]
    (tmp_path / "m.csv").write_text("file,patient\na.tiff,P1\n")
    job = find_jobs([tmp_path], manifest=tmp_path / "m.csv")[0]
    assert job.row["patient"] == "P1"
    (tmp_path / "m.csv").write_text("file,patient\na.tiff,P1\nb.tiff,P2\n")
    with pytest.raises(BadInput, match="both match slide 'b'"):
        find_jobs([tmp_path], manifest=tmp_path / "m.csv")
    assert [job.name for job in find_jobs([tmp_path / "a.tiff"])] == ["a"]


def test_a_manifest_is_of_slides_or_of_one_tile_set(make_slide, tile_folder, tmp_path):
    slide = make_slide(tmp_path / "a.tiff", side=448)
    (tmp_path / "m.csv").write_text("file,label\na.tiff,x\n")
    with pytest.raises(BadInput, match=r"1 slide\(s\) and 1 tile set\(s\)"):
        find_inputs([slide, tile_folder], manifest=tmp_path / "m.csv")


def test_a_person_wins_over_the_file_and_it_is_said(make_slide, encoder, tmp_path):
    slide = make_slide(tmp_path / "a.tiff", side=1024, mpp=2.5)
    (failed,) = embed([slide], encoder, tmp_path / "0", mpp=0.5)
    assert failed.state == "failed" and "--override-mpp" in failed.reason
    (tmp_path / "m.csv").write_text("file;mpp\na.tiff;0,25\n")  # as Excel writes it in Germany
    (stated,) = embed([slide], encoder, tmp_path / "1", manifest=tmp_path / "m.csv", assume_mpp=0.7)
    about = read_features(tmp_path / stated.features).about
    assert about["key"]["mpp"] == 0.25 and about["mpp_from"] == "manifest"
    assert (
        "0.25 (from the manifest or an option); the file's 2.5 x 2.5"
        in stated.notes[1]
        == about["notes"][1]
    )
    (over,) = embed([slide], encoder, tmp_path / "2", manifest=tmp_path / "m.csv", override_mpp=0.5)
    about = read_features(tmp_path / over.features).about
    assert about["key"]["mpp"] == 0.5 and about["mpp_from"] == "override"
    assert "--override-mpp); the manifest's 0.25 was overridden" in over.notes[0]
    assert "0.25 (from the manifest); --assume-mpp 0.7" in stated.notes[0]
    (assumed,) = embed([slide], encoder, tmp_path / "3", mpp=2.5, assume_mpp=0.5)
    assert read_features(tmp_path / assumed.features).mpp == 2.5
    assert "--assume-mpp 0.5 was not used: it is only for files" in assumed.notes[0]
    (same,) = embed([slide], encoder, tmp_path / "4", mpp=2.5, override_mpp=2.51)
    assert same.notes == []


def test_unequal_resolution_tags_give_way_to_a_stated_scale(tissue, encoder, tmp_path):
    for name, dots, unit in (("print", (300, 600), 2), ("wrong", (20000, 10000), 3)):
        tifffile.imwrite(
            tmp_path / f"{name}.tiff", tissue, resolution=dots, resolutionunit=unit, **TILE
        )
    (tmp_path / "m.csv").write_text("slide,mpp\nprint,0.5\nwrong,0.5\n")
    for result in embed(
        [tmp_path / "print.tiff", tmp_path / "wrong.tiff"], encoder, tmp_path / "1",
        manifest=tmp_path / "m.csv",
    ):  # fmt: skip
        assert result.state == "done" and "was overridden" in result.notes[0], result
    with open_slide(tmp_path / "print.tiff", assume_mpp=0.5) as slide:
        assert slide.mpp == 0.5 and "84.67 x 42.33" in slide.notes[0]
    with pytest.raises(BadInput, match=r"0\.5 x 1 µm; expected square pixels.*--override-mpp"):
        open_slide(tmp_path / "wrong.tiff", assume_mpp=0.5)


def _ome(name, mpp):
    sizes = {f"PhysicalSize{axis}{unit}": value for axis in "XY"
             for unit, value in (("", mpp), ("Unit", "µm"))}  # fmt: skip
    return {"axes": "YXS", "Name": name, **sizes}


@pytest.mark.parametrize("ome", [True, False])
@pytest.mark.parametrize("tiled", [True, False])
def test_a_label_or_macro_first_is_not_the_slide(tissue, encoder, tmp_path, ome, tiled):
    """OpenSlide itself takes a first tiled picture for the slide, and reads only that."""
    path = tmp_path / ("case.ome.tif" if ome else "case.tiff")
    small = {} if tiled else {"tile": None, "compression": None}
    with tifffile.TiffWriter(path, ome=ome) as out:
        for picture, name, mpp, more in (
            (tissue[::4, ::4].copy(), "macro", 2.0, {**TILE, "tile": (64, 64), **small}),
            (tissue, "slide", 0.5, TILE),
        ):
            scale = {"metadata": _ome(name, mpp)} if ome else HALF_MICRON
            out.write(picture, **{**more, **scale})
    (result,) = embed([path], encoder, tmp_path / "out")
    found = read_features(tmp_path / result.features)
    assert (found.width, found.height, found.mpp) == (512, 512, pytest.approx(0.5))
    assert "series 1 of 0 to 1" in result.notes[0]


def test_pictures_of_one_size_are_told_apart_by_tissue_or_a_number(tissue, encoder, tmp_path):
    empty = np.full_like(tissue, 243)
    with tifffile.TiffWriter(tmp_path / "one.ome.tif", ome=True) as out:
        for picture, name in ((empty, "empty glass"), (tissue, "tissue")):
            out.write(picture, **{**TILE, "metadata": _ome(name, 0.5)})
    with open_slide(tmp_path / "one.ome.tif") as slide:
        assert slide.thumbnail().mean() < 230
    with tifffile.TiffWriter(tmp_path / "two.ome.tif", ome=True) as out:
        for picture, name, mpp in (
            (tissue, "scene A", 0.5),
            (tissue[::-1].copy(), "scene B", 0.25),
        ):
            out.write(picture, **{**TILE, "metadata": _ome(name, mpp)})
    (refused,) = embed([tmp_path / "two.ome.tif"], encoder, tmp_path / "0")
    assert "0 (scene A, 512 x 512), 1 (scene B, 512 x 512)" in refused.reason
    assert "--series N" in refused.reason and refused.state == "failed"
    (chosen,) = embed([tmp_path / "two.ome.tif"], encoder, tmp_path / "1", series=1)
    about = read_features(tmp_path / chosen.features).about
    assert about["key"]["mpp"] == 0.25 and about["key"]["series"] == 1
    (tmp_path / "m.csv").write_text("slide,series\ntwo,0\n")
    (by_row,) = embed(
        [tmp_path / "two.ome.tif"], encoder, tmp_path / "2", manifest=tmp_path / "m.csv"
    )
    assert read_features(tmp_path / by_row.features).mpp == 0.5
    with pytest.raises(BadInput, match="no series 7; it has 2"):
        open_slide(tmp_path / "two.ome.tif", series=7)


def test_what_is_left_out_is_named_for_people_and_programs(make_slide, cli, tmp_path):
    folder = tmp_path / "s"
    for name in (".snapshot/daily.0", ".Trash-1000", "_b_/stack1"):
        (folder / name).mkdir(parents=True)
    make_slide(folder / "a.tiff", side=448)
    for name in (".snapshot/daily.0/a.tiff", ".Trash-1000/deleted.tiff"):
        shutil.copy(folder / "a.tiff", folder / name)
    for name in ("b.vsi", "_b_/stack1/frame_t_0.ets", "c.isyntax", "d.lif", "e.zip", "f.sdpc",
                 "g.czi", "notes.txt"):  # fmt: skip
        (folder / name).write_bytes(np.random.default_rng(0).bytes(1000))
    out = tmp_path / "out"
    done = cli("embed", folder, "--out", out, "--no-overlays", check=True)
    record = json.loads((out / "run.json").read_text())
    left = {
        item["path"].removeprefix(f"{folder}/"): item["reason"]
        for item in record["inputs"]["left_out"]
    }
    assert set(left) == {
        ".snapshot", ".Trash-1000", "b.vsi", "c.isyntax", "d.lif", "e.zip", "f.sdpc", "g.czi", "notes.txt"
    }  # fmt: skip
    assert (
        "Olympus VSI" in left["b.vsi"]
        and "Zeiss CZI" in left["g.czi"]
        and "unpack" in left["e.zip"]
    )
    for name in (
        "Philips iSyntax",
        "hidden or system folder: 2",
        "neither a slide nor an image: 1",
    ):
        assert name in done.stdout, done.stdout
    assert record["states"] == {"done": 1}
    with pytest.raises(
        BadInput, match=r"neither slides nor images; it contains b\.vsi .*and 4 more"
    ):
        (folder / "a.tiff").unlink()
        find_inputs([folder])


def test_slides_alone_leave_out_pictures_beside_them(make_slide, tissue, tmp_path):
    make_slide(tmp_path / "a.tiff", side=448)
    Image.fromarray(tissue).save(tmp_path / "photo.jpg")
    found = find_inputs([tmp_path], "slides")
    assert [job.name for job in found.jobs] == ["a"]
    assert [(left.path, left.reason) for left in found.left_out] == [
        (str(tmp_path / "photo.jpg"), "image beside slides (--as slides)")
    ]
    (tmp_path / "m.csv").write_text("file\nphoto.jpg\n")
    says = r"contains photo.jpg; left out, image beside slides .--as slides.: 1 .*photo.jpg"
    with pytest.raises(BadInput, match=says):
        find_inputs([tmp_path], "slides", manifest=tmp_path / "m.csv")
    (tmp_path / "m.csv").unlink()
    (tmp_path / "a.tiff").unlink()
    assert [job.name for job in find_inputs([tmp_path], "slides").jobs] == ["photo"]


def test_slides_in_a_folder_named_like_an_mrxs_are_found(make_slide, tmp_path):
    for name, has_data in (("case", False), ("true", True)):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.mrxs").write_bytes(b"x" * 30)
        make_slide(tmp_path / name / f"in-{name}.tiff", side=448)
        if has_data:
            (tmp_path / name / "Slidedat.ini").write_text("")
    found = find_inputs([tmp_path], "slides")
    assert sorted(job.source.name for job in found.jobs) == [
        "case.mrxs",
        "in-case.tiff",
        "true.mrxs",
    ]


def test_the_scale_is_that_of_the_picture_itself(tissue, tmp_path):
    """OME-XML may describe pictures of other files first, which have no place in this one."""
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, tissue, ome=True, **{**TILE, "metadata": _ome("slide", 0.5)})
    other = (
        '<Image ID="Image:9" Name="macro"><Pixels ID="Pixels:9" DimensionOrder="XYCZT" Type="uint8" '
        'SizeX="99" SizeY="99" SizeC="3" SizeZ="1" SizeT="1" PhysicalSizeX="2.0" PhysicalSizeY="2.0">'
        "<MetadataOnly/></Pixels></Image>"
    )
    with tifffile.TiffFile(path) as opened:
        document = opened.ome_metadata.replace("<Image ", f"{other}<Image ", 1)
    with tifffile.TiffWriter(path) as out:
        out.write(tissue, description=document.encode(), **TILE)
    with open_slide(path) as slide:
        assert slide.mpp == 0.5


def test_an_mrxs_without_its_folder_names_it(encoder, tmp_path):
    (tmp_path / "case7.mrxs").write_bytes(b"x" * 30)
    (result,) = embed([tmp_path / "case7.mrxs"], encoder, tmp_path / "out")
    assert "needs the folder case7/ beside it" in result.reason


def test_pictures_that_an_index_file_names_are_parts_of_its_slide(tissue, tmp_path):
    """A Hamamatsu .vms lies among the JPEG files that make up its slide."""
    for name in ("scan_0.jpg", "scan_map.jpg", "photo.jpg"):
        Image.fromarray(tissue).save(tmp_path / name)
    (tmp_path / "scan.vms").write_text(
        "[Virtual Microscope Specimen]\nImageFile=scan_0.jpg\nMapFile=scan_map.jpg\nNoLayers=1\n"
    )
    found = find_inputs([tmp_path], "slides")
    assert [job.source.name for job in found.jobs] == ["scan.vms"]
    assert [left.path for left in found.left_out] == [str(tmp_path / "photo.jpg")]


@pytest.mark.shared
def test_dicom_is_found_by_its_content_and_named_by_its_whole_uid(shared, tmp_path):
    with tarfile.open(shared / "formats.tar") as pack:
        (name,) = [n for n in pack.getnames() if n.endswith("highdicom/sm_image.dcm")]
        (tmp_path / "1.2.840.1001").write_bytes(pack.extractfile(name).read())
    (tmp_path / "1.2.840.1002").write_bytes(b"no DICOM" * 50)
    found = find_inputs([tmp_path])
    assert [job.name for job in found.jobs] == ["1.2.840.1001"]
    assert [left.path for left in found.left_out] == [str(tmp_path / "1.2.840.1002")]
    assert [job.name for job in find_jobs([tmp_path / "1.2.840.1001"])] == ["1.2.840.1001"]


def test_hidden_copies_are_no_tiles(tile_folder, tmp_path):
    for name in ("tumour", "tumour/.ipynb_checkpoints", "@eaDir", "__MACOSX/tumour"):
        (tmp_path / "t" / name).mkdir(parents=True)
        shutil.copy(tile_folder / "cat/00.png", tmp_path / "t" / name / "a.png")
    (tmp_path / "t/read.me").write_text("")
    tiles = open_tiles(tmp_path / "t")
    assert [(tile.file, tile.label) for tile in tiles.tiles] == [("tumour/a.png", "tumour")]
    assert sorted(left.reason for left in tiles.left_out) == [
        *["hidden or system folder"] * 3, "neither a slide nor an image"
    ]  # fmt: skip
    with tarfile.open(tmp_path / "t.tar", "w") as pack:
        pack.add(tmp_path / "t", arcname=".")
    packed = open_tiles(tmp_path / "t.tar")
    assert [tile.file for tile in packed.tiles] == ["tumour/a.png"] and len(packed.left_out) == 4


def test_labels_of_tiles_that_say_no_value_are_none(tile_folder, tmp_path):
    shutil.copytree(tile_folder, tmp_path / "t")
    (tmp_path / "t/manifest.csv").write_text(
        "file;label;group\ncat/00.png;NaN;nan\ncat/01.png;cat;N/A\ncat/02.png;;g\n"
    )
    tiles = open_tiles(tmp_path / "t")
    assert [(t.label, t.group) for t in tiles.tiles] == [(None, None), ("cat", None), (None, "g")]
    assert "3 cell(s) read as no value (N/A 1, NaN 1, nan 1)" in tiles.notes[1]


# -- QuPath's frame ---------------------------------------------------------------------------------

LEFT, TOP, SIDE, ACROSS, DOWN = 448, 672, 896, 2000, 2400


@pytest.fixture(scope="module")
def bounded(tmp_path_factory, tissue):
    """A Leica SCN of real pixels, scanned from (448, 672) on, as OpenSlide's bounds say."""
    path = tmp_path_factory.mktemp("scn") / "case.scn"
    nm, picture = 500, np.asarray(Image.fromarray(tissue).resize((SIDE, SIDE)))

    def image(width, height, x, y, sizes, power):
        dims = "".join(
            f'<dimension sizeX="{a}" sizeY="{b}" r="{r}" ifd="{i}"/>'
            for r, (a, b, i) in enumerate(sizes)
        )
        return (
            '<image><creationDate>2020-01-01T00:00:00Z</creationDate><device model="x" version="1"/>'
            f'<pixels sizeX="{sizes[0][0]}" sizeY="{sizes[0][1]}">{dims}</pixels><view sizeX="{width}" '
            f'sizeY="{height}" offsetX="{x}" offsetY="{y}" spacingZ="0"/><scanSettings><objectiveSettings>'
            f"<objective>{power}</objective></objectiveSettings><illuminationSettings>"
            "<numericalAperture>0.4</numericalAperture><illuminationSource>brightfield</illuminationSource>"
            "</illuminationSettings></scanSettings></image>"
        )

    document = (
        '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">'
        f'<collection name="c" sizeX="{ACROSS * nm}" sizeY="{DOWN * nm}"><barcode>x</barcode>'
        + image(ACROSS * nm, DOWN * nm, 0, 0, [(125, 150, 0)], 1)
        + image(SIDE * nm, SIDE * nm, LEFT * nm, TOP * nm, [(SIDE, SIDE, 1), (224, 224, 2)], 20)
        + "</collection></scn>"
    )
    with tifffile.TiffWriter(path, bigtiff=True) as out:
        macro = np.full((150, 125, 3), 243, np.uint8)
        out.write(macro, description=document, resolution=(1250, 1250), resolutionunit=3,
                  **{**TILE, "tile": (128, 128)})  # fmt: skip
        out.write(picture, resolution=(20000, 20000), resolutionunit=3, **TILE)
        small = np.ascontiguousarray(picture[::4, ::4])
        out.write(small, resolution=(5000, 5000), resolutionunit=3, subfiletype=1, **TILE)
    with openslide.OpenSlide(str(path)) as slide:
        assert slide.properties["openslide.bounds-x"] == str(LEFT)
    return path


def drawn(path, x, y, width, height):
    ring = [[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]]
    polygon = {"type": "Polygon", "coordinates": [ring]}
    path.write_text(json.dumps({"type": "Feature", "properties": {}, "geometry": polygon}))
    return path


def test_a_region_drawn_in_qupath_is_embedded_where_it_was_drawn(bounded, encoder, tmp_path):
    regions = drawn(tmp_path / "r.geojson", 0, 0, 448, 896)
    (result,) = embed([bounded], encoder, tmp_path / "out", regions=regions, geojson=True)
    found = read_features(tmp_path / result.features)
    x, y = found.coords[:, 0], found.coords[:, 1]
    assert result.tiles == 8 and x.min() >= LEFT and (x + 224).max() <= LEFT + 448
    assert y.min() >= TOP and (y + 224).max() <= TOP + 896
    with openslide.OpenSlide(str(bounded)) as slide:  # what OpenSlide reads there was scanned
        for left, top in found.coords.tolist():
            tile = slide.read_region((left, top), 0, (224, 224))
            assert np.asarray(tile.getchannel("A")).min() == 255
    assert found.about["bounds"] == [LEFT, TOP, SIDE, SIDE]
    tiles = json.loads((tmp_path / "out/geojson/case.tiles.geojson").read_text())["features"]
    corners = [tuple(f["geometry"]["coordinates"][0][0]) for f in tiles]
    assert corners == [(a - LEFT, b - TOP) for a, b in found.coords.tolist()]
    tissue = json.loads((tmp_path / "out/geojson/case.tissue.geojson").read_text())["features"]
    outline = np.array(tissue[0]["geometry"]["coordinates"][0])
    assert outline[:, 0].max() <= 460 and outline[:, 1].max() <= 910 and outline.min() >= -12


def test_glass_that_was_never_scanned_is_never_embedded(bounded, encoder, tmp_path):
    everything = drawn(tmp_path / "r.geojson", -LEFT, -TOP, ACROSS, DOWN)
    (result,) = embed([bounded], encoder, tmp_path / "out", regions=everything, min_tissue=0)
    coords = read_features(tmp_path / result.features).coords
    inside = ((coords > (LEFT - 224, TOP - 224)) & (coords < (LEFT + SIDE, TOP + SIDE))).all(axis=1)
    assert inside.all() and len(coords) == 16
    nothing = drawn(tmp_path / "n.geojson", -LEFT, -TOP, 200, 200)
    (result,) = embed([bounded], encoder, tmp_path / "out2", regions=nothing)
    assert result.state == "empty"


def test_tiles_go_back_to_qupath_in_its_frame(bounded, make_slide, cli_json, tmp_path):
    plain = make_slide(tmp_path / "plain.tiff", side=448)
    cli_json("embed", bounded, plain, "--out", tmp_path / "f", "--no-overlays")
    cli_json("index", "create", tmp_path / "atlas")
    cli_json("index", "add", tmp_path / "atlas", tmp_path / "f")
    said = cli_json(
        "index",
        "export",
        tmp_path / "atlas",
        "--to",
        "geojson",
        "--like",
        1,
        "--out",
        tmp_path / "g",
    )
    assert said["frame_unknown"] == []
    for name, origin in (("case", (LEFT, TOP)), ("plain", (0, 0))):
        (file,) = (tmp_path / "f").glob(f"*/*/{name}.h5")
        coords = read_features(file).coords - origin
        drawn_tiles = json.loads((tmp_path / f"g/{name}.geojson").read_text())["features"]
        corners = [f["geometry"]["coordinates"][0][0] for f in drawn_tiles]
        assert sorted(corners) == sorted(coords.tolist())


def test_one_annotation_is_never_laid_on_two_slides(two_patients, encoder, cli_json, tmp_path):
    one = drawn(tmp_path / "one.geojson", 0, 0, 224, 224)
    slides = find_jobs([two_patients])
    with pytest.raises(BadInput, match="one file and there are 2 slides"):
        embed_jobs(slides, encoder, tmp_path / "0", EmbedOptions(regions=one), lambda *_: None)
    folder = tmp_path / "r"
    (folder / "patientA").mkdir(parents=True)
    drawn(folder / "slide.geojson", 0, 0, 224, 224)
    refused = cli_json(
        "embed", two_patients, "--out", tmp_path / "1", "--regions", folder, expect=1
    )
    assert "'slide' matches 2 slides" in refused["error"]["message"]
    (folder / "slide.geojson").rename(folder / "patientA/slide.geojson")
    drawn(folder / "stranger.geojson", 0, 0, 9, 9)
    found = cli_json(
        "embed", two_patients, "--out", tmp_path / "2", "--regions", folder, "--no-overlays",
        "--min-tissue", 0.01, expect=1,
    )  # fmt: skip
    by_folder = {r["source"].split("/")[-2]: r for r in found["results"]}
    assert by_folder["patientA"]["tiles"] == 1
    assert "has no regions for slide.tiff" in by_folder["patientB"]["reason"]
    assert found["inputs"]["regions_unused"] == [str(folder / "stranger.geojson")]


# -- slides that moved ------------------------------------------------------------------------------


def test_features_take_over_a_new_place_of_their_slide(two_patients, encoder, tmp_path):
    first = embed([two_patients], encoder, tmp_path / "out")
    two_patients.rename(tmp_path / "there")
    again = embed([tmp_path / "there"], encoder, tmp_path / "out")
    assert [r.state for r in again] == ["skipped", "skipped"]
    assert [r.name for r in again] == [r.name for r in first]
    for result in again:
        assert "the new path was stored" in result.notes[-1]
        stored = read_features(tmp_path / result.features)
        assert stored.source == stored.about["source"] == result.source
    third = embed([tmp_path / "there"], encoder, tmp_path / "out")
    assert all(not any("new place" in note for note in r.notes) for r in third)
    with h5py.File(again[0].features) as stored:
        assert stored["features"].shape[0] == first[0].tiles


def test_copies_that_moved_keep_their_own_features(two_patients, encoder, tmp_path):
    shutil.copy(two_patients / "patientA/slide.tiff", two_patients / "patientB/slide.tiff")
    table = tmp_path / "m.csv"
    table.write_text("file,patient\npatientA/slide.tiff,PA\npatientB/slide.tiff,PB\n")
    embed([two_patients], encoder, tmp_path / "out", manifest=table)
    two_patients.rename(tmp_path / "there")
    table.write_text("file,patient,label\npatientA/slide.tiff,PA,x\npatientB/slide.tiff,PB,y\n")
    results = embed([tmp_path / "there"], encoder, tmp_path / "out", manifest=table)
    assert [r.state for r in results] == ["done", "done"] and len(
        {r.features for r in results}
    ) == 2
    for result in results:
        assert "the new path was stored" in result.notes[-1]
        item = read_features(tmp_path / result.features)
        assert item.source == result.source
        assert (
            item.about["row"]["patient"]
            == {"patientA": "PA", "patientB": "PB"}[item.source.split("/")[-2]]
        )


def test_features_of_before_bounds_were_heeded_are_made_anew(
    bounded, make_slide, encoder, tmp_path
):
    plain = make_slide(tmp_path / "plain.tiff", side=448)
    first = embed([bounded, plain], encoder, tmp_path / "out")
    for result in first:  # as an earlier version wrote them
        with h5py.File(result.features, "r+") as stored:
            about = json.loads(stored.attrs["about"])
            del about["bounds"]
            stored.attrs["about"] = json.dumps(about)
    again = embed([bounded, plain], encoder, tmp_path / "out")
    assert [r.state for r in again] == ["done", "skipped"]
    assert read_features(tmp_path / again[0].features).about["bounds"] == [LEFT, TOP, SIDE, SIDE]
    assert read_features(tmp_path / again[1].features).about["bounds"] is None
    assert [r.state for r in embed([bounded, plain], encoder, tmp_path / "out")] == ["skipped"] * 2


def test_a_copy_of_a_slide_is_a_slide_of_its_own(two_patients, encoder, tmp_path):
    shutil.copy(two_patients / "patientA/slide.tiff", two_patients / "patientB/slide.tiff")
    results = embed([two_patients], encoder, tmp_path / "out")
    assert [r.state for r in results] == ["done", "done"]
    assert len({r.features for r in results}) == 2
