"""Every registered model as a bundle: parity on real tiles, in process and on the real Triton server."""

import json

import numpy as np
import pytest
import torch

from histoseek.export.bundle import export_run
from histoseek.export.triton import TritonOptions, write_repository
from histoseek.serving.encoder import OnnxEncoder, open_encoder
from histoseek.tilesets import open_tiles, sample_tiles
from histoseek.training.data import load
from histoseek.training.evaluate import calibrate
from histoseek.training.models import MODELS, build
from histoseek.training.run import RunFolder


@pytest.fixture(scope="module")
def bundles(tile_folder, tmp_path_factory):
    """A bundle of every model with random weights, batch norms calibrated on real tiles."""
    folder = tmp_path_factory.mktemp("bundles")
    tiles = open_tiles(tile_folder)
    few = tiles.take(range(0, len(tiles), 6))
    for name in MODELS:
        torch.manual_seed(0)
        encoder = build(name)
        calibrate(encoder, load(few, encoder.size_px, lambda *_: None).tiles)
        run = RunFolder(folder / f"run-{name}", {})
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
        export_run(folder / f"run-{name}", folder / name, few, build)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_the_graph_is_the_net_on_real_tiles(name, bundles, tile_folder):
    parity = json.loads((bundles / name / "parity.json").read_text())
    assert parity["tiles"] == 12
    assert parity["max_abs"] <= 1e-4 and parity["max_cosine_error"] <= 1e-6
    assert parity["batch_max_abs"] <= 1e-5
    encoder = OnnxEncoder(bundles / name)
    found = encoder.embed(sample_tiles(open_tiles(tile_folder), encoder.manifest.size_px, 9))
    assert found.shape == (9, encoder.manifest.dim)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-4)
    assert (found @ found.T).min() < 0.9999  # tiles are told apart
    weights = sum(p.numel() * 4 for p in build(name).backbone.parameters())
    graph = (bundles / name / "encoder.onnx").stat().st_size
    assert graph < 1.1 * weights + 75_000_000 * (name == "sobel-alexnet") + 2_000_000  # no decoder


def test_triton_serves_every_model(bundles, tile_folder, tmp_path, triton):
    options = TritonOptions(max_batch=8, instances=1)
    write_repository([bundles / name for name in MODELS], tmp_path / "models", options)
    server = triton(tmp_path / "models")
    tiles = open_tiles(tile_folder)
    for name in MODELS:
        local = OnnxEncoder(bundles / name)
        remote = open_encoder(server.url(name), local.manifest)
        pictures = sample_tiles(tiles, local.manifest.size_px, 5)
        assert np.abs(remote.embed(pictures) - local.embed(pictures)).max() < 1e-5, name
        remote.close()
