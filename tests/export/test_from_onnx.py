"""ONNX image encoders of other programs as bundles: layouts, outputs, and what is refused."""

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from histoseek.artifacts.manifest import CARD, CHECKPOINT, read_manifest
from histoseek.errors import BadInput, Damaged
from histoseek.export.from_checkpoint import made_tiles
from histoseek.export.from_onnx import export_onnx
from histoseek.export.options import ExportOptions
from histoseek.serving.encoders.onnx import OnnxEncoder

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
COLOURS = {"mean": "0.5,0.4,0.3", "std": "0.2,0.25,0.3"}
WEIGHT = np.random.default_rng(0).normal(0, 0.1, (6, 3, 8, 8)).astype(np.float32)


def encoder(path, kind="maps", layout="nchw", batch="n", opset=18, side=32):
    """A convolution of 8 x 8 patches, with six maps, as another program would write it."""
    nodes, source = [], "images"
    if layout == "nhwc":
        nodes.append(helper.make_node("Transpose", ["images"], ["planes"], perm=[0, 3, 1, 2]))
        source = "planes"
    last = "maps" if kind == "maps" else "found"
    nodes.append(helper.make_node("Conv", [source, "weight"], [last], strides=[8, 8]))
    constants, steps = [numpy_helper.from_array(WEIGHT, "weight")], side // 8
    shapes = {"maps": [6, steps, steps], "tokens": [steps**2, 6], "vector": [6 * steps**2]}
    if kind == "vector":
        nodes.append(helper.make_node("Flatten", ["found"], ["vector"]))
    if kind == "tokens":
        constants.append(numpy_helper.from_array(np.array([0, 6, -1]), "flat"))
        nodes.append(helper.make_node("Reshape", ["found", "flat"], ["rows"]))
        nodes.append(helper.make_node("Transpose", ["rows"], ["tokens"], perm=[0, 2, 1]))
    shape = [batch, side, side, 3] if layout == "nhwc" else [batch, 3, side, side]
    graph = helper.make_graph(
        nodes,
        "theirs",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(kind, TensorProto.FLOAT, [batch, *shapes[kind]])],
        constants,
    )
    ids = [helper.make_opsetid("", opset)]
    onnx.save(helper.make_model(graph, opset_imports=ids, ir_version=9), path)
    return path


def maps(tiles):
    """What the convolution computes, by NumPy: (N, H, W, 6)."""
    images = ((tiles / 255 - MEAN) / STD).astype(np.float64)
    count, side = len(tiles), tiles.shape[1] // 8
    patches = images.reshape(count, side, 8, side, 8, 3)
    return np.einsum("nhawbc,ocab->nhwo", patches, WEIGHT.astype(np.float64))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("kind", "pool"),
    [
        ("maps", None),
        ("vector", None),
        ("tokens", "cls"),
        ("tokens", "mean"),
        ("tokens", "cls+mean"),
    ],
)
def test_the_bundle_embeds_as_the_given_graph(kind, pool, layout, tmp_path):
    path = encoder(tmp_path / "theirs.onnx", kind, layout, opset=13 if pool else 18)
    options = ExportOptions(pool=pool, layout=layout, mpp=0.5, **COLOURS)
    manifest = export_onnx(path, tmp_path / "b", options)
    assert manifest == read_manifest(tmp_path / "b")
    tiles = made_tiles(32, 5)
    found = maps(tiles)
    tokens = found.reshape(5, -1, 6)
    wanted = {
        "maps": found.mean((1, 2)),
        "vector": found.transpose(0, 3, 1, 2).reshape(5, -1),
        "tokens": {
            "cls": tokens[:, 0],
            "mean": tokens[:, 1:].mean(1),
            "cls+mean": np.concatenate([tokens[:, 0], tokens[:, 1:].mean(1)], 1),
        }.get(pool),
    }[kind]
    wanted = wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
    opened = OnnxEncoder(tmp_path / "b")
    np.testing.assert_allclose(opened.embed(tiles), wanted, atol=1e-5)
    opened.close()
    record = json.loads((tmp_path / "b" / CHECKPOINT).read_text())["onnx"]
    assert record["sha256"] in (tmp_path / "b" / CARD).read_text()


@pytest.mark.parametrize(
    ("graph", "options", "message"),
    [
        ({}, {"mean": None}, "--mean is None; expected three numbers"),
        ({}, {"std": "1,0,1"}, "--std is '1,0,1'"),
        ({}, {"layout": "nhwc"}, r"takes \? x 3 x 32 x 32 .*pass --layout"),
        ({"batch": 1}, {}, "takes batches of 1 only"),
        ({"kind": "tokens"}, {}, "returns tokens; pass --pool"),
        ({}, {"pool": "cls"}, "returns no tokens"),
        ({"opset": 12}, {}, "has opset 12; expected at least 13"),
        ({}, {"views": 4}, "--views is not for an .onnx file"),
    ],
)
def test_another_graph_or_a_wrong_option_is_refused(graph, options, message, tmp_path):
    path = encoder(tmp_path / "theirs.onnx", **graph)
    with pytest.raises(BadInput, match=message):
        export_onnx(path, tmp_path / "b", ExportOptions(**{**COLOURS, **options}))
    assert not (tmp_path / "b").exists()


def test_a_file_that_is_no_graph_is_refused(tmp_path, cli):
    (tmp_path / "a.onnx").write_bytes(b"\x08\x09no graph at all")
    with pytest.raises(Damaged, match="not a "):
        export_onnx(tmp_path / "a.onnx", tmp_path / "b", ExportOptions(**COLOURS))
    words = ("export", encoder(tmp_path / "c.onnx"), "--out", tmp_path / "c")
    made = cli(*words, "--mean", COLOURS["mean"], "--std", COLOURS["std"])
    assert made.returncode == 0 and "encoder c, 6-d" in made.stdout
