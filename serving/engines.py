"""Engines that run an encoder's graph in this process: ONNX Runtime and OpenVINO.

A small network is fastest where its activations stay in a core's cache: one stream per core, each with
a small batch. Which engine and batch are best differs by machine and network, so it is measured once
(about two seconds), and remembered.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Barrier
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from ..errors import BadInput, Damaged, HistoseekError, MissingPart, unknown_name
from ..files import read_json, write_json
from ..manifest import GRAPH, INPUT, OUTPUT, Manifest

EngineName = Literal["onnxruntime", "openvino"]
Precision = Literal["f32", "bf16"]
GPU_BATCH = 64
GPU_STREAMS = 2
MARGIN = 1.05
"""OpenVINO must be this much faster than ONNX Runtime to be preferred."""

_TRIAL_S = 0.15
_BUDGET_S = 6.0
_CACHE = "HISTOSEEK_CACHE"


@dataclass(frozen=True)
class Plan:
    """How a graph is run.

    Attributes:
        engine: ``onnxruntime`` or ``openvino``.
        precision: ``f32``, or ``bf16`` (OpenVINO on CPUs that have it).
        batch: tiles per run of the graph.
        streams: runs side by side.
    """

    engine: EngineName = "onnxruntime"
    precision: Precision = "f32"
    batch: int = 4
    streams: int = 1


class Engine(Protocol):
    """A loaded graph; ``run`` may be called from as many threads as there are streams."""

    offloads: bool
    plan: Plan

    def run(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 (N, S, S, 3) -> float32 (N, D), N at most the plan's batch."""
        ...


def cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _onnxruntime() -> Any:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before the import: its wheels may report home
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingPart(
            "embedding needs ONNX Runtime: pip install 'histoseek[cpu]' (or [gpu])"
        ) from error
    return onnxruntime


def _openvino() -> Any:
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # never loaded
    try:
        import openvino
    except ImportError as error:
        raise MissingPart(
            "--engine openvino needs OpenVINO: pip install 'histoseek[openvino]'"
        ) from error
    return openvino


