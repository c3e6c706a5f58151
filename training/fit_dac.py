"""Recipe ``dac``: paper 001, an autoencoder and a clustering head trained together, without labels.

Phase 1 trains the reconstruction of the tiles. Phase 2 adds the pair loss of Deep Adaptive Clustering; its
two thresholds approach each other epoch by epoch. DAC's released code differs from its paper: ``released``
thresholds, ``super_batch``, ``inner`` and ``anchor`` do what it does. The baselines are methods of the same
recipe: ``dac`` (the pair loss alone, from random weights), ``dec`` (Xie et al. 2016 on the pretrained code)
and ``ae-kmeans`` (phase 1, then k-means).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..artifacts.option_models import Field, options
from ..artifacts.tilesets import TileSet
from ..console import Progress
from ..errors import BadInput
from ..metrics import Floats, Ints, clustering_report
from .checkpoint import load_run_weights
from .data import LabelledTiles
from .evaluate import to_input
from .job import Job
from .kmeans import assign, cluster_tensors, kmeans
from .losses import full_precision, pair_loss, student_assignment, target_assignment
from .models.dac import ClusteringAutoEncoder
from .options import TrainingOptions
from .steps import Objective, Phase, TrainingJob

BATCH = 4096
THRESHOLDS = {"001": (0.95, 0.5, 0.1, 0.005), "dac": (0.95, 0.455, 0.1, 0.009)}
"""u(0), l(0), rise of l per unit of xi, and step eta, as in paper 001 and as in the DAC paper."""
RELEASED = (0.99, 0.75)
"""In DAC's released code for CIFAR-10 the only threshold (l = u) falls from .99 towards .75."""


