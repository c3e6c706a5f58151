"""Metadata in an atlas: matching rows to slides, missing values, and slides that were moved."""

import json
import os
import shutil
import sqlite3

import pytest
from atlases import features

from histoseek.artifacts.feature_files import read_features
from histoseek.errors import BadInput, NotFound
from histoseek.index.atlas import Atlas
from histoseek.serving.embedding.jobs import find_jobs
from histoseek.serving.embedding.pipeline import embed_jobs
from histoseek.serving.embedding.results import EmbedOptions
from histoseek.serving.encoders.open import DEFAULT_BUNDLE, open_encoder


@pytest.fixture
def atlas(tmp_path):
    return Atlas.create(tmp_path / "atlas", DEFAULT_BUNDLE)


def made(folder, **sources):
    """Feature files by name, of slides that lie at the given paths."""
    folder.mkdir(exist_ok=True)
    return [
        features(folder / f"{name}.h5", 3, number, source=source)
        for number, (name, source) in enumerate(sources.items())
    ]


def people(atlas):
    with sqlite3.connect(atlas.path / "atlas.db") as db:
        return {
            name: (p, la) for name, p, la in db.execute("SELECT name, patient, label FROM slides")
        }


def test_a_row_goes_to_the_slide_whose_path_it_ends(atlas, tmp_path):
    files = made(
        tmp_path / "f", case="/s/case.svs", slide_a="/s/A/slide.svs", slide_b="/s/B/slide.svs"
    )
    found = atlas.add(
        files,
        {
            "case.2": {"patient": "P-WRONG", "label": "carcinoma"},
            "A/slide.svs": {"patient": "PA"},
            "B/slide": {"patient": "PB"},
        },
    )
    assert people(atlas) == {"case": (None, None), "slide_a": ("PA", None), "slide_b": ("PB", None)}
    assert found.rows.unused == ("case.2",) and found.rows.without == ("case",)


def test_a_row_that_means_two_slides_adds_nothing(atlas, tmp_path):
    files = made(tmp_path / "f", slide_a="/s/A/slide.svs", slide_b="/s/B/slide.svs")
    with pytest.raises(BadInput, match=r"matches 2 slides.*A/slide\.svs"):
        atlas.add(files, {"slide.svs": {"patient": "P"}})
    assert people(atlas) == {}
    atlas.add(files[:1], {"slide.svs": {"patient": "PA"}})  # one slide is known: no doubt
    with pytest.raises(BadInput, match="matches 2 slides"):  # another of that name is in the atlas
        atlas.add(files[1:], {"slide.svs": {"patient": "PB"}})
    assert people(atlas) == {"slide_a": ("PA", None)}
    with pytest.raises(BadInput, match="both match slide 'slide_a'"):
        atlas.relabel([{"slide": "slide_a", "label": "x"}, {"slide": "A/slide.svs", "label": "y"}])


def test_two_files_of_one_name_are_two_slides_if_they_lie_apart(atlas, tmp_path):
    (b,) = made(tmp_path / "fb", slide="/s/B/slide.svs")
    (a,) = made(tmp_path / "fa", slide="/s/A/slide.svs")
    features(a, 4, 9, source="/s/A/slide.svs", name="slide")
    added = atlas.add([b, a], {"A/slide.svs": {"patient": "PA"}})
    assert [one.state for one in added] == ["added", "failed"]
    assert people(atlas) == {"slide": (None, None)}  # B's features, and nothing of A
    coarse = features(tmp_path / "coarse.h5", 3, 0, source="/s/B/slide.svs", name="slide")
    found = atlas.add([b, coarse], {"slide": {"patient": "PB"}})  # one slide twice is one slide
    assert people(atlas) == {"slide": ("PB", None)} and found.rows.unused == ()


def test_another_slide_in_the_place_of_one_does_not_inherit_its_patient(atlas, tmp_path):
    def of(folder, seed, source, content):
        folder.mkdir()
        about = {"key": {"content": content}}
        return features(folder / "slide.h5", 3, seed, source=source, about=about)

    atlas.add([of(tmp_path / "1", 1, "/a/slide.svs", "one")], {"slide": {"patient": "PA"}})
    again = of(tmp_path / "2", 2, "/b/slide.svs", "one")  # the same slide, cut anew, elsewhere
    assert atlas.add([again], replace=True)[0].state == "replaced"
    assert people(atlas) == {"slide": ("PA", None)}
    other = of(tmp_path / "3", 3, "/c/slide.svs", "two")
    (result,) = atlas.add([other], replace=True)
    assert result.state == "replaced" and "label, patient" in result.reason
    assert people(atlas) == {"slide": (None, None)}


