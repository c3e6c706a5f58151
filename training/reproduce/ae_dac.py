"""Paper 001, table 2: NMI, ARI and ACC of k-means, AE + k-means, DEC, DAC and AE + DAC on a data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...console import counted
from ...errors import BadInput
from ...metrics import clustering_report, contingency
from ..fit_dac import codes_of
from ..kmeans import assign, kmeans
from ..models.dac import ClusteringAutoEncoder
from . import figures
from .report import Cell, Report, Table, difference, fewer_epochs, row, said
from .study import Study, first_classes, reconstruct, spread, values

Scores = dict[str, float]
Records = list[dict[str, Any]]
"""One record per seed."""

COLUMNS = ("NMI %", "ARI %", "ACC %")
NAMES = ("nmi", "ari", "accuracy")
METHODS = {"AE + k-means": "ae-kmeans", "DEC": "dec", "DAC": "dac", "AE + DAC": "ae-dac"}
SIZES = {28: "dac-fmnist", 32: "dac-cifar", 96: "dac-stl"}
# Table 2 of the paper, NMI/ARI/ACC in %. The paper's "GLWTDN" is an autoencoder with k-means.
PUBLISHED: dict[str, dict[str, tuple[float, float, float]]] = {
    "fashion-mnist": {
        "k-means on pixels": (18.55, 14.37, 22.89), "AE + k-means": (20.31, 18.72, 25.74),
        "DEC": (60.54, 58.43, 65.25), "DAC": (65.38, 62.41, 70.52), "AE + DAC": (70.66, 69.43, 75.21),
    },
    "cifar10": {
        "k-means on pixels": (8.71, 4.87, 22.89), "AE + k-means": (23.93, 16.89, 31.35),
        "DEC": (25.68, 16.07, 30.10), "DAC": (43.79, 33.99, 47.78), "AE + DAC": (46.39, 42.25, 52.25),
    },
    "cifar100": {
        "k-means on pixels": (8.39, 2.80, 12.97), "AE + k-means": (10.04, 4.76, 16.45),
        "DEC": (13.58, 4.95, 18.52), "DAC": (21.24, 11.00, 25.52), "AE + DAC": (25.46, 16.10, 30.47),
    },
    "stl10": {
        "k-means on pixels": (12.45, 6.08, 19.20), "AE + k-means": (24.96, 16.10, 30.30),
        "DEC": (27.60, 18.61, 35.90), "DAC": (40.33, 28.64, 48.18), "AE + DAC": (44.31, 33.08, 52.12),
    },
}  # fmt: skip
# Table 4: AE + DAC on the first k classes, NMI/ARI/ACC in %.
BY_CLUSTERS: dict[str, dict[int, tuple[float, float, float]]] = {
    "cifar10": {
        5: (48.12, 42.53, 52.33), 6: (47.82, 42.02, 51.12), 7: (47.39, 41.79, 51.02),
        8: (46.64, 41.52, 50.51), 9: (46.52, 41.27, 50.32), 10: (46.39, 40.25, 50.25),
    },
    "cifar100": {
        10: (26.67, 21.72, 35.33), 12: (26.03, 21.47, 35.10), 14: (25.81, 21.32, 34.27),
        16: (25.72, 21.04, 33.43), 18: (25.67, 20.53, 31.25), 20: (25.46, 20.10, 30.47),
    },
    "stl10": {
        5: (45.01, 34.82, 53.35), 6: (44.96, 34.51, 52.98), 7: (44.72, 34.03, 52.17),
        8: (44.56, 33.87, 51.55), 9: (44.33, 33.53, 51.23), 10: (44.31, 33.08, 51.12),
    },
}  # fmt: skip
CHANGED: dict[str, Any] = {"rotation_deg": 10.0, "shift": 0.1, "zoom": 0.05}
"""The random changes of tiles in DAC's released code for MNIST."""
SWITCHES: dict[str, dict[str, Any]] = {
    "as in paper 001": {},
    "tiles changed at random": {**CHANGED, "super_batch": 128},
    "1,280 tiles labelled once for 5 passes": {"super_batch": 1280, "inner": 5},
    "RMSprop, 1e-3": {"optimiser": "rmsprop", "lr_cluster": 1e-3},
    "one threshold, .99 to .75": {"thresholds": "released", "eta": -1.0},
    "all four": {
        **CHANGED, "super_batch": 1280, "inner": 5, "optimiser": "rmsprop", "lr_cluster": 1e-3,
        "thresholds": "released", "eta": -1.0,
    },
    "all four, outputs held": {
        **CHANGED, "super_batch": 1280, "inner": 5, "optimiser": "rmsprop", "lr_cluster": 1e-3,
        "thresholds": "released", "eta": -1.0, "anchor": 10.0,
    },
}  # fmt: skip
"""What DAC's released code does and paper 001 does not say, one at a time and together."""
SIGN_RULES: dict[str, tuple[str, Callable[..., Any]]] = {
    "fewest tiles moved": ("moved", min), "most even sizes": ("even", max), "most sure": ("sure", max),
}  # fmt: skip
"""Where to stop by what :class:`~histoseek.training.fit_dac.Clustering` tells without labels."""
WEIGHTS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Of the paper's grid, every second."""
SCHEDULE = {"pretrain": (50, 1), "clustering": (75, 2)}
"""Epochs of a full and a quick run; the paper states no number, but its thresholds meet after 75."""


