"""Builds, writes and reads the FAISS index."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...errors import Damaged, StorageFailed
from .scan import Metric, Vectors, import_faiss

Coding = Literal["none", "sq8", "pq"]
GPU_LIMIT = 2048
"""Maximum number of hits and of probes in FAISS's GPU index."""


@dataclass(frozen=True)
class IndexPlan:
    """How the main part is built and searched.

    Attributes:
        kind: ``flat`` (exact) or ``ivf`` (inverted lists).
        coding: how ``ivf`` stores a vector in its lists; ``none`` for ``flat``.
        cells: number of lists.
        probes: number of lists that a query reads.
        widen: candidates per hit that are ranked again by their exact vectors.
        code_bytes: bytes per vector with ``pq``.
    """

    kind: Literal["flat", "ivf"] = "flat"
    coding: Coding = "none"
    cells: int = 0
    probes: int = 0
    widen: int = 1
    code_bytes: int = 0


def new_main(dim: int, metric: Metric, plan: IndexPlan, sample: Vectors, seed: int) -> Any:
    """Return an empty FAISS index of a plan, trained on a sample (M, D) of prepared vectors."""
    faiss = import_faiss()
    kind = faiss.METRIC_INNER_PRODUCT if metric == "cosine" else faiss.METRIC_L2
    if plan.kind == "flat":
        return faiss.IndexFlat(dim, kind)
    cells = faiss.IndexFlat(dim, kind)
    if plan.coding == "sq8":
        codes = faiss.ScalarQuantizer.QT_8bit_uniform
        index = faiss.IndexIVFScalarQuantizer(cells, dim, plan.cells, codes, kind)
    else:
        index = faiss.IndexIVFPQ(cells, dim, plan.cells, plan.code_bytes, 8, kind)
        index.pq.cp.seed, index.pq.cp.min_points_per_centroid = seed, 1
    index.cp.seed, index.cp.niter, index.cp.min_points_per_centroid = seed, 10, 1
    index.cp.max_points_per_centroid = max(1, len(sample) // plan.cells + 1)
    index.train(sample)
    return index


def write_main(index: Any, path: Path) -> None:
    """Write a FAISS index to a file.

    Raises:
        StorageFailed: no space or no write permission.
    """
    try:
        import_faiss().write_index(index, str(path))
    except RuntimeError as error:
        raise StorageFailed(
            f"the index {path.name} cannot be written ({_short(error)}); the features are stored and "
            "can be searched without it; free space, then run `histoseek index tune`"
        ) from error


def read_main(path: Path, dim: int) -> Any:
    """Open a FAISS index; its vectors stay in the file until they are read.

    Raises:
        Damaged: the file is not a FAISS index of this dimension.
    """
    faiss = import_faiss()
    try:
        index = faiss.read_index(str(path), getattr(faiss, "IO_FLAG_MMAP_IFC", 0))
    except (OSError, RuntimeError) as error:
        raise Damaged(f"{path} is not a readable FAISS index ({_short(error)})") from error
    if index.d != dim:
        raise Damaged(f"{path} has vectors of length {index.d}; expected {dim}, as in the atlas")
    return index


def _short(error: Exception) -> str:
    return str(error).strip().splitlines()[-1][:200]


def gpu_copy(main: Any, plan: IndexPlan) -> Any:
    """Return a copy of the lists on all GPUs that FAISS sees, for unfiltered searches; None without a GPU.

    FAISS's GPU index does not support selectors, so filtered and exact searches stay on the CPU.
    """
    faiss = import_faiss()
    if plan.kind != "ivf" or not getattr(faiss, "get_num_gpus", lambda: 0)():
        return None
    if plan.probes > GPU_LIMIT:
        return None
    copy = faiss.index_cpu_to_all_gpus(main)
    faiss.GpuParameterSpace().set_index_parameter(copy, "nprobe", plan.probes)
    return copy