@options
class DacOptions(TrainingOptions):
    """Options of the recipe ``dac``."""

    model: str = "dac-fmnist"
    epochs: int = 75
    batch: int = 128
    lr: float = 1e-3
    folds: int = 0
    # fmt: off
    method: Annotated[Literal["ae-dac", "dac", "dec", "ae-kmeans"],
        Field(description="The method of the paper (ae-dac), or one of its baselines.")] = "ae-dac"
    clusters: Annotated[int, Field(ge=0, description="Number of clusters; 0: the number of classes.")] = 0
    pretrain: Annotated[int,
        Field(ge=0, description="Number of epochs of reconstruction before clustering (not for dac).")] = 50
    start: Annotated[str,
        Field(description="Start with the weights of this finished run of the same recipe and model, "
        "such as an ae-kmeans run. Then also give --pretrain 0. Empty: random weights.")] = ""
    lr_cluster: Annotated[float,
        Field(ge=1e-9, le=10, description="Learning rate during clustering, after --pretrain.")] = 1e-4
    alpha: Annotated[float,
        Field(ge=0, le=1000, description="Weight of the reconstruction loss during clustering.")] = 0.5
    beta: Annotated[float, Field(ge=0, le=1000, description="Weight of the loss on pairs of tiles.")] = 0.3
    thresholds: Annotated[Literal["001", "dac", "released"],
        Field(description="Start and step of the two similarity thresholds, above and below which a "
        "pair of tiles counts as equal or different: as in paper 001, as in DAC's paper, or as in DAC's "
        "released code (a single threshold that falls from .99 to .75).")] = "001"
    eta: Annotated[float,
        Field(ge=-1, le=1, description="Step of the two thresholds per epoch. 0: such that they meet in "
        "the last epoch; below 0: as set by --thresholds.")] = -1.0
    super_batch: Annotated[int,
        Field(ge=0, description="Number of tiles, a multiple of --batch, whose pairs are labelled "
        "together, from unchanged tiles, before --inner passes over them. 0: each batch labels its own "
        "pairs as it is trained on.")] = 0
    inner: Annotated[int,
        Field(ge=1, description="Number of passes over each super-batch. An epoch keeps its number of "
        "steps, so it has fewer different tiles.")] = 1
    anchor: Annotated[float,
        Field(ge=0, le=1000, description="Weight, times --beta, of a binary cross-entropy between the "
        "cluster probabilities and those that labelled the super-batch, the latter scaled to length 1; "
        "10 in DAC's released code.")] = 0.0
    reduction: Annotated[Literal["mean", "sum"],
        Field(description="Squared error: mean over pixels, or sum (the paper's equation 1).")] = "mean"
    output: Annotated[Literal["code", "clusters"],
        Field(description="Output of the exported encoder: code (256 numbers) or cluster "
        "probabilities.")] = "code"
    judge_every: Annotated[int,
        Field(ge=0, description="Measure the clusters after this number of epochs; 0: only at the "
        "end.")] = 5
    # fmt: on

    VALIDATES: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the output against the method.

        Raises:
            BadInput: an option does not fit the others; the message names it, its value and what to expect.
        """
        super().__post_init__()
        if self.output == "clusters" and self.method not in {"ae-dac", "dac"}:
            raise BadInput(
                f"output is 'clusters', but method {self.method} trains no clustering head"
            )
        if self.super_batch % self.batch:
            raise BadInput(
                f"super_batch is {self.super_batch}; expected 0 or a multiple of batch ({self.batch})"
            )
        if self.super_batch and self.devices > 1:
            raise BadInput(
                f"super_batch is {self.super_batch} and devices {self.devices}; expected one device"
            )
        if self.super_batch and self.method not in {"ae-dac", "dac"}:
            raise BadInput(
                f"super_batch is {self.super_batch}, but method {self.method} labels no pairs"
            )
        if self.thresholds == "released" and self.eta >= 0:
            raise BadInput(
                f"eta is {self.eta:g}, but thresholds are 'released', which have no such step; leave it out"
            )
        if (self.inner > 1 or self.anchor) and not self.super_batch:
            raise BadInput(
                f"inner is {self.inner} and anchor {self.anchor:g}, but super_batch is 0; expected a "
                "super-batch"
            )

    def all_epochs(self) -> int:
        """Return the number of epochs of all phases together."""
        return sum(phase.epochs for phase in self.phases())

    def phases(self) -> list[Phase]:
        """Return the phases of training, in order."""
        phases = []
        if self.method != "dac" and self.pretrain:
            phases.append(Phase("pretraining", self.pretrain, self.lr))
        if self.method != "ae-kmeans":
            phases.append(Phase("clustering", self.epochs, self.lr_cluster))
        return phases

    def at(self, epoch: int) -> tuple[float, float]:
        """Return the thresholds u and l of clustering epoch ``epoch``; they never cross.

        xi gets a gradient only from u - l, of size 1 + rise. So it grows by (1 + rise) * eta per epoch
        until u and l are equal.
        """
        if self.thresholds == "released":
            first, last = RELEASED
            threshold = first - (first - last) * epoch / max(1, self.epochs)
            return threshold, threshold
        upper, lower, rise, eta = THRESHOLDS[self.thresholds]
        meet = (upper - lower) / (1 + rise)
        if self.eta > 0:
            eta = self.eta
        elif self.eta == 0:
            eta = meet / ((1 + rise) * max(1, self.epochs - 1))
        xi = min(meet, (1 + rise) * eta * epoch)
        return upper - xi, lower + rise * xi


class Clustering(Objective):
    """The reconstruction loss in phase 1, then the method's loss; labels are never used."""

    centres: torch.Tensor
    target: torch.Tensor
    reference: torch.Tensor
    last: torch.Tensor

    def __init__(self, encoder: ClusteringAutoEncoder, options: DacOptions, tiles: int) -> None:
        """Wrap the net; ``tiles`` is the number of tiles, for DEC's target distribution."""
        super().__init__()
        self.encoder: ClusteringAutoEncoder = encoder
        self.options = options
        self.phase = ""
        self.upper, self.lower = options.at(0)
        if options.method == "dec":
            self.centres = nn.Parameter(torch.zeros(encoder.clusters, 256))
            self.register_buffer("target", torch.zeros(tiles, encoder.clusters), persistent=False)
        elif options.super_batch:
            self.register_buffer(
                "reference", torch.zeros(tiles, encoder.clusters), persistent=False
            )
        # Clusters of the last measurement; in the checkpoint, so that a resumed run counts the same.
        self.register_buffer("last", torch.full((tiles,), -1))
        self._data: LabelledTiles | None = None
        self._order: Ints = np.empty(0, dtype=np.int64)
        self._step, self._steps, self._batch = 0, 1, options.batch

    def begin_phase(self, phase: Phase) -> None:
        """Train everything; layers that the phase does not use get no gradient."""
        self.train()
        self.phase = phase.name
        clustering = phase.name == "clustering"
        uses_decoder = not clustering or (
            self.options.method == "ae-dac" and self.options.alpha > 0
        )
        self.encoder.decoder.requires_grad_(uses_decoder)
        self.encoder.cluster_head.requires_grad_(clustering and self.options.method != "dec")
        if self.options.method == "dec":
            self.centres.requires_grad_(clustering)

    def begin_epoch(
        self, job: TrainingJob, phase: Phase, epoch: int, optimizer: Any
    ) -> dict[str, float]:
        """Set the thresholds (DAC) or the target distribution (DEC); score every ``judge_every`` epochs."""
        if phase.name != "clustering":
            return {}
        self._data = job.data
        told: dict[str, float] = {}
        asks = bool(self.options.judge_every) and epoch % self.options.judge_every == 0
        if asks or self.options.method == "dec":
            codes, kept = codes_of(self.encoder, job.data, job.parts.train)
        if asks and epoch:
            found = self.clusters_of(codes)
            report = scores(codes, job.data.labels[kept], found, 0)
            told = {
                m["name"]: m["value"] for m in report if m["name"] in ("accuracy", "nmi", "ari")
            }
            told |= self._without_labels(codes, found, kept)
        if self.options.method != "dec":
            self.upper, self.lower = self.options.at(epoch)
            return {**told, "upper": self.upper, "lower": self.lower}
        if epoch == 0:
            centres = kmeans(codes, self.encoder.clusters, seed=self.options.seed, restarts=20)
            with torch.no_grad():  # all processes start with the same centres
                self.centres.copy_(torch.from_numpy(job.fabric.broadcast(centres)))
        with torch.no_grad():
            vectors = torch.from_numpy(codes).to(self.centres.device)
            target = self.target
            target[torch.from_numpy(kept).to(target.device)] = target_assignment(
                student_assignment(vectors, self.centres)
            )
        return told

    def _without_labels(self, codes: Floats, found: Ints, kept: Ints) -> dict[str, float]:
        """Return what can be told of clusters (M,) without labels.

        ``moved`` is the share of tiles in another cluster than at the last measurement, ``even`` the
        entropy of the clusters' sizes (1: all of one size), ``sure`` the mean of the largest probability.
        """
        sizes = np.bincount(found, minlength=self.encoder.clusters) / len(found)
        entropy = -(sizes[sizes > 0] * np.log(sizes[sizes > 0])).sum()
        told = {"even": float(entropy / np.log(max(2, self.encoder.clusters)))}
        if self.options.method != "dec":
            told["sure"] = float(self.probabilities(codes).max(1).mean())
        before = self.last[torch.from_numpy(kept)].cpu().numpy()
        if before.min() >= 0:
            told["moved"] = float((before != found).mean())
        self.last[torch.from_numpy(kept)] = torch.from_numpy(found).to(self.last.device)
        return told

    def draw(self, train: Ints, rng: np.random.Generator) -> Ints:
        """Return the order of the tiles: with super-batches, each of them several times in a row."""
        if not self.options.super_batch or self.phase != "clustering":
            return rng.permutation(train)
        batch = min(self.options.batch, len(train))
        size = min(self.options.super_batch // batch, len(train) // batch) * batch
        self._batch, self._steps = batch, self.options.inner * size // batch
        blocks: list[Ints] = []
        while sum(map(len, blocks)) < len(train):
            shuffled = rng.permutation(train)
            for start in range(0, len(train) - size + 1, size):
                block = shuffled[start : start + size]
                blocks.append(
                    np.concatenate([rng.permutation(block) for _ in range(self.options.inner)])
                )
        self._order, self._step = np.concatenate(blocks), 0
        return self._order[: len(train)]

    @torch.no_grad()
    def _label(self) -> None:
        """Before the first step of a super-batch, store the probabilities of its unchanged tiles.

        Batch norms use the statistics of each batch, as in DAC's released code and as in the steps: before
        the first steps, the head has no others.
        """
        if self._step % self._steps == 0:
            assert self._data is not None  # set by begin_epoch
            first, size = self._step * self._batch, self._steps * self._batch // self.options.inner
            for start in range(first, first + size, self._batch):
                tiles, kept = self._data.read(self._order[start : start + self._batch])
                if len(kept) > 1:
                    codes = self.encoder.code(to_input(self.encoder, torch.from_numpy(tiles)))
                    found = self.encoder.cluster_head(codes).float()
                    self.reference[torch.from_numpy(kept).to(found.device)] = found
        self._step += 1

    def forward(self, tiles: torch.Tensor, numbers: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the losses of the phase."""
        options, encoder = self.options, self.encoder
        if self.phase != "clustering":
            _, drawn, seen = encoder.reconstruct(tiles)
            return {"loss": self._error(drawn, seen)}
        if options.method == "dec":
            q = student_assignment(encoder.code(tiles), self.centres)
            target = self.target
            return {"loss": nn.functional.kl_div(q.log(), target[numbers], reduction="batchmean")}
        reference = None
        if options.super_batch:
            self._label()
            reference = self.reference[numbers]
        if options.method == "dac" or options.alpha == 0:
            found = encoder.cluster_head(encoder.code(tiles))
            pairs = pair_loss(found, self.upper, self.lower, reference)
            losses = {"loss": options.beta * pairs, "pairs": pairs}
        else:
            code, drawn, seen = encoder.reconstruct(tiles)
            found = encoder.cluster_head(code)
            pairs = pair_loss(found, self.upper, self.lower, reference)
            error = self._error(drawn, seen)
            loss = options.alpha * error + options.beta * pairs + (self.upper - self.lower)
            losses = {"loss": loss, "pairs": pairs, "reconstruction": error}
        if options.anchor and reference is not None:
            with full_precision(found):
                held = nn.functional.binary_cross_entropy(
                    found.float().clamp(1e-7, 1 - 1e-7), nn.functional.normalize(reference)
                )
            losses["loss"] = losses["loss"] + options.beta * options.anchor * held
            losses["anchor"] = held
        return losses

    def _error(self, drawn: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Return half the squared error per tile, averaged or summed over its pixels."""
        error = (drawn.float() - seen.float()).square().flatten(1)
        per_tile = error.sum(1) if self.options.reduction == "sum" else error.mean(1)
        return 0.5 * per_tile.mean()

    def clusters_of(self, codes: Floats, fitted_on: Floats | None = None) -> Ints:
        """Return the cluster of every code (N, 256); k-means is fitted on ``fitted_on`` or ``codes``."""
        k, seed = self.encoder.clusters, self.options.seed
        if self.phase != "clustering":
            return assign(codes, kmeans(codes if fitted_on is None else fitted_on, k, seed=seed))
        if self.options.method == "dec":
            return assign(codes, self.centres.detach().cpu().numpy())
        found: Ints = self.probabilities(codes).argmax(1).astype(np.int64)
        return found

    def probabilities(self, codes: Floats) -> NDArray[np.float32]:
        """Return the cluster probabilities (N, K) of codes (N, 256), without training the net."""
        self.encoder.eval()
        device = next(self.encoder.parameters()).device
        with torch.inference_mode():
            found = [
                self.encoder.cluster_head(torch.from_numpy(codes[n : n + BATCH]).to(device))
                for n in range(0, len(codes), BATCH)
            ]
        return torch.cat(found).float().cpu().numpy()


@torch.inference_mode()
def codes_of(
    encoder: ClusteringAutoEncoder, data: LabelledTiles, numbers: Ints
) -> tuple[NDArray[np.float32], Ints]:
    """Return the unscaled codes (M, 256) of the tiles of given indices, and the indices that were read."""
    encoder.eval()
    found, kept = [], []
    for start in range(0, len(numbers), BATCH):
        tiles, read = data.read(numbers[start : start + BATCH])
        found.append(encoder.code(to_input(encoder, torch.from_numpy(tiles))).float().cpu().numpy())
        kept.append(read)
    return np.concatenate(found), np.concatenate(kept)


def fit(
    options: DacOptions,
    tileset: TileSet,
    out: Path,
    progress: Progress,
    selection: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train, cluster, evaluate and write the run; uses all tiles, as the paper does, unless folds are set.

    Args:
        options: options of the recipe.
        tileset: tiles; labels are used for evaluation only.
        out: folder of the run.
        progress: called with the number done, the total and a text.
        selection: sources and exclusions of the tile set, for the record.

    Returns:
        The content of ``run.json``; ``metrics.clusters`` has the scores of the clusters.

    Raises:
        BadInput: the model has no clustering head, or the data cannot be used.
        Mismatch: ``out`` holds a run with other options or data; the message names the difference.
    """
    paper = "001: autoencoder and Deep Adaptive Clustering"
    job = Job("dac", paper, options, tileset, out, progress, selection)
    if job.finished is not None:
        return job.finished
    job.prepare()
    more: dict[str, Any] = {"output": options.output}
    classes = len(np.unique(job.data.labels[job.data.labels >= 0]))
    if options.clusters or classes > 1:
        more["clusters"] = options.clusters or classes
    encoder = job.build(**more)
    if not isinstance(encoder, ClusteringAutoEncoder):
        raise BadInput(
            f"model {options.model!r} has no clustering head; expected dac-fmnist, dac-cifar or dac-stl"
        )
    if options.start:
        load_run_weights(encoder, Path(options.start))
    net = Clustering(encoder, options, len(job.data))
    job.train(net, options.phases())
    net.phase = "pretraining" if options.method == "ae-kmeans" else "clustering"
    fitted, kept = codes_of(encoder, job.data, job.parts.train)
    shipped = _shipped(net, fitted, net.clusters_of(fitted))
    codes = fitted
    if len(job.parts.test):
        codes, kept = codes_of(encoder, job.data, job.parts.test)
    labels = job.data.labels[kept]
    metrics: dict[str, Any] = {
        "k": encoder.clusters,
        "method": options.method,
        "assigned": scores(codes, labels, net.clusters_of(codes, fitted), options.seed),
    }
    if options.output == "code":  # assign to the nearest mean code, as the bundle's clusters do
        unit = codes / np.maximum(np.linalg.norm(codes, axis=1, keepdims=True), 1e-12)
        near = assign(unit, shipped["clusters.centres"].numpy())
        metrics["shipped"] = scores(unit, labels, near, options.seed)
    return job.finish(encoder, {"clusters": metrics}, shipped)


def scores(vectors: Floats, labels: Ints, clusters: Ints, seed: int) -> list[dict[str, Any]]:
    """Score the clusters of labelled tiles; [] without labels."""
    known = labels >= 0
    if len(np.unique(labels[known])) < 2:
        return []
    truth = np.unique(labels[known], return_inverse=True)[1].astype(np.int64)
    report = clustering_report(vectors[known], truth, clusters[known], seed)
    return [metric.as_dict() for metric in report]


def _shipped(net: Clustering, codes: Floats, clusters: Ints) -> dict[str, torch.Tensor]:
    """Return one centre per cluster: a corner of the probability simplex, or the mean of its unit codes."""
    k = net.encoder.clusters
    if net.options.output == "clusters":
        with torch.inference_mode():
            device = next(net.encoder.parameters()).device
            found = net.encoder.eval().cluster_head(torch.from_numpy(codes).to(device))
        return cluster_tensors(nn.functional.normalize(found).cpu().numpy(), np.eye(k))
    unit = nn.functional.normalize(torch.from_numpy(codes))
    means = [
        unit[clusters == n].mean(0) if (clusters == n).any() else unit.mean(0) for n in range(k)
    ]
    return cluster_tensors(unit.numpy(), torch.stack(means).numpy())
