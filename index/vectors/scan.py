"""Exact comparison of vectors, and their preparation for FAISS."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...errors import MissingPart

Metric = Literal["cosine", "l2"]
Vectors = NDArray[np.float32]
Positions = NDArray[np.int64]
Mask = NDArray[np.bool_]
Found = tuple[NDArray[np.float32], Positions]
CHUNK_VALUES = 4_000_000
"""Maximum number of coordinates held at once when candidates are ranked again (32 MB)."""
SCAN_ROWS = 65_536
"""Rows of a matrix that are scanned at once."""


def import_faiss() -> Any:
    """Return FAISS.

    Raises:
        MissingPart: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise MissingPart(
            "the index needs FAISS: pip install 'histoseek[cpu]' or 'histoseek[gpu]'"
        ) from error
    return faiss


def prepared(vectors: NDArray[Any], metric: Metric) -> Vectors:
    """Return vectors (N, D) as float32, for cosine normalised to length 1."""
    ready = np.ascontiguousarray(vectors, dtype=np.float32)
    if metric == "cosine":
        lengths = np.linalg.norm(ready, axis=1, keepdims=True)
        ready = ready / np.maximum(lengths, 1e-12)
    return ready


def matrix_of(flat: Any) -> Vectors:
    """Return the vectors (M, D) of a FAISS flat index without a copy; keep the index while using them."""
    values = import_faiss().rev_swig_ptr(flat.get_xb(), flat.ntotal * flat.d)
    matrix: Vectors = values.reshape(flat.ntotal, flat.d)
    return matrix


def empty_hits(queries: int, k: int) -> Found:
    """Return scores and positions (Q, k) without any hit."""
    scores = np.full((queries, k), -np.inf, dtype=np.float32)
    return scores, np.full((queries, k), -1, dtype=np.int64)


def merged(parts: list[Found], k: int) -> Found:
    """Merge the hits (Q, k_i) of several parts and return the best k."""
    if len(parts) == 1:
        scores, found = parts[0]
        return np.where(found >= 0, scores, -np.inf).astype(np.float32), found
    scores = np.concatenate([scores for scores, _ in parts], axis=1)
    return _best(scores, np.concatenate([found for _, found in parts], axis=1), k)


def _best(scores: NDArray[np.float32], found: Positions, k: int) -> Found:
    """Return the best k of candidates (Q, K); empty candidates (-1) come last."""
    scores = np.where(found >= 0, scores, -np.inf).astype(np.float32)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(found, order, 1)


def scan(
    ready: Vectors, matrix: Vectors, k: int, metric: Metric, mask: Mask | None = None
) -> Found:
    """Compare queries (Q, D) with all rows (M, D), or with those of a mask.

    Returns:
        Scores and rows (Q, k), best first; for l2 the score is the negative squared distance.
    """
    faiss = import_faiss()
    rows = None if mask is None else np.flatnonzero(mask)
    total = len(matrix) if rows is None else len(rows)
    kind = faiss.METRIC_INNER_PRODUCT if metric == "cosine" else faiss.METRIC_L2
    best = empty_hits(len(ready), k)
    for start in range(0, total, SCAN_ROWS):
        end = min(start + SCAN_ROWS, total)
        part = matrix[start:end] if rows is None else matrix[rows[start:end]]
        count = min(k, len(part))
        scores, found = faiss.knn(
            np.ascontiguousarray(ready), np.ascontiguousarray(part), count, metric=kind
        )
        found = found + start if rows is None else rows[start:end][found]
        scores = scores if metric == "cosine" else -scores
        best = (scores, found) if start == 0 and count == k else merged([best, (scores, found)], k)
    return best


def rescored(ready: Vectors, originals: Vectors, found: Positions, k: int, metric: Metric) -> Found:
    """Rank candidates (Q, K) again by their exact vectors, and keep the best k."""
    exact = np.empty(found.shape, dtype=np.float32)
    wide = max(1, CHUNK_VALUES // originals.shape[1])  # candidates at once
    step = max(1, wide // max(1, found.shape[1]))
    for row in range(0, len(found), step):
        for column in range(0, found.shape[1], wide):
            part = np.s_[row : row + step, column : column + wide]
            vectors = originals[np.maximum(found[part], 0)]
            queries = ready[row : row + step]
            if metric == "cosine":
                exact[part] = np.einsum("qd,qkd->qk", queries, vectors)
            else:
                exact[part] = -np.square(vectors - queries[:, None, :]).sum(axis=2)
    return _best(exact, found, k)
