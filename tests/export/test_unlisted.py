"""``--arch vit``: a vision transformer that is not among the published encoders."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoints import WRITERS, seeded, timm

from histoseek.errors import BadInput
from histoseek.export.checkpoints import read_checkpoint
from histoseek.export.from_checkpoint import build_published, export_checkpoint, made_tiles
from histoseek.export.nets.vit import VitEncoder, VitShape
from histoseek.export.onnx_graph import Graph
from histoseek.export.options import ExportOptions
from histoseek.export.published import PUBLISHED
from histoseek.export.unlisted import unlisted_vit
from histoseek.serving.encoders.onnx import OnnxEncoder

VITS = [name for name, known in PUBLISHED.items() if isinstance(known.shape, VitShape)]
IMAGENET = {"mean": "0.485,0.456,0.406", "std": "0.229,0.224,0.225"}


@pytest.mark.parametrize("name", VITS)
def test_the_shape_of_every_published_transformer_is_found(name):
    known = PUBLISHED[name]
    shape = known.shape.shallow(1)
    net = seeded(build_published(known, depth=1))
    state = WRITERS.get(name, timm)(net)
    tensors = state.get("teacher", state)
    tensors = {key.removeprefix("backbone."): value for key, value in tensors.items()}
    quick = "quick_gelu" if shape.mlp == "quick_gelu" else None
    options = ExportOptions(arch="vit", heads=shape.heads, activation=quick)
    found, notes = unlisted_vit(tensors, "net.bin", options)
    # what a checkpoint does not state; only CLIP's epsilon can be guessed
    unstated = {"built_grid": 0, "eps": found.shape.eps, "size_px": found.shape.size_px}
    assert found.shape == replace(shape, **unstated)
    assert notes and "epsilon" in notes[0] and ("--heads" in notes[0]) == (options.heads is None)


def test_a_transformer_of_ones_own_becomes_a_bundle_that_names_its_guesses(tmp_path, cli, cli_json):
    shape = VitShape(
        16, 192, 2, 3, 768, size_px=96, layer_scale=True, registers=4, positions="patches"
    )
    with torch.device("meta"):
        net = VitEncoder(shape, "cls+mean")
    torch.save({"model": timm(seeded(net))}, tmp_path / "own.pth")
    words = ("export", tmp_path / "own.pth", "--arch", "vit", "--pool", "cls+mean")
    refused = cli(*words, "--out", tmp_path / "bundle")
    assert refused.returncode == 1 and "--arch needs --mean and --std" in refused.stderr
    colours = ("--mean", IMAGENET["mean"], "--std", IMAGENET["std"])
    made = cli_json(*words, *colours, "--out", tmp_path / "bundle", "--mpp", 0.25)
    guessed = made["loaded"]["checkpoint"]["notes"]
    assert any("3 attention heads of 64 numbers (--heads)" in note for note in guessed)
    assert (made["dim"], made["size_px"], made["mpp"]) == (384, 96, 0.25)
    tiles = made_tiles(96, 3)
    mean, std = ExportOptions(**IMAGENET).colours()
    with torch.inference_mode():
        wanted = Graph(net, mean, std)(torch.from_numpy(tiles)).numpy()
    encoder = OnnxEncoder(tmp_path / "bundle")
    np.testing.assert_allclose(encoder.embed(tiles), wanted, atol=1e-5)
    encoder.close()
    larger = cli_json(*words, *colours, "--out", tmp_path / "larger", "--input-px", 112)
    assert larger["size_px"] == 112
    assert any(
        "resampled positions from 6 x 6 to 7 x 7" in n
        for n in larger["loaded"]["checkpoint"]["notes"]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "vit", "published": "uni"}, "cannot be combined"),
        ({"published": "uni", "heads": 3}, "--heads is not for a checkpoint of a published encoder"),
        ({"arch": "vit", "heads": 5}, "expected a multiple of heads 5"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(options, message, tmp_path):
    with torch.device("meta"):
        net = VitEncoder(VitShape(16, 192, 1, 3, 768, size_px=96), "cls")
    torch.save(timm(seeded(net)), tmp_path / "own.pth")
    with pytest.raises(BadInput, match=message):
        export_checkpoint(
            tmp_path / "own.pth", tmp_path / "out", ExportOptions(**IMAGENET, **options)
        )
    assert not (tmp_path / "out").exists()


def test_networks_of_another_kind_are_refused_by_name(tmp_path):
    torch.save(timm(seeded(build_published(PUBLISHED["lunit-resnet50"]))), tmp_path / "r.pth")
    tensors, _ = read_checkpoint(tmp_path / "r.pth")
    with pytest.raises(BadInput, match="no plain vision transformer"):
        unlisted_vit(tensors, "r.pth", ExportOptions(arch="vit"))
    own = timm(seeded(VitEncoder(VitShape(16, 192, 1, 3, 768, size_px=96), "cls")))
    own["pos_embed"] = own["pos_embed"][:, :30]
    with pytest.raises(BadInput, match="30 learned positions"):
        unlisted_vit(own, "own.pth", ExportOptions(arch="vit"))
