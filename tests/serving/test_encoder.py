"""The in-process encoder, and the shipped bundle."""

import json
import shutil

import numpy as np
import pytest

from histoseek.errors import BadInput, Damaged, Mismatch
from histoseek.serving.encoders.onnx import OnnxEncoder
from histoseek.serving.encoders.open import DEFAULT_BUNDLE, open_encoder


@pytest.fixture(scope="module")
def encoder():
    return open_encoder("default")


def tiles_of(tissue, count=64):
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 512 - 224, (count, 2))
    return np.stack([tissue[y : y + 224, x : x + 224] for y, x in corners])


def test_embeddings_are_unit_vectors_of_the_promised_length(encoder, tissue):
    found = encoder.embed(tiles_of(tissue, 5))
    assert found.shape == (5, encoder.manifest.dim) and found.dtype == np.float32
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert encoder.embed(tiles_of(tissue, 1)[:0]).shape == (0, encoder.manifest.dim)


def test_a_batch_of_64_agrees_with_batches_of_one(tissue):
    tiles = tiles_of(tissue)
    together = OnnxEncoder(DEFAULT_BUNDLE, batch=64).embed(tiles)
    alone = OnnxEncoder(DEFAULT_BUNDLE, batch=1).embed(tiles)
    assert np.abs(together - alone).max() <= 1e-5


def test_the_shipped_encoder_is_small_and_its_parity_was_measured():
    assert (DEFAULT_BUNDLE / "encoder.onnx").stat().st_size <= 6_000_000
    parity = json.loads((DEFAULT_BUNDLE / "parity.json").read_text())
    assert parity["max_abs"] <= 1e-4 and parity["batch_max_abs"] <= 1e-5 and parity["tiles"] >= 64
    manifest = open_encoder("default").manifest
    assert manifest.sha256 in (DEFAULT_BUNDLE / "MODEL_CARD.md").read_text()


def test_wrong_tiles_are_refused(encoder, tissue):
    with pytest.raises(BadInput, match="uint8"):
        encoder.embed(tiles_of(tissue, 1).astype(np.float32))
    with pytest.raises(BadInput, match="224"):
        encoder.embed(tiles_of(tissue, 1)[:, :100])


def test_a_changed_graph_and_a_folder_that_is_no_bundle_are_refused(tmp_path):
    with pytest.raises(BadInput, match="not an encoder bundle"):
        open_encoder(str(tmp_path))
    shutil.copytree(DEFAULT_BUNDLE, tmp_path / "bundle")
    blob = bytearray((tmp_path / "bundle/encoder.onnx").read_bytes())
    blob[len(blob) // 2] ^= 1
    (tmp_path / "bundle/encoder.onnx").write_bytes(blob)
    with pytest.raises(Damaged, match="sha256"):
        open_encoder(str(tmp_path / "bundle"))


def test_another_encoder_than_expected_is_refused_with_both_names(encoder, other_bundle):
    with pytest.raises(Mismatch, match=f"other .* is not {encoder.manifest.name}"):
        open_encoder(str(other_bundle), expect=encoder.manifest)


def test_a_newer_manifest_asks_for_an_upgrade(tmp_path):
    shutil.copytree(DEFAULT_BUNDLE, tmp_path / "bundle")
    path = tmp_path / "bundle/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    with pytest.raises(BadInput, match="upgrade"):
        open_encoder(str(tmp_path / "bundle"))


@pytest.mark.parametrize(
    ("cores", "streams", "threads"), [(2, 1, 2), (8, 1, 8), (24, 3, 8), (1, 1, 1)]
)
def test_several_cores_share_each_run_of_a_large_graph(
    cores, streams, threads, monkeypatch, tissue
):
    module = "histoseek.serving.encoders.engine_choice"
    small = OnnxEncoder(DEFAULT_BUNDLE)
    assert small.describe()["threads"] == 1
    monkeypatch.setattr(f"{module}.LARGE", 0)
    monkeypatch.setattr(f"{module}.cores", lambda: cores)
    large = OnnxEncoder(DEFAULT_BUNDLE)
    assert (large.parallel, large.describe()["threads"]) == (streams, threads)
    few = OnnxEncoder(DEFAULT_BUNDLE, streams=1)  # as a task on a cluster has it
    assert (few.parallel, few.describe()["threads"]) == (1, 1)
    tiles = tiles_of(tissue, 3)
    np.testing.assert_allclose(large.embed(tiles), small.embed(tiles), atol=1e-5)


def test_a_gpu_that_cannot_be_used_is_named(monkeypatch, capsys, tissue):
    """ONNX Runtime built for CUDA falls back to the CPU without an error."""
    import onnxruntime

    from histoseek.serving.encoders import engines

    class GpuBuild:
        loaded = 0

        def get_available_providers(self):
            return [engines.CUDA, engines.CPU]

        def InferenceSession(self, path, options, providers):
            assert providers == [engines.CUDA, engines.CPU]
            return onnxruntime.InferenceSession(path, options, providers=[engines.CPU])

        def preload_dlls(self):
            print("Failed to load libcudnn.so.9")
            GpuBuild.loaded += 1

        def __getattr__(self, name):
            return getattr(onnxruntime, name)

    build = GpuBuild()
    monkeypatch.setattr(engines, "need", lambda module, extra: build)
    opened = OnnxEncoder(DEFAULT_BUNDLE, engine="auto", batch=4)
    about = opened.describe()
    assert about["device"] == "cpu" and "could not use it" in about["notes"][0]
    assert GpuBuild.loaded == 1 and capsys.readouterr().out == ""
    assert opened.embed(tiles_of(tissue, 2)).shape == (2, opened.manifest.dim)
    monkeypatch.undo()
    assert OnnxEncoder(DEFAULT_BUNDLE, engine="auto", batch=4).describe()["notes"] == []
