"""The map of an atlas: two dimensions by t-SNE; new tiles get coordinates without moving others.

Some tiles, the landmarks, are laid out by t-SNE (van der Maaten & Hinton 2008; openTSNE, Poličar et al.
2024). Every other vector is put near its nearest landmarks. So a map of any atlas takes seconds, is
computed once, and does not change when tiles are added.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from ...errors import BadInput, Damaged, MissingPart
from ..vectors.scan import Metric, Vectors, prepared, scan
from .state import State

FILE = "map.npz"
LANDMARKS = 3_000
NEIGHBOURS = 5
NEAR = 0.05
"""Radius around a point's nearest landmark, as a share of the map's width, in which landmarks count."""
PERPLEXITY = 30
TRUST_SAMPLE = 1_500
FEW = 10
STALE = 2.0


@dataclass(frozen=True)
class Layout:
    """The landmarks and their coordinates on the map.

    Attributes:
        atlas: id of the atlas.
        tiles: number of tiles of the atlas when the map was made.
        metric: of the vectors.
        landmarks: (L, D) prepared vectors.
        points: (L, 2) coordinates from -1 to 1.
        trust: trustworthiness (Venna & Kaski 2001) of the landmarks' coordinates for 10 neighbours, 0 to 1.
        method: ``t-SNE``, or ``PCA`` for fewer than ten tiles.
        stored: whether it is in the atlas's folder.
    """

    atlas: str
    tiles: int
    metric: Metric
    landmarks: Vectors
    points: NDArray[np.float32]
    trust: float
    method: str
    stored: bool = False

    def place(self, vectors: NDArray[Any]) -> NDArray[np.float32]:
        """Return map coordinates (N, 2) of vectors (N, D): the mean of their nearest landmarks."""
        ready = prepared(vectors, self.metric)
        count = min(NEIGHBOURS, len(self.landmarks))
        scores, near = scan(ready, self.landmarks, count, self.metric)
        distance = np.maximum(1 - scores if self.metric == "cosine" else -scores, 0)
        places = self.points[near]
        close = np.abs(places - places[:, :1]).max(axis=2) <= 2 * NEAR
        weight = close / (distance + 1e-6)
        mean: NDArray[np.float64]
        mean = (places * weight[:, :, None]).sum(axis=1) / weight.sum(axis=1)[:, None]
        return mean.astype(np.float32)

    def to_bytes(self) -> bytes:
        """Return the map as the bytes of its file."""
        buffer = io.BytesIO()
        np.savez(
            buffer,
            about=np.array([self.atlas, str(self.tiles), self.metric, self.method]),
            trust=np.array(self.trust),
            landmarks=self.landmarks,
            points=self.points,
        )
        return buffer.getvalue()


def read(path: Path) -> Layout | None:
    """Read an atlas's map; None if it has none.

    Raises:
        Damaged: the file is incomplete.
    """
    try:
        blob = (path / FILE).read_bytes()
        with np.load(io.BytesIO(blob), allow_pickle=False) as arrays:
            atlas, tiles, metric, method = (str(part) for part in arrays["about"])
            checked: Metric = "l2" if metric == "l2" else "cosine"
            landmarks, points, trust = arrays["landmarks"], arrays["points"], float(arrays["trust"])
            return Layout(atlas, int(tiles), checked, landmarks, points, trust, method, stored=True)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, BadZipFile, EOFError) as error:
        raise Damaged(
            f"{path / FILE} is damaged ({error}); delete it: it will be rebuilt"
        ) from error


def fits(layout: Layout | None, atlas: str, tiles: int, dim: int) -> bool:
    """Whether a map belongs to this atlas, which has at most doubled since the map was made."""
    return (
        layout is not None
        and layout.atlas == atlas
        and layout.landmarks.shape[1] == dim
        and tiles <= STALE * max(layout.tiles, FEW)
    )


def landmarks_of(state: State, seed: int = 0) -> Vectors:
    """Return the prepared vectors (L, D) of the landmarks."""
    return state.index.at(state.sample(LANDMARKS, seed))


def make(atlas: str, tiles: int, landmarks: Vectors, metric: Metric, seed: int = 0) -> Layout:
    """Compute the map; the arguments are those of :class:`Layout`, and the seed of t-SNE.

    Raises:
        BadInput: no tiles.
        MissingPart: openTSNE is not installed.
    """
    if not len(landmarks):
        raise BadInput("the atlas has no tiles to show on a map; add features first")
    flat = landmarks.astype(np.float64)
    method = "t-SNE" if len(flat) >= FEW else "PCA"
    points = _tsne(flat, seed) if method == "t-SNE" else _first_two(flat)
    points -= points.mean(axis=0)
    points /= max(float(np.abs(points).max()), 1e-12)
    trust = _trust(flat, points) if method == "t-SNE" else 1.0
    return Layout(atlas, tiles, metric, landmarks, points.astype(np.float32), trust, method)


def _tsne(flat: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    try:
        from openTSNE import TSNE
    except ImportError as error:
        raise MissingPart("the map needs openTSNE: pip install 'histoseek[ui]'") from error
    plane = _first_two(flat)
    start = 1e-4 * plane / max(float(plane.std()), 1e-12)
    # Without noise, equal tiles would start at the same coordinates and could not separate.
    start += np.random.default_rng(seed).normal(scale=1e-6, size=start.shape)
    perplexity = min(PERPLEXITY, (len(flat) - 1) / 3)
    tsne = TSNE(
        perplexity=perplexity, initialization=start, random_state=seed, n_jobs=-1, neighbors="exact"
    )
    return np.array(tsne.fit(flat), dtype=np.float64)


def _first_two(flat: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the first two principal components (N, 2), with zeros for missing ones.

    Unlike scikit-learn's PCA, this also works for one tile and for equal tiles.
    """
    centred = flat - flat.mean(axis=0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:2]
    plane = np.zeros((len(flat), 2))
    plane[:, : len(axes)] = centred @ axes.T
    return plane


def _trust(flat: NDArray[np.float64], points: NDArray[np.float64]) -> float:
    from sklearn.manifold import trustworthiness

    some = np.linspace(0, len(flat) - 1, min(len(flat), TRUST_SAMPLE)).astype(int)
    neighbours = min(10, max(1, (len(some) - 1) // 3))
    return round(float(trustworthiness(flat[some], points[some], n_neighbors=neighbours)), 4)
