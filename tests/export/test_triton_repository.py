"""Model repositories: Triton's protobuf parses the configuration, and the real server loads them."""

import json
import shutil

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from histoseek.artifacts.manifest import read_manifest
from histoseek.artifacts.tileset_files import open_tiles
from histoseek.artifacts.tilesets import sample_tiles
from histoseek.errors import BadInput, Mismatch
from histoseek.export.options import TritonOptions
from histoseek.export.triton import write_repository
from histoseek.serving.encoders.onnx import OnnxEncoder
from histoseek.serving.encoders.open import DEFAULT_BUNDLE, open_encoder


def parse(path):
    return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())


@pytest.fixture(scope="module")
def repository(tmp_path_factory, tile_folder):
    folder = tmp_path_factory.mktemp("repository") / "models"
    options = TritonOptions(max_batch=8, fp16=True)
    return folder, write_repository([DEFAULT_BUNDLE], folder, options, open_tiles(tile_folder))


def test_the_configuration_is_one_for_production(repository):
    folder, written = repository
    manifest = read_manifest(DEFAULT_BUNDLE)
    assert [w.model for w in written] == [manifest.name, f"{manifest.name}-fp16"]
    for name in (w.model for w in written):
        config = parse(folder / name / "config.pbtxt")
        assert (config.name, config.backend, config.max_batch_size) == (name, "onnxruntime", 8)
        (given,), (made,) = config.input, config.output
        assert (given.name, given.data_type, list(given.dims)) == (
            "tiles", model_config_pb2.TYPE_UINT8, [224, 224, 3],
        )  # fmt: skip
        assert (made.name, made.data_type, list(made.dims)) == (
            "embedding", model_config_pb2.TYPE_FP32, [manifest.dim],
        )  # fmt: skip
        queue = config.dynamic_batching.default_queue_policy
        assert config.dynamic_batching.max_queue_delay_microseconds == 1000
        assert queue.max_queue_size == 256 and queue.timeout_action == queue.REJECT
        (group,) = config.instance_group
        assert (group.kind, group.count) == (group.KIND_AUTO, 2)
        assert sorted(w.batch_size for w in config.model_warmup) == [1, 8]
        assert config.parameters["encoder_sha256"].string_value == manifest.sha256
        stated = json.loads(config.parameters["histoseek_manifest.1"].string_value)
        assert stated == manifest.model_dump()
        assert not config.optimization.graph.level  # leaving it out is the highest


def test_the_tensorrt_variant_adds_engines_with_caches_and_profiles(repository):
    folder, written = repository
    for name in (w.model for w in written):
        plain, trt = (parse(folder / name / f) for f in ("config.pbtxt", "configs/tensorrt.pbtxt"))
        (engine,) = trt.optimization.execution_accelerators.gpu_execution_accelerator
        assert engine.name == "tensorrt"
        assert engine.parameters["trt_engine_cache_path"] == f"/cache/{name}"
        assert engine.parameters["trt_profile_max_shapes"] == "tiles:8x224x224x3"
        trt.ClearField("optimization")
        assert trt == plain


def test_half_precision_halves_the_weights_and_keeps_the_door(repository, tile_folder):
    folder, (full, half) = repository
    assert full.cosine_error == 0 and 0 < half.cosine_error < 1e-4
    paths = [folder / w.model / "1/model.onnx" for w in (full, half)]
    assert paths[1].stat().st_size < 0.6 * paths[0].stat().st_size
    graph = onnx.load(paths[1]).graph
    kinds = [graph.input[0].type, graph.output[0].type]
    assert [k.tensor_type.elem_type for k in kinds] == [
        onnx.TensorProto.UINT8,
        onnx.TensorProto.FLOAT,
    ]
    halves = [w for w in graph.initializer if w.data_type == onnx.TensorProto.FLOAT16]
    assert len(halves) > 20


def test_the_real_server_gives_the_bundles_embeddings(repository, triton, tile_folder):
    folder, written = repository
    tiles = sample_tiles(open_tiles(tile_folder), 224, 12)
    expected = OnnxEncoder(DEFAULT_BUNDLE, batch=4).embed(tiles)
    server = triton(folder)
    for model, bound in ((written[0].model, 1e-6), (written[1].model, 5e-3)):
        encoder = open_encoder(server.url(model), read_manifest(DEFAULT_BUNDLE))
        assert np.abs(encoder.embed(tiles) - expected).max() <= bound
        encoder.close()
    plain = [line for line in server.log.splitlines() if " E" in line[:2]]
    assert not plain, plain


def test_writing_again_changes_nothing_and_a_new_encoder_adds_a_version(
    tmp_path, triton, tile_folder
):
    bundle = tmp_path / "bundle"
    shutil.copytree(DEFAULT_BUNDLE, bundle)
    options = TritonOptions(max_batch=4)
    for _ in range(2):
        (written,) = write_repository([bundle], tmp_path / "models", options)
        assert written.version == 1
    model = onnx.load(bundle / "encoder.onnx")
    weight = max(model.graph.initializer, key=lambda w: len(w.raw_data))
    values = onnx.numpy_helper.to_array(weight)
    changed = onnx.numpy_helper.from_array((values * 0.5).astype(np.float32), weight.name)
    weight.CopyFrom(changed)
    onnx.save(model, bundle / "encoder.onnx")
    from histoseek.artifacts.files import sha256_file

    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["sha256"] = sha256_file(bundle / "encoder.onnx")
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    (written,) = write_repository([bundle], tmp_path / "models", options)
    assert written.version == 2
    server = triton(tmp_path / "models")
    tiles = sample_tiles(open_tiles(tile_folder), 224, 3)
    for spec, source in (("@1", DEFAULT_BUNDLE), ("@2", bundle), ("", bundle)):
        encoder = open_encoder(server.url(manifest["name"], spec), read_manifest(source))
        assert encoder.version == ("1" if spec == "@1" else "2")
        difference = np.abs(encoder.embed(tiles) - OnnxEncoder(source).embed(tiles)).max()
        assert difference <= 1e-6
        encoder.close()


def test_what_cannot_be_served_together_is_refused(tmp_path, other_bundle):
    with pytest.raises(BadInput, match="two models would have the name"):
        write_repository([DEFAULT_BUNDLE, DEFAULT_BUNDLE], tmp_path / "m", TritonOptions())
    write_repository([other_bundle], tmp_path / "m", TritonOptions())
    name = read_manifest(other_bundle).name
    other = tmp_path / "same-name"
    shutil.copytree(DEFAULT_BUNDLE, other)
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "name": name}))
    with pytest.raises(Mismatch, match="versions of a model must agree"):
        write_repository([other], tmp_path / "m", TritonOptions())
    with pytest.raises(BadInput, match="--max-batch is 0"):
        TritonOptions(max_batch=0)
    (tmp_path / "foreign" / name / "1").mkdir(parents=True)
    with pytest.raises(BadInput, match="not written by histoseek"):
        write_repository([other_bundle], tmp_path / "foreign", TritonOptions())


def test_the_command_writes_and_tells(cli_json, tmp_path):
    found = cli_json("triton", "repository", "default", "--out", tmp_path / "m", "--fp16")
    assert [m["precision"] for m in found["models"]] == ["fp32", "fp16"]
    assert all(m["version"] == 1 for m in found["models"])
