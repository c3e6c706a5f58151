"""Annotations of slides: stored, filtered by, evaluated, exchanged with QuPath, kept and removed."""

import json
import sqlite3
import time

import numpy as np
import pytest
from atlases import features, filled
from skimage.measure import points_in_poly

from histoseek.artifacts.geojson import inside
from histoseek.errors import BadInput, NotFound
from histoseek.index.atlas import Atlas
from histoseek.index.exchange.annotations import export_files, import_files
from histoseek.index.search.tiles import allowed
from histoseek.index.store.annotation import Annotation
from histoseek.index.store.catalog import Catalog
from histoseek.index.studies.retrieval import evaluate
from histoseek.index.studies.scores import RetrievalOptions

UUID = "0b2e6a4c-6d1f-4e7f-9d0e-0a4b5c6d7e8f"


def box(x, y, width, height=None):
    height = height or width
    return np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]], float)


def as_qupath_writes(ring, name="Tumor", number=UUID, kind="annotation", **more):
    """A Feature in the form of QuPath 0.5: closed rings, a class with its colour."""
    closed = [*ring.tolist(), ring[0].tolist()]
    properties = {
        "objectType": kind, "classification": {"name": name, "color": [200, 0, 0]},
        "isLocked": False, "measurements": {"Area µm^2": 12.5}, **more,
    }  # fmt: skip
    geometry = {"type": "Polygon", "coordinates": [closed]}
    return {"type": "Feature", "id": number, "geometry": geometry, "properties": properties}


def write(path, found):
    path.write_text(json.dumps({"type": "FeatureCollection", "features": found}))
    return path


def tiles_of(atlas, where):
    view = atlas.view()
    return set(view.columns.ids(np.flatnonzero(allowed(view.state, where))).tolist())


def inside_of(atlas, slide, rings):
    """The tiles whose centre is in exactly one of the rings, by scikit-image."""
    columns = atlas.view().columns
    number = [row["name"] for row in columns.slides].index(slide)
    rows = np.arange(columns.starts[number], columns.starts[number + 1])
    centres = columns.places()[rows] + columns.slides[number]["size_px_level0"] / 2
    odd = np.sum([points_in_poly(centres, ring) for ring in rings], axis=0) % 2 == 1
    return set(columns.ids(rows[odd]).tolist())


def test_tiles_in_an_annotation_are_found_by_its_label(tmp_path):
    atlas = filled(tmp_path, slides=3)
    hole = box(3000, 3000, 1500)
    star = np.array([[5000, 100], [9500, 9000], [200, 3500], [9800, 3500], [500, 9000]], float)
    done = atlas.annotate([
        Annotation("slide-1", [[box(1000, 1000, 7000), hole]], "tumour", "see margin", "anna"),
        Annotation("slide-2", [[star]], "it's odd", author="bob"),
        Annotation("slide-2", [[box(0, 0, 2000)], [box(8000, 8000, 1800)]], "tumour"),
    ])  # fmt: skip
    assert len(done.added) == 3
    ring = inside_of(atlas, "slide-1", [box(1000, 1000, 7000), hole])
    parts = inside_of(atlas, "slide-2", [box(0, 0, 2000), box(8000, 8000, 1800)])
    odd = inside_of(atlas, "slide-2", [star])
    assert len(ring) > 50 and len(parts) > 3 and len(odd) > 20
    everything = set(range(1, 601))
    for where, expected in {
        "annotation.label = 'tumour'": ring | parts,
        "annotation.label = 'it''s odd'": odd,
        "annotation.label in ('tumour', 'none')": ring | parts,
        "annotation.label like 'TUM%'": ring | parts,
        "annotation.label != 'tumour'": everything - ring - parts,
        "annotation.label not like 'tum%'": everything - ring - parts,
        "annotation.label is not null": ring | parts | odd,
        "annotation.label is null": everything - ring - parts - odd,
        "annotation.note like '%margin%'": ring,
        "annotation.author = 'bob' and annotation.label = 'tumour'": odd & parts,
        "annotation.author is null": everything - ring - odd,
    }.items():
        assert tiles_of(atlas, where) == expected, where
    (hits,) = atlas.search(tiles=[1], k=20, where="annotation.label like 'it%'")
    assert len(hits) == 20 and {hit.tile for hit in hits} <= odd


