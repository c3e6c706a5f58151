"""Recipe ``deepcluster``: paper 002, clusters of the features become the labels of the next epoch.

Every epoch: features of all tiles in one fixed order, PCA, whitening, length 1, k-means; the clusters are
pseudo-labels for a classifier with a new top layer, drawn evenly from all clusters. Unlike the reference
code, the last chain (PCA, whitening, centres) is kept: it becomes a layer of the encoder, so that export
ships it and any new tile can be assigned.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..artifacts.tilesets import TileSet
from ..console import Report
from ..errors import BadInput
from ..metrics import Ints
from .data import LabelledTiles
from .evaluate import embed_numbers, quiet_duplicates
from .job import Job, Objective, Phase
from .kmeans import cluster_tensors
from .models import Encoder
from .options import TrainingOptions
from .probe import linear_probe


@dataclass(frozen=True)
class DeepClusterOptions(TrainingOptions):
    """Options of the recipe ``deepcluster``.

    Attributes:
        clusters: K.
        pca_dim: length of the features after PCA and whitening; at most what the net gives.
        iterations: of k-means per epoch.
        uniform: draw evenly from the clusters; --no-uniform draws tiles as they come (the paper's code).
    """

    model: str = "sobel-alexnet"
    epochs: int = 20
    batch: int = 256
    lr: float = 1e-3
    weight_decay: float = 1e-4
    plateau: int = 5
    rotation_deg: float = 0.0
    clusters: int = 200
    pca_dim: int = 128
    iterations: int = 20
    uniform: bool = True

    VALIDATES: ClassVar[bool] = False
    LEAST: ClassVar[dict[str, int]] = {
        **TrainingOptions.LEAST,
        "clusters": 2,
        "pca_dim": 1,
        "iterations": 1,
    }


@dataclass(frozen=True)
class Chain:
    """From features to vectors that are clustered: (f - mean) @ projection.T, then length 1.

    Attributes:
        mean: (F,).
        projection: (D, F), principal directions over the square root of their variance.
    """

    mean: NDArray[np.float32]
    projection: NDArray[np.float32]

    @classmethod
    def fit(cls, features: NDArray[np.float32], dim: int) -> Chain:
        """Fit PCA with whitening on features (N, F); D is at most ``dim``, F and N - 1."""
        from sklearn.decomposition import PCA

        dim = min(dim, features.shape[1], len(features) - 1)
        with np.errstate(invalid="ignore"):  # features that are all the same have no variance
            fitted = PCA(dim, random_state=0).fit(features)
        kept = fitted.explained_variance_ > 1e-12 * fitted.explained_variance_[0]
        spread = np.sqrt(np.where(kept, fitted.explained_variance_, np.inf))
        return cls(
            fitted.mean_.astype(np.float32),
            (fitted.components_ / spread[:, None]).astype(np.float32),
        )

    def apply(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return vectors of length 1, (N, D)."""
        white = (features - self.mean) @ self.projection.T
        unit: NDArray[np.float32] = white / np.maximum(
            np.linalg.norm(white, axis=1, keepdims=True), 1e-12
        )
        return unit

    def into(self, encoder: Encoder) -> None:
        """Make it the encoder's last layer; export adds the length."""
        layer = encoder.attach_chain(len(self.projection))
        layer.to(next(encoder.backbone.parameters()).device)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(self.projection))
            layer.bias.copy_(torch.from_numpy(-self.projection @ self.mean))


def cluster(
    vectors: NDArray[np.float32], k: int, iterations: int, seed: int
) -> tuple[NDArray[np.float32], Ints, float]:
    """Run k-means from random vectors; returns centres (K', D), clusters (N,) and the inertia.

    A cluster that runs empty is started again at the vector farthest from its centre (scikit-learn's
    rule); what is empty in the end, as there are fewer distinct vectors than K, is left out: K' <= K.
    """
    from sklearn.cluster import KMeans

    with quiet_duplicates():
        fitted = KMeans(
            min(k, len(vectors)), init="random", n_init=1, max_iter=iterations, random_state=seed
        ).fit(vectors)
    used, clusters = np.unique(fitted.labels_, return_inverse=True)
    centres: NDArray[np.float32] = fitted.cluster_centers_[used].astype(np.float32)
    return centres, clusters.astype(np.int64), float(fitted.inertia_)


