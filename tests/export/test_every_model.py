"""Every registered model as a bundle: parity on real tiles, in process and on the real Triton server."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from histoseek.artifacts.tileset_files import open_tiles
from histoseek.artifacts.tilesets import sample_tiles
from histoseek.export.bundle import export_run
from histoseek.export.onnx_graph import Graph, to_onnx
from histoseek.export.options import ExportOptions, TritonOptions
from histoseek.export.triton import write_repository
from histoseek.serving.encoders.onnx import OnnxEncoder
from histoseek.serving.encoders.open import open_encoder
from histoseek.training.data import load
from histoseek.training.evaluate import calibrate
from histoseek.training.models import MODELS, build
from histoseek.training.run import RunFolder


@pytest.fixture(scope="session")
def bundle(tile_folder, made_once):
    """The bundle of a model with random weights, batch norms calibrated on real tiles."""
    tiles = open_tiles(tile_folder)
    few = tiles.take(range(0, len(tiles), 6))

    def export(name, folder):
        torch.manual_seed(0)
        encoder = build(name)
        calibrate(encoder, load(few, encoder.size_px, lambda *_: None).tiles)
        run = RunFolder(folder / "run", {})
        data = {
            "name": "tiles",
            "fingerprint": "0",
            "tiles": 12,
            "groups": 3,
            "classes": [],
            "unreadable": [],
        }
        record = {
            "recipe": "none", "paper": MODELS[name].paper, "options": {"seed": 0}, "data": data,
            "split": {"by": "group", "train_tiles": 0, "held_out_tiles": 0}, "metrics": {},
        }  # fmt: skip
        run.finish(encoder.state_dict(), {"model": name}, record)
        export_run(folder / "run", folder / name, few, build, ExportOptions(name=name))

    return lambda name: made_once(f"bundle-{name}", lambda folder: export(name, folder)) / name


@pytest.mark.parametrize("name", MODELS)
def test_the_graph_is_the_net_on_real_tiles(name, bundle, tile_folder):
    parity = json.loads((bundle(name) / "parity.json").read_text())
    assert parity["tiles"] == 12
    assert parity["max_abs"] <= 1e-4 and parity["max_cosine_error"] <= 1e-6
    assert parity["batch_max_abs"] <= 1e-5
    encoder = OnnxEncoder(bundle(name))
    found = encoder.embed(sample_tiles(open_tiles(tile_folder), encoder.manifest.size_px, 9))
    assert found.shape == (9, encoder.manifest.dim)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-4)
    assert (found @ found.T).min() < 0.9999  # tiles are told apart
    weights = sum(p.numel() * 4 for p in build(name).backbone.parameters())
    graph = (bundle(name) / "encoder.onnx").stat().st_size
    assert graph < 1.1 * weights + 75_000_000 * (name == "sobel-alexnet") + 2_000_000  # no decoder


def test_kernels_that_are_computed_from_weights_are_constants_of_the_graph(tile_folder, tmp_path):
    torch.manual_seed(0)
    encoder = build("mobilenet-v3-small", size_px=64, dim=8, symmetry=True)
    tiles = load(open_tiles(tile_folder), 64, lambda *_: None).tiles
    calibrate(encoder, tiles)
    graph = Graph(encoder.eval(), encoder.mean, encoder.std)
    model = onnx.load_from_string(to_onnx(graph, 64))
    constants = {tensor.name for tensor in model.graph.initializer}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 52 and all(node.input[1] in constants for node in convolutions)
    assert not [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    (tmp_path / "encoder.onnx").write_bytes(model.SerializeToString())
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx")
    seen = [tiles[:5], np.rot90(tiles[:5], 1, (1, 2)).copy(), tiles[:5, :, ::-1].copy()]
    plain, turned, mirrored = (session.run(None, {"tiles": one})[0] for one in seen)
    assert np.abs(turned - plain).max() < 1e-5 and np.abs(mirrored - plain).max() < 1e-5
    assert np.abs(plain[0] - plain[1]).max() > 1e-2


def test_triton_serves_every_model(bundle, tile_folder, tmp_path, triton):
    options = TritonOptions(max_batch=8, instances=1)
    write_repository([bundle(name) for name in MODELS], tmp_path / "models", options)
    server = triton(tmp_path / "models")
    tiles = open_tiles(tile_folder)
    for name in MODELS:
        local = OnnxEncoder(bundle(name))
        remote = open_encoder(server.url(name), local.manifest)
        pictures = sample_tiles(tiles, local.manifest.size_px, 5)
        assert np.abs(remote.embed(pictures) - local.embed(pictures)).max() < 1e-5, name
        remote.close()
