"""Features of another tool tell how it pooled, coloured and resized; `export --against` finds it."""

import h5py
import numpy as np
import pytest
import torch
from checkpoints import seeded, timm
from PIL import Image
from safetensors.torch import save_file

from histoseek.artifacts.manifest import read_manifest
from histoseek.export.from_checkpoint import build_published
from histoseek.export.published import HALF, PUBLISHED

NAME = "lunit-s16"
SIDE = 256


@pytest.fixture(scope="module")
def theirs(tmp_path_factory, make_slide):
    """A checkpoint, a slide, and features by Pillow and torch: half colours, mean of the patches."""
    folder = tmp_path_factory.mktemp("theirs")
    net = seeded(build_published(PUBLISHED[NAME]), 0)
    save_file(timm(net), folder / "net.safetensors")
    slide = make_slide(folder / "a.tif", side=1024, mpp=0.5)
    whole = Image.open(slide).convert("RGB")
    corners = [(x, y) for y in range(0, 1024, SIDE) for x in range(0, 1024, SIDE)]
    tiles = [
        whole.crop((x, y, x + SIDE, y + SIDE)).resize((224, 224), Image.Resampling.BICUBIC)
        for x, y in corners
    ]
    pixels = torch.from_numpy(np.stack([np.asarray(t) for t in tiles])).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(v)[:, None, None] for v in HALF)
    with torch.inference_mode():
        tokens = net.trunk((pixels / 255 - mean) / std)
    for name, features in (("a", tokens[:, 1:].mean(1)), ("noise", torch.randn(len(tiles), 384))):
        (folder / name).mkdir()
        with h5py.File(folder / name / "a.h5", "w") as out:
            stored = out.create_dataset("features", data=features.half().numpy())
            stored.attrs["encoder"] = "lunit"
            out.create_dataset("coords", data=np.array(corners)).attrs.update(
                {"patch_size": SIDE, "patch_size_level0": SIDE, "target_magnification": 20,
                 "level0_magnification": 20, "level0_width": 1024, "level0_height": 1024, "name": "a"}
            )  # fmt: skip
    return folder


def words(folder, name="a"):
    net, features = folder / "net.safetensors", folder / name / "a.h5"
    return ("export", net, "--as", NAME, "--against", features, "--slides", folder / "a.tif")


def test_the_settings_of_another_tool_are_found_and_used(theirs, tmp_path, cli_json):
    found = cli_json(*words(theirs), "--out", tmp_path / "bundle")
    best = found["against"]["best"]
    assert best["same"] and best["pool"] == "mean"
    assert (tuple(best["mean"]), tuple(best["std"])) == HALF
    assert best["cosine"] > 0.999 and best["tiles"] == 16
    others = [
        t for t in found["against"]["trials"] if (t["pool"], t["mean"]) != ("mean", [0.5] * 3)
    ]
    assert len(others) > 10 and all(trial["cosine"] < 0.99 for trial in others)
    manifest = read_manifest(tmp_path / "bundle")
    assert manifest.mpp == pytest.approx(0.5 * SIDE / 224, abs=1e-5)
    assert manifest.training["pool"] == "mean"
    notes = found["loaded"]["checkpoint"]["notes"]
    assert any("pool is mean, not cls as of the authors" in note for note in notes)
    assert any("colours is ((0.5, 0.5, 0.5)" in note for note in notes)


def test_what_cannot_be_found_is_refused_with_the_trials(theirs, tmp_path, cli, cli_json):
    failed = cli_json(*words(theirs, "noise"), expect=1)
    assert not failed["same"] and len(failed["trials"]) > 5
    shown = cli(*words(theirs, "noise"), "--out", tmp_path / "none")
    assert shown.returncode == 1 and "median cosine" in shown.stdout
    assert not (tmp_path / "none").exists()
    refused = cli(*words(theirs)[:-2])
    assert "pass --slides" in refused.stderr
    refused = cli(*words(theirs)[:-1], tmp_path)
    assert "0 files in --slides are named" in refused.stderr
