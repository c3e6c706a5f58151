"""Engines that run an encoder's graph in this process: ONNX Runtime and OpenVINO.

A small network is fastest if its activations stay in a core's cache: one stream per core, each with a
small batch. In a large network several cores share each run, so that one image alone is answered as fast as
the machine can. ``engine_choice`` chooses the engine, the batch and the streams.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ...artifacts.manifest import GRAPH, INPUT, OUTPUT, Manifest
from ...errors import Damaged, need

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
EngineName = Literal["onnxruntime", "openvino"]
Precision = Literal["f32", "bf16"]


@dataclass(frozen=True)
class EnginePlan:
    """How to run a graph: tiles per run (``batch``), parallel runs (``streams``), threads of each run."""

    engine: EngineName = "onnxruntime"
    precision: Precision = "f32"
    batch: int = 4
    streams: int = 1
    threads: int = 1


class Engine(Protocol):
    """A loaded graph; ``run`` may be called from as many threads as there are streams."""

    offloads: bool
    plan: EnginePlan

    def run(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embed uint8 (N, S, S, 3) -> float32 (N, D); N is at most the plan's batch."""
        ...


def cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_onnxruntime() -> Any:
    """Import ONNX Runtime with its telemetry off; with a GPU build, load the CUDA libraries of packages."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before the import: its wheels may send telemetry
    runtime = need("onnxruntime", "cpu")
    if CUDA in runtime.get_available_providers():
        _load_cuda(runtime)
    return runtime


@cache
def _load_cuda(runtime: Any) -> None:
    """Load the CUDA and cuDNN libraries of packages; the runtime itself finds only those of the system."""
    if hasattr(runtime, "preload_dlls"):
        with redirect_stdout(
            StringIO()
        ):  # it prints what it does not find, also if the system has it
            runtime.preload_dlls()


def load_openvino() -> Any:
    """Import OpenVINO without its telemetry."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # never loaded
    return need("openvino", "openvino")