def test_a_tile_has_the_value_of_the_smallest_annotation_around_it(tmp_path):
    atlas = filled(tmp_path, slides=4)
    large, small = box(0, 0, 12_000), box(2000, 2000, 4000)
    atlas.annotate([
        *(Annotation(f"slide-{n}", [[small]], f"class {n % 2}") for n in range(4)),
        *(Annotation(f"slide-{n}", [[large]], "tissue") for n in range(4)),
    ])  # fmt: skip
    label = atlas.view().columns.coded("annotation.label")
    names = np.array([*label.names, "-"])[label.codes]
    assert set(names) == {"tissue", "class 0", "class 1"}
    expected = inside_of(atlas, "slide-0", [small])
    assert {n + 1 for n in np.flatnonzero(names[:200] == "class 0").tolist()} == expected
    report = evaluate(atlas, RetrievalOptions("annotation.label", "slide"), None)
    assert set(report["classes"]) == {"tissue", "class 0", "class 1"}
    with pytest.raises(NotFound, match="column 'annotation.lable'"):
        evaluate(atlas, RetrievalOptions("annotation.lable", "slide"), None)


def test_what_is_wrong_is_said_and_nothing_is_stored(tmp_path):
    atlas = filled(tmp_path, slides=1)
    good = Annotation("slide-0", [[box(0, 0, 100)]], "a")
    for wrong, error, says in (
        (Annotation("slide-9", [[box(0, 0, 9)]]), NotFound, "no slide 'slide-9'|'slide-9'"),
        (Annotation("slide-0", []), BadInput, "has no area"),
        (Annotation("slide-0", [[box(5, 5, 10)[[0, 1, 0]]]]), BadInput, "has no area"),
        (Annotation("slide-0", [[box(0, 0, 9)]], "x" * 201), BadInput, "201 characters.*most 200"),
        (Annotation("slide-0", [[box(0, 0, 9)]], id="7"), BadInput, "'7'.*expected a UUID"),
    ):
        with pytest.raises(error, match=says):
            atlas.annotate([good, wrong])
        assert atlas.annotations() == []
    with pytest.raises(NotFound, match="no annotation"):
        atlas.remove_annotations([UUID])
    with pytest.raises(NotFound):
        atlas.annotations("slide-9")


