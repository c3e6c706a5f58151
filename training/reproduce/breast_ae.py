"""Paper 000, table 1: k-means clusters of tumour and normal tiles, from pixels and from five codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...artifacts.tilesets import TileSet
from ...console import counted
from ...errors import BadInput
from ...metrics import Floats, Ints, contingency, match, purity
from ..data import LabelledTiles, Split, split
from ..evaluate import embed_numbers
from ..fit_classifier import predict
from ..kmeans import assign, kmeans
from . import figures
from .report import FOLDS_OVERLAP, Cell, Report, Table, difference, row, said
from .study import Study, draw, reconstruct, spread


@dataclass(frozen=True)
class Net:
    """A row of the table: its model, its published scores and how it is trained.

    Attributes:
        model: name in the registry.
        f1: published F1.
        acc: published accuracy.
        lr: learning rate.
        epochs: epochs of a full and a quick run.
        batch: batch size of the paper.
        size_px: side of a tile.
        large: whether it costs more than 2 GMACs per tile.
    """

    model: str
    f1: float
    acc: float
    lr: float = 1e-3
    epochs: tuple[int, int] = (70, 1)
    batch: int = 1000
    size_px: int = 50
    large: bool = False


NETS = {
    "FC AE": Net("fc-ae", 0.605, 0.729),
    "CNN AE": Net("cnn-ae", 0.623, 0.736),
    "AlexNet AE": Net("alexnet-ae", 0.53, 0.532, 1e-3, (40, 1), 300, 250, large=True),
    "ResNet AE": Net("resnet-ae", 0.515, 0.50, 1e-4, (4, 1), 160, 256, large=True),
    "CNN AE, no max-pool": Net("cnn-ae-no-pool", 0.651, 0.747),
}
PIXELS = "k-means on pixels"
DENSENET = "DenseNet, supervised"
PUBLISHED = {PIXELS: (0.593, 0.714), DENSENET: (0.825, 0.90)}
IDC_MAJORITY, IDC_POSITIVE_F1 = 0.7161, 0.442
COLUMNS = ("F1", "ACC (one-to-one)", "ACC (majority)")
FOLDS = 5
STEPS = 166
"""Steps of an epoch in the paper: three fifths of the IDC set's 277,524 patches, in batches of 1,000."""
SCORES_VERSION = 1
"""Increased when scores are computed otherwise, so that stored ones are not taken."""
REBUILT = 200
"""Number of held-out tiles whose reconstructions are judged."""
RULE_NAMES = {
    "minibatch": "mini-batch",
    "full": "full",
    "literal": "mini-batch as printed (eq. 10)",
}
Scores = Sequence[float]
"""F1, accuracy with one label per cluster (one to one), accuracy with each cluster's majority."""


def reproduce(study: Study) -> Report:
    """Run the seven rows on the same folds; the training part maps clusters to labels."""
    options = study.options
    folds = study.folds(FOLDS, 1)
    rule = "minibatch" if options.preset == "paper" else "full"
    names = sorted({tile.label for tile in study.tiles.tiles if tile.label is not None})
    if len(names) < 2:
        raise BadInput(
            f"the data has {len(names)} label(s); expected at least 2 (tumour and normal)"
        )
    positive = options.positive or names[-1]
    if positive not in names:
        raise BadInput(
            f"--positive {positive!r} is not a label of the data; it has {', '.join(names)}"
        )
    study.cells = folds * (len(NETS) + 1)
    report = study.report(
        "Breast histopathology: autoencoders and k-means", "000, table 1",
        seeds=f"{folds} of {study.fold_count(FOLDS)} folds, each held out once, the next one validating",
        preset=options.preset,
        clustering=f"k-means ({rule}), K = {len(names)}, on the training part's codes",
        positive=positive,
    )  # fmt: skip
    _note_differences(study, report, names)
    for net in NETS.values():
        study.check_fits(net.size_px, _tiles(study, net))
    trained = [_train(study, fold, positive) for fold in range(folds)]
    study.all_asked()
    records = {name: [fold[name] for fold in trained] for name in trained[0]}
    data = study.load(50)
    pixels = data.tiles.reshape(len(data), -1).astype(np.float32) / 255
    clusters = {name: [record["scores"]["clusters"] for record in records[name]] for name in NETS}
    clusters = {PIXELS: [], **clusters}
    trivial: list[Scores] = []
    for fold in range(folds):
        parts = _split(study, data, fold)
        trivial.append(_trivial(data, parts, positive))
        clusters[PIXELS].append(
            _score_rules(pixels[parts.train], pixels[parts.test], data, parts, positive)
        )
    scores = {name: [run[rule] for run in runs] for name, runs in clusters.items()}
    scores[DENSENET] = [record["scores"]["classifier"] for record in records[DENSENET]]
    title = f"Table 1: held-out tiles of {study.whole.name}"
    report.tables += [
        _table(title, scores, np.mean(trivial, 0).tolist()), _rules(clusters), _training(records),
    ]  # fmt: skip
    report.says = _says(report.tables[0].rows)
    extents = [f"{name}: {runs[-1]['scores']['extent']}" for name, runs in records.items()]
    report.notes.append(f"Training: {'; '.join(extents)}.")
    if study.elsewhere:
        report.notes.append(
            "Known by records (`records.json`) from another machine or an earlier run: "
            f"{counted(study.elsewhere, 'training')}."
        )
    _draw(study, report, data, folds)
    return report


