"""Evaluate an encoder on held-out tiles: retrieval, and clustering as in paper 004."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..metrics import Floats, Ints, clustering_report, retrieval_report, silhouette
from .data import LabelledTiles, Split
from .models import Encoder
from .models.embedding import UNIT_MEAN, UNIT_STD

Basis = dict[str, NDArray[np.float32]]
JUDGED = ("trained", "random_init", "pixels")
"""Names in the metrics: the trained encoder, the same net before training, and shrunken pixels."""


@torch.inference_mode()
def embed(
    encoder: Encoder, tiles: NDArray[np.uint8], batch: int = 64, unit: bool = True
) -> NDArray[np.float32]:
    """Embed uint8 tiles (N, S, S, 3); returns float32 (N, D), of length 1 if ``unit``."""
    was_training = encoder.training
    encoder.eval()
    parts = [np.zeros((0, encoder.dim), dtype=np.float32)]
    for start in range(0, len(tiles), batch):
        found = encoder(to_input(encoder, tiles[start : start + batch])).float()
        parts.append((nn.functional.normalize(found) if unit else found).cpu().numpy())
    encoder.train(was_training)
    return np.concatenate(parts)


def embed_numbers(
    encoder: Encoder, data: LabelledTiles, numbers: Ints, unit: bool = True, batch: int = 256
) -> tuple[NDArray[np.float32], Ints]:
    """Embed the tiles of given indices; returns (M, D) and the indices of the tiles that could be read."""
    found = [np.zeros((0, encoder.dim), dtype=np.float32)]
    kept = [np.zeros(0, dtype=np.int64)]
    for start in range(0, len(numbers), batch):
        tiles, read = data.read(numbers[start : start + batch])
        found.append(embed(encoder, tiles, unit=unit))
        kept.append(read)
    return np.concatenate(found), np.concatenate(kept)


@torch.no_grad()
def calibrate(encoder: Encoder, tiles: NDArray[np.uint8], batch: int = 64) -> None:
    """Set the batch norms' statistics to averages over ``tiles``; no weight changes.

    An untrained net is a fair baseline only after this: with the initial statistics its embeddings are
    almost identical.
    """
    norms = [m for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    was_training, batch = encoder.training, min(batch, len(tiles))
    encoder.eval()  # no dropout
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for start in range(0, len(tiles) - batch + 1, batch):
        encoder(to_input(encoder, tiles[start : start + batch]))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    encoder.train(was_training)


def to_input(encoder: Encoder, tiles: NDArray[np.uint8] | torch.Tensor) -> torch.Tensor:
    """Turn uint8 tiles (N, S, S, 3) into the encoder's float input (N, 3, S, S), on its device."""
    device = next(encoder.parameters()).device
    pixels = tiles if torch.is_tensor(tiles) else torch.from_numpy(np.ascontiguousarray(tiles))
    return normalise(encoder, pixels.to(device).permute(0, 3, 1, 2).float().div_(255))


def normalise(encoder: Encoder, tiles: torch.Tensor) -> torch.Tensor:
    """Normalise float tiles (N, 3, S, S) in 0..1 in place, by the encoder's mean and standard deviation."""
    if (encoder.mean, encoder.std) == (UNIT_MEAN, UNIT_STD):
        return tiles
    mean = torch.tensor(encoder.mean, device=tiles.device)[:, None, None]
    std = torch.tensor(encoder.std, device=tiles.device)[:, None, None]
    return tiles.sub_(mean).div_(std)


def pca_basis(embeddings: Floats) -> Basis:
    """Fit PCA without whitening: ``mean`` (D,), ``components`` (R, D), ``variance`` (R,) as fractions."""
    from sklearn.decomposition import PCA

    with np.errstate(invalid="ignore"):  # identical embeddings have no variance
        fitted = PCA(random_state=0).fit(embeddings)
    return {
        "mean": fitted.mean_.astype(np.float32),
        "components": fitted.components_.astype(np.float32),
        "variance": fitted.explained_variance_ratio_.astype(np.float32),
    }


def project(embeddings: Floats, basis: Basis, keep: float = 0.95) -> Floats:
    """Project on the first components that explain the fraction ``keep`` of the variance (paper 004)."""
    count = int(np.searchsorted(np.cumsum(basis["variance"]), keep)) + 1
    result: Floats = (embeddings - basis["mean"]) @ basis["components"][:count].T
    return result


