"""Tissue networks as bundles: from a run, from ONNX graphs of other programs, and what is refused."""

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from histoseek.artifacts.manifest import CARD, MANIFEST
from histoseek.artifacts.tissue_bundle import TISSUE_GRAPH, read_tissue_manifest
from histoseek.errors import BadInput, Damaged
from histoseek.export.options import TissueExportOptions
from histoseek.export.tissue import export_tissue_onnx, export_tissue_run
from histoseek.serving.embedding.tissue_network import TissueNetwork
from histoseek.training.tissue.net import TissueNet

COLOURS = {"mpp": 10, "mean": "0.5,0.4,0.3", "std": "0.2,0.25,0.3"}
WEIGHT = np.random.default_rng(0).normal(0, 1, (3, 3)).astype(np.float32)


def network(path, classes=3, layout="nchw", rank=4, side=64, last=None, cast=None, valid=False):
    """A 1 x 1 convolution to classes, as another program would write it."""
    nodes, source = [], "images"
    if layout == "nhwc":
        nodes.append(helper.make_node("Transpose", [source], ["planes"], perm=[0, 3, 1, 2]))
        source = "planes"
    kernel = (
        np.repeat(WEIGHT[:classes, :, None, None], 3, 3).repeat(3, 2)
        if valid
        else WEIGHT[:classes, :, None, None]
    )
    weight = numpy_helper.from_array(kernel, "weight")
    nodes.append(helper.make_node("Conv", [source, "weight"], ["found"]))
    found, constants = "found", [weight]
    if last:
        nodes.append(
            helper.make_node(
                last, [found], ["probable"], **({"axis": 1} if last == "Softmax" else {})
            )
        )
        found = "probable"
    if rank == 3:
        constants.append(numpy_helper.from_array(np.array([1]), "axis"))
        nodes.append(helper.make_node("Squeeze", [found, "axis"], ["map"]))
        found = "map"
    elif layout == "nhwc":
        nodes.append(helper.make_node("Transpose", [found], ["last"], perm=[0, 2, 3, 1]))
        found = "last"
    given = ["n", side, side, 3] if layout == "nhwc" else ["n", 3, side, side]
    kind = TensorProto.FLOAT
    if cast:
        kind = getattr(TensorProto, cast)
        nodes.append(helper.make_node("Cast", [found], ["whole"], to=kind))
        found = "whole"
    out = side - 2 if valid else side
    shapes = {3: ["n", side, side], 4: ["n", classes, out, out]}
    shape = ["n", side, side, classes] if rank == 4 and layout == "nhwc" else shapes[rank]
    graph = helper.make_graph(
        nodes,
        "theirs",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, given)],
        [helper.make_tensor_value_info(found, kind, shape)],
        constants,
    )
    ids = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=ids, ir_version=9), path)
    return path


def probabilities(squares, classes):
    """What the convolution and a softmax, or a sigmoid, compute, by NumPy: (N, H, W, classes)."""
    images = (squares / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.25, 0.3]
    logits = images @ WEIGHT[:classes].T.astype(float)
    if classes == 1:
        return 1 / (1 + np.exp(-logits))
    powers = np.exp(logits)
    return powers / powers.sum(-1, keepdims=True)


@pytest.fixture
def squares():
    return np.random.default_rng(1).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("made", "given", "wanted"),
    [
        ({}, {"tissue": (1,)}, [1]),
        ({}, {"tissue": (0, 2)}, [0, 2]),
        ({"layout": "nhwc"}, {"tissue": (2,), "layout": "nhwc"}, [2]),
        ({"last": "Softmax"}, {"tissue": (2,), "output": "probabilities"}, [2]),
        ({"classes": 1}, {}, [0]),
        ({"classes": 1, "rank": 3}, {}, [0]),
        ({"classes": 1, "layout": "nhwc"}, {"layout": "nhwc"}, [0]),
        ({"classes": 1, "last": "Sigmoid"}, {"output": "probabilities"}, [0]),
        ({"side": None}, {"tissue": (1,), "size_px": 64}, [1]),
    ],
)
def test_a_graph_of_another_program_gives_its_own_probabilities(
    tmp_path, squares, made, given, wanted
):
    model = network(tmp_path / "net.onnx", **made)
    options = TissueExportOptions(name="theirs", licence="CC0", **COLOURS, **given)
    manifest = export_tissue_onnx(model, tmp_path / "bundle", options)
    assert read_tissue_manifest(tmp_path / "bundle") == manifest
    assert (manifest.name, manifest.size_px, manifest.mpp) == ("theirs", 64, 10)
    expected = probabilities(squares, made.get("classes", 3))[..., wanted].sum(-1)
    found = TissueNetwork(tmp_path / "bundle").shares(squares)
    assert np.abs(found - expected).max() < 1e-4
    card = (tmp_path / "bundle" / CARD).read_text()
    assert "CC0" in card and "10 µm per pixel" in card


