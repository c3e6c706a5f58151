"""What ``histoseek train`` does, apart from parsing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import console
from ..errors import BadInput
from ..files import write_json
from ..tilesets import TileSet, concatenate, open_tiles
from .models import MODELS, build
from .recipes import RECIPES, Recipe, describe_options, find_recipe, parse_options


def show_recipes() -> None:
    """Print every recipe with its options, and every model with its size."""
    models = {}
    for name in MODELS:
        model = build(name)
        models[name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "size_px": model.size_px,
            "dim": model.dim,
        }
    options = {name: describe_options(recipe) for name, recipe in RECIPES.items()}
    document = {
        "recipes": {
            name: {
                "about": RECIPES[name].about,
                "options": [{"flag": f, "default": d, "meaning": m} for f, d, m in rows],
            }
            for name, rows in options.items()
        },
        "models": models,
    }

    def human() -> None:
        rows = [(n, m["parameters"], m["size_px"], m["dim"]) for n, m in models.items()]
        console.table("Models", ("name", "parameters", "tile px", "embedding"), rows)
        for name, recipe in RECIPES.items():
            console.say(f"\n{name}: {recipe.about}")
            console.table("", ("option", "default", "meaning"), options[name])

    console.emit(document, human)


def select(sources: Sequence[Path], exclude: Sequence[str], label_from: Sequence[str]) -> TileSet:
    """Open the sources as one tile set, without what is excluded.

    Raises:
        BadInput: an exclusion that is not COLUMN=VALUE or matches nothing.
    """
    parts = [open_tiles(source) for source in sources]
    for rule in exclude:
        column, equals, values = rule.partition("=")
        if not equals or not values:
            raise BadInput(f"--exclude {rule!r}; expected COLUMN=VALUE[,VALUE…]")
        less = [part.without(column, values.split(",")) for part in parts]
        if sum(map(len, less)) == sum(map(len, parts)):
            raise BadInput(f"--exclude {rule!r} matches no tile; check the column and the values")
        parts = less
    if list(label_from) != ["label"]:
        parts = [part.relabelled(label_from) for part in parts]
    whole = concatenate(parts)
    return whole


def train(
    name: str,
    sources: Sequence[Path],
    out: Path,
    exclude: Sequence[str],
    label_from: Sequence[str],
    cross_validate: bool,
    words: list[str],
) -> None:
    """Train one run, or one per fold."""
    recipe = find_recipe(name)
    options = parse_options(recipe, words)
    tiles = select(sources, exclude, label_from)
    selection = {
        "sources": [str(s) for s in sources],
        "exclude": list(exclude),
        "label_from": list(label_from),
    }
    if cross_validate:
        _every_fold(recipe, options, tiles, out, selection)
        return
    record = _one(recipe, options, tiles, out, selection)
    if record:  # only the first process of several has one
        console.emit(record, lambda: show_run(record, out))


def _one(
    recipe: Recipe, options: Any, tiles: TileSet, out: Path, selection: dict[str, Any]
) -> dict[str, Any]:
    with console.progress("training") as progress:
        return recipe.fit(options, tiles, out, progress, selection)


def _every_fold(
    recipe: Recipe, options: Any, tiles: TileSet, out: Path, selection: dict[str, Any]
) -> None:
    if options.folds < 2:
        raise BadInput(f"--cross-validate with folds {options.folds}; expected at least 2")
    records = [
        _one(recipe, replace(options, fold=fold), tiles, out / f"fold-{fold}", selection)
        for fold in range(options.folds)
    ]
    summary = {
        side: summarise([r["metrics"][side] for r in records]) for side in records[0]["metrics"]
    }
    document = {"folds": options.folds, "summary": summary}
    write_json(out / "cross_validation.json", document)

    def human() -> None:
        random = summary["random_init"]
        rows = [
            (name, row["mean"], row["sd"], row["baseline"], random.get(name, {}).get("mean"))
            for name, row in summary["trained"].items()
        ]
        columns = ("metric", "mean", "sd", "trivial baseline", "random weights")
        console.table(f"{options.folds} folds", columns, rows)

    console.emit(document, human)


def flat_metrics(side: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return every metric of a record's side by one name, such as ``hdbscan.ari``."""
    rows = {row["name"]: row for row in side["retrieval"]}
    for part, content in side.items():
        if isinstance(content, dict):
            rows |= {f"{part}.{row['name']}": row for row in content["scores"]}
    return rows


def summarise(sides: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return mean and standard deviation over folds of every metric."""
    tables = [flat_metrics(side) for side in sides]

    def over_folds(name: str, key: str) -> list[float]:
        return [t[name][key] for t in tables if name in t and t[name][key] is not None]

    return {
        name: {
            "mean": float(np.mean(over_folds(name, "value"))),
            "sd": float(np.std(over_folds(name, "value"))),
            "baseline": float(np.mean(over_folds(name, "baseline"))),
        }
        for name in tables[0]
        if over_folds(name, "value") and over_folds(name, "baseline")
    }


def show_run(record: dict[str, Any], out: Path) -> None:
    """Print what a run reached, beside its baselines."""
    data, split = record["data"], record["split"]
    console.say(
        f"{out}: {split['train_tiles']} tiles trained on, {split['held_out_tiles']} held out by "
        f"{split['by']}, {record['seconds']:.0f} s"
    )
    for reason in data["unreadable"]:
        console.say(f"left out: {reason}")
    if record["metrics"]:
        trained = flat_metrics(record["metrics"]["trained"])
        random = flat_metrics(record["metrics"]["random_init"])
        rows = [
            (name, row["value"], random.get(name, {}).get("value"), row["baseline"])
            for name, row in trained.items()
        ]
        console.table("Held-out tiles", ("metric", "trained", "random weights", "trivial"), rows)
        kinds = dict.fromkeys((r["baseline_is"], n.split(".")[-1]) for n, r in trained.items())
        meaning = {text: [n for t, n in kinds if t == text] for text, _ in kinds}
        for text, names in meaning.items():
            console.say(f"trivial = {text}: {', '.join(names)}")
