"""k-means on latents and on raw pixels: full, with mini-batches, and as paper 000 prints it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import BadInput, unknown_name
from ..metrics import Floats, Ints, clustering_report
from .data import LabelledTiles, Split
from .evaluate import embed_numbers, pixels_of, quiet_duplicates
from .models import Encoder

RULES = ("full", "minibatch", "literal")
ASSIGN_ROWS = 8192


def kmeans(
    vectors: Floats,
    k: int,
    rule: str = "full",
    seed: int = 0,
    batch: int = 1000,
    restarts: int = 10,
) -> NDArray[np.float32]:
    """Return K centres (K, D) of vectors (N, D).

    Args:
        vectors: vectors to cluster.
        k: K.
        rule: ``full`` (Lloyd), ``minibatch`` (Sculley 2010, scikit-learn's: every centre moves by 1/n_j
            towards each of its members) or ``literal`` (see :func:`literal_minibatch`).
        seed: seed of the initial centres and the batches.
        batch: tiles per mini-batch.
        restarts: number of restarts of full k-means.

    Raises:
        BadInput: there are fewer vectors than centres, or the rule is unknown.
    """
    from sklearn.cluster import KMeans, MiniBatchKMeans

    if len(vectors) < k:
        raise BadInput(f"k-means with K = {k} needs at least {k} tiles; there are {len(vectors)}")
    if rule == "literal":
        return literal_minibatch(vectors, k, seed, batch)
    if rule not in RULES:
        raise unknown_name("k-means rule", rule, RULES)
    model = (
        KMeans(k, n_init=restarts, max_iter=300, random_state=seed)
        if rule == "full"
        else MiniBatchKMeans(k, batch_size=batch, n_init=3, random_state=seed)
    )
    with quiet_duplicates():
        fitted = model.fit(vectors)
    centres: NDArray[np.float32] = fitted.cluster_centers_.astype(np.float32)
    return centres


def literal_minibatch(
    vectors: Floats, k: int, seed: int = 0, batch: int = 1000, steps: int = 100
) -> NDArray[np.float32]:
    """Run mini-batch k-means as paper 000 prints it (equation 10).

    Each step draws a mini-batch and replaces every centre by the mean of the batch's vectors nearest to it.
    This does not converge, because the next batch moves the centres again. The equation is 0/0 for a centre
    without members; such a centre does not move.
    """
    rng = np.random.default_rng(seed)
    centres = vectors[rng.choice(len(vectors), k, replace=False)].astype(np.float64)
    for _ in range(steps):
        drawn = vectors[rng.choice(len(vectors), min(batch, len(vectors)), replace=False)]
        nearest = assign(drawn, centres)
        for number in np.unique(nearest):
            centres[number] = drawn[nearest == number].mean(0)
    return centres.astype(np.float32)


def assign(vectors: Floats, centres: Floats) -> Ints:
    """Return the index of the nearest centre for every vector, (N,)."""
    b = centres.astype(np.float64)
    nearest = np.zeros(len(vectors), dtype=np.int64)
    for start in range(0, len(vectors), ASSIGN_ROWS):
        a = vectors[start : start + ASSIGN_ROWS].astype(np.float64)
        nearest[start : start + len(a)] = ((b * b).sum(1) - 2 * a @ b.T).argmin(1)
    return nearest


KNOWN_SHARE = 0.99
"""Fraction of a cluster's training tiles that lie within the cluster's reach."""


def cluster_tensors(vectors: Floats, centres: Floats) -> dict[str, torch.Tensor]:
    """Return the tensors that a run stores to assign new tiles to its clusters.

    Args:
        vectors: unit embeddings of the training tiles (N, D).
        centres: (K, D).

    Returns:
        ``clusters.centres`` (K, D) and ``clusters.reach`` (K,): the largest distance at which a tile counts
        as known; 0 for a cluster without training tiles.
    """
    nearest = assign(vectors, centres)
    own = np.linalg.norm(vectors - centres[nearest], axis=1)
    reach = [
        float(np.quantile(own[nearest == n], KNOWN_SHARE)) if (nearest == n).any() else 0.0
        for n in range(len(centres))
    ]
    return {
        "clusters.centres": torch.from_numpy(np.asarray(centres, dtype=np.float32)),
        "clusters.reach": torch.tensor(reach),
    }


def fit_clusters(
    encoder: Encoder, data: LabelledTiles, parts: Split, k: int, rule: str, seed: int
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Fit K centres on the training tiles' unit embeddings and evaluate them on held-out tiles.

    Returns:
        The centres and their reach, and the scores of the clusters of embeddings and of raw pixels ({} if
        nothing can be evaluated).
    """
    trained, _ = embed_numbers(encoder, data, parts.train)
    centres = kmeans(trained, min(k, len(trained)), rule, seed)
    scores: dict[str, Any] = {}
    held_out = parts.test[data.labels[parts.test] >= 0]
    if len(held_out):
        found, kept = embed_numbers(encoder, data, held_out)
        pixels = pixels_of(data, kept)
        own = kmeans(pixels_of(data, parts.train), len(centres), rule, seed)
        truth = np.unique(data.labels[kept], return_inverse=True)[1].astype(np.int64)
        scores = {
            "k": len(centres),
            "rule": rule,
            "latents": _scores(found, truth, assign(found, centres), seed),
            "pixels": _scores(pixels, truth, assign(pixels, own), seed),
        }
    return cluster_tensors(trained, centres), scores


def _scores(vectors: Floats, labels: Ints, clusters: Ints, seed: int) -> list[dict[str, Any]]:
    return [m.as_dict() for m in clustering_report(vectors, labels, clusters, seed)]
