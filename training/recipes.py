"""The recipes that ``histoseek train`` offers, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..artifacts.option_models import read_options
from ..errors import unknown_name
from . import fit_arcface, fit_autoencoder, fit_classifier, fit_dac, fit_deepcluster, fit_distill
from .arcface_options import ArcFaceOptions, DistillOptions


@dataclass(frozen=True)
class Recipe:
    """A way to train: its option model, its function and a one-line description."""

    options: type[Any]
    fit: Callable[..., dict[str, Any]]
    about: str


RECIPES: dict[str, Recipe] = {
    "autoencoder": Recipe(
        fit_autoencoder.AutoencoderOptions,
        fit_autoencoder.fit,
        "papers 000 and 003: reconstruction, then k-means on the code; also a VAE; no labels",
    ),
    "classifier": Recipe(
        fit_classifier.ClassifierOptions,
        fit_classifier.fit,
        "paper 000: supervised DenseNet, or any encoder with a linear classifier",
    ),
    "dac": Recipe(
        fit_dac.DacOptions,
        fit_dac.fit,
        "paper 001: autoencoder + Deep Adaptive Clustering; DAC, DEC, AE + k-means; no labels",
    ),
    "deepcluster": Recipe(
        fit_deepcluster.DeepClusterOptions,
        fit_deepcluster.fit,
        "paper 002: DeepCluster with Sobel-AlexNet or the P4M CNN; no labels",
    ),
    "arcface": Recipe(
        ArcFaceOptions,
        fit_arcface.fit,
        "paper 004: MobileNetV3-Small, head 576-256-64, ArcFace; softmax, triplet, contrastive",
    ),
    "distill": Recipe(
        DistillOptions,
        fit_distill.fit,
        "a small student follows any encoder bundle on your own tiles; no labels",
    ),
}


def find_recipe(name: str) -> Recipe:
    """Return a recipe by name.

    Raises:
        BadInput: the name is not registered; the choices are listed.
    """
    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES)
    return RECIPES[name]


def describe_options(model: type[Any]) -> list[tuple[str, Any, str]]:
    """Return flag, default and help text (with the range) of every option of a model."""
    return [(option.flag, option.default, option.help) for option in read_options(model)]