def _says(rows: dict[str, list[Cell]]) -> tuple[str, str, str]:
    """Return the report's first sentences, by F1."""
    best = max(NETS, key=lambda name: rows[name][0].mean or 0.0)
    second = max(
        (name for name in NETS if name != best), key=lambda name: rows[name][0].mean or 0.0
    )
    ours, pixels, supervised = (rows[name][0] for name in (best, PIXELS, DENSENET))
    return (
        "k-means on the code of an autoencoder separates tumour from normal tissue better than on pixels: "
        "F1 .651 (CNN AE without max-pooling) and .593.",
        f"The best code is that of {best}, F1 {said(ours)}; pixels {said(pixels)}; DenseNet, with labels, "
        f"{said(supervised)} ({counted(len(ours.ours), 'fold')}); with every tile called positive "
        f"{ours.trivial:.3f}.",
        f"{best} minus pixels: {difference(ours, pixels)}; minus the next autoencoder, {second}: "
        f"{difference(ours, rows[second][0])}. The best was chosen by these values, which favours it.",
    )


def _table(title: str, scores: dict[str, list[Scores]], trivial: list[float]) -> Table:
    published = PUBLISHED | {name: (net.f1, net.acc) for name, net in NETS.items()}
    rows = {}
    for name, runs in scores.items():
        by_column = [dict(zip(COLUMNS, run, strict=True)) for run in runs]
        rows[name] = row(COLUMNS, by_column, (*published[name], None), trivial)
    trivial_is = "all-positive F1; always the training part's largest class; the held-out part's "
    return Table(title, COLUMNS, rows, f"{trivial_is}largest class")


def _rules(clusters: dict[str, list[dict[str, Scores]]]) -> Table:
    """Tabulate F1 with each rule of k-means on the same codes."""
    rows = {
        name: [Cell(None, tuple(run[rule][0] for run in runs)) for rule in RULE_NAMES]
        for name, runs in clusters.items()
    }
    title = "F1 by the rule of k-means, on the same codes"
    return Table(title, tuple(RULE_NAMES.values()), rows, compares_settings=True)


def _training(records: dict[str, list[dict[str, Any]]]) -> Table:
    """Tabulate how much of the tiles the autoencoders rebuild, and how long they trained."""
    rows = {}
    for name in NETS:
        minutes = [run["seconds"] / 60 for run in records[name] if run.get("seconds") is not None]
        rebuilt = tuple(run["scores"]["r2"] for run in records[name])
        rows[name] = [Cell(None, rebuilt, 0.0), Cell(None, tuple(minutes))]
    note = "The minutes are those of the machines that trained."
    columns = ("R² of held-out tiles", "minutes")
    trivial_is = "each tile's mean colour in place of its reconstruction"
    return Table("Reconstruction", columns, rows, trivial_is, notes=[note])


def _note_differences(study: Study, report: Report, names: list[str]) -> None:
    """Add notes on how the data and the training differ from the paper's."""
    options = study.options
    idc = study.whole.name.startswith("idc") or set(names) == {"0", "1"}
    if not idc:
        report.notes.append(
            "The published numbers are of the IDC set (198,738 negative, 78,786 positive patches), not of "
            "this data set: they only give orientation."
        )
    report.notes += [
        "AlexNet AE starts from random weights (the paper: from ImageNet's, which we do not have), with a "
        "code of 512 (the authors' settings: 256).",
        f"Batches are smaller than the paper's where an epoch would have fewer than the paper's {STEPS} "
        "steps: at least 16 tiles (AlexNet and ResNet AE: 8). AlexNet and ResNet AE take at most a quarter "
        "of the paper's batch.",
        f"On IDC, always the larger class has ACC {IDC_MAJORITY}, and all-positive has F1 "
        f"{IDC_POSITIVE_F1}: the published k-means is below this ACC, and the best autoencoder 3 points "
        "above it.",
        "The published split is one shuffle of patches, so that patients are in both parts.",
        FOLDS_OVERLAP,
    ]
    most = _epochs(study, Net.epochs)
    if most < Net.epochs[0]:
        report.fewer = f"At most {most}; the paper has 30 to 70."
    if options.epochs:
        report.notes.append("DenseNet takes a learning rate of 1e-3 instead of 1e-4.")
    if options.limit_large:
        report.notes.append(
            "AlexNet and ResNet AE are trained and judged on fewer tiles than the other rows."
        )


