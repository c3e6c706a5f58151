"""An atlas of another tool's features is bound to the bundle that computes them again."""

import h5py
import numpy as np
import pytest
import torch
from checkpoints import seeded, timm
from PIL import Image

from histoseek.export.from_checkpoint import build_published, export_checkpoint
from histoseek.export.normalising import export_normalising
from histoseek.export.options import ExportOptions
from histoseek.export.published import PUBLISHED
from histoseek.index.atlas import Atlas
from histoseek.index.care.binding import sample

NAME = "lunit-s16"
SIDE = 256
"""Side of a tile in pixels of the slide; the other tool resizes it to 224."""


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """A bundle of one block, one that pools other tokens to the same length, and one of other weights."""
    folder = tmp_path_factory.mktemp("bundles")
    for name, seed, pool in (("right", 0, "cls"), ("pooled", 0, "mean"), ("other", 1, "cls")):
        torch.save(
            timm(seeded(build_published(PUBLISHED[NAME], depth=1), seed)), folder / "net.bin"
        )
        options = ExportOptions(published=NAME, pool=pool, mpp=0.5 * SIDE / 224)
        export_checkpoint(folder / "net.bin", folder / name, options, depth=1)
    return folder


@pytest.fixture(scope="module")
def made_by_another_tool(tmp_path_factory, make_slide):
    """Slides, and the features that a loop of Pillow and torch computes of them, as TRIDENT writes it."""
    folder = tmp_path_factory.mktemp("theirs")
    (folder / "slides").mkdir()
    net = seeded(build_published(PUBLISHED[NAME], depth=1), 0)
    mean, std = (torch.tensor(v)[:, None, None] for v in PUBLISHED[NAME].colours)
    for seed, name in enumerate(("a", "b")):
        slide = make_slide(folder / "slides" / f"{name}.tif", side=1024, mpp=0.5, seed=seed)
        whole = Image.open(slide).convert("RGB")
        corners = [(x, y) for y in range(0, 1024, SIDE) for x in range(0, 1024, SIDE)]
        tiles = [
            whole.crop((x, y, x + SIDE, y + SIDE)).resize((224, 224), Image.Resampling.BILINEAR)
            for x, y in corners
        ]
        pixels = torch.from_numpy(np.stack([np.asarray(t) for t in tiles])).permute(0, 3, 1, 2)
        with torch.inference_mode():
            features = net((pixels / 255 - mean) / std).half().numpy()
        with h5py.File(folder / f"{name}.h5", "w") as out:
            out.create_dataset("features", data=features).attrs["encoder"] = "lunit"
            out.create_dataset("coords", data=np.array(corners)).attrs.update(
                {"patch_size": SIDE, "patch_size_level0": SIDE, "target_magnification": 20,
                 "level0_magnification": 20, "level0_width": 1024, "level0_height": 1024, "name": name}
            )  # fmt: skip
    return folder


def imported(cli, folder, path):
    files = [folder / "a.h5", folder / "b.h5"]
    cli("index", "import", path, *files, "--encoder", "lunit", "--mpp", 0.5, check=True)
    return path


def test_a_bound_atlas_is_searched_with_a_new_image(
    bundles, made_by_another_tool, tmp_path, cli, cli_json
):
    atlas = imported(cli, made_by_another_tool, tmp_path / "atlas")
    slides = made_by_another_tool / "slides"
    region = Image.open(slides / "b.tif").convert("RGB").crop((512, 256, 768, 512))
    region.save(tmp_path / "region.png")
    words = ("index", "search", atlas, tmp_path / "region.png", "-k", 1)
    assert "another tool made its features" in cli(*words).stderr
    bound = cli_json("index", "bind", atlas, bundles / "right", "--slides", slides)
    assert bound["cosines"][bound["best"]] >= 0.999 and bound["tiles"] == 32
    assert (bound["encoder"], bound["slides"], bound["unreadable"]) == ("right", 2, {})
    hit = cli_json(*words)["answers"][0][0]
    assert (hit["slide"], hit["x"], hit["y"]) == ("b", 512, 256) and hit["score"] > 0.99
    assert cli("index", "verify", atlas).returncode == 0
    cli("index", "snapshot", atlas, "--out", tmp_path / "copy", check=True)
    assert Atlas(tmp_path / "copy").manifest.name == "right"
    again = cli("index", "bind", atlas, bundles / "right")
    assert again.returncode == 1 and "already has a bundle" in again.stderr
    # further features of the same tool and encoder can still be imported
    more = cli_json("index", "import", atlas, made_by_another_tool / "a.h5", "--encoder", "lunit")
    assert more["added"][0]["state"] == "unchanged"
    assert {row["source"] for row in Atlas(atlas).slides()} == {
        str((slides / f"{name}.tif").resolve()) for name in "ab"
    }