class OnnxRuntimeEngine:
    """ONNX Runtime: one session; on a CPU every run stays on the thread that calls it."""

    def __init__(self, bundle: Path, manifest: Manifest, plan: Plan) -> None:
        """Load the graph.

        Raises:
            Damaged: the graph cannot be loaded, or does not keep the manifest's contract.
            MissingPart: ONNX Runtime is not installed.
        """
        runtime = _onnxruntime()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
        usable = [p for p in wanted if p in runtime.get_available_providers()]
        try:
            self._session = runtime.InferenceSession(str(bundle / GRAPH), options, providers=usable)
        except Exception as error:
            raise Damaged(f"{bundle / GRAPH} cannot be loaded by ONNX Runtime: {error}") from error
        self.plan = plan
        self.offloads = "CUDAExecutionProvider" in self.providers
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
                f"{bundle / GRAPH} has {inputs} -> {outputs}; its manifest promises {INPUT} uint8 "
                f"[N, {size}, {size}, 3] -> {OUTPUT} float [N, {manifest.dim}]: export it again"
            )

    def run(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See :class:`Engine`."""
        return np.asarray(self._session.run([OUTPUT], {INPUT: np.ascontiguousarray(tiles)})[0])


class OpenVinoEngine:
    """OpenVINO on the CPU: a graph of fixed shape, one request per stream."""

    offloads = False

    def __init__(self, bundle: Path, manifest: Manifest, plan: Plan) -> None:
        """Compile the graph for the plan's batch.

        Raises:
            Damaged: OpenVINO cannot compile it.
            MissingPart: OpenVINO is not installed.
        """
        openvino = _openvino()
        core = openvino.Core()
        size = manifest.size_px
        settings = {
            "INFERENCE_PRECISION_HINT": plan.precision,
            "NUM_STREAMS": str(plan.streams),
            "INFERENCE_NUM_THREADS": str(plan.streams),
            "ENABLE_CPU_PINNING": "NO",  # a pinned stream waits while its core decodes tiles
        }
        try:
            model = core.read_model(bundle / GRAPH)
            model.reshape({INPUT: [plan.batch, size, size, 3]})
            _scale_before_turning(openvino, model)
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
        """See :class:`Engine`; a short batch is filled up, and the filling's embeddings dropped."""
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


def _scale_before_turning(openvino: Any, model: Any) -> None:
    """Move the turn to channels-first behind the scaling of pixels: then OpenVINO need not turn at all.

    Its convolutions keep channels last, so that it would turn the picture back right away. The graph
    computes the same; one that is built otherwise is left as it is.
    """
    from openvino import opset13 as ops

    for turn in model.get_ordered_ops():
        if turn.get_type_name() != "Transpose" or _constant(turn, 1) != [0, 3, 1, 2]:
            continue
        made, last = turn.input_value(0), turn
        while True:
            users = list(last.output(0).get_target_inputs())
            node = users[0].get_node() if len(users) == 1 else None
            kind = node.get_type_name() if node is not None else ""
            if node is not None and kind == "Convert":
                made = ops.convert(made, node.get_element_type().to_dtype()).output(0)
            elif node is not None and kind in {"Multiply", "Add"}:
                side = 1 - users[0].get_index()
                value = _channels(node, side, 3)
                if value is None:
                    break
                made = getattr(ops, kind.lower())(made, value).output(0)
            else:
                break
            last = node
        if last is not turn:
            order = ops.constant([0, 3, 1, 2], dtype=np.int64)
            last.output(0).replace(ops.transpose(made, order).output(0))
    model.validate_nodes_and_infer_types()


def _constant(node: Any, side: int) -> list[int] | None:
    source = node.input_value(side).get_node()
    return list(source.data.ravel()) if source.get_type_name() == "Constant" else None


def _channels(node: Any, side: int, count: int) -> NDArray[np.float32] | None:
    """Return a constant of one value per channel, (count,), if that is what a node takes."""
    source = node.input_value(side).get_node()
    if source.get_type_name() != "Constant" or list(source.shape)[-3:] != [count, 1, 1]:
        return None
    return np.asarray(source.data, dtype=np.float32).reshape(count)


ENGINES: dict[str, Any] = {"onnxruntime": OnnxRuntimeEngine, "openvino": OpenVinoEngine}


def open_engine(
    bundle: Path,
    manifest: Manifest,
    engine: str = "onnxruntime",
    precision: str = "f32",
    batch: int | None = None,
    streams: int | None = None,
) -> Engine:
    """Load a bundle's graph.

    Args:
        bundle: the folder.
        manifest: of the bundle.
        engine: ``onnxruntime``, ``openvino``, or ``auto`` for what is measured to be faster.
        precision: ``f32`` or ``bf16``; bf16 is OpenVINO's.
        batch: tiles per run; measured when left out and ``engine`` is ``auto``.
        streams: runs side by side; one per core when left out.

    Raises:
        BadInput: an unknown engine or precision, or one that this machine or engine lacks.
    """
    if engine not in {*ENGINES, "auto"}:
        raise unknown_name("engine", engine, [*ENGINES, "auto"])
    if precision not in get_args(Precision):
        raise unknown_name("precision", precision, get_args(Precision))
    side = streams or cores()
    if precision == "bf16":
        if engine == "onnxruntime":
            raise BadInput("--precision bf16 needs --engine openvino (or auto)")
        _check_bf16()
        engine = "openvino" if engine == "auto" and batch else engine
    cuda = "CUDAExecutionProvider" in _onnxruntime().get_available_providers()
    if cuda and precision == "f32" and engine != "openvino":
        loaded = OnnxRuntimeEngine(
            bundle, manifest, Plan(batch=batch or GPU_BATCH, streams=streams or GPU_STREAMS)
        )
        if loaded.offloads:
            return loaded
    if engine == "auto" and batch is None:
        plan = _remembered_plan(bundle, manifest, precision, side)
    else:
        name = "onnxruntime" if engine == "auto" else engine
        plan = Plan(name, precision, batch or Plan.batch, side)  # type: ignore[arg-type]
    made: Engine = ENGINES[plan.engine](bundle, manifest, plan)
    return made


def _check_bf16() -> None:
    able = _openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if "BF16" not in able:
        raise BadInput(
            f"--precision bf16: this CPU does not compute in bf16 (it has {', '.join(able)}); use f32"
        )


def _candidates(precision: str, streams: int) -> list[Plan]:
    plans = []
    if precision == "f32":
        plans += [Plan("onnxruntime", "f32", batch, streams) for batch in (1, 2, 4, 8)]
    try:
        _openvino()
    except MissingPart:
        if precision != "f32":
            raise
    else:
        plans += [Plan("openvino", precision, batch, streams) for batch in (1, 2, 4)]  # type: ignore[arg-type]
    return plans


def _remembered_plan(bundle: Path, manifest: Manifest, precision: str, streams: int) -> Plan:
    """Return the fastest plan on this machine, measured now or before."""
    key = _machine_key(manifest, precision, streams)
    path = cache_folder() / "engines.json"
    try:
        known = read_json(path)
        return Plan(**known[key]["plan"])
    except (HistoseekError, KeyError, TypeError):
        known = {}
    rates = measure(bundle, manifest, _candidates(precision, streams))
    plan = fastest(rates)
    try:
        before = read_json(path) if path.is_file() else {}
        before = before if isinstance(before, dict) else {}
        measured = [{**asdict(p), "tiles_per_s": round(rate, 1)} for p, rate in rates]
        write_json(path, {**before, key: {"plan": asdict(plan), "measured": measured}})
    except HistoseekError:
        pass  # it is measured again next time
    return plan


def fastest(rates: Sequence[tuple[Plan, float]]) -> Plan:
    """Return the fastest plan; ONNX Runtime where OpenVINO is not clearly faster."""

    def worth(item: tuple[Plan, float]) -> float:
        return item[1] / (MARGIN if item[0].engine == "openvino" else 1.0)

    return max(rates, key=worth)[0]


def measure(
    bundle: Path, manifest: Manifest, plans: Sequence[Plan], trial_s: float = _TRIAL_S
) -> list[tuple[Plan, float]]:
    """Return tiles per second of each plan, all streams at work; stops after some seconds."""
    rng = np.random.default_rng(0)
    size = manifest.size_px
    started = time.perf_counter()
    found: list[tuple[Plan, float]] = []
    for plan in plans:
        if found and time.perf_counter() - started > _BUDGET_S:
            break
        tiles = rng.integers(0, 256, (plan.batch, size, size, 3), dtype=np.uint8)
        try:
            engine = ENGINES[plan.engine](bundle, manifest, plan)
        except Damaged:
            if plan.engine == "onnxruntime" or plan is plans[-1] and not found:
                raise
            continue  # an engine that cannot run this graph is none to choose
        found.append((plan, rate_of(engine, tiles, trial_s)))
    return found


def rate_of(engine: Engine, tiles: NDArray[np.uint8], seconds: float) -> float:
    """Return tiles per second with every stream of an engine at work for some time."""

    def work(_: int) -> float:
        engine.run(tiles)
        together.wait()
        done, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            engine.run(tiles)
            done += len(tiles)
        return done / (time.perf_counter() - started)

    streams = engine.plan.streams
    together = Barrier(streams)
    with ThreadPoolExecutor(streams) as pool:
        return sum(pool.map(work, range(streams)))


def cache_folder() -> Path:
    """Return where measurements of this machine are kept: ``$HISTOSEEK_CACHE``, else the user's cache."""
    if os.environ.get(_CACHE):
        return Path(os.environ[_CACHE])
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "histoseek"


def _machine_key(manifest: Manifest, precision: str, streams: int) -> str:
    parts = [manifest.sha256, precision, str(streams), platform.machine(), _cpu_name()]
    parts.append(f"onnxruntime {_onnxruntime().__version__}")
    try:
        parts.append(f"openvino {_openvino().__version__}")
    except MissingPart:
        parts.append("no openvino")
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:24]


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            return next(line.split(":", 1)[1].strip() for line in stream if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor()
