"""Recipe ``arcface``: paper 004, an embedding trained with an additive angular margin.

With pretrained weights, phase 1 trains the head on the frozen backbone, and phase 2 also trains the
backbone's last layers. Without them, one phase trains everything from scratch. Held-out groups are only
embedded, never used to choose anything; the PCA for clustering is fitted on the training part. Other losses
are available: softmax (the control that the paper lacks), triplet and contrastive. A teacher network can
add a second loss.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..artifacts.tilesets import TileSet
from ..console import Progress
from ..errors import BadInput
from ..metrics import Ints
from .arcface_options import ArcFaceOptions
from .augment import look
from .components import drop_head
from .data import LabelledTiles
from .evaluate import calibrate
from .fit_gate import fit_gate, judge_gate
from .job import Job
from .losses import ArcFace, Contrastive, Softmax, Triplet, info_nce
from .models import Encoder
from .models.gate import TissueGate
from .steps import Objective, Phase
from .teacher import teacher_maps

JUDGED = 1000
"""Maximum number of held-out tiles to measure the tissue gate on."""
LAYER_DIM = 64
"""Length of the vectors that ``layer_consistency`` compares."""
CALIBRATE = 1024
"""Approximate number of training tiles that set the batch norms' statistics after training."""


class EmbeddingNet(Objective):
    """The encoder with one loss per target, and optionally the loss of a teacher."""

    def __init__(
        self,
        encoder: Encoder,
        targets: dict[str, torch.Tensor],
        options: ArcFaceOptions,
        teacher: NDArray[np.float16] | None = None,
    ) -> None:
        """Create a loss for every target.

        Args:
            encoder: network to train.
            targets: class numbers (N,) of all tiles by target; -1 is unknown and adds nothing to the loss.
            options: options of the recipe.
            teacher: the teacher's maps of each tile, (N, F, H, H). The embedding has to predict their mean
                over the visible part of the tile; maps of zeros add nothing to the loss.
        """
        super().__init__()
        self.encoder = encoder
        for name, numbers in targets.items():
            self.register_buffer(f"target_{name}", numbers, persistent=False)
        self.options = options
        self.heads = nn.ModuleDict(
            {
                name: make_loss(options, encoder.dim, int(numbers.max()) + 1)
                for name, numbers in targets.items()
            }
        )
        self.views = 2 if options.consistency or options.layer_consistency else 1
        self.layers = nn.ModuleList(
            nn.Linear(part, min(part, LAYER_DIM))
            for part in encoder.parts
            if options.layer_consistency
        )
        self.looks = self.has_teacher = teacher is not None
        if teacher is not None:
            self.maps = teacher  # not a buffer: it may be large, and every process holds a copy
            self.predict = nn.Linear(sum(encoder.parts) or encoder.dim, teacher.shape[1])

    def forward(
        self, tiles: torch.Tensor, numbers: torch.Tensor, where: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Return the total loss of tiles (N, 3, S, S), and its parts if there are several."""
        if self.encoder.parts:
            norm, *project = cast(nn.Sequential, self.encoder.head)
            features = norm(self.encoder.backbone(self.encoder.colours(tiles)))
            embeddings = nn.Sequential(*project)(features)
        else:
            features = embeddings = self.encoder(tiles)
        options, loss = self.options, embeddings.sum() * 0.0
        parts: dict[str, torch.Tensor] = {}
        for name, head in self.heads.items():
            labels = self.get_buffer(f"target_{name}")[numbers]
            known = labels >= 0
            for weight in head.parameters():
                loss = loss + weight.sum() * 0.0  # DDP requires a gradient for every weight
            if known.any():
                parts[name] = head(embeddings[known], labels[known])
                alone = name != "label" or len(self.heads) == 1
                loss = loss + (1.0 if alone else options.label_weight) * parts[name]
        predicted = self.predict(features).float() if self.has_teacher else embeddings
        if self.has_teacher:
            parts["teacher"] = self._teacher_loss(predicted, numbers, where)
            loss = loss + options.teacher_weight * parts["teacher"]
        if self.training and options.consistency:
            parts["consistency"] = info_nce(predicted, options.temperature)
            loss = loss + options.consistency * parts["consistency"]
        if self.training and len(self.layers):
            of_layers = features.split(self.encoder.parts, 1)
            parts["layers"] = torch.stack(
                [
                    info_nce(linear(layer), options.temperature)
                    for linear, layer in zip(self.layers, of_layers, strict=True)
                ]
            ).sum()
            loss = loss + options.layer_consistency * parts["layers"]
        return {"loss": loss, **(parts if len(parts) > 1 else {})}

    def _teacher_loss(
        self, predicted: torch.Tensor, numbers: torch.Tensor, where: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the mean cosine distance to the teacher's features of the visible part of each tile."""
        maps = torch.from_numpy(self.maps[numbers.cpu().numpy()]).to(predicted.device).float()
        if where is not None:
            maps = look(maps, where, maps.shape[-1])
        wanted = maps.mean((2, 3))
        near = nn.functional.cosine_similarity(predicted, wanted)
        return (1 - near)[wanted.any(1)].sum() / len(wanted)

    def begin_phase(self, phase: Phase) -> None:
        """Freeze the layers that the phase does not train; frozen batch norms keep their statistics."""
        self.train()
        backbone = self.encoder.backbone
        tail = self.encoder.tail if phase.tail else ()
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_(
                phase.all_layers or name.startswith(tuple(f"{t}." for t in tail))
            )
        if not phase.all_layers:
            backbone.eval()
            for name in tail:
                backbone.get_submodule(name).train()

    def draw(self, train: Ints, rng: np.random.Generator) -> Ints:
        """Draw the tiles of an epoch; with ``per_class``, in runs of that many tiles of one class."""
        size = self.options.per_class
        if not size:
            return rng.permutation(train)
        first = self.options.target.split("+")[0]
        labels = self.get_buffer(f"target_{first}").cpu().numpy()[train]
        members = {n: train[labels == n] for n in np.unique(labels[labels >= 0])}
        order: list[Ints] = []
        while sum(map(len, order)) < len(train):
            for number in rng.permutation(list(members)):
                mine = members[number]
                order.append(rng.choice(mine, size, replace=len(mine) < size))
        return np.concatenate(order)[: len(train)]


def make_loss(options: ArcFaceOptions, dim: int, classes: int) -> nn.Module:
    """Return the loss named in the options, for embeddings of length ``dim``."""
    if options.loss == "softmax":
        return Softmax(dim, classes)
    if options.loss == "triplet":
        return Triplet(options.margin)
    if options.loss == "contrastive":
        return Contrastive(options.margin)
    return ArcFace(dim, classes, options.scale, options.margin, options.easy_margin)


def fit(
    options: ArcFaceOptions,
    tileset: TileSet,
    out: Path,
    progress: Progress,
    selection: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train, evaluate on the held-out groups and write ``weights.safetensors`` and ``run.json``.

    A killed run resumes after its last complete epoch and ends with the same weights.

    Args:
        options: options of the recipe.
        tileset: labelled tiles.
        out: folder of the run.
        progress: called with the number done, the total and a text.
        selection: sources and exclusions of the tile set, for the record.

    Returns:
        The content of ``run.json``.

    Raises:
        BadInput: the data has no such target.
        Mismatch: ``out`` holds a run with other options or data; the message names the difference.
    """
    options = options.with_known_teacher()
    paper = "004: MobileNetV3-Small + ArcFace, k-means and HDBSCAN"
    job = Job("arcface", paper, options, tileset, out, progress, selection)
    if job.finished is not None:
        return job.finished
    job.prepare(options.cut)
    targets = _targets(options, job.data, job.parts.train)
    encoder = job.build()
    train_to(job, encoder, targets, options)
    if options.drop_head:
        drop_head(encoder, job.data, job.parts.train, options.dim - options.gate)
        job.architecture |= {"dim": 0, "chain": encoder.dim}
    return job.finish(encoder, add_gate(job, encoder, options))


def train_to(
    job: Job, encoder: Encoder, targets: dict[str, torch.Tensor], options: ArcFaceOptions
) -> None:
    """Train an encoder on targets and on its teacher, then set the statistics of its batch norms."""
    job.train(EmbeddingNet(encoder, targets, options, _teacher(job, options)), options.phases())
    if not options.weights:
        # MobileNetV3's batch norms have a momentum of 0.01: after a short training their statistics lag.
        few = job.parts.train[:: max(1, len(job.parts.train) // CALIBRATE)]
        calibrate(encoder, job.data.read(few)[0])


def add_gate(job: Job, encoder: Encoder, options: ArcFaceOptions) -> dict[str, Any]:
    """Fit the tissue gate, if the options ask for it; return its metrics."""
    if not options.gate:
        return {}
    encoder.gate = TissueGate()
    job.architecture["gate"] = True
    if not job.fabric.is_global_zero:
        return {}
    fit_gate(encoder.gate, job.data, job.parts.train, options.seed)
    asked = job.parts.test[:: -(-len(job.parts.test) // JUDGED) or 1]
    tiles, _ = job.data.read(asked)
    return judge_gate(encoder.gate, tiles, options.seed) if len(tiles) else {}


def _teacher(job: Job, options: ArcFaceOptions) -> NDArray[np.float16] | None:
    """Return the teacher's maps of every tile, as components fitted on the training tiles."""
    if not options.teacher:
        return None
    if not job.fabric.is_global_zero:
        job.fabric.barrier()  # the first process fills the cache for the others; streamed tiles use none
    found = teacher_maps(
        options.teacher,
        job.data,
        job.parts.train,
        options.teacher_dim,
        job.fabric.device,
        job.report,
        options.teacher_power,
        options.teacher_views,
    )
    if job.fabric.is_global_zero:
        job.fabric.barrier()
    return found


def _targets(options: ArcFaceOptions, data: LabelledTiles, train: Ints) -> dict[str, torch.Tensor]:
    """Number the classes of the training part from 0; classes outside it become -1."""
    result: dict[str, torch.Tensor] = {}
    for name in options.target.split("+"):
        if name != "label" and not data.grouped:
            raise BadInput(
                f"target is {options.target!r}, but the data has no groups; add a column 'group'"
            )
        values = {"label": data.labels, "group": data.groups, "place": data.places}[name]
        present = np.unique(values[train][values[train] >= 0])
        if len(present) < 2:
            raise BadInput(
                f"the data has {len(present)} {name}(s) to train on; expected at least 2"
            )
        numbers = np.full(int(values.max()) + 2, -1, dtype=np.int64)
        numbers[present] = np.arange(len(present))
        result[name] = torch.from_numpy(numbers[values])
    return result
