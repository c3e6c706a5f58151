"""Recipes by name, and their options from text: what ``histoseek train`` offers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from ..errors import BadInput, unknown_name
from . import fit_arcface, fit_autoencoder, fit_classifier, fit_dac, fit_deepcluster


@dataclass(frozen=True)
class Recipe:
    """A way to train: its options, its function, and one line on what it is."""

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
        fit_arcface.ArcFaceOptions,
        fit_arcface.fit,
        "paper 004: MobileNetV3-Small, head 576-256-64, ArcFace; softmax, triplet, contrastive",
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


def describe_options(recipe: Recipe) -> list[tuple[str, Any, str]]:
    """Return flag, default and meaning of every option, from the dataclass and its docstring."""
    meaning: dict[str, str] = {}
    for part in reversed(recipe.options.__mro__):  # what a recipe says of an option goes first
        text = inspect.getdoc(part) or "" if part is not object else ""
        meaning |= re.findall(r"^    (\w+): (.+(?:\n        .+)*)", text, re.MULTILINE)
    return [
        (f"--{f.name.replace('_', '-')}", f.default, " ".join(meaning.get(f.name, "").split()))
        for f in fields(recipe.options)
        if f.default is not MISSING
    ]


def parse_options(recipe: Recipe, words: list[str]) -> Any:
    """Turn ``--name value`` pairs (or ``--flag`` / ``--no-flag``) into the recipe's options.

    Raises:
        BadInput: an option that the recipe does not have, a missing value, or one of a wrong type.
    """
    types = get_type_hints(recipe.options)
    values: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, _, glued = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        off = name.startswith("no_") and types.get(name[3:]) is bool
        key = name[3:] if off else name
        if not word.startswith("--") or key not in types:
            choices = ", ".join(flag for flag, _, _ in describe_options(recipe))
            raise BadInput(f"unknown option {word!r}; this recipe has: {choices}")
        if types[key] is bool and not glued:
            values[key] = not off
            continue
        if not glued and not rest:
            raise BadInput(f"{word} needs a value of type {types[key].__name__}")
        text = glued or rest.pop(0)
        try:
            values[key] = TypeAdapter(types[key]).validate_python(text)
        except ValidationError as error:
            wanted = types[key].__name__
            raise BadInput(f"{word} is {text!r}; expected a value of type {wanted}") from error
    return recipe.options(**values)
