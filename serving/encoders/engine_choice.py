"""Chooses the engine and its settings for a graph on this machine: given, measured, or cached."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from threading import Barrier
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from ...artifacts.files import cache_folder, read_json, write_json
from ...artifacts.manifest import GRAPH, Manifest
from ...artifacts.onnx_files import LARGE, graph_bytes
from ...errors import BadInput, Damaged, HistoseekError, MissingPart, unknown_name
from .engines import (
    CUDA,
    ENGINES,
    Engine,
    EnginePlan,
    OnnxRuntimeEngine,
    Precision,
    cores,
    load_onnxruntime,
    load_openvino,
)

GPU_BATCH = 64
GPU_STREAMS = 2
MARGIN = 1.05
"""OpenVINO must be this many times as fast as ONNX Runtime to be chosen."""

SHARED = 8
"""Maximum number of cores that share a run; more gain little."""

_TRIAL_S = 0.15
_BUDGET_S = 6.0


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
        manifest: the bundle's manifest.
        engine: ``onnxruntime``, ``openvino``, or ``auto`` for the one measured to be faster.
        precision: ``f32`` or ``bf16``; only OpenVINO supports bf16.
        batch: tiles per run; measured when None and ``engine`` is ``auto``.
        streams: parallel runs; one per core when None.

    Raises:
        BadInput: the engine or precision is unknown, or this machine or engine does not support it.
    """
    if engine not in {*ENGINES, "auto"}:
        raise unknown_name("engine", engine, [*ENGINES, "auto"])
    if precision not in get_args(Precision):
        raise unknown_name("precision", precision, get_args(Precision))
    side, threads = streams_of(bundle, streams)
    if precision == "bf16":
        if engine == "onnxruntime":
            raise BadInput("--precision bf16 needs --engine openvino (or auto)")
        _check_bf16()
        engine = "openvino" if engine == "auto" and batch else engine
    if offers_cuda() and precision == "f32" and engine != "openvino":
        loaded = OnnxRuntimeEngine(
            bundle, manifest, EnginePlan(batch=batch or GPU_BATCH, streams=streams or GPU_STREAMS)
        )
        if loaded.offloads:
            return loaded
    if engine == "auto" and batch is None:
        plan = _remembered_plan(bundle, manifest, precision, side, threads)
    else:
        name = "onnxruntime" if engine == "auto" else engine
        plan = EnginePlan(name, precision, batch or EnginePlan.batch, side, threads)  # type: ignore[arg-type]
    return ENGINES[plan.engine](bundle, manifest, plan)


def offers_cuda() -> bool:
    """Return whether the installed ONNX Runtime was built for CUDA; it may still not be able to use it."""
    return CUDA in load_onnxruntime().get_available_providers()


def streams_of(bundle: Path, streams: int | None = None) -> tuple[int, int]:
    """Return the number of parallel runs of a bundle's graph on this CPU, and the threads of each.

    Args:
        bundle: the folder.
        streams: cores to use, one per run of a small graph; all when None.
    """
    budget = streams or cores()
    if graph_bytes(bundle / GRAPH) < LARGE:
        return budget, 1
    side = -(-budget // SHARED)
    return side, max(1, budget // side)


def _check_bf16() -> None:
    supported = load_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if "BF16" not in supported:
        raise BadInput(
            f"--precision bf16: this CPU does not support bf16 (it supports {', '.join(supported)}); use "
            "--precision f32"
        )


def _candidates(precision: str, streams: int, threads: int) -> list[EnginePlan]:
    onnxruntime = [
        EnginePlan("onnxruntime", "f32", batch, streams, threads) for batch in (1, 2, 4, 8)
    ]
    try:
        load_openvino()
    except MissingPart:
        if precision != "f32":
            raise
        return onnxruntime
    openvino = [
        EnginePlan("openvino", precision, batch, streams, threads)  # type: ignore[arg-type]
        for batch in (1, 2, 4)
    ]
    return [*onnxruntime, *openvino] if precision == "f32" else openvino


def _remembered_plan(
    bundle: Path, manifest: Manifest, precision: str, streams: int, threads: int
) -> EnginePlan:
    """Return the fastest plan on this machine, from the cache or measured now."""
    key = _machine_key(manifest, precision, streams, threads)
    path = cache_folder() / "engines.json"
    try:
        return EnginePlan(**read_json(path)[key]["plan"])
    except (HistoseekError, KeyError, TypeError):
        pass  # not measured yet
    rates = measure(bundle, manifest, _candidates(precision, streams, threads))
    plan = fastest(rates)
    with suppress(HistoseekError):  # not cached: measured again next time
        cached = read_json(path) if path.is_file() else {}
        measured = [{**asdict(p), "tiles_per_s": round(rate, 1)} for p, rate in rates]
        entry = {key: {"plan": asdict(plan), "measured": measured}}
        write_json(path, {**cached, **entry} if isinstance(cached, dict) else entry)
    return plan


def fastest(rates: Sequence[tuple[EnginePlan, float]]) -> EnginePlan:
    """Return the fastest plan; ONNX Runtime unless OpenVINO is clearly faster."""
    margin = {"openvino": MARGIN}
    return max(rates, key=lambda item: item[1] / margin.get(item[0].engine, 1.0))[0]


def measure(
    bundle: Path, manifest: Manifest, plans: Sequence[EnginePlan]
) -> list[tuple[EnginePlan, float]]:
    """Return tiles per second of each plan with all streams busy; stops after some seconds."""
    rng = np.random.default_rng(0)
    size = manifest.size_px
    started = time.perf_counter()
    rates: list[tuple[EnginePlan, float]] = []
    for plan in plans:
        if rates and time.perf_counter() - started > _BUDGET_S:
            break
        tiles = rng.integers(0, 256, (plan.batch, size, size, 3), dtype=np.uint8)
        try:
            engine = ENGINES[plan.engine](bundle, manifest, plan)
        except Damaged:
            if plan.engine == "onnxruntime" or plan is plans[-1] and not rates:
                raise
            continue  # this engine cannot run the graph
        rates.append((plan, rate_of(engine, tiles, _TRIAL_S)))
    return rates


def rate_of(engine: Engine, tiles: NDArray[np.uint8], seconds: float) -> float:
    """Return tiles per second with all streams of an engine busy for ``seconds``."""

    def work(_: int) -> float:
        engine.run(tiles)
        all_ready.wait()
        done, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            engine.run(tiles)
            done += len(tiles)
        return done / (time.perf_counter() - started)

    streams = engine.plan.streams
    all_ready = Barrier(streams)
    with ThreadPoolExecutor(streams) as pool:
        return sum(pool.map(work, range(streams)))


def _machine_key(manifest: Manifest, precision: str, streams: int, threads: int) -> str:
    parts = [manifest.sha256, precision, str(streams), platform.machine(), _cpu_name()]
    if threads > 1:
        parts.append(f"{threads} threads")
    parts.append(f"onnxruntime {load_onnxruntime().__version__}")
    try:
        parts.append(f"openvino {load_openvino().__version__}")
    except MissingPart:
        parts.append("no openvino")
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:24]


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            return next(line.split(":", 1)[1].strip() for line in stream if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor()
