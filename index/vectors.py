"""Vectors: exact search on a FAISS index that is derived from the feature files, never the truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import Damaged, MissingPart
from ..files import write_atomic

Metric = Literal["cosine", "l2"]
CHUNK_VALUES = 4_000_000
"""Differences of coordinates held at once when distances are made exact (32 MB)."""


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingPart(
            "the index needs FAISS: pip install 'histoseek[cpu]' (or [gpu])"
        ) from error
    return faiss


class VectorIndex:
    """Exact nearest neighbours of vectors with ids.

    For ``cosine`` the score is the cosine similarity (1 is the same direction); for ``l2`` it is minus
    the Euclidean distance. Higher is nearer in both.
    """

    def __init__(self, dim: int, metric: Metric, index: Any = None) -> None:
        """Make an empty index, or wrap a FAISS one."""
        faiss = _faiss()
        flat = faiss.IndexFlatIP(dim) if metric == "cosine" else faiss.IndexFlatL2(dim)
        self._index = index if index is not None else faiss.IndexIDMap2(flat)
        self.dim, self.metric = dim, metric

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def add(self, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
        """Add vectors (N, D) under ids (N,)."""
        if len(ids):
            self._index.add_with_ids(self._prepared(vectors), np.ascontiguousarray(ids))

    def search(
        self, queries: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return scores (Q, k') and ids (Q, k'), best first; k' is the smaller of k and the size."""
        k = min(k, len(self))
        if k == 0 or not len(queries):
            empty = (len(queries), 0)
            return np.zeros(empty, dtype=np.float32), np.zeros(empty, dtype=np.int64)
        scores, ids = self._index.search(self._prepared(queries), k)
        if self.metric == "l2":
            scores = -np.sqrt(np.maximum(scores, 0))
        return scores, ids

    def _prepared(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        if self.metric == "cosine":
            lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
            vectors = vectors / np.maximum(lengths, 1e-12)
        return vectors

    def save(self, path: Path) -> None:
        """Write the index atomically."""
        write_atomic(path, _faiss().serialize_index(self._index).tobytes())

    @classmethod
    def load(cls, path: Path, dim: int, metric: Metric) -> VectorIndex:
        """Read what :meth:`save` wrote.

        Raises:
            Damaged: not a FAISS index of this dimension.
        """
        faiss = _faiss()
        try:
            index = faiss.deserialize_index(np.fromfile(path, dtype=np.uint8))
        except (OSError, RuntimeError) as error:
            raise Damaged(f"{path} is not a readable FAISS index ({error})") from error
        if index.d != dim:
            raise Damaged(f"{path} has dimension {index.d}, the atlas {dim}")
        return cls(dim, metric, index)


def nearest(
    points: NDArray[np.floating], queries: NDArray[np.floating], k: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return Euclidean distances (Q, k) and row numbers (Q, k) of the nearest points, exact."""
    index = _faiss().IndexFlatL2(points.shape[1])
    index.add(np.ascontiguousarray(points, dtype=np.float32))
    k = min(k, len(points))
    distances = np.empty((len(queries), k))
    rows = np.empty((len(queries), k), dtype=np.int64)
    step = max(1, CHUNK_VALUES // max(1, k * points.shape[1]))
    for start in range(0, len(queries), step):
        part = queries[start : start + step]
        found = index.search(np.ascontiguousarray(part, dtype=np.float32), k)[1]
        # FAISS's own distances come from a matrix product that cancels digits; these do not.
        gap = part[:, None, :].astype(np.float64) - points[found].astype(np.float64)
        exact = np.linalg.norm(gap, axis=2)
        order = np.argsort(exact, axis=1, kind="stable")
        distances[start : start + step] = np.take_along_axis(exact, order, 1)
        rows[start : start + step] = np.take_along_axis(found, order, 1)
    return distances, rows