class PseudoLabels(Objective):
    """Cross-entropy with the clusters of the epoch's beginning."""

    def __init__(self, encoder: Encoder, options: DeepClusterOptions, tiles: int) -> None:
        """Wrap an encoder with a top layer; ``tiles`` is how many the data has."""
        super().__init__()
        self.encoder = encoder
        self.options = options
        self.clusters = nn.Buffer(torch.full((tiles,), -1, dtype=torch.int64))

    def begin_epoch(self, job: Job, phase: Phase, epoch: int, optimizer: Any) -> dict[str, float]:
        """Cluster all training tiles, compare with the last epoch and the labels, renew the top."""
        from sklearn.metrics import adjusted_mutual_info_score as ami
        from sklearn.metrics import normalized_mutual_info_score as nmi

        features, kept = features_of(self.encoder, job.data, job.parts.train)
        if len(kept) < 3:
            reason = next(iter(job.data.unreadable.values()), "there are no more")
            raise BadInput(f"only {len(kept)} tiles to cluster; first reason: {reason}")
        vectors = Chain.fit(features, self.options.pca_dim).apply(features)
        seed = self.options.seed * 1000 + epoch
        _, clusters, inertia = cluster(
            vectors, self.options.clusters, self.options.iterations, seed
        )
        clusters = job.fabric.broadcast(clusters)
        before = self.clusters[torch.from_numpy(kept)].cpu().numpy()
        with torch.no_grad():
            self.clusters.fill_(-1)
            self.clusters[torch.from_numpy(kept)] = torch.from_numpy(clusters).to(
                self.clusters.device
            )
        self._renew_top(optimizer, seed)
        told = {"kmeans_inertia": inertia, "clusters_used": float(clusters.max() + 1)}
        if (before >= 0).all():
            told |= {"nmi_previous": nmi(before, clusters), "ami_previous": ami(before, clusters)}
        labels = job.data.labels[kept]
        if (labels >= 0).any():
            known = labels >= 0
            told |= {
                "nmi_labels": nmi(labels[known], clusters[known]),
                "ami_labels": ami(labels[known], clusters[known]),
            }
        return {name: float(value) for name, value in told.items()}

    def _renew_top(self, optimizer: Any, seed: int) -> None:
        """Draw a new top layer, N(0, .01) and bias 0, without the moments of the old one."""
        top = self.encoder.top
        assert top is not None
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            drawn = torch.randn(top.weight.shape, generator=generator) * 0.01
            top.weight.copy_(drawn)
            top.bias.zero_()
        inner = getattr(optimizer, "optimizer", optimizer)
        for parameter in top.parameters():
            inner.state.pop(parameter, None)

    def draw(self, train: Ints, rng: np.random.Generator) -> Ints:
        """Draw as many tiles as there are, evenly from the clusters (with repeats from small ones)."""
        clusters = self.clusters.cpu().numpy()
        train = train[clusters[train] >= 0]
        if not self.options.uniform:
            return rng.permutation(train)
        own = clusters[train]
        share = len(train) // (own.max() + 1) + 1
        drawn = []
        for number in np.unique(own):
            members = train[own == number]
            drawn.append(rng.choice(members, share, replace=len(members) <= share))
        order: Ints = rng.permutation(np.concatenate(drawn))[: len(train)]
        return order

    def forward(self, tiles: torch.Tensor, numbers: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the cross-entropy of the classifier with the clusters."""
        logits = self.encoder.classify(tiles)
        return {"loss": nn.functional.cross_entropy(logits.float(), self.clusters[numbers])}


def features_of(
    encoder: Encoder, data: LabelledTiles, numbers: Ints
) -> tuple[NDArray[np.float32], Ints]:
    """Return features (M, F) of unchanged tiles in the order of ``numbers``, and those read."""
    assert encoder.chain is None
    return embed_numbers(encoder, data, numbers, unit=False)


def fit(
    options: DeepClusterOptions,
    tileset: TileSet,
    out: Path,
    progress: Report,
    selection: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train, fit the last chain and its clusters, probe and judge on held-out groups, write the run.

    Args:
        options: of the recipe.
        tileset: tiles; labels are only used to judge.
        out: the run's folder.
        progress: called with what is done, of how many, and a text.
        selection: how the tile set was put together, for the record.

    Returns:
        The content of ``run.json``; ``metrics.probe`` has the linear probe.

    Raises:
        BadInput: a model without a top layer, or fewer tiles than 2.
        Mismatch: ``out`` holds a run with other options or data; says which.
    """
    paper = "002: DeepCluster, Sobel-AlexNet and P4M CNN"
    job = Job("deepcluster", paper, options, tileset, out, progress, selection)
    if job.finished is not None:
        return job.finished
    job.prepare()
    encoder = job.build(classes=options.clusters)
    if encoder.top is None:
        raise BadInput(
            f"model {options.model!r} has no top layer; expected sobel-alexnet or p4m-cnn"
        )
    net = PseudoLabels(encoder, options, len(job.data))
    job.train(net, [Phase("pseudo-labels", options.epochs, options.lr)])
    features, kept = features_of(encoder, job.data, job.parts.train)
    probe = []
    if len(job.parts.test):
        held_out, read = features_of(encoder, job.data, job.parts.test)
        labels = job.data.labels
        probe = linear_probe(features, labels[kept], held_out, labels[read], job.data.label_names)
    chain = Chain.fit(features, options.pca_dim)
    vectors = chain.apply(features)
    centres, _, _ = cluster(vectors, options.clusters, 10 * options.iterations, options.seed)
    chain.into(encoder)
    job.architecture["chain"] = encoder.dim
    return job.finish(
        encoder,
        {"probe": [metric.as_dict() for metric in probe]},
        cluster_tensors(vectors, centres),
    )