def reproduce(study: Study) -> Report:
    """Run table 2 on all tiles without a split, as the paper does.

    ``parts`` adds table4, grid and switches (what DAC's released code does differently).
    """
    options = study.options
    side = study.tiles.read(0).shape[0]
    size_px = options.size_px or min(SIZES, key=lambda size: abs(size - side))
    if size_px not in SIZES:
        raise BadInput(
            f"--size-px is {size_px}; the paper's nets are for {', '.join(map(str, SIZES))} px"
        )
    seeds = study.pick(5, 1, options.seeds)
    pretrain = study.pick(*SCHEDULE["pretrain"], options.epochs and max(1, options.epochs // 2))
    epochs = study.pick(*SCHEDULE["clustering"], options.epochs)
    every = max(1, epochs // 5)
    common: dict[str, Any] = {
        "model": SIZES[size_px], "judge": False, "judge_every": every, "lr_cluster": 1e-4,
        "eta": 0.0 if epochs < 75 else -1.0,
    }  # fmt: skip
    extra = (len(SWITCHES) - 1) * seeds * ("switches" in study.parts)
    study.cells = 4 * seeds + extra + 25 * ("grid" in study.parts)
    report = study.report(
        "AE + DAC", "001 (convolutional autoencoder + Deep Adaptive Clustering), table 2",
        split="none: train and test together, as the paper has it; labels only judge",
        seeds=seeds, epochs=f"{pretrain} of reconstruction, then {epochs} of clustering",
        network=f"{SIZES[size_px]}, batch 128, Adam 1e-3, then {common['lr_cluster']}",
    )  # fmt: skip
    first = fewer_epochs(pretrain, SCHEDULE["pretrain"][0], of=" of reconstruction")
    then = fewer_epochs(epochs, SCHEDULE["clustering"][0], of=" of clustering")
    report.fewer = f"{first} {then}".strip()
    if epochs < 75:
        report.notes.append(
            f"{epochs} epochs of clustering instead of the 75 after which the paper's thresholds meet; the "
            "thresholds move faster here, to meet in time (eta = 0.4091 / (1.1 (epochs - 1)))."
        )
    report.notes += [
        "The losses are corrected: pairs below the lower threshold count, similarities are cosines, and "
        "the penalty is u - l. As printed, the pair loss is always 0.",
        "ACC is Hungarian accuracy; with K = number of classes it cannot be below 1/K.",
    ]
    classes = len({tile.label for tile in study.tiles.tiles})
    runs = _Runs(study, pretrain, epochs, common)
    study.check_fits(size_px)
    records = _train(runs, seeds)
    switches = _train_switches(runs, seeds) if "switches" in study.parts else {}
    first_k = _train_first_k(runs, seeds, classes) if "table4" in study.parts else {}
    grid = _train_grid(runs) if "grid" in study.parts else {}
    study.all_asked()
    pixels = _pixels(study, size_px, seeds)
    scores = {name: [_scores(record) for record in found] for name, found in records.items()}
    history = {
        name: [_curve(record, "accuracy") for record in found] for name, found in records.items()
    }
    published = PUBLISHED.get(study.data_name, {})
    rows = {
        name: row(NAMES, runs, published.get(name), (0.0, 0.0, 100 / classes), 100)
        for name, runs in {"k-means on pixels": pixels, **scores}.items()
    }
    trivial_is = "NMI and ARI of clusters drawn at random; ACC 1/K"
    report.tables.append(Table(f"Table 2, {study.whole.name}", COLUMNS, rows, trivial_is, digits=2))
    report.says = _says(study, rows)
    if switches:
        _switches(study, report, runs, switches)
    if first_k:
        report.tables.append(_by_clusters(study, first_k))
    curves = {name: np.mean(runs, 0).tolist() for name, runs in history.items() if len(runs[0]) > 1}
    report.add_figure(
        figures.curves(
            study.out / "accuracy.png", curves, "epoch of clustering",
            "Hungarian accuracy, mean over seeds", at=[*range(every, epochs, every), epochs],
        ),
        "Accuracy while clustering (paper 001, figure 3)",
    )  # fmt: skip
    if study.elsewhere:
        report.notes.append(
            "Known by records (`records.json`) from another machine or an earlier run: "
            f"{counted(study.elsewhere, 'training')}. What the figures show, and what new trainings start "
            "with, was trained again."
        )
    _draw(runs, report, size_px)
    if grid:
        _grid(runs, report, grid)
    return report


def _says(study: Study, rows: dict[str, list[Cell]]) -> tuple[str, str, str]:
    """Return the report's first sentences."""
    ours, dac, pixels = (rows[name][-1] for name in ("AE + DAC", "DAC", "k-means on pixels"))
    claim = "Clusters of AE + DAC are better than those of DAC alone"
    if ours.published is not None and dac.published is not None:
        claim += f": on {study.data_name} {ours.published} % are right instead of {dac.published} %"
    both = zip(COLUMNS, rows["AE + DAC"], rows["DAC"], strict=True)
    differences = {column: difference(one, other, 1) for column, one, other in both}
    meaning = "AE + DAC minus DAC, in points: " + "; ".join(
        f"{column.removesuffix(' %')} {text}" for column, text in reversed(differences.items())
    )
    if ours.published is not None and ours.mean is not None:
        reached = ours.published - ours.mean <= (ours.sd or 0)
        away = f"{ours.mean - ours.published:+.1f} points"
        meaning += f"; the published number is {'' if reached else 'not '}reached ({away})"
    out = (
        f"AE + DAC has {said(ours, 1)} % right, DAC {said(dac, 1)} %, k-means on pixels "
        f"{said(pixels, 1)} % ({counted(len(ours.ours), 'seed')})."
    )
    return f"{claim}.", out, f"{meaning}."


@dataclass(frozen=True)
class _Runs:
    """The trainings of the table.

    Attributes:
        study: the study that runs them.
        pretrain: epochs of reconstruction.
        epochs: epochs of clustering.
        common: options of all trainings.
    """

    study: Study
    pretrain: int
    epochs: int
    common: dict[str, Any]

    def first(self, seed: int, record_only: bool = True) -> dict[str, Any]:
        """Train an autoencoder, then k-means on its codes."""
        return self.study(
            f"ae-kmeans-{seed}", "dac", record_only=record_only, method="ae-kmeans",
            pretrain=self.pretrain, seed=seed, **self.common,
        )  # fmt: skip

    def second(
        self, cell: str, seed: int, record_only: bool = True, **changed: Any
    ) -> dict[str, Any]:
        """Train what starts with the autoencoder's weights; the autoencoder is trained first if need be."""
        start = str(self.study.folder(f"ae-kmeans-{seed}"))
        options = {"pretrain": 0, "epochs": self.epochs, "seed": seed, "start": start, **changed}
        return self.study(
            cell, "dac", record_only=record_only, before=lambda: self.first(seed, record_only=False),
            builds_on={**self.common, "pretrain": self.pretrain}, **{**self.common, **options},
        )  # fmt: skip

    def method(self, method: str, seed: int) -> dict[str, Any]:
        """Train a method of the table."""
        if method == "ae-kmeans":
            return self.first(seed)
        if method == "dac":
            return self.study(
                f"dac-{seed}", "dac", record_only=True, method="dac", pretrain=0, epochs=self.epochs,
                seed=seed, **self.common,
            )  # fmt: skip
        return self.second(f"{method}-{seed}", seed, method=method)


def _train(runs: _Runs, seeds: int) -> dict[str, Records]:
    """Train every method with every seed."""
    records: dict[str, Records] = {name: [] for name in METHODS}
    for seed in range(seeds):
        for name, method in METHODS.items():
            records[name].append(runs.method(method, seed))
    return records


def _curve(record: dict[str, Any], name: str) -> list[float]:
    """Return a measurement while clustering; of accuracy, with the last one at the end."""
    curve = [epoch[name] for epoch in record["epochs"] if name in epoch]
    return [*curve, _scores(record)[name]] if name == "accuracy" else curve


def _train_switches(runs: _Runs, seeds: int) -> dict[str, Records]:
    """Train AE + DAC with parts of DAC's released code; the first is that of the table."""
    found: dict[str, Records] = {}
    for number, (name, changed) in enumerate(SWITCHES.items()):
        cells = [
            f"switch-{number}-{seed}" if changed else f"ae-dac-{seed}" for seed in range(seeds)
        ]
        found[name] = [runs.second(c, n, method="ae-dac", **changed) for n, c in enumerate(cells)]
    return found


def _switches(study: Study, report: Report, runs: _Runs, found: dict[str, Records]) -> None:
    """Compare what DAC's released code does, and where training could stop without labels."""
    rows, stops, curves = {}, {}, {}
    for name, records in found.items():
        rows[name] = row(NAMES, [_scores(record) for record in records], scale=100)
        stops[name] = _stops(records)
        curves[name] = np.mean([_curve(record, "accuracy") for record in records], 0).tolist()
    report.tables.append(
        Table("AE + DAC with parts of DAC's released code", COLUMNS, rows, digits=2)
    )
    report.tables.append(
        Table(
            "ACC % if training stopped where a sign says so", ("last epoch", *SIGN_RULES, "best"), stops,
            digits=2, notes=["The signs need no labels. *best* needs them: no rule can do better."],
        )
    )  # fmt: skip
    every = runs.common["judge_every"]
    report.add_figure(
        figures.curves(
            study.out / "switches.png", curves, "epoch of clustering",
            "Hungarian accuracy, mean over seeds", at=[*range(every, runs.epochs, every), runs.epochs],
        ),
        "Accuracy while clustering, with parts of DAC's released code",
    )  # fmt: skip


def _stops(records: list[dict[str, Any]]) -> list[Cell]:
    """Return the accuracy at the last epoch, where each sign says to stop, and at the best epoch."""
    found: list[list[float]] = [[] for _ in range(2 + len(SIGN_RULES))]
    for record in records:
        accuracies = _curve(record, "accuracy")
        judged = [epoch for epoch in record["epochs"] if "accuracy" in epoch]
        found[0].append(accuracies[-1])
        found[-1].append(max(accuracies))
        for at, (sign, best) in enumerate(SIGN_RULES.values()):
            told = [(n, epoch[sign]) for n, epoch in enumerate(judged) if sign in epoch]
            chosen = best(told, key=lambda pair: pair[1])[0] if told else len(accuracies) - 1
            found[1 + at].append(accuracies[chosen])
    return [Cell(ours=tuple(100 * value for value in values)) for values in found]


def _scores(record: dict[str, Any]) -> Scores:
    return values(record["metrics"]["clusters"]["assigned"])


def _pixels(study: Study, size_px: int, seeds: int) -> list[Scores]:
    data = study.load(size_px)
    coloured = study.tiles.read(0).std(2).max() > 0
    pixels = data.tiles if coloured else data.tiles[..., :1]
    vectors = pixels.reshape(len(data), -1).astype(np.float32) / 255
    runs = []
    for seed in range(seeds):
        clusters = assign(vectors, kmeans(vectors, len(data.label_names), seed=seed, restarts=3))
        metrics = clustering_report(vectors, data.labels, clusters, seed)
        runs.append(values([metric.as_dict() for metric in metrics]))
    return runs


def _train_first_k(runs: _Runs, seeds: int, classes: int) -> dict[int, Records]:
    """Train on the first K classes with K clusters (the paper does not say what table 4 varies)."""
    study, found = runs.study, {}
    shared = {"pretrain": runs.pretrain, "epochs": runs.epochs, **runs.common}
    for k in BY_CLUSTERS.get(study.data_name) or range(max(2, classes // 2), classes + 1):
        part = first_classes(study.tiles, k)
        found[k] = [
            study(f"ae-dac-first{k}-{seed}", "dac", part, seed=seed, **shared)
            for seed in range(seeds)
        ]
    return found


def _by_clusters(study: Study, found: dict[int, Records]) -> Table:
    """Tabulate the scores by K."""
    published = BY_CLUSTERS.get(study.data_name, {})
    rows = {}
    for k, records in found.items():
        runs = [_scores(record) for record in records]
        rows[f"K = {k}"] = row(NAMES, runs, published.get(k), (0.0, 0.0, None), 100)
    trivial_is = "NMI and ARI of clusters drawn at random"
    return Table("Table 4: AE + DAC on the first K classes", COLUMNS, rows, trivial_is, digits=2)


def _draw(runs: _Runs, report: Report, size_px: int) -> None:
    """Draw the clusters of seed 0, which is trained again if only its record is here."""
    import torch

    study = runs.study
    runs.first(0, record_only=False)
    runs.second("ae-dac-0", 0, record_only=False, method="ae-dac")
    data = study.load(size_px)
    numbers = np.arange(len(data))
    encoder = study.autoencoder("ae-dac-0")
    assert isinstance(encoder, ClusteringAutoEncoder)
    codes, readable = codes_of(encoder, data, numbers)
    with torch.inference_mode():
        clusters = encoder.cluster_head(torch.from_numpy(codes)).argmax(1).numpy()
    counts = contingency(data.labels[readable], clusters)
    report.add_figure(
        figures.confusion(
            study.out / "confusion.png", counts, data.label_names, "AE + DAC, seed 0"
        ),
        "Clusters of AE + DAC by class, seed 0",
    )
    some = spread(numbers, 3000)
    file = study.tsne("tsne.png", codes[some], data, readable[some], "codes of AE + DAC, seed 0")
    report.add_figure(file, "t-SNE of the codes of AE + DAC, seed 0, coloured by class")
    few = data.read(spread(numbers, 10))[0]
    images: figures.Images = {
        "tiles": few,
        "AE": reconstruct(study.autoencoder("ae-kmeans-0"), few),
        "AE + DAC": reconstruct(encoder, few),
    }
    file = figures.reconstructions(study.out / "reconstructions.png", images)
    report.add_figure(file, "Tiles and their reconstructions before and after clustering")


def _train_grid(runs: _Runs) -> dict[tuple[float, float], dict[str, Any]]:
    """Train with the weights of the paper's grid: reconstruction (alpha) and pairs (beta), one seed."""
    epochs = _grid_epochs(runs)
    return {
        (alpha, beta): runs.second(
            f"grid-{alpha}-{beta}", 0, epochs=epochs, alpha=alpha, beta=beta, eta=0.0
        )
        for alpha in WEIGHTS
        for beta in WEIGHTS
    }


def _grid_epochs(runs: _Runs) -> int:
    return max(2, runs.epochs // 3)


def _grid(runs: _Runs, report: Report, found: dict[tuple[float, float], dict[str, Any]]) -> None:
    """Draw the accuracies of the grid."""
    study, epochs = runs.study, _grid_epochs(runs)
    accuracies = np.array([_scores(record)["accuracy"] for record in found.values()])
    accuracies = accuracies.reshape(len(WEIGHTS), len(WEIGHTS))
    report.add_figure(
        figures.grid(
            study.out / "grid.png", accuracies, WEIGHTS, WEIGHTS, "alpha", "beta", "accuracy, one seed"
        ),
        f"Accuracy by alpha and beta (every second weight of the paper's grid) after {epochs} epochs, "
        "one seed",
    )  # fmt: skip