def test_qupath_there_and_back(tmp_path, cli, cli_json):
    atlas = filled(tmp_path, slides=2)
    described = {"metadata": {"ANNOTATION_DESCRIPTION": "check with Dr. M"}}
    file = write(tmp_path / "slide-1.svs.geojson", [
        as_qupath_writes(box(1000, 2000, 3000), **described),
        as_qupath_writes(box(0, 0, 50), "Cell", "1", kind="detection"),
        {"type": "Feature", "id": "PathAnnotationObject", "properties": {"name": "spot"},
         "geometry": {"type": "Point", "coordinates": [5, 5]}},
    ])  # fmt: skip
    write(tmp_path / "other.geojson", [as_qupath_writes(box(0, 0, 9))])
    said = cli("index", "annotate", atlas.path, file, tmp_path / "other.geojson", check=True).stdout
    assert "1 added, 0 changed, 0 unchanged" in said and "other.geojson" in said
    assert "1 x detection, not an annotation" in said and "1 x Point, which has no area" in said
    (stored,) = atlas.annotations("slide-1")
    assert (stored.label, stored.note, stored.id) == ("Tumor", "check with Dr. M", UUID)
    assert stored.author and stored.created_at and stored.area == 9e6

    wrote = cli_json("index", "annotations", atlas.path, "--out", tmp_path / "out")
    assert wrote["slides"] == {"slide-1": 1}
    (feature,) = json.loads((tmp_path / "out/slide-1.geojson").read_text())["features"]
    assert feature["id"] == UUID and feature["properties"]["objectType"] == "annotation"
    assert feature["properties"]["classification"]["name"] == "Tumor"
    assert feature["properties"]["metadata"]["ANNOTATION_DESCRIPTION"] == "check with Dr. M"
    ring = feature["geometry"]["coordinates"][0]
    assert ring[0] == ring[-1] and ring[:4] == box(1000, 2000, 3000).tolist()

    again = import_files(Atlas(atlas.path), [tmp_path / "out"], "bob")
    assert again.stored.unchanged == [UUID] and again.slides == {"slide-1": 1}
    write(
        tmp_path / "out/slide-1.geojson",
        [as_qupath_writes(box(1000, 2000, 3000), "Stroma", **described)],
    )
    changed = import_files(Atlas(atlas.path), [tmp_path / "out"], "bob")
    assert changed.stored.changed == [UUID]
    (stored,) = atlas.annotations()
    assert (stored.label, stored.author) == ("Stroma", "bob")
    listed = cli("index", "annotations", atlas.path, "--slide", "slide-1", check=True).stdout
    assert UUID[:8] in listed and "Stroma" in listed
    assert cli_json("index", "annotations", atlas.path)["annotations"][0]["author"] == "bob"
    wrong = cli("index", "annotations", atlas.path, "--remove", "zz")
    assert wrong.returncode == 1 and "'zz' fits 0 annotations" in wrong.stderr
    cli("index", "annotations", atlas.path, "--remove", UUID[:8], check=True)
    assert atlas.annotations() == []


def test_qupaths_frame_is_that_of_the_scanned_area(tmp_path):
    file = features(tmp_path / "scan.h5", about={"bounds": [500, 700, 9000, 9000]})
    atlas = filled(tmp_path, slides=1)
    atlas.add([file])
    write(tmp_path / "scan.geojson", [as_qupath_writes(box(0, 0, 100))])
    done = import_files(atlas, [tmp_path / "scan.geojson"], "")
    assert done.frame_unknown == []
    assert atlas.annotations("scan")[0].polygons[0][0][0].tolist() == [500, 700]
    counts, unknown = export_files(atlas, tmp_path / "out")
    assert (counts, unknown) == ({"scan": 1}, [])
    (feature,) = json.loads((tmp_path / "out/scan.geojson").read_text())["features"]
    assert feature["geometry"]["coordinates"][0][0] == [0, 0]


def test_a_file_that_fits_nothing_or_holds_nothing_is_refused(tmp_path):
    atlas = filled(tmp_path, slides=2)
    file = write(tmp_path / "elsewhere.geojson", [as_qupath_writes(box(0, 0, 9))])
    with pytest.raises(BadInput, match="no file matches a slide.*elsewhere.*--slide"):
        import_files(atlas, [file], "")
    assert import_files(atlas, [file], "", slide="slide-0").slides == {"slide-0": 1}
    with pytest.raises(BadInput, match=f"annotation {UUID} of slide 'slide-1' is stored already"):
        import_files(atlas, [file], "", slide="slide-1")
    empty = write(tmp_path / "slide-1.geojson", [as_qupath_writes(box(0, 0, 9), kind="cell")])
    with pytest.raises(BadInput, match="no annotation with an area.*1 x cell"):
        import_files(atlas, [empty], "")
    with pytest.raises(BadInput, match="does not exist"):
        import_files(atlas, [tmp_path / "gone.geojson"], "")
    with pytest.raises(BadInput, match="--slide is for one file"):
        import_files(atlas, [file, empty], "", slide="slide-1")


