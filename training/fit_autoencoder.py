"""Recipe ``autoencoder``: papers 000 and 003, an encoder trained to reconstruct its tiles, without labels.

k-means or mini-batch k-means clusters the latents and, as a baseline, the raw pixels. The model ``vae``
trains the variational form.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import nn

from ..artifacts.option_models import Field, options
from ..artifacts.tilesets import TileSet
from ..console import Progress
from ..errors import BadInput
from .distributed import processes
from .job import Job
from .kmeans import fit_clusters
from .losses import full_precision, gaussian_divergence
from .models import AutoEncoder
from .models.vae import VariationalAutoEncoder
from .options import TrainingOptions
from .steps import Objective, Phase


@options
class AutoencoderOptions(TrainingOptions):
    """Options of the recipe ``autoencoder``."""

    model: str = "cnn-ae-no-pool"
    epochs: int = 70
    batch: int = 1000
    weight_decay: float = 5e-4
    keep_best: bool = True
    # fmt: off
    pixel_loss: Annotated[Literal["squared", "cross-entropy"],
        Field(description="Loss of a reconstructed pixel: squared error or binary cross-entropy. The "
        "latter needs a model that ends in a sigmoid.")] = "squared"
    reduction: Annotated[Literal["sum", "mean"],
        Field(description="Loss: sum over pixels and batch (as in the code of paper 000) or mean. With "
        "mean, the same weight decay has far more effect.")] = "sum"
    beta: Annotated[float,
        Field(ge=0, le=1000, description="Weight of the divergence in a variational autoencoder.")] = 1.0
    clusters: Annotated[int,
        Field(ge=0, description="Number of k-means clusters; 0: the number of classes, but at least "
        "2.")] = 0
    kmeans: Annotated[Literal["full", "minibatch", "literal"],
        Field(description="Algorithm of k-means: full, minibatch (Sculley 2010) or literal (equation 10 "
        "of paper 000).")] = "full"
    # fmt: on


class Reconstruction(Objective):
    """The loss between a tile and its reconstruction; for a VAE, plus the weighted KL divergence.

    Reduction ``sum`` adds up over pixels and, in training, over the tiles of the batch on all processes;
    ``mean`` averages over both.
    """

    def __init__(self, encoder: AutoEncoder, options: AutoencoderOptions) -> None:
        """Wrap an autoencoder."""
        super().__init__()
        self.encoder: AutoEncoder = encoder
        self.options = options

    def forward(self, tiles: torch.Tensor, numbers: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return ``loss`` and ``mse``, the mean squared error per pixel."""
        divergence = None
        if isinstance(self.encoder, VariationalAutoEncoder):
            mean, log_variance, drawn, seen = self.encoder.sample(tiles)
            divergence = gaussian_divergence(mean, log_variance)
            if not self.training:
                drawn = self.encoder.decoder(mean)
        else:
            _, drawn, seen = self.encoder.reconstruct(tiles)
        error = (drawn.float() - seen.float()).square().flatten(1)
        mse, pixels = error.mean(), error.shape[1]
        per_pixel = mse
        if self.options.pixel_loss == "cross-entropy":
            with full_precision(drawn):
                per_pixel = nn.functional.binary_cross_entropy(drawn.float(), seen.float())
        whole = pixels if self.options.reduction == "sum" else 1
        loss = per_pixel * whole
        losses = {"mse": mse}
        if divergence is not None:
            loss = loss + self.options.beta * divergence * whole / pixels
            losses["divergence"] = divergence
        if self.options.reduction == "sum" and self.training:
            loss = loss * len(tiles) * processes()
        return {"loss": loss, **losses}


def fit(
    options: AutoencoderOptions,
    tileset: TileSet,
    out: Path,
    progress: Progress,
    selection: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train, cluster the latents, evaluate on held-out groups and write the run.

    Args:
        options: options of the recipe.
        tileset: tiles; labels are used for evaluation only.
        out: folder of the run.
        progress: called with the number done, the total and a text.
        selection: sources and exclusions of the tile set, for the record.

    Returns:
        The content of ``run.json``.

    Raises:
        BadInput: the model has no decoder or does not fit ``pixel_loss``, or the data cannot be used.
        Mismatch: ``out`` holds a run with other options or data; the message names the difference.
    """
    paper = "000 and 003: autoencoder, k-means on the latents"
    job = Job("autoencoder", paper, options, tileset, out, progress, selection)
    if job.finished is not None:
        return job.finished
    job.prepare()
    encoder = job.build()
    if not isinstance(encoder, AutoEncoder):
        raise BadInput(f"model {options.model!r} has no decoder; --list shows which have one")
    last = [
        m for m in encoder.decoder.modules() if not isinstance(m, nn.Sequential | nn.Unflatten)
    ][-1]
    if options.pixel_loss == "cross-entropy" and not isinstance(last, nn.Sigmoid):
        raise BadInput(
            f"pixel_loss is 'cross-entropy', but model {options.model!r} does not end in a sigmoid; "
            "expected 'squared'"
        )
    job.train(
        Reconstruction(encoder, options), [Phase("reconstruction", options.epochs, options.lr)]
    )
    classes = len(np.unique(job.data.labels[job.data.labels >= 0]))
    k = options.clusters or max(2, classes)
    tensors, scores = fit_clusters(encoder, job.data, job.parts, k, options.kmeans, options.seed)
    return job.finish(encoder, {"clusters": scores}, tensors)