@pytest.mark.parametrize("bundle", ["pooled", "other"])
def test_another_encoder_or_pooling_is_refused(
    bundle, bundles, made_by_another_tool, tmp_path, cli
):
    atlas = imported(cli, made_by_another_tool, tmp_path / "atlas")
    slides = made_by_another_tool / "slides"
    refused = cli("index", "bind", atlas, bundles / bundle, "--slides", slides)
    assert refused.returncode == 1
    assert "median cosine of 32 tiles" in refused.stderr and "another --pool" in refused.stderr
    assert Atlas(atlas).manifest.external
    assert [path.name for path in atlas.glob("encoder*")] == ["encoder"]


def test_a_bundle_that_normalises_stains_is_refused(bundles, made_by_another_tool, tmp_path, cli):
    export_normalising(bundles / "right", tmp_path / "b", ExportOptions(stain_normalise="macenko"))
    atlas = imported(cli, made_by_another_tool, tmp_path / "atlas")
    slides = made_by_another_tool / "slides"
    refused = cli("index", "bind", atlas, tmp_path / "b", "--slides", slides)
    assert refused.returncode == 1 and "normalises stains" in refused.stderr
    assert Atlas(atlas).manifest.external


def test_import_binds_in_one_step_and_can_link_the_bundle(
    bundles, made_by_another_tool, tmp_path, cli, cli_json
):
    words = (made_by_another_tool / "a.h5", "--encoder", "lunit", "--mpp", 0.5)
    slides = ("--slides", made_by_another_tool / "slides")
    right = ("--bundle", bundles / "right", *slides)
    report = cli_json("index", "import", tmp_path / "atlas", *words, *right, "--link-encoder")
    assert report["ok"] and report["bound"]["encoder"] == "right"
    assert Atlas(tmp_path / "atlas").encoder_bundle == bundles / "right"
    assert not list((tmp_path / "atlas").rglob("*.onnx"))
    again = cli_json("index", "import", tmp_path / "atlas", *words, *right)
    assert again["ok"] and "bound" not in again
    refused = cli_json(
        "index", "import", tmp_path / "b", *words, "--bundle", bundles / "other", *slides, expect=1
    )
    assert "another --pool" in refused["not_bound"] and refused["added"][0]["state"] == "added"
    assert Atlas(tmp_path / "b").manifest.external
    alone = cli("index", "import", tmp_path / "c", *words, *slides)
    assert alone.returncode == 1 and "give --bundle too" in alone.stderr


def test_slides_that_are_not_found_are_named(bundles, made_by_another_tool, tmp_path, cli):
    atlas = imported(cli, made_by_another_tool, tmp_path / "atlas")
    refused = cli("index", "bind", atlas, bundles / "right")
    assert refused.returncode == 1 and "pass the folder of the slides" in refused.stderr
    alone = made_by_another_tool / "slides" / "a.tif"
    bound = cli("index", "bind", atlas, bundles / "right", "--slides", alone, "--tiles", 4)
    assert bound.returncode == 0 and "not read: b: its slide was not found" in bound.stdout


def test_a_sample_is_spread_over_slides_and_tiles():
    row = {"kind": "slide", "size_px_level0": 224}
    slides = [{"name": str(n), "tiles": 50, "first_tile": 50 * n, **row} for n in range(100)]
    found = sample(slides, 8)
    assert list(found) == ["0", "14", "28", "42", "56", "70", "84", "99"]
    assert [ids[0] for ids in found.values()][:2] == [0, 700]
    assert sample(slides[:1], 5) == {"0": [0, 12, 24, 36, 49]}
    assert sample([{**slides[0], "kind": "tiles"}, {**slides[1], "tiles": 0}]) == {}


def test_an_interrupted_bind_changes_nothing_and_can_be_repeated(
    bundles, made_by_another_tool, tmp_path, cli, monkeypatch
):
    atlas = imported(cli, made_by_another_tool, tmp_path / "atlas")
    words = ("index", "bind", atlas, bundles / "right", "--slides", made_by_another_tool / "slides")
    with monkeypatch.context() as patch:
        patch.setattr("histoseek.index.care.binding.set_meta", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cli(*words)
    assert Atlas(atlas).manifest.external and cli("index", "verify", atlas).returncode == 0
    cli(*words, check=True)
    assert Atlas(atlas).manifest.name == "right"
    assert len(list(atlas.glob("encoder*"))) == 1