def test_they_stay_with_a_slide_that_is_replaced_and_go_with_one_that_is_removed(
    tmp_path, cli_json
):
    atlas = filled(tmp_path, slides=2)
    atlas.annotate([Annotation(f"slide-{n}", [[box(0, 0, 5000)]], f"label {n}") for n in (0, 1)])
    before = atlas.annotations("slide-0")
    (added,) = atlas.add([features(tmp_path / "slide-0.h5", seed=77)], replace=True)
    assert added.state == "replaced" and atlas.annotations("slide-0") == before
    assert tiles_of(atlas, "annotation.label = 'label 0'")
    assert atlas.verify() == []
    assert cli_json("index", "remove", atlas.path, "slide-1")["annotations"] == 1
    assert [item.slide for item in atlas.annotations()] == ["slide-0"]
    copy = tmp_path / "copy"
    atlas.snapshot(copy)
    assert Atlas(copy).annotations() == atlas.annotations()


def test_damage_is_found(tmp_path):
    atlas = filled(tmp_path, slides=1)
    atlas.annotate([Annotation("slide-0", [[box(0, 0, 5000)]], "tumour")])
    with sqlite3.connect(atlas.path / "atlas.db") as db:
        db.execute("UPDATE annotations SET label = 'tumoor'")
    assert any("a row of annotations" in problem for problem in atlas.verify())


def test_an_atlas_of_the_former_schema_is_read_without_permission_to_write(tmp_path, monkeypatch):
    folder = filled(tmp_path, slides=1).path
    with sqlite3.connect(folder / "atlas.db") as db:
        db.execute("DROP TABLE annotations")
        db.execute("DROP TABLE tile_quality")
        db.execute("PRAGMA user_version = 2")
    with monkeypatch.context() as patched:
        patched.setattr(Catalog, "_can_write", lambda _: False)
        assert Atlas(folder).annotations() == [] and Atlas(folder).verify() == []
        assert tiles_of(Atlas(folder), "annotation.label is null")
    with sqlite3.connect(folder / "atlas.db") as db:
        assert db.execute("PRAGMA user_version").fetchone() == (2,)
    Atlas(folder).annotate([Annotation("slide-0", [[box(0, 0, 5000)]], "tumour")])
    assert len(Atlas(folder).annotations()) == 1


def test_two_files_of_one_slide_are_both_read(tmp_path):
    atlas = filled(tmp_path, slides=1)
    for person, label in (("anna", "tumour"), ("bob", "stroma")):
        (tmp_path / person).mkdir()
        found = [
            as_qupath_writes(
                box(0, 0, 500 if person == "anna" else 700), label, "PathAnnotationObject"
            )
        ]
        write(tmp_path / person / "slide-0.geojson", found)
    folders = [tmp_path / "anna", tmp_path / "bob"]
    assert import_files(atlas, folders, "").slides == {"slide-0": 2}
    assert sorted(item.label for item in atlas.annotations()) == ["stroma", "tumour"]
    again = import_files(atlas, folders, "")
    assert len(again.stored.unchanged) == 2, "an object without an id is known by its content"


def test_a_column_of_the_metadata_may_not_be_named_like_one_of_annotations(tmp_path):
    atlas = filled(tmp_path, slides=1)
    with pytest.raises(BadInput, match="annotation.label"):
        atlas.relabel([{"slide": "slide-0", "annotation.label": "a"}])


def test_many_corners_take_little_time(tmp_path):
    """A region drawn with a wand: the edge of a circle, rough, against its formula."""
    turn = np.linspace(0, 2 * np.pi, 50_000, endpoint=False)
    circle = np.stack([np.cos(turn), np.sin(turn)], axis=1) * 1000 + 1500
    points = np.random.default_rng(0).integers(0, 3000, (10_000, 2)) + 0.5
    started = time.perf_counter()
    found = inside(points, [circle])
    spent = time.perf_counter() - started
    distance = np.linalg.norm(points - 1500, axis=1)
    clear = np.abs(distance - 1000) > 0.1
    assert (found[clear] == (distance < 1000)[clear]).all() and spent < 2