def _train(study: Study, fold: int, positive: str) -> dict[str, dict[str, Any]]:
    """Train the autoencoders and the DenseNet on a fold; returns the records by row."""
    options = study.options
    authors = options.preset == "authors"
    folds = study.fold_count(FOLDS)
    shared: dict[str, Any] = {
        "fold": fold, "folds": folds, "split": options.split, "judge": False,
        "record_only": True, "builds_on": {"positive": positive, "scores": SCORES_VERSION},
    }  # fmt: skip
    records = {}
    for name, net in NETS.items():
        records[name] = study(
            f"{net.model}-{fold}", "autoencoder", _tiles(study, net), model=net.model,
            epochs=_epochs(study, net.epochs),
            batch=_batch(_tiles(study, net), folds, net.batch, net.large), lr=net.lr,
            weight_decay=5e-4 if authors else 0.0, schedule="step" if authors else "constant",
            step_epochs=7, keep_best=True, kmeans="minibatch",
            score=partial(_score_autoencoder, study, net, fold, positive), **shared,
        )  # fmt: skip
    records[DENSENET] = study(
        f"densenet-{fold}", "classifier", model="densenet", epochs=_epochs(study, (30, 1)),
        batch=_batch(study.tiles, folds, 1000), lr=1e-3 if options.epochs else 1e-4,
        score=partial(_score_classifier, study, fold, positive), **shared,
    )  # fmt: skip
    return records


def _score_autoencoder(
    study: Study, net: Net, fold: int, positive: str, record: dict[str, Any]
) -> dict[str, Any]:
    """Score an autoencoder that was trained on a fold: its clusters and its reconstructions."""
    data = study.load(net.size_px, _tiles(study, net))
    parts = _split(study, data, fold)
    encoder = study.autoencoder(f"{net.model}-{fold}")
    train, train_numbers = embed_numbers(encoder, data, parts.train, unit=False)
    test, test_numbers = embed_numbers(encoder, data, parts.test, unit=False)
    readable = Split(train_numbers, parts.validate, test_numbers, parts.by)
    some = data.read(spread(test_numbers, REBUILT))[0]
    return {
        "clusters": _score_rules(train, test, data, readable, positive),
        "r2": _r2(some, reconstruct(encoder, some)),
        "extent": _extent(record),
    }


def _score_classifier(
    study: Study, fold: int, positive: str, record: dict[str, Any]
) -> dict[str, Any]:
    """Score the supervised net on the held-out part; without clusters both accuracies are the same."""
    data = study.load(50)
    encoder = study.encoder(f"densenet-{fold}")
    predicted, readable = predict(encoder, data, _split(study, data, fold).test)
    f1, right = _f1_and_accuracy(data, data.labels[readable], predicted, positive)
    return {"classifier": (f1, right, right), "extent": _extent(record)}


def _r2(tiles: NDArray[np.uint8], rebuilt: Floats) -> float:
    """Return 1 - squared error / squared error of each tile's mean colour; 0 if only that is learnt."""
    wanted = tiles.astype(np.float32) / 255
    constant = wanted.mean((1, 2), keepdims=True)
    varies = np.square(wanted - constant).sum()
    return float(1 - np.square(wanted - rebuilt).sum() / varies) if varies else 0.0


def _tiles(study: Study, net: Net) -> TileSet:
    return draw(study.tiles, study.options.limit_large) if net.large else study.tiles


def _split(study: Study, data: LabelledTiles, fold: int) -> Split:
    return split(data, study.fold_count(FOLDS), fold, 0, study.options.split, validate=True)


def _extent(record: dict[str, Any]) -> str:
    return f"{len(record['epochs'])} epochs, {record['split']['train_tiles']} tiles trained on"