def judge(
    encoder: Encoder, initial: Encoder, data: LabelledTiles, parts: Split, seed: int, measure: bool
) -> tuple[Basis, dict[str, Any]]:
    """Evaluate a trained encoder on held-out tiles; the baselines are the net before training and pixels.

    PCA is fitted on training tiles. The batch norms of the initial net are calibrated on a sample of them.
    At most 10,000 held-out tiles are compared, drawn with ``seed``.

    Returns:
        The PCA basis of the trained encoder, and metrics of ``trained``, ``random_init`` and ``pixels``
        ({} if nothing was held out or ``measure`` is off).
    """
    rng = np.random.default_rng(seed)
    train = _sample(parts.train, MOST, rng)
    basis = pca_basis(embed_numbers(encoder, data, train)[0])
    if not measure or not len(parts.test):
        return basis, {}
    tiles, numbers = data.read(_sample(parts.test, MOST, rng))
    labels, groups = data.labels[numbers], data.groups[numbers]
    sample = data.read(train[:: max(1, len(train) // 512)])[0]
    calibrate(initial, sample)
    pixels = pixel_features(tiles)
    sides = {
        "trained": (embed(encoder, tiles), basis),
        "random_init": (embed(initial, tiles), pca_basis(embed(initial, sample))),
        "pixels": (pixels, pca_basis(pixel_features(sample))),
    }
    return basis, {
        name: evaluate(found, labels, groups, data.grouped, own, seed)
        for name, (found, own) in sides.items()
    }


MOST = 10_000
"""Maximum number of held-out tiles to evaluate; every tile is compared with every other."""


def _sample(numbers: Ints, most: int, rng: np.random.Generator) -> Ints:
    if len(numbers) <= most:
        return numbers
    return np.sort(rng.choice(numbers, most, replace=False))


def pixels_of(data: LabelledTiles, numbers: Ints, batch: int = 1024) -> NDArray[np.float32]:
    """Return :func:`pixel_features` of the tiles of given indices, without those that cannot be read."""
    parts = [
        pixel_features(data.read(numbers[start : start + batch])[0])
        for start in range(0, len(numbers), batch)
    ]
    return np.concatenate(parts)


@contextmanager
def quiet_duplicates() -> Iterator[None]:
    """Suppress the warning of k-means that duplicate vectors leave fewer than K clusters."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def pixel_features(tiles: NDArray[np.uint8], side: int = 16) -> NDArray[np.float32]:
    """Shrink uint8 tiles (N, S, S, 3) to side x side; returns float32 (N, 3 * side * side) in 0..1."""
    pixels = torch.from_numpy(np.ascontiguousarray(tiles)).permute(0, 3, 1, 2).float() / 255
    small = nn.functional.adaptive_avg_pool2d(pixels, min(side, tiles.shape[1]))
    return small.flatten(1).numpy()


def evaluate(
    embeddings: Floats, labels: Ints, groups: Ints, grouped: bool, basis: Basis, seed: int
) -> dict[str, Any]:
    """Return retrieval and clustering metrics, each with its trivial baseline.

    Three clusterings of the PCA projection: k-means with K = number of classes, k-means with the K of
    2..10 that has the best silhouette, and HDBSCAN with min_cluster_size max(15, n / 40).
    """
    known = labels >= 0
    named = groups if grouped else None
    report: dict[str, Any] = {
        "tiles": len(embeddings),
        "retrieval": [m.as_dict() for m in retrieval_report(embeddings, labels, named)],
    }
    classes = len(np.unique(labels[known]))
    if classes < 2 or known.sum() < 20:
        return report
    flat, truth = project(embeddings[known], basis), labels[known]
    truth = np.unique(truth, return_inverse=True)[1].astype(np.int64)
    for name, clusters in _clusterings(flat, classes, seed).items():
        scores = [m.as_dict() for m in clustering_report(flat, truth, clusters, seed)]
        report[name] = {"k": int(clusters.max()) + 1, "scores": scores}
    return report


def _clusterings(flat: Floats, classes: int, seed: int) -> dict[str, Ints]:
    from hdbscan import HDBSCAN
    from sklearn.cluster import KMeans

    def kmeans(k: int) -> Ints:
        with quiet_duplicates():
            fitted = KMeans(k, n_init=10, max_iter=300, random_state=seed).fit_predict(flat)
        return np.asarray(fitted, dtype=np.int64)

    tried = {k: kmeans(k) for k in range(2, min(10, len(flat) - 1) + 1)}
    best = max(tried, key=lambda k: silhouette(flat, tried[k], seed))
    density = HDBSCAN(min_cluster_size=max(15, len(flat) // 40)).fit_predict(flat)
    return {
        "kmeans_k_classes": tried.get(classes, kmeans(classes)),
        "kmeans_k_silhouette": tried[best],
        "hdbscan": np.asarray(density, dtype=np.int64),
    }