class OnnxRuntimeEngine:
    """ONNX Runtime: one session; on a CPU a run with one thread stays on the thread that calls it."""

    def __init__(self, bundle: Path, manifest: Manifest, plan: EnginePlan) -> None:
        """Load the graph; raise Damaged if that fails or the graph does not match the manifest."""
        runtime = load_onnxruntime()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = plan.threads
        options.log_severity_level = 3
        usable = [p for p in (CUDA, CPU) if p in runtime.get_available_providers()]
        try:
            self._session = runtime.InferenceSession(str(bundle / GRAPH), options, providers=usable)
        except Exception as error:
            raise Damaged(f"{bundle / GRAPH} cannot be loaded by ONNX Runtime: {error}") from error
        self.plan = plan
        self.offloads = CUDA in self.providers
        self._check_contract(bundle, manifest)

    @property
    def providers(self) -> list[str]:
        """ONNX Runtime's execution providers in use, such as CUDAExecutionProvider."""
        return list(self._session.get_providers())

    def _check_contract(self, bundle: Path, manifest: Manifest) -> None:
        size = manifest.size_px
        inputs = {i.name: (i.type, i.shape[1:]) for i in self._session.get_inputs()}
        outputs = {o.name: (o.type, o.shape[1:]) for o in self._session.get_outputs()}
        if inputs != {INPUT: ("tensor(uint8)", [size, size, 3])} or outputs != {
            OUTPUT: ("tensor(float)", [manifest.dim])
        }:
            raise Damaged(
                f"{bundle / GRAPH} has {inputs} -> {outputs}; its manifest states {INPUT} uint8 "
                f"[N, {size}, {size}, 3] -> {OUTPUT} float [N, {manifest.dim}]: export it again"
            )

    def run(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See :class:`Engine`."""
        return np.asarray(self._session.run([OUTPUT], {INPUT: np.ascontiguousarray(tiles)})[0])


class OpenVinoEngine:
    """OpenVINO on the CPU: a graph of fixed shape, one request per stream."""

    offloads = False

    def __init__(self, bundle: Path, manifest: Manifest, plan: EnginePlan) -> None:
        """Compile the graph for the plan's batch; raise Damaged if OpenVINO cannot."""
        openvino = load_openvino()
        core = openvino.Core()
        size = manifest.size_px
        settings = {
            "INFERENCE_PRECISION_HINT": plan.precision,
            "NUM_STREAMS": str(plan.streams),
            "INFERENCE_NUM_THREADS": str(plan.streams * plan.threads),
            "ENABLE_CPU_PINNING": "NO",  # a pinned stream would wait while its core decodes tiles
        }
        try:
            model = core.read_model(bundle / GRAPH)
            model.reshape({INPUT: [plan.batch, size, size, 3]})
            _scale_before_transpose(openvino, model)
            compiled = core.compile_model(model, "CPU", settings)
        except Exception as error:
            raise Damaged(
                f"{bundle / GRAPH} cannot be compiled by OpenVINO: {error}; use --engine onnxruntime"
            ) from error
        self.plan = plan
        self._requests: SimpleQueue[Any] = SimpleQueue()
        for _ in range(plan.streams):
            self._requests.put(compiled.create_infer_request())

    def run(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See :class:`Engine`; a short batch is padded, and the padding's embeddings are dropped."""
        count = len(tiles)
        if count < self.plan.batch:
            full = np.zeros((self.plan.batch, *tiles.shape[1:]), dtype=np.uint8)
            full[:count] = tiles
            tiles = full
        request = self._requests.get()
        try:
            request.infer({INPUT: np.ascontiguousarray(tiles)}, share_inputs=True)
            return np.array(request.get_output_tensor(0).data[:count], dtype=np.float32)
        finally:
            self._requests.put(request)


def _scale_before_transpose(openvino: Any, model: Any) -> None:
    """Move the transpose to channels-first behind the scaling of pixels, so that OpenVINO can drop it.

    OpenVINO's convolutions use channels last, so it would transpose the image back at once. The result
    is the same; a graph with another structure is left unchanged.
    """
    from openvino import opset13 as ops

    for transpose in model.get_ordered_ops():
        if transpose.get_type_name() != "Transpose" or _constant(transpose, 1) != [0, 3, 1, 2]:
            continue
        scaled, last = transpose.input_value(0), transpose
        while True:
            users = list(last.output(0).get_target_inputs())
            node = users[0].get_node() if len(users) == 1 else None
            kind = node.get_type_name() if node is not None else ""
            if node is not None and kind == "Convert":
                scaled = ops.convert(scaled, node.get_element_type().to_dtype()).output(0)
            elif node is not None and kind in {"Multiply", "Add"}:
                value = _channels(node, 1 - users[0].get_index(), 3)
                if value is None:
                    break
                scaled = getattr(ops, kind.lower())(scaled, value).output(0)
            else:
                break
            last = node
        if last is not transpose:
            order = ops.constant([0, 3, 1, 2], dtype=np.int64)
            last.output(0).replace(ops.transpose(scaled, order).output(0))
    model.validate_nodes_and_infer_types()


def _constant(node: Any, side: int) -> list[int] | None:
    source = node.input_value(side).get_node()
    return list(source.data.ravel()) if source.get_type_name() == "Constant" else None


def _channels(node: Any, side: int, count: int) -> NDArray[np.float32] | None:
    """Return a node's constant input with one value per channel, (count,); None if it has none."""
    source = node.input_value(side).get_node()
    if source.get_type_name() != "Constant" or list(source.shape)[-3:] != [count, 1, 1]:
        return None
    return np.asarray(source.data, dtype=np.float32).reshape(count)


ENGINES: dict[str, Callable[[Path, Manifest, EnginePlan], Engine]] = {
    "onnxruntime": OnnxRuntimeEngine,
    "openvino": OpenVinoEngine,
}
