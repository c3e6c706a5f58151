"""A bundle consists of its folder only: no weights in other files, and no links to the outside."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from histoseek.artifacts.files import sha256_file
from histoseek.artifacts.manifest import read_manifest
from histoseek.artifacts.onnx_files import check_graph_whole
from histoseek.errors import BadInput, Damaged
from histoseek.export.options import TritonOptions
from histoseek.export.triton import write_repository
from histoseek.index.atlas import Atlas
from histoseek.serving.encoders.onnx import OnnxEncoder
from histoseek.serving.encoders.open import DEFAULT_BUNDLE


@pytest.fixture
def bundle(tmp_path):
    return Path(shutil.copytree(DEFAULT_BUNDLE, tmp_path / "bundle"))


def signed(bundle):
    """Let the manifest know the graph as it is now."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["sha256"] = sha256_file(bundle / "encoder.onnx")
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def everywhere(bundle):
    """What opens a bundle: reading, embedding, serving, an atlas."""
    return (
        lambda: read_manifest(bundle),
        lambda: OnnxEncoder(bundle),
        lambda: OnnxEncoder(bundle, engine="openvino"),
        lambda: write_repository([bundle], bundle.parent / "models", TritonOptions()),
        lambda: Atlas.create(bundle.parent / "atlas", bundle),
    )


@pytest.mark.parametrize("place", ["weights.bin", "../weights.bin", "absolute"])
def test_external_weights_are_refused_by_name_everywhere(bundle, tmp_path, place):
    name = str(tmp_path / "weights.bin") if place == "absolute" else place
    graph = bundle / "encoder.onnx"
    model = onnx.load(graph)
    large = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    (bundle / name).resolve().write_bytes(large.raw_data)
    large.ClearField("raw_data")
    large.data_location = TensorProto.EXTERNAL
    large.external_data.add(key="location", value=name)
    graph.write_bytes(model.SerializeToString())
    signed(bundle)
    for read in everywhere(bundle):
        with pytest.raises(BadInput, match="external data") as caught:
            read()
        assert repr(name) in str(caught.value) and large.name in str(caught.value)
    assert not (tmp_path / "models").exists() and not (tmp_path / "atlas").exists()


def hidden(where):
    """A model with an external tensor in an odd place."""
    tensor = numpy_helper.from_array(np.ones(3, np.float32), "w")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/hostname")
    inner = helper.make_graph([], "inner", [], [], [tensor])
    nodes, functions, values = [], [], []
    if where == "constant":
        nodes = [helper.make_node("Constant", [], ["c"], value=tensor)]
    elif where == "branch":
        nodes = [helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)]
    elif where == "function":
        node = helper.make_node("Constant", [], ["c"], value=tensor)
        opset = [helper.make_opsetid("", 18)]
        functions = [helper.make_function("d", "f", [], ["c"], [node], opset)]
    graph = helper.make_graph(nodes, "g", [], [], values)
    if where == "sparse":
        graph.sparse_initializer.add().values.CopyFrom(tensor)
    model = helper.make_model(graph, functions=functions)
    if where == "training":
        model.training_info.add().initialization.CopyFrom(inner)
    return model


@pytest.mark.parametrize("where", ["constant", "branch", "function", "sparse", "training"])
def test_an_external_tensor_is_found_wherever_it_hides(tmp_path, where):
    (tmp_path / "g.onnx").write_bytes(hidden(where).SerializeToString())
    with pytest.raises(BadInput, match="tensor 'w' from the file '/etc/hostname'"):
        check_graph_whole(tmp_path / "g.onnx")


def test_whole_graphs_pass_and_cut_ones_are_damaged(bundle, tmp_path):
    check_graph_whole(bundle / "encoder.onnx")
    blob = (bundle / "encoder.onnx").read_bytes()
    rng = np.random.default_rng(0)
    for size in rng.integers(1, len(blob) - 1, 30).tolist():
        (tmp_path / "cut.onnx").write_bytes(blob[:size])
        try:
            check_graph_whole(tmp_path / "cut.onnx")  # it may end between two fields
        except Damaged as error:
            assert "cut.onnx" in str(error)
    (tmp_path / "cut.onnx").write_bytes(bytes(rng.integers(0, 256, 4000, dtype=np.uint8)))
    with pytest.raises(Damaged):
        check_graph_whole(tmp_path / "cut.onnx")


@pytest.mark.parametrize("name", ["encoder.onnx", "MODEL_CARD.md", "notes.txt"])
def test_links_out_of_a_bundle_are_refused_by_name(bundle, tmp_path, name):
    outside = tmp_path / "outside"
    outside.write_bytes((bundle / name).read_bytes() if (bundle / name).exists() else b"secret")
    (bundle / name).unlink(missing_ok=True)
    (bundle / name).symlink_to(outside)
    for read in everywhere(bundle):
        with pytest.raises(BadInput, match="outside the bundle") as caught:
            read()
        assert name in str(caught.value) and str(outside) in str(caught.value)
    assert not (tmp_path / "models").exists() and not (tmp_path / "atlas").exists()


def test_links_inside_and_a_linked_bundle_are_read(bundle, tmp_path):
    (bundle / "..data").mkdir()  # as Kubernetes mounts files
    shutil.move(bundle / "MODEL_CARD.md", bundle / "..data/MODEL_CARD.md")
    (bundle / "MODEL_CARD.md").symlink_to("..data/MODEL_CARD.md")
    (tmp_path / "link").symlink_to(bundle)
    assert read_manifest(tmp_path / "link") == read_manifest(DEFAULT_BUNDLE)
