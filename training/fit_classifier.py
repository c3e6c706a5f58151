"""Recipe ``classifier``: the supervised net of paper 000, an encoder with a linear layer on top."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..artifacts.option_models import options
from ..artifacts.tilesets import TileSet
from ..console import Progress
from ..errors import BadInput
from ..metrics import Ints, Metric
from .data import LabelledTiles
from .evaluate import to_input
from .job import Job
from .models import Encoder
from .options import TrainingOptions
from .steps import Objective, Phase


@options
class ClassifierOptions(TrainingOptions):
    """Options of the recipe ``classifier``."""

    model: str = "densenet"
    epochs: int = 30
    batch: int = 1000
    lr: float = 1e-4
    keep_best: bool = True


class Classification(Objective):
    """Cross-entropy of the linear classifier; a tile without a label adds nothing to the loss."""

    def __init__(self, encoder: Encoder, labels: Ints) -> None:
        """Wrap an encoder with a top layer; ``labels`` (N,) covers all tiles, -1 for no label."""
        super().__init__()
        self.encoder = encoder
        self.labels = nn.Buffer(torch.from_numpy(labels), persistent=False)

    def forward(self, tiles: torch.Tensor, numbers: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return ``loss`` and ``accuracy``."""
        logits = self.encoder.classify(tiles).float()
        labels = self.labels[numbers]
        loss = nn.functional.cross_entropy(logits, labels, ignore_index=-1)
        return {"loss": loss, "accuracy": (logits.argmax(1) == labels).float().mean()}


def fit(
    options: ClassifierOptions,
    tileset: TileSet,
    out: Path,
    progress: Progress,
    selection: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train on labels, evaluate on held-out groups and write the run; unlabelled tiles are left out.

    Args:
        options: options of the recipe.
        tileset: labelled tiles.
        out: folder of the run.
        progress: called with the number done, the total and a text.
        selection: sources and exclusions of the tile set, for the record.

    Returns:
        The content of ``run.json``; ``metrics.classifier`` has accuracy and F1.

    Raises:
        BadInput: there are fewer than two labels to train on, or the data cannot be used.
        Mismatch: ``out`` holds a run with other options or data; the message names the difference.
    """
    paper = "000: supervised DenseNet"
    job = Job("classifier", paper, options, tileset, out, progress, selection)
    if job.finished is not None:
        return job.finished
    job.prepare()
    labels = job.data.labels
    job.keep(labels >= 0)
    if len(np.unique(labels[job.parts.train])) < 2:
        raise BadInput(
            f"the training part has {len(np.unique(labels[job.parts.train]))} label(s); expected at "
            "least 2: give labels by folders or a manifest"
        )
    encoder = job.build(classes=len(job.data.label_names))
    job.train(Classification(encoder, labels), [Phase("all layers", options.epochs, options.lr)])
    predicted, kept = predict(encoder, job.data, job.parts.test)
    metrics: dict[str, Any] = {}
    if len(kept):
        metrics["classifier"] = [m.as_dict() for m in _scores(predicted, labels[kept], job)]
    return job.finish(encoder, metrics)


@torch.inference_mode()
def predict(
    encoder: Encoder, data: LabelledTiles, numbers: Ints, batch: int = 256
) -> tuple[Ints, Ints]:
    """Return the predicted classes (M,) of the tiles of given indices, and the indices that were read."""
    encoder.eval()
    found, kept = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for start in range(0, len(numbers), batch):
        tiles, read = data.read(numbers[start : start + batch])
        found.append(encoder.classify(to_input(encoder, tiles)).argmax(1).cpu().numpy())
        kept.append(read)
    return np.concatenate(found), np.concatenate(kept)


def _scores(predicted: Ints, truth: Ints, job: Job) -> list[Metric]:
    """Return accuracy and macro-F1; the baseline always predicts the training part's largest class."""
    from sklearn.metrics import f1_score

    largest = np.full(len(truth), np.bincount(job.data.labels[job.parts.train]).argmax())
    rule = "always the largest class"

    def f1(given: Ints) -> float:
        return float(f1_score(truth, given, average="macro", zero_division=0))

    right, base = (float(np.mean(given == truth)) for given in (predicted, largest))
    return [
        Metric("accuracy", right, base, rule),
        Metric("macro_f1", f1(predicted), f1(largest), rule),
    ]
