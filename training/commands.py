"""The commands behind ``histoseek train`` and ``histoseek reproduce``, without argument parsing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import console
from ..artifacts.files import write_json
from ..artifacts.tilesets import TileSet, concatenate
from ..artifacts.walking import summarised
from ..errors import BadInput
from ..metrics import flat_rows
from .evaluate import JUDGED
from .layouts import open_data
from .models import MODELS, build, model_options
from .models.cost import parameters
from .models.cost import summarise as summarise_model
from .options import TrainingOptions
from .recipes import RECIPES, Recipe, describe_options, find_recipe
from .reproduce import PROTOCOLS, find_protocol
from .reproduce import reproduce as run_protocol
from .study_options import StudyOptions

Choice = Callable[[Sequence[Path]], TileSet]
TITLES = {"trained": "trained", "random_init": "random weights", "pixels": "pixels"}


def show_recipes() -> None:
    """Print every recipe with its options, and every model with its size, cost and source."""
    models = {name: _model_facts(name) for name in MODELS}
    options = {name: describe_options(recipe.options) for name, recipe in RECIPES.items()}
    protocols = {name: protocol.about for name, protocol in PROTOCOLS.items()}
    document = {
        "recipes": {
            name: {
                "about": RECIPES[name].about,
                "options": [{"flag": f, "default": d, "meaning": m} for f, d, m in rows],
            }
            for name, rows in options.items()
        },
        "models": models,
        "protocols": protocols,
    }

    def human() -> None:
        facts = [
            (n, m["input"], m["dim"], f"{m['parameters']:,}", m["macs"], m["paper"])
            for n, m in models.items()
        ]
        columns = ("model", "input", "dim", "parameters", "MACs", "paper")
        console.table("Models, with decoder or classifier as in the paper", columns, facts)
        choices = [
            (n, ", ".join(f"{k}={v}" for k, v in m["options"].items())) for n, m in models.items()
        ]
        console.table("Model options (--model-options name=value,…)", ("model", "options"), choices)
        for name, recipe in RECIPES.items():
            console.say(f"\n{name}: {recipe.about}")
            own = [row for row in options[name] if row not in _SHARED]
            console.table("", ("option", "default", "meaning"), _exact(own))
        console.table("Options of every recipe", ("option", "default", "meaning"), _exact(_SHARED))
        console.table("histoseek reproduce", ("protocol", "what"), list(protocols.items()))

    console.emit(document, human)


_SHARED = describe_options(TrainingOptions)


def _exact(rows: list[tuple[str, Any, str]]) -> list[tuple[str, str, str]]:
    """Return the rows with their defaults in full; a table would round a learning rate to 0.000."""
    return [(flag, str(default), meaning) for flag, default, meaning in rows]


def _model_facts(name: str) -> dict[str, Any]:
    with torch.device("meta"):  # shapes only: allocates and computes nothing
        model = build(name)
        cost = sum(layer.macs for layer in summarise_model(model))
    return {
        "parameters": parameters(model),
        "macs": f"{cost / 1e6:,.2f} M",
        "input": f"{1 if model.grey else 3}x{model.size_px}x{model.size_px}",
        "size_px": model.size_px,
        "dim": model.dim,
        "paper": MODELS[name].paper,
        "options": {k: v for k, v in model_options(name).items() if k != "size_px"},
    }


def dry_run(name: str, options: TrainingOptions, sources: Sequence[Path], choose: Choice) -> None:
    """Print the model's layers with their cost, and the size of the training on the data."""
    with torch.device("meta"):
        model = build(**options.architecture())
        layers = summarise_model(model)
    macs = sum(layer.macs for layer in layers)
    tiles = len(choose(sources)) if sources else None
    document: dict[str, Any] = {
        "recipe": name,
        "options": asdict(options),
        "architecture": options.architecture(),
        "layers": [asdict(layer) for layer in layers],
        "parameters": parameters(model),
        "macs_per_tile": macs,
        "embedding": model.dim,
    }
    if tiles is not None:
        held = 0 if not options.folds else 1 + options.validates
        trained = tiles - tiles * held // max(1, options.folds)
        document |= {
            "tiles": tiles,
            "tiles_trained_on": trained,
            "pixels_bytes": tiles * model.size_px**2 * 3,
            "epochs": options.all_epochs(),
            "training_macs": 3 * macs * trained * options.all_epochs(),
        }

    def human() -> None:
        rows = [
            (r.name, r.kind, " x ".join(map(str, r.output)), f"{r.parameters:,}", f"{r.macs:,}")
            for r in layers
        ]
        columns = ("layer", "kind", "output", "parameters", "MACs")
        console.table(f"{options.model}: forward pass of one tile", columns, rows)
        console.say(
            f"{parameters(model):,} parameters, {macs / 1e6:,.2f} M multiply-adds per tile, embedding "
            f"of {model.dim}"
        )
        if tiles is not None:
            console.say(
                f"{tiles:,} tiles ({document['pixels_bytes'] / 2**20:,.0f} MiB of pixels), about "
                f"{document['tiles_trained_on']:,} of them to train on, {options.all_epochs()} epochs: "
                f"about {document['training_macs'] / 1e12:,.1f} T multiply-adds "
                "(a step costs 3 forward passes)"
            )
        console.say("nothing was trained (--dry-run)")

    console.emit(document, human)