@pytest.mark.parametrize(
    ("made", "given", "says"),
    [
        ({}, {}, "has 3 classes, and --class is not given; expected .* 0 to 2"),
        ({}, {"tissue": (3,)}, "--class is 3; expected"),
        ({"classes": 1}, {"tissue": (0,)}, "one class only; leave out --class"),
        ({}, {"tissue": (1,), "mpp": None}, "pass --mpp"),
        ({}, {"tissue": (1,), "mean": None}, "--mean is None"),
        ({"side": None}, {"tissue": (1,)}, "expected squares of a fixed size"),
        ({"layout": "nhwc"}, {"tissue": (1,)}, "pass --layout"),
        ({}, {"tissue": (1,), "size_px": 128}, "leave out --size-px"),
        ({"last": "Softmax"}, {"tissue": (1,)}, "pass --output probabilities"),
        ({"classes": 1, "last": "Sigmoid"}, {}, "pass --output probabilities"),
        ({"classes": 1}, {"output": "probabilities"}, "pass --output logits"),
        ({"classes": 1, "cast": "INT64"}, {}, "without argmax"),
        ({"classes": 1, "valid": True}, {}, "62 x 62 for squares of 64 pixels"),
    ],
)
def test_what_cannot_be_exported_is_refused_with_a_remedy(tmp_path, made, given, says):
    model = network(tmp_path / "net.onnx", **made)
    with pytest.raises(BadInput, match=says):
        export_tissue_onnx(model, tmp_path / "out", TissueExportOptions(**{**COLOURS, **given}))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def run(tmp_path_factory, tile_folder):
    from histoseek.artifacts.tileset_files import open_tiles
    from histoseek.training.tissue import fit

    folder = tmp_path_factory.mktemp("tissue") / "run"
    options = fit.TissueOptions(steps=2, batch=2, side_px=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "HELD_OUT", 2)
        fit.fit(options, open_tiles(tile_folder), folder, lambda *_: None)
    return folder


def test_a_run_gives_a_graph_equal_to_torch(run, tmp_path, squares):
    from safetensors.torch import load_file

    manifest = export_tissue_run(run, tmp_path / "mine", TissueNet, TissueExportOptions())
    assert (manifest.name, manifest.mpp, manifest.size_px) == ("mine", 8, 64)
    net = TissueNet().eval()
    net.load_state_dict(load_file(run / "weights.safetensors"))
    with torch.inference_mode():
        expected = net(torch.from_numpy(squares).permute(0, 3, 1, 2).float() / 255).sigmoid()
    found = TissueNetwork(tmp_path / "mine").shares(squares)
    assert found.shape == (3, 32, 32)
    assert np.abs(found - expected[:, 0].numpy()).max() < 1e-5
    assert (tmp_path / "mine" / TISSUE_GRAPH).stat().st_size < 1_000_000
    assert "held-out made scenes" in (tmp_path / "mine" / CARD).read_text()


def test_commands_train_and_export(cli_json, tile_folder, tmp_path, run):
    out = tmp_path / "bundle"
    made = cli_json("tissue", "export", run, "--out", out, "--threshold", 0.4, "--licence", "CC0")
    assert made["bundle"] == str(out) and made["threshold"] == 0.4 and made["licence"] == "CC0"
    words = [
        "tissue",
        "train",
        tile_folder,
        "--out",
        run,
        "--steps",
        2,
        "--batch",
        2,
        "--side-px",
        64,
    ]
    assert cli_json(*words)["metrics"]["scenes"] == 2  # finished before
    for flag, value in (("--mpp", 10), ("--class", 0), ("--layout", "nhwc"), ("--size-px", 64)):
        words = ["tissue", "export", run, "--out", tmp_path / "x", flag, value]
        failed = cli_json(*words, expect=1)["error"]["message"]
        assert f"{flag} is for an .onnx file" in failed
    failed = cli_json("tissue", "export", tile_folder, "--out", tmp_path / "x", expect=1)
    assert "no finished run of `histoseek tissue train`" in failed["error"]["message"]
    assert not (tmp_path / "x").exists()


def test_a_bundle_that_is_none_or_was_changed_is_refused(run, tmp_path, other_bundle):
    with pytest.raises(BadInput, match="is not a bundle of a tissue network"):
        read_tissue_manifest(tmp_path)
    with pytest.raises(BadInput, match="is an encoder bundle, not a bundle of a tissue network"):
        read_tissue_manifest(other_bundle)
    bundle = tmp_path / "bundle"
    export_tissue_run(run, bundle, TissueNet, TissueExportOptions())
    manifest = json.loads((bundle / MANIFEST).read_text())
    for change, error, says in (
        ({"format": 9}, BadInput, "upgrade histoseek"),
        ({"mpp": "coarse"}, Damaged, "is not a valid manifest"),
        ({"sha256": "0" * 64}, Damaged, "is missing or is not the file"),
    ):
        (bundle / MANIFEST).write_text(json.dumps({**manifest, **change}))
        with pytest.raises(error, match=says):
            read_tissue_manifest(bundle)
