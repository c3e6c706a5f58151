"""Write Triton model repositories: folders with encoder bundles that NVIDIA's server loads unmodified.

``<name>/config.pbtxt`` runs the graph on ONNX Runtime (on a GPU if there is one, else on the CPU).
``<name>/configs/tensorrt.pbtxt`` (``--model-config-name=tensorrt``) runs it through TensorRT.
``<name>-fp16`` computes in half precision but also returns float32 embeddings. The model's parameters
contain the encoder's manifest and the embedding of a known image, so that a client can check both.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..artifacts import manifest as keys
from ..artifacts.files import publish_folder, read_json, write_atomic, write_json
from ..artifacts.manifest import GRAPH, INPUT, OUTPUT, Manifest, probe_tile, read_manifest
from ..artifacts.onnx_files import LARGE, data_file
from ..artifacts.tilesets import TileSet, sample_tiles
from ..errors import BadInput, Mismatch, need
from ..metrics import cosine_error
from .options import TritonOptions

MODEL = "model.onnx"
CONFIG = "config.pbtxt"
TENSORRT = "configs/tensorrt.pbtxt"
ABOUT = "histoseek.json"
MAX_FP16_COSINE = 1e-3
KEPT_VERSIONS = 2


@dataclass(frozen=True)
class Written:
    """One model in the repository.

    Attributes:
        model: name of the model on the server.
        version: version that was written or renewed.
        encoder: name of the bundle's encoder.
        sha256: SHA-256 of the bundle's graph.
        precision: ``fp32`` or ``fp16``.
        cosine_error: largest 1 - cosine to the bundle's embeddings, measured on the CPU; 0 for ``fp32``,
            the unchanged graph.
    """

    model: str
    version: int
    encoder: str
    sha256: str
    precision: str
    cosine_error: float = 0.0


def write_repository(
    bundles: list[Path], out: Path, options: TritonOptions, tiles: TileSet | None = None
) -> list[Written]:
    """Write or extend a model repository.

    If the repository has the model already, a changed graph becomes a new version; an unchanged one gets
    only a new configuration.

    Args:
        bundles: encoder bundles.
        out: folder of the repository.
        options: options of the models on the server.
        tiles: real tiles for the parity test of ``fp16``; None uses synthetic ones.

    Raises:
        BadInput: two models have the same name, or a bundle does not exist.
        Mismatch: half precision differs too much from the bundle, and that model is not written; or the
            repository's model has another tile size or embedding length.
    """
    manifests = [read_manifest(bundle) for bundle in bundles]
    names = [manifest.name for manifest in manifests]
    names += [f"{name}-fp16" for name in names if options.fp16]
    for name in names:
        if names.count(name) > 1:
            raise BadInput(
                f"two models would have the name {name!r}; export one bundle with another --name"
            )
    written = []
    for bundle, manifest in zip(bundles, manifests, strict=True):
        probes = _probes(manifest, tiles)
        embeddings = _run(str(bundle / GRAPH), probes)
        written.append(
            _write_model(out, manifest.name, manifest, bundle / GRAPH, embeddings, options)
        )
        if options.fp16:
            from .half_precision import to_fp16

            name = f"{manifest.name}-fp16"
            with tempfile.TemporaryDirectory(dir=out.parent) as place:
                half = Path(place) / MODEL
                to_fp16(bundle / GRAPH, half)
                halved = _run(str(half), probes)
                error = cosine_error(embeddings, halved)
                if not error <= MAX_FP16_COSINE:
                    raise Mismatch(
                        f"{manifest.name} in half precision differs from the bundle: 1 - cosine is "
                        f"{error:.1e}, expected at most {MAX_FP16_COSINE:.0e}; serve it without --fp16"
                    )
                written.append(
                    _write_model(out, name, manifest, half, halved, options, "fp16", error)
                )
    return written


def _probes(manifest: Manifest, tiles: TileSet | None) -> NDArray[np.uint8]:
    probe = probe_tile(manifest.size_px)
    if tiles is not None:
        return np.concatenate([probe[None], sample_tiles(tiles, manifest.size_px)])
    return np.stack([np.roll(probe, 17 * n, n % 2) for n in range(16)])


def _run(model: str, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    onnxruntime = need("onnxruntime", "cpu")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    parts = [session.run([OUTPUT], {INPUT: tile[None]})[0] for tile in tiles]
    return np.concatenate(parts)


def _write_model(
    out: Path,
    name: str,
    manifest: Manifest,
    graph: Path,
    embeddings: NDArray[np.float32],
    options: TritonOptions,
    precision: str = "fp32",
    error: float = 0.0,
) -> Written:
    folder = out / name
    versions = _versions(folder)
    for about in versions.values():
        _check_shape(folder, about["manifest"], manifest)
    version = max(versions, default=0)
    blob, data = graph.read_bytes(), data_file(graph)
    if not version or (folder / str(version) / MODEL).read_bytes() != blob:
        version += 1
        about = {
            "manifest": manifest.model_dump(),
            "precision": precision,
            "probe": base64.b64encode(embeddings[0].astype("<f4").tobytes()).decode(),
        }
        with publish_folder(folder / str(version)) as new:
            (new / MODEL).write_bytes(blob)
            if data is not None:
                shutil.copyfile(data, new / data.name)
            write_json(new / ABOUT, about)
        versions[version] = about
    size = _Size.of(options, len(blob) + (data.stat().st_size if data is not None else 0))
    text = config(name, manifest, _parameters(versions, size), options, size)
    write_atomic(folder / TENSORRT, text + _tensorrt(name, manifest, size))
    write_atomic(folder / CONFIG, text)  # last: from now on the server can load the model
    return Written(name, version, manifest.name, manifest.sha256, precision, error)


class _Size(NamedTuple):
    """Settings of a model that depend on its size.

    Attributes:
        max_batch: maximum number of tiles per batch.
        instances: copies of the model.
        threads: of each run on a CPU; 0: all cores.
        timeout_s: how long a request waits in the queue.
    """

    max_batch: int
    instances: int
    threads: int
    timeout_s: int

    @classmethod
    def of(cls, options: TritonOptions, size: int) -> _Size:
        """Return the settings of a graph of this many bytes; options that are given stay."""
        usual = cls(16, 1, 0, 300) if size >= LARGE else cls(64, 2, 1, 30)
        return usual._replace(
            max_batch=options.max_batch or usual.max_batch,
            instances=options.instances or usual.instances,
        )


def _versions(folder: Path) -> dict[int, dict[str, Any]]:
    """Return the record of each version of a model that is in its folder."""
    versions = {}
    for path in sorted(p for p in folder.glob("[0-9]*") if p.name.isdigit()):
        if not (path / ABOUT).is_file():
            raise BadInput(f"{path} was not written by histoseek; choose another --out")
        versions[int(path.name)] = read_json(path / ABOUT)
    return versions


def _check_shape(folder: Path, before: dict[str, Any], now: Manifest) -> None:
    old = before["size_px"], before["dim"]
    if old != (now.size_px, now.dim):
        raise Mismatch(
            f"the model in {folder} embeds tiles of {old[0]} px in {old[1]} dimensions, but encoder "
            f"{now.name} takes {now.size_px} px and has {now.dim} dimensions; all versions of a model must "
            "agree: choose another --out, or export the encoder with another --name"
        )


def _parameters(versions: dict[int, dict[str, Any]], size: _Size) -> dict[str, str]:
    parameters = {keys.TRITON_SHA256: versions[max(versions)]["manifest"]["sha256"]}
    for version, about in versions.items():
        values = {
            keys.TRITON_SHA256: about["manifest"]["sha256"],
            keys.TRITON_PRECISION: about["precision"],
            keys.TRITON_MANIFEST: json.dumps(about["manifest"], ensure_ascii=False),
            keys.TRITON_PROBE: about["probe"],
        }
        parameters |= {f"{key}.{version}": value for key, value in values.items()}
    # "1" is cuDNN's heuristic search; the default tries every algorithm at each new batch size.
    return {**parameters, "cudnn_conv_algo_search": "1", "intra_op_thread_count": str(size.threads)}


def config(
    name: str,
    manifest: Manifest,
    parameters: dict[str, str],
    options: TritonOptions,
    size: _Size,
) -> str:
    """Return the text of a model's ``config.pbtxt``."""
    dims = f"dims: [ {manifest.size_px}, {manifest.size_px}, 3 ]"
    lines = [
        "# Written by `histoseek triton repository`; write it again instead of editing it.",
        f'name: "{name}"',
        'backend: "onnxruntime"',
        f"max_batch_size: {size.max_batch}",
        f'input [ {{ name: "{INPUT}" data_type: TYPE_UINT8 {dims} }} ]',
        f'output [ {{ name: "{OUTPUT}" data_type: TYPE_FP32 dims: [ {manifest.dim} ] }} ]',
        f"version_policy {{ latest {{ num_versions: {KEPT_VERSIONS} }} }}",
        f"instance_group [ {{ count: {size.instances} }} ]",
        "dynamic_batching {",
        f"  max_queue_delay_microseconds: {options.delay_us}",
        "  default_queue_policy {",
        f"    max_queue_size: {options.queue}",
        "    timeout_action: REJECT",
        f"    default_timeout_microseconds: {size.timeout_s * 10**6}",
        "    allow_timeout_override: true",
        "  }",
        "}",
    ]
    for batch in sorted({1, size.max_batch}):
        lines.append(
            f'model_warmup [ {{ name: "batch{batch}" batch_size: {batch} count: 1 inputs {{ key: '
            f'"{INPUT}" value {{ data_type: TYPE_UINT8 {dims} random_data: true }} }} }} ]'
        )
    for key, value in parameters.items():
        lines.append(f'parameters {{ key: "{key}" value: {{ string_value: "{_escape(value)}" }} }}')
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    for sign, escaped in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\r", "\\r")):
        text = text.replace(sign, escaped)
    return text


def _tensorrt(name: str, manifest: Manifest, settings: _Size) -> str:
    """Return the lines that the TensorRT variant adds; its engines are cached on the volume ``/cache``.

    They set no precision: TensorRT 11 takes it from the graph's types, so ``<name>-fp16`` is the
    half-precision variant here too.
    """
    size = manifest.size_px

    def shape(batch: int) -> str:
        return f"{INPUT}:{batch}x{size}x{size}x3"

    parameters = {
        "max_workspace_size_bytes": str(2 * 2**30),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": f"/cache/{name}",
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": f"/cache/{name}",
        "trt_profile_min_shapes": shape(1),
        "trt_profile_opt_shapes": shape(max(1, settings.max_batch // 2)),
        "trt_profile_max_shapes": shape(settings.max_batch),
    }
    lines = [f'  parameters {{ key: "{k}" value: "{v}" }}' for k, v in parameters.items()]
    head = (
        'optimization { execution_accelerators { gpu_execution_accelerator : [ { name: "tensorrt"'
    )
    return "\n".join([head, *lines, "} ] } }"]) + "\n"
