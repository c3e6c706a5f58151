"""An atlas that refers to its encoder's bundle instead of copying it."""

import shutil

import pytest
from PIL import Image

from histoseek.errors import BadInput, Damaged, Mismatch
from histoseek.index.atlas import Atlas
from histoseek.index.care.snapshots import restore
from histoseek.serving.encoders.open import DEFAULT_BUNDLE

GRAPH = "encoder.onnx"


@pytest.fixture
def bundle(tmp_path):
    return shutil.copytree(DEFAULT_BUNDLE, tmp_path / "bundle")


@pytest.fixture
def linked(tmp_path, bundle, cli_json):
    made = cli_json("index", "create", tmp_path / "atlas", "--encoder", bundle, "--link-encoder")
    assert made["encoder_link"] == str(bundle)
    return tmp_path / "atlas"


def test_a_linked_atlas_has_no_graph_and_embeds_with_the_bundle(
    linked, bundle, make_slide, tmp_path, cli, cli_answers
):
    assert not list(linked.rglob("*.onnx*")) and (linked / "encoder" / "manifest.json").is_file()
    slide = make_slide(tmp_path / "s.tif", side=1024, mpp=0.5)
    cli("embed", slide, "--encoder", bundle, "--out", tmp_path / "features", check=True)
    cli("index", "add", linked, tmp_path / "features", check=True)
    assert Atlas(linked).encoder_bundle == bundle
    Image.open(slide).convert("RGB").crop((224, 448, 448, 672)).save(tmp_path / "crop.png")
    hit = cli_answers("index", "search", linked, tmp_path / "crop.png", "-k", 1)[0][0]
    assert (hit["x"], hit["y"]) == (224, 448)


def test_a_missing_bundle_is_named_and_relocated(linked, bundle, tmp_path, cli, cli_json):
    moved = bundle.rename(tmp_path / "moved")
    atlas = Atlas(linked)
    assert atlas.stats()["tiles"] == 0  # what needs no encoder works
    with pytest.raises(Damaged, match="is not there; give its place"):
        _ = atlas.encoder_bundle
    assert any("is not there" in problem for problem in atlas.verify())
    cli("index", "relocate", linked, "--encoder", moved, check=True)
    assert Atlas(linked).encoder_bundle == moved and Atlas(linked).verify() == []


def test_another_bundle_is_refused(linked, bundle, tmp_path, other_bundle):
    with pytest.raises(Mismatch, match="but the atlas was made with"):
        Atlas(linked).relocate_encoder(other_bundle)
    shutil.rmtree(bundle)
    shutil.copytree(other_bundle, bundle)
    with pytest.raises(Damaged, match="contains encoder"):
        _ = Atlas(linked).encoder_bundle


def test_a_changed_graph_is_found(linked, bundle):
    graph = bundle / GRAPH
    graph.write_bytes(graph.read_bytes()[:-1] + b"x")
    assert "the manifest says" in Atlas(linked).verify()[0]


def test_a_snapshot_keeps_the_link_and_can_be_restored_without_the_bundle(
    linked, bundle, tmp_path, cli_json
):
    shutil.rmtree(bundle)
    report = cli_json("index", "snapshot", linked, "--out", tmp_path / "copy")
    assert report["encoder_link"] == str(bundle)
    restore(tmp_path / "copy", tmp_path / "back")
    assert Atlas(tmp_path / "back").store.encoder_link == bundle


def test_an_atlas_with_a_copy_has_nothing_to_relocate(tmp_path, bundle):
    atlas = Atlas.create(tmp_path / "atlas", bundle)
    with pytest.raises(BadInput, match="its own copy"):
        atlas.relocate_encoder(bundle)