def test_a_stated_scale_wins_over_another_tools_file(cli_json, tmp_path):
    made(tmp_path / "f", one="", two="")
    for name in ("one", "two"):
        features(
            tmp_path / f"f/{name}.h5", 3, len(name), encoder="uni_v1", encoder_sha256="", mpp=0.25
        )
    (tmp_path / "t.csv").write_text("slide;mpp\none;0,5\ntwo;0,2501\n")
    said = cli_json(
        "index", "import", tmp_path / "a", tmp_path / "f", "--encoder", "uni_v1",
        "--metadata", tmp_path / "t.csv",
    )  # fmt: skip
    reasons = {one["slide"]: one["reason"] for one in said["added"]}
    assert "the metadata's 0.5 µm per pixel was used instead of the file's 0.25" in reasons["one"]
    assert reasons["two"] == ""
    assert {s["name"]: s["mpp"] for s in Atlas(tmp_path / "a").slides()} == {
        "one": 0.5,
        "two": 0.25,
    }


def test_rows_with_folders_for_slides_of_unknown_place_are_named(atlas, cli_json, tmp_path):
    made(tmp_path / "f", case="")
    (tmp_path / "t.csv").write_text("slide,patient\npatientA/case.svs,PA\n")
    said = cli_json("index", "add", atlas.path, tmp_path / "f", "--metadata", tmp_path / "t.csv")
    assert said["rows_by_name_only"] == ["patientA/case.svs"]
    assert people(atlas) == {"case": ("PA", None)}


def test_rows_of_other_slides_and_of_none_are_told_apart(atlas, cli_json, cli, tmp_path):
    files = made(tmp_path / "f", one="/s/one.svs", two="/s/two.svs")
    atlas.add(files[:1])
    table = tmp_path / "t.csv"
    table.write_text("sep=;\nslide;label\none.svs;x\ntwo;NaN\nthree;z\n", encoding="utf-16")
    said = cli_json("index", "add", atlas.path, files[1], "--metadata", table)
    assert said["rows_unused"] == ["three"] and said["slides_without_row"] == []
    assert said["metadata_of_other_slides"] == ["one.svs", "three"]
    assert any("1 cell(s) read as no value (NaN 1)" in note for note in said["notes"])
    text = cli("index", "add", atlas.path, files[1], "--metadata", table, check=True).stdout
    assert "match no slide: 1 (three)" in text and "not added now" in text
    assert people(atlas) == {"one": (None, None), "two": (None, None)}


def test_no_value_is_no_patient_and_no_class(atlas, cli_json, tmp_path):
    made(tmp_path / "f", **{f"s{n}": f"/s/s{n}.svs" for n in range(6)})
    table = tmp_path / "t.csv"
    rows = ["nan,NaN", "NULL,N/A", "None,#N/A", "<NA>,", "n/a,null", "P1,benign"]
    table.write_text(
        "slide,patient,label\n" + "".join(f"s{n},{row}\n" for n, row in enumerate(rows))
    )
    cli_json("index", "add", atlas.path, tmp_path / "f", "--metadata", table)
    assert people(atlas) == {f"s{n}": (None, None) for n in range(5)} | {"s5": ("P1", "benign")}
    assert set(atlas.stats()["labels"]) == {"(none)", "benign"}
    atlas.relabel([{"slide": "s5", "patient": float("nan"), "label": "kept"}])  # as pandas gives it
    assert people(atlas)["s5"] == (None, "kept")
    with pytest.raises(
        NotFound, match=r"2 rows match no slide.*'gone', 'lost'.*nothing was changed"
    ):
        atlas.relabel(
            [{"slide": "gone", "label": "x"}, {"slide": "lost"}, {"slide": "s1", "label": "x"}]
        )
    assert people(atlas)["s1"] == (None, None)


def test_folders_of_features_are_walked_like_folders_of_slides(atlas, cli_json, tmp_path):
    made(tmp_path / "elsewhere", one="/s/one.svs")
    made(tmp_path / "elsewhere/.snapshot", old="/s/old.svs")
    (tmp_path / "f").mkdir()
    (tmp_path / "f/batch1").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "f/again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "f/case.pt").write_bytes(b"pickle")
    said = cli_json("index", "add", atlas.path, tmp_path / "f")
    assert [one["slide"] for one in said["added"]] == ["one"]
    left = {os.path.relpath(one["path"], tmp_path / "f"): one["reason"] for one in said["left_out"]}
    assert left == {
        "again/.snapshot": "hidden or system folder",
        "batch1": "link to a folder that is searched already",
        "case.pt": "a pickle, which can run code",
    }