def select(
    sources: Sequence[Path],
    exclude: Sequence[str],
    label_from: Sequence[str],
    shared_groups: bool = False,
) -> TileSet:
    """Open the sources as one tile set, without the excluded tiles.

    Raises:
        BadInput: an exclusion is not COLUMN=VALUE or matches nothing.
    """
    parts = [open_data(source) for source in sources]
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
    whole = concatenate(parts, shared_groups)
    for line in [*whole.notes, *summarised(whole.left_out)]:
        console.say(line)
    return whole


def _of_data(tiles: TileSet) -> dict[str, Any]:
    """Return, ready for JSON, what was recognised and what was left out while reading the data."""
    return {"notes": list(tiles.notes), "left_out": [left._asdict() for left in tiles.left_out]}


def train(
    name: str,
    options: TrainingOptions,
    sources: Sequence[Path],
    out: Path,
    exclude: Sequence[str],
    label_from: Sequence[str],
    cross_validate: bool,
    shared_groups: bool = False,
) -> None:
    """Train one run, or one per fold."""
    recipe = find_recipe(name)
    tiles = select(sources, exclude, label_from, shared_groups)
    selection: dict[str, Any] = {
        "sources": [str(s) for s in sources],
        "exclude": list(exclude),
        "label_from": list(label_from),
    }
    if shared_groups:
        selection["shared_groups"] = True
    if cross_validate:
        _every_fold(recipe, options, tiles, out, selection)
        return
    record = _one(recipe, options, tiles, out, selection)
    if record:  # of several processes only the first has a record
        console.emit({**record, **_of_data(tiles)}, lambda: show_run(record, out))


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
    if not all(records):  # of several processes only the first has records
        return
    summary = {
        side: summarise([flat_rows(r["metrics"][side]) for r in records])
        for side in records[0]["metrics"]
    }
    document = {"folds": options.folds, "summary": summary, **_of_data(tiles)}
    write_json(out / "cross_validation.json", document)

    def human() -> None:
        for side, rows in summary.items():
            shown = [(name, row["mean"], row["sd"], row["baseline"]) for name, row in rows.items()]
            columns = ("metric", "mean", "sd", "trivial baseline")
            console.table(f"{options.folds} folds: {TITLES.get(side, side)}", columns, shown)

    console.emit(document, human)


def summarise(tables: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Return the mean and standard deviation of every metric over the folds."""

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
    """Print the results of a run next to its baselines."""
    data, split = record["data"], record["split"]
    console.say(
        f"{out}: {split['train_tiles']} tiles for training, {split['held_out_tiles']} held out by "
        f"{split['by']}, {record['seconds']:.0f} s"
    )
    for reason in data["unreadable"]:
        console.say(f"left out: {reason}")
    judged = {side: flat_rows(record["metrics"].get(side)) for side in JUDGED}
    meaning: dict[str, list[str]] = {}
    if judged["trained"]:
        rows = [
            (name, *(judged[side].get(name, {}).get("value") for side in JUDGED), row["baseline"])
            for name, row in judged["trained"].items()
        ]
        columns = ("metric", *(TITLES[side] for side in JUDGED), "trivial")
        console.table("Held-out tiles", columns, rows)
    own = flat_rows({k: v for k, v in record["metrics"].items() if k not in JUDGED})
    if own:
        rows = [(name, row["value"], row["baseline"]) for name, row in own.items()]
        console.table(f"Recipe {record['recipe']}", ("metric", "value", "trivial"), rows)
    for name, row in {**judged["trained"], **own}.items():
        names = meaning.setdefault(row["baseline_is"], [])
        if name.split(".")[-1] not in names:
            names.append(name.split(".")[-1])
    for text, names in meaning.items():
        console.say(f"trivial = {text}: {', '.join(names)}")


def reproduce(name: str, sources: Sequence[Path], choose: Choice, options: StudyOptions) -> None:
    """Run a paper's protocol and print the path of its report."""
    find_protocol(name)
    tiles = choose(sources)
    with console.progress(f"reproduce {name}") as progress:
        document = run_protocol(name, options, tiles, progress)

    def human() -> None:
        if options.train_only:
            cells = document["trained"]
            console.say(
                f"trained here: {', '.join(cells) or 'nothing'}; the same command without --train-only "
                "writes the report"
            )
            return
        for table in document["tables"]:
            rows = [
                (row, metric, cell["published"], cell["mean"], cell["sd"], cell["trivial"])
                for row, cells in table["rows"].items()
                for metric, cell in cells.items()
            ]
            columns = ("", "metric", "published", "ours", "sd", "trivial")
            console.table(table["title"], columns, rows)
        for note in document["notes"]:
            console.say(f"note: {note}")
        console.say(f"{options.out / 'report.md'}: the report with figures; report.json beside it")

    console.emit(document, human)
