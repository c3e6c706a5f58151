"""Distillation: a small student learns to find the neighbours that a larger encoder finds, without labels.

The student is trained as in ``arcface`` with a teacher, but without classes: from a changed tile it
predicts the teacher's whitened components. Then its head is replaced by the affine map from its pooled
features to the teacher's embeddings that has the least squared error (ridge regression). So its embeddings
have the teacher's geometry, in the ``dim`` directions in which the teacher's embeddings vary most.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..artifacts.tilesets import TileSet
from ..console import Progress
from ..metrics import Ints, Metric
from .arcface_options import DistillOptions
from .components import FITTED
from .evaluate import embed_numbers
from .fit_arcface import add_gate, train_to
from .job import Job
from .models import Encoder
from .teacher import Ask, asker

Floats = NDArray[np.float32]
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Penalties of the regression that are tried, as fractions of the features' variance."""
TRIED = 5
"""One of this many groups is left out of the regression to choose the penalty."""
NEIGHBOURS = 10
COMPARED = 2_000
"""Maximum number of held-out tiles whose neighbours are compared."""


def fit(
    options: DistillOptions,
    tileset: TileSet,
    out: Path,
    progress: Progress,
    selection: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train a student, compare it with its teacher on the held-out groups, and write the run.

    A killed run resumes after its last complete epoch and ends with the same weights.

    Args:
        options: options of the recipe.
        tileset: tiles; labels are used for the measurement only, if there are any.
        out: folder of the run.
        progress: called with the number done, the total and a text.
        selection: sources and exclusions of the tile set, for the record.

    Returns:
        The content of ``run.json``.

    Raises:
        BadInput: the teacher is no bundle.
        Mismatch: ``out`` holds a run with other options or data; the message names the difference.
    """
    options = options.with_known_teacher()
    about = "no paper: distillation of an encoder"
    job = Job("distill", about, options, tileset, out, progress, selection)
    if job.finished is not None:
        return job.finished
    job.prepare(options.cut)
    encoder = job.build()
    train_to(job, encoder, {}, options)
    ask = asker(options.teacher, job.data, job.fabric.device, job.report, options.teacher_views)
    follow(encoder, job, ask, options.dim - options.gate)
    metrics = add_gate(job, encoder, options)
    if job.fabric.is_global_zero and len(job.parts.test) > 1:
        metrics["teacher"] = [row.as_dict() for row in _compared(encoder, job, ask)]
    return job.finish(encoder, metrics)


def follow(encoder: Encoder, job: Job, ask: Ask, dim: int) -> None:
    """Replace the encoder's head by the affine map to the teacher's embeddings with the least error.

    Args:
        encoder: the trained student; changed in place.
        job: with the training tiles.
        ask: the teacher.
        dim: number of the teacher's directions to keep; fewer if it has fewer.
    """
    train = job.parts.train[:: -(-len(job.parts.train) // FITTED)]
    features_of = next(m for m in encoder.head.modules() if isinstance(m, nn.Linear)).in_features
    encoder.dim, encoder.head = features_of, nn.Identity()
    features, numbers = embed_numbers(encoder, job.data, train, unit=False)
    wanted = teacher_vectors(ask, numbers)
    _, _, directions = np.linalg.svd(wanted.astype(np.float64), full_matrices=False)
    wanted = (wanted @ directions[:dim].T).astype(np.float32)
    weight, bias = _ridge(features, wanted, job.data.groups[numbers])
    layer = encoder.attach_chain(len(weight)).to(next(encoder.backbone.parameters()).device)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
        layer.bias.copy_(torch.from_numpy(bias))
    job.architecture |= {"dim": 0, "chain": encoder.dim}


def teacher_vectors(ask: Ask, numbers: Ints, batch: int = 32) -> Floats:
    """Return the teacher's embeddings (N, F) of tiles, of length 1."""
    parts = [
        ask(numbers[start : start + batch])[0].mean((2, 3)).cpu().numpy()
        for start in range(0, len(numbers), batch)
    ]
    vectors = np.concatenate(parts)
    unit: Floats = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return unit


def _ridge(features: Floats, wanted: Floats, groups: Ints) -> tuple[Floats, Floats]:
    """Return the weight (D, F) and bias (D,) of a ridge regression.

    The penalty is chosen on one of :data:`TRIED` groups; then all tiles are used.
    """
    from sklearn.linear_model import Ridge

    spread = features.std(0) + 1e-6
    # In double precision: the smallest penalty leaves a matrix that single precision cannot solve.
    scaled, wanted = (features / spread).astype(np.float64), wanted.astype(np.float64)
    named = np.unique(groups)
    left_out = np.isin(groups, named[::TRIED])

    def fitted(penalty: float, rows: NDArray[np.bool_]) -> Any:
        return Ridge(alpha=penalty * int(rows.sum())).fit(scaled[rows], wanted[rows])

    def error(penalty: float) -> float:
        found = fitted(penalty, ~left_out).predict(scaled[left_out])
        return float(np.square(found - wanted[left_out]).mean())

    best = PENALTIES[2]
    if left_out.any() and not left_out.all():
        best = min(PENALTIES, key=error)
    model = fitted(best, np.ones(len(features), dtype=bool))
    weight = np.atleast_2d(model.coef_) / spread
    return weight.astype(np.float32), np.atleast_1d(model.intercept_).astype(np.float32)


def _compared(encoder: Encoder, job: Job, ask: Ask) -> list[Metric]:
    """Compare the neighbours of held-out tiles, in other groups, with those of the teacher."""
    asked = job.parts.test[:: -(-len(job.parts.test) // COMPARED)]
    student, numbers = embed_numbers(encoder, job.data, asked)
    teacher = teacher_vectors(ask, numbers)
    groups = job.data.groups[numbers]
    return neighbours_found(student, teacher, groups)


def neighbours_found(student: Floats, teacher: Floats, groups: Ints) -> list[Metric]:
    """Return how many of the teacher's nearest tiles, in other groups, the student finds.

    Args:
        student: (N, D) embeddings.
        teacher: (N, F) embeddings of the same tiles.
        groups: (N,) groups of the tiles, such as patients.
    """
    own = groups[:, None] == groups[None]
    tops = []
    for vectors in (teacher, student):
        unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        scores = unit @ unit.T
        scores[own] = -np.inf
        tops.append(np.argsort(-scores, axis=1, kind="stable")[:, :NEIGHBOURS])
    candidates = (~own).sum(1)
    rows = candidates > NEIGHBOURS
    if not rows.any():
        return []
    shared = (tops[0][:, :, None] == tops[1][:, None, :]).any(2)[rows]
    chance = float((NEIGHBOURS / candidates[rows]).mean())
    return [
        Metric(f"neighbours_found_{NEIGHBOURS}", float(shared.mean()), chance, "a random order"),
        Metric("nearest_found", float(shared[:, 0].mean()), chance, "a random order"),
    ]