# -- slides that moved ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded(tmp_path_factory, make_slide, tile_folder):
    """Two slides and a tile set, embedded, in an atlas."""
    root = tmp_path_factory.mktemp("moved")
    (root / "here/deep").mkdir(parents=True)
    make_slide(root / "here/a.tiff", side=448, seed=1)
    make_slide(root / "here/deep/b.tiff", side=448, seed=2)
    shutil.copytree(tile_folder, root / "sets/kinds")
    encoder = open_encoder("default")
    jobs = find_jobs([root / "here", root / "sets/kinds"])
    results = embed_jobs(jobs, encoder, root / "f", EmbedOptions(overlays=False), lambda *_: None)
    atlas = Atlas.create(root / "atlas", DEFAULT_BUNDLE)
    atlas.add([root / result.features for result in results])
    return root


@pytest.fixture
def moved(embedded, tmp_path):
    """A copy of the atlas; its slides lie in ``there`` and no longer where the atlas says."""
    shutil.copytree(embedded / "atlas", tmp_path / "atlas")
    shutil.copytree(embedded / "here", tmp_path / "there")
    shutil.copytree(embedded / "sets", tmp_path / "sets")
    for name in ("here", "sets"):
        shutil.move(embedded / name, embedded / f"{name}-away")
    yield Atlas(tmp_path / "atlas")
    for name in ("here", "sets"):
        shutil.move(embedded / f"{name}-away", embedded / name)


def sources(atlas):
    return {slide["name"]: slide["source"] for slide in atlas.slides()}


def test_an_atlas_is_told_where_its_slides_lie_now(moved, embedded, cli_json, tmp_path):
    (tmp_path / "there/deep/b.tiff").write_bytes((tmp_path / "there/a.tiff").read_bytes())
    said = cli_json(
        "index",
        "relocate",
        moved.path,
        "--from",
        embedded / "here",
        "--to",
        tmp_path / "there",
        expect=1,
    )
    states = {one["slide"]: one["state"] for one in said["slides"]}
    assert states == {"a": "moved", "b": "other content"} and not said["ok"]
    assert sources(moved)["a"] == str(tmp_path / "there/a.tiff")
    assert sources(moved)["b"] == str(embedded / "here/deep/b.tiff")
    assert moved.verify() == []
    with pytest.raises(BadInput, match="no slide of the atlas is below '/nowhere'"):
        moved.relocate("/nowhere", tmp_path / "there", [])


def test_slides_are_found_by_content_in_a_folder(moved, cli_json, tmp_path):
    (tmp_path / "there/deep/b.tiff").rename(tmp_path / "there/renamed.tiff")
    said = cli_json(
        "index",
        "relocate",
        moved.path,
        "--slides",
        tmp_path / "there",
        "--slides",
        tmp_path / "sets",
    )
    assert {one["slide"]: one["state"] for one in said["slides"]} == {
        "a": "moved", "b": "moved", "kinds": "moved"
    }  # fmt: skip
    assert sources(moved) == {
        "a": str(tmp_path / "there/a.tiff"),
        "b": str(tmp_path / "there/renamed.tiff"),
        "kinds": str(tmp_path / "sets/kinds"),
    }
    again = moved.relocate(None, None, [tmp_path / "there", tmp_path / "sets"])
    assert {one.state for one in again} == {"there"}
    (tmp_path / "there/a.tiff").unlink()
    (missing,) = [
        one for one in moved.relocate(None, None, [tmp_path / "sets"]) if one.slide == "a"
    ]
    assert missing.state == "not found"


def test_old_features_do_not_move_a_slide_back(moved, embedded, tmp_path):
    moved.relocate(str(embedded / "here"), tmp_path / "there", [])
    files = sorted((embedded / "f").glob("20x*/*/a.h5"))
    (added,) = moved.add(files, {"a": {"label": "later"}})
    assert added.state == "relabelled" and sources(moved)["a"] == str(tmp_path / "there/a.tiff")


def test_adding_from_a_new_place_takes_it_over(moved, embedded, tmp_path):
    encoder = open_encoder("default")
    shutil.copytree(embedded / "f", tmp_path / "f")
    jobs = find_jobs([tmp_path / "there"])
    results = embed_jobs(
        jobs, encoder, tmp_path / "f", EmbedOptions(overlays=False), lambda *_: None
    )
    assert [result.state for result in results] == ["skipped", "skipped"]
    added = moved.add([tmp_path / result.features for result in results], {"a": {"label": "new"}})
    assert {one.slide: one.state for one in added} == {"a": "relabelled", "b": "moved"}
    assert sources(moved)["b"] == str(tmp_path / "there/deep/b.tiff")
    assert sources(moved)["a"] == str(tmp_path / "there/a.tiff") and moved.verify() == []


def test_features_of_other_tools_are_left_where_they_are(atlas, tmp_path):
    atlas.add(made(tmp_path / "f", one="/s/one.svs"))
    (found,) = atlas.relocate(None, None, [tmp_path])
    assert found.state == "unchecked" and sources(atlas) == {"one": "/s/one.svs"}
    assert "key" not in json.dumps(read_features(tmp_path / "f/one.h5").about)