def _epochs(study: Study, epochs: tuple[int, int]) -> int:
    full = min(epochs[0], study.options.epochs) if study.options.epochs else 0
    return study.pick(*epochs, full)


def _batch(tiles: TileSet, folds: int, batch: int, large: bool = False) -> int:
    """Return the batch with which an epoch has the paper's number of steps, as far as limits allow.

    Args:
        tiles: tiles of all folds.
        folds: number of folds, of which one validates and one is held out.
        batch: the largest batch: the paper's, and a quarter of it for a large net.
        large: the smallest batch is 8 instead of 16.
    """
    same_steps = len(tiles) * (folds - 2) // folds // STEPS
    return max(8, min(batch // 4, same_steps)) if large else max(16, min(batch, same_steps))


def _score_rules(
    train: Floats, test: Floats, data: LabelledTiles, parts: Split, positive: str
) -> dict[str, Scores]:
    """Score the clusters of each rule of k-means."""
    return {rule: _score(train, test, data, parts, rule, positive) for rule in RULE_NAMES}


def _score(
    train: Floats, test: Floats, data: LabelledTiles, parts: Split, rule: str, positive: str
) -> Scores:
    """Cluster and map clusters to labels on the training part, then score the held-out part."""
    classes = len(data.label_names)
    centres = kmeans(train, classes, rule, restarts=50 if rule == "full" else 10)
    clusters, held_out = assign(train, centres), assign(test, centres)
    labels, truth = data.labels[parts.train], data.labels[parts.test]
    one_to_one = np.zeros(classes, dtype=np.int64)
    one_to_one[clusters] = match(labels, clusters)
    counts = contingency(labels, clusters)
    majority = np.zeros(classes, dtype=np.int64)
    majority[: len(counts)] = counts.argmax(1)
    f1, right = _f1_and_accuracy(data, truth, one_to_one[held_out], positive)
    return f1, right, float(np.mean(majority[held_out] == truth))


def _f1_and_accuracy(
    data: LabelledTiles, truth: Ints, predicted: Ints, positive: str
) -> tuple[float, float]:
    from sklearn.metrics import f1_score

    number = data.label_names.index(positive)
    f1 = float(f1_score(truth == number, predicted == number, zero_division=0))
    return f1, float(np.mean(predicted == truth))


def _trivial(data: LabelledTiles, parts: Split, positive: str) -> Scores:
    """Score the held-out part without a model.

    Returns:
        F1 if all tiles are called positive, accuracy of the training part's largest class, and purity of a
        single cluster.
    """
    truth = data.labels[parts.test]
    share = float(np.mean(truth == data.label_names.index(positive)))
    majority = float(np.mean(truth == np.bincount(data.labels[parts.train]).argmax()))
    return 2 * share / (1 + share), majority, purity(truth, np.zeros(len(truth), dtype=np.int64))


def _draw(study: Study, report: Report, small: LabelledTiles, folds: int) -> None:
    """Draw the first fold whose weights are here."""
    fold = next((fold for fold in range(folds) if _has_weights(study, fold)), None)
    if fold is None:
        report.notes.append("No pictures: of no fold are the weights of all autoencoders here.")
        return
    test = _split(study, small, fold).test
    images: figures.Images = {"tiles": small.tiles[spread(test, 10)]}
    lines: dict[str, list[float]] = {}
    for name, net in NETS.items():
        tiles = images["tiles"]
        if net.large:
            data = study.load(net.size_px, _tiles(study, net))
            tiles = data.tiles[spread(_split(study, data, fold).test, 10)]
            images[f"tiles, {net.size_px} px"] = tiles
        images[name] = reconstruct(study.autoencoder(f"{net.model}-{fold}"), tiles)
        lines[name] = [epoch["mse"] for epoch in study.record(f"{net.model}-{fold}")["epochs"]]
    file = figures.reconstructions(study.out / "reconstructions.png", images)
    report.add_figure(file, f"Held-out tiles and their reconstructions, fold {fold}")
    file = figures.curves(study.out / "loss.png", lines, "epoch", "mean squared error of a pixel")
    report.add_figure(file, f"Training error by epoch, fold {fold}")
    vectors, readable = embed_numbers(study.encoder(f"cnn-ae-no-pool-{fold}"), small, test)
    file = study.tsne("tsne.png", vectors, small, readable, "CNN AE, no max-pool")
    caption = f"t-SNE of the codes of held-out tiles, CNN AE without max-pool, fold {fold}"
    report.add_figure(file, caption)


def _has_weights(study: Study, fold: int) -> bool:
    return all(study.has_weights(f"{net.model}-{fold}") for net in NETS.values())
