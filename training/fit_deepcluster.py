"""Recipe ``deepcluster``: paper 002, clusters of the features are the labels of the epoch.

Every epoch, or every ``reassign`` epochs, computes the features of all tiles in a fixed order, applies
PCA and whitening, scales to length 1 and runs k-means. The clusters are pseudo-labels for a classifier
with a new top layer; tiles are drawn evenly from all clusters. Unlike the reference code, this keeps the
last chain (PCA and whitening) and its centres: the chain becomes a layer of the encoder, so that export
ships it and new tiles can be assigned.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..artifacts.option_models import Field, options
from ..artifacts.tilesets import TileSet
from ..console import Progress
from ..errors import BadInput
from ..metrics import Ints
from .components import Chain
from .data import LabelledTiles
from .evaluate import embed_numbers, quiet_duplicates
from .job import Job
from .kmeans import cluster_tensors
from .models import Encoder
from .options import TrainingOptions
from .probe import linear_probe
from .steps import Objective, Phase, TrainingJob


@options
class DeepClusterOptions(TrainingOptions):
    """Options of the recipe ``deepcluster``."""

    model: str = "sobel-alexnet"
    epochs: int = 20
    batch: int = 256
    lr: float = 1e-3
    weight_decay: float = 1e-4
    plateau: int = 5
    # fmt: off
    clusters: Annotated[int, Field(ge=2, description="Number of clusters.")] = 200
    pca_dim: Annotated[int,
        Field(ge=1, description="Maximum length of the features after PCA and whitening.")] = 128
    iterations: Annotated[int, Field(ge=1, description="Number of k-means iterations per epoch.")] = 20
    reassign: Annotated[int,
        Field(ge=1, description="Number of epochs between two clusterings of the features.")] = 1
    uniform: Annotated[bool,
        Field(description="Draw tiles evenly from the clusters. Off: as in the code of the paper.")] = True
    # fmt: on

    VALIDATES: ClassVar[bool] = False


def cluster(
    vectors: NDArray[np.float32], k: int, iterations: int, seed: int
) -> tuple[NDArray[np.float32], Ints, float]:
    """Run k-means from random vectors; returns centres (K', D), clusters (N,) and the inertia.

    A cluster that becomes empty restarts at the vector farthest from its centre (scikit-learn's rule).
    Clusters that are empty in the end, because there are fewer distinct vectors than K, are left out:
    K' <= K.
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
    """Cross-entropy with the clusters found at the beginning of the epoch."""

    def __init__(self, encoder: Encoder, options: DeepClusterOptions, tiles: int) -> None:
        """Wrap an encoder with a top layer; ``tiles`` is the number of tiles in the data."""
        super().__init__()
        self.encoder = encoder
        self.options = options
        self.clusters = nn.Buffer(torch.full((tiles,), -1, dtype=torch.int64))

    def begin_epoch(
        self, job: TrainingJob, phase: Phase, epoch: int, optimizer: Any
    ) -> dict[str, float]:
        """Cluster all training tiles, compare with the last clusters and the labels, reset the top layer.

        Between two clusterings (``reassign``) nothing changes, and nothing is returned.
        """
        if epoch % self.options.reassign:
            return {}
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
        """Draw a new top layer (weights N(0, .01), bias 0); delete the optimiser's state of the old one."""
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
        """Draw as many tiles as ``train`` has, evenly from all clusters; small clusters repeat tiles."""
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
        """Return the cross-entropy between the classifier and the clusters."""
        logits = self.encoder.classify(tiles)
        return {"loss": nn.functional.cross_entropy(logits.float(), self.clusters[numbers])}


def features_of(
    encoder: Encoder, data: LabelledTiles, numbers: Ints
) -> tuple[NDArray[np.float32], Ints]:
    """Return features (M, F) of unaugmented tiles and their indices, in the order of ``numbers``."""
    assert encoder.chain is None
    return embed_numbers(encoder, data, numbers, unit=False)


def fit(
    options: DeepClusterOptions,
    tileset: TileSet,
    out: Path,
    progress: Progress,
    selection: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train, fit the last chain and its clusters, probe and evaluate on held-out groups, write the run.

    Args:
        options: options of the recipe.
        tileset: tiles; labels are used for evaluation only.
        out: folder of the run.
        progress: called with the number done, the total and a text.
        selection: sources and exclusions of the tile set, for the record.

    Returns:
        The content of ``run.json``; ``metrics.probe`` has the linear probe.

    Raises:
        BadInput: the model has no top layer, or there are fewer than 2 tiles.
        Mismatch: ``out`` holds a run with other options or data; the message names the difference.
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
