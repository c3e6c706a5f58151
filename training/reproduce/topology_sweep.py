"""Paper 003, tables 1 and 2: purity of k-means on the codes of AEs and CAEs, by code length and K."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...artifacts.files import read_json, sha256_file, write_json
from ...errors import BadInput
from ...metrics import Floats, Ints, accuracy, purity
from ..data import LabelledTiles
from ..evaluate import embed_numbers
from ..run import WEIGHTS
from . import figures
from .report import Cell, Report, Table, fewer_epochs
from .study import Study, reconstruct, spread

CODES = (16, 32, 64, 128)
CLUSTERS = (10, 20, 30, 40, 50)
NETS = {"CAE": "topology-cae", "AE": "topology-ae"}
EPOCHS, BATCH = {"CAE": 50, "AE": 100}, {"CAE": 128, "AE": 256}
"""As in the examples of Keras."""
INITIALISATIONS = 20
SIDES = (28, 32)
UNPUBLISHED = ((None, None),) * len(CODES)
KERAS: dict[str, Any] = {"optimiser": "adadelta", "lr": 1.0, "pixel_loss": "cross-entropy"}
"""What the examples of Keras, which the paper used, did at its time; the paper itself does not say."""
TABLES = "Adadelta 1, cross-entropy"
OPTIMISERS: dict[str, dict[str, Any]] = {
    TABLES: KERAS,
    "Adadelta 1, squared error": {**KERAS, "pixel_loss": "squared"},
    "Adam 1e-3, cross-entropy": {**KERAS, "optimiser": "adam", "lr": 1e-3},
    "Adam 1e-3, squared error": {"optimiser": "adam", "lr": 1e-3, "pixel_loss": "squared"},
}
"""Settings that the part ``settings`` compares; the first is that of the tables."""
RELU = "relu_code=true"
"""Option of the AE with the part ``relu``: Keras's fully connected example has a ReLU after the code."""
OTHER_LAYERS = {
    "AE": {"ReLU after the code": RELU},
    "CAE": {
        "widths 16 and 8, no batch norm, ReLU after the code": "widths=16-8,norm=false,relu_code=true"
    },
}
"""Other layers that the part ``settings`` compares; those of the CAE are as in Keras's example."""
SETTINGS_CODE = 32
Values = dict[int, list[float]]
"""One value per initialisation of k-means, by code length."""
# Purity in %, mean and standard deviation, by K; columns are code lengths 16, 32, 64, 128.
Row = tuple[tuple[float, float], ...]
PUBLISHED: dict[tuple[str, str], dict[int, Row]] = {
    ("CAE", "cifar10"): {
        10: ((22.97, 1.57), (24.90, 1.15), (26.28, 0.92), (25.27, 0.67)),
        20: ((26.43, 1.80), (27.70, 0.74), (29.13, 0.73), (28.42, 0.51)),
        30: ((27.54, 1.29), (28.66, 1.17), (30.01, 0.73), (29.46, 0.51)),
        40: ((28.77, 0.88), (29.98, 0.78), (31.39, 0.79), (30.47, 0.73)),
        50: ((29.16, 1.19), (30.46, 0.87), (31.92, 0.70), (31.49, 0.74)),
    },
    ("CAE", "mnist"): {
        10: ((52.10, 3.47), (51.40, 4.26), (45.69, 3.81), (42.54, 2.69)),
        20: ((63.74, 3.94), (64.51, 4.05), (62.31, 2.17), (57.50, 2.63)),
        30: ((71.24, 3.41), (72.81, 1.95), (71.63, 2.45), (67.22, 2.02)),
        40: ((73.44, 2.98), (75.56, 1.91), (73.94, 1.98), (71.94, 2.73)),
        50: ((76.07, 2.87), (77.18, 2.21), (75.97, 2.92), (74.36, 1.40)),
    },
    ("CAE", "svhn"): {
        10: ((20.31, 0.65), (20.44, 0.59), (20.43, 0.53), (20.06, 0.23)),
        20: ((21.31, 0.72), (21.47, 0.68), (21.66, 0.66), (20.34, 0.37)),
        30: ((21.60, 0.58), (21.87, 0.67), (22.36, 0.83), (21.22, 0.42)),
        40: ((22.23, 0.54), (22.64, 0.66), (23.03, 0.76), (21.31, 0.44)),
        50: ((22.39, 0.49), (22.95, 1.02), (23.83, 0.81), (21.69, 0.37)),
    },
    ("AE", "cifar10"): {
        10: ((20.42, 0.93), (20.71, 0.74), (20.90, 0.59), (20.95, 0.45)),
        20: ((23.24, 1.12), (24.31, 0.53), (23.49, 0.86), (23.81, 0.45)),
        30: ((24.71, 1.05), (24.31, 0.74), (24.84, 0.57), (24.74, 0.45)),
        40: ((25.33, 0.99), (25.13, 0.65), (25.58, 0.79), (25.70, 0.48)),
        50: ((26.39, 0.86), (26.69, 1.65), (26.57, 0.59), (26.49, 0.62)),
    },
    ("AE", "mnist"): {
        10: ((64.04, 3.39), (66.57, 1.76), (66.52, 1.06), (59.23, 2.21)),
        20: ((73.23, 2.20), (74.99, 2.04), (73.56, 1.53), (70.06, 2.63)),
        30: ((78.09, 2.16), (79.80, 1.40), (77.86, 1.17), (76.47, 1.83)),
        40: ((81.46, 1.53), (82.47, 1.14), (81.27, 1.03), (79.26, 1.65)),
        50: ((82.21, 1.67), (83.52, 0.73), (83.27, 1.19), (81.05, 1.61)),
    },
    ("AE", "svhn"): {
        10: ((20.05, 0.47), (19.86, 0.23), (19.92, 0.32), (19.83, 0.23)),
        20: ((20.90, 0.68), (20.94, 0.70), (20.72, 0.65), (20.46, 0.30)),
        30: ((21.74, 1.16), (21.68, 0.66), (21.87, 0.60), (21.48, 0.31)),
        40: ((22.68, 1.53), (22.49, 0.52), (22.47, 0.64), (22.11, 0.28)),
        50: ((23.21, 1.12), (23.44, 0.86), (23.47, 0.95), (22.53, 0.37)),
    },
}  # fmt: skip


def reproduce(study: Study) -> Report:
    """Train every net once per code length; cluster its codes 20 times per K, from random centres.

    ``parts`` may have AE or CAE, to run only one of them; relu, for an AE with a ReLU after the code; and
    settings, to compare optimisers, losses and layers.
    """
    options = study.options
    repeats = study.pick(INITIALISATIONS, 2, options.seeds)
    study.leave_out_test_part()
    side = options.size_px or study.tiles.read(0).shape[0]
    if side not in SIDES:
        raise BadInput(
            f"tiles of {side} px: the paper's nets are for 28 and 32 px; pass --size-px 32"
        )
    nets = [net for net in NETS if net in study.parts] or list(NETS)
    relu = "relu" in study.parts
    if relu and "AE" not in nets:
        raise BadInput("--parts has relu, which changes only the AE, but runs only the CAE; add AE")
    epochs = {net: study.pick(EPOCHS[net], 1, options.epochs) for net in nets}
    inputs = {
        "AE": f"{side * side} grey pixels, {'' if relu else 'no '}ReLU after the code",
        "CAE": "3 channels, widths 32, 16, c",
    }
    compared = "settings" in study.parts
    settings = {net: _settings(net, relu) for net in nets}
    study.cells = len(CODES) * len(nets) + compared * sum(len(of) - 1 for of in settings.values())
    report = study.report(
        "Topology, code size and K", "003, tables 1 and 2",
        epochs="; ".join(f"{net}: {count}" for net, count in epochs.items()),
        split="none: fitted and judged on the same tiles, as the paper has it",
        seeds=f"one trained net per cell, {repeats} random initialisations of k-means",
        network="; ".join(f"{net} on {inputs[net]}, batch {BATCH[net]}" for net in nets)
        + f"; {TABLES}",
    )  # fmt: skip
    fewer = (fewer_epochs(count, EPOCHS[net], of=f" of {net}") for net, count in epochs.items())
    report.fewer = " ".join(filter(None, fewer))
    report.notes += [
        "Purity never falls with K and is at least the share of the largest class.",
        "The paper names no optimiser, rate, loss, epochs or batch. It used Keras, whose examples had "
        "Adadelta with rate 1, binary cross-entropy, and 100 epochs with batches of 256 (deep, fully "
        "connected) or 50 with batches of 128 (convolutions). The protocol has these and Keras's initial "
        "weights. That example also has a ReLU after the code (--parts relu).",
    ]

    def train(cell: str, net: str, code: int, setting: dict[str, Any]) -> dict[str, Any]:
        layers = ",".join(filter(None, (f"dim={code}", setting["model_options"])))
        setting = {**setting, "model_options": layers}
        return study(
            cell, "autoencoder", model=NETS[net], size_px=side,
            epochs=epochs[net], batch=BATCH[net], weight_decay=0.0, reduction="mean", keep_best=False,
            folds=0, judge=False, clusters=10, kmeans="minibatch", **setting,
        )  # fmt: skip

    study.check_fits(side)
    records = {
        f"{net.lower()}-{code}": train(f"{net.lower()}-{code}", net, code, settings[net][TABLES])
        for net in nets
        for code in CODES
    }
    for net in nets if compared else []:
        for number, setting in enumerate(settings[net].values()):
            if number:  # the first is in the tables
                train(f"{net.lower()}-{SETTINGS_CODE}-{number}", net, SETTINGS_CODE, setting)
    study.all_asked()
    data = study.load(side)
    purities: dict[str, dict[int, Values]] = {}
    accuracies: dict[str, Values] = {}
    images: figures.Images = {}
    losses: dict[str, list[float]] = {}
    for net in nets:
        purities[net], accuracies[net] = {k: {} for k in CLUSTERS}, {}
        for code in CODES:
            cell = f"{net.lower()}-{code}"
            losses[f"{net}, code {code}"] = [epoch["loss"] for epoch in records[cell]["epochs"]]
            found = _cluster(study, cell, data, repeats)
            accuracies[net][code] = found["accuracy"]
            for k in CLUSTERS:
                purities[net][k][code] = found[str(k)]
            few = data.read(spread(np.arange(len(data)), 10))[0]
            images.setdefault("tiles", few)
            images[f"{net} {code}"] = reconstruct(study.autoencoder(cell), few)
    report.tables += _tables(study, purities, accuracies, data.labels)
    report.says = _says(report.tables[:-1])
    rows = {}
    for net in nets if compared else []:
        for number, name in enumerate(settings[net]):
            cell = f"{net.lower()}-{SETTINGS_CODE}" + (f"-{number}" if number else "")
            found = _cluster(study, cell, data, repeats)
            rows[f"{net}: {name}"] = [
                Cell(mean, tuple(found[str(k)]), None, sd)
                for k, (mean, sd) in zip(
                    CLUSTERS, _published(study, net, SETTINGS_CODE), strict=True
                )
            ]
    if rows:
        title = f"Purity in % with other settings, code {SETTINGS_CODE}, {study.whole.name}"
        report.tables.append(
            Table(title, [f"K = {k}" for k in CLUSTERS], rows, digits=2, compares_settings=True)
        )
    lines = {
        f"{net}, code {code}": [float(np.mean(by_k[k][code])) for k in CLUSTERS]
        for net, by_k in purities.items()
        for code in CODES
    }
    file = figures.curves(study.out / "purity.png", lines, "K", "purity in %", at=CLUSTERS)
    report.add_figure(file, "Purity by K")
    file = figures.curves(study.out / "loss.png", losses, "epoch", "loss")
    report.add_figure(file, "Loss by epoch")
    file = figures.reconstructions(study.out / "reconstructions.png", images)
    report.add_figure(file, "Tiles and their reconstructions, by net and code size")
    return report


def _settings(net: str, relu: bool) -> dict[str, dict[str, Any]]:
    """Return the settings that are compared, by name; the first is that of the tables."""
    layers, others = "", OTHER_LAYERS[net]
    if relu and net == "AE":
        layers, others = RELU, {"no ReLU after the code": ""}
    optimisers = {name: {**chosen, "model_options": layers} for name, chosen in OPTIMISERS.items()}
    return optimisers | {
        f"{TABLES}, {name}": {**KERAS, "model_options": other} for name, other in others.items()
    }


def _says(tables: list[Table]) -> tuple[str, str, str]:
    """Return the report's first sentences, of the tables of purities."""
    cells = [cell for table in tables for cells in table.rows.values() for cell in cells]
    known = [(c.mean, c.published, c.near) for c in cells if c.published is not None]
    claim = "Purity grows with K, and depends on the network and the length of its code"
    if not known:
        return f"{claim}.", "The paper has no numbers of this data set.", "Nothing can be compared."
    low, high = min(p for _, p, _ in known), max(p for _, p, _ in known)
    near = sum(bool(within) for *_, within in known)
    gap = float(np.mean([mean - p for mean, p, _ in known if mean is not None]))
    out = (
        f"{near} of {len(known)} values are within two published standard deviations; ours are "
        f"{abs(gap):.1f} points {'higher' if gap > 0 else 'lower'} on average."
    )
    share = near / len(known)
    part = "reproduced in part" if share >= 0.5 else "not reproduced"
    verdict = "reproduced" if share >= 0.875 else part
    return f"{claim}: from {low} % to {high} %.", out, f"The tables are {verdict}."


def _cluster(study: Study, cell: str, data: LabelledTiles, repeats: int) -> dict[str, list[float]]:
    """Return purities in % by K (as text), one per initialisation, and Hungarian accuracies at K = 10.

    They are stored beside the cell's weights, so that a repeated command does not compute them again.
    """
    path = study.folder(cell) / "clusterings.json"
    basis = {
        "weights": sha256_file(study.folder(cell) / WEIGHTS),
        "repeats": repeats,
        "clusters": list(CLUSTERS),
    }
    known = read_json(path) if path.is_file() else {}
    if known.get("basis") == basis:
        stored: dict[str, list[float]] = known["purity"]
        return stored
    encoder = study.autoencoder(cell)
    codes, readable = embed_numbers(encoder, data, np.arange(len(data)), unit=False)
    labels = data.labels[readable]
    found: dict[str, list[float]] = {}
    for k in CLUSTERS:
        clusters = []
        for seed in range(repeats):
            study.after(f"{cell}: k-means, K = {k}, {seed + 1} of {repeats}")
            clusters.append(random_kmeans(codes, k, seed))
        found[str(k)] = [100 * purity(labels, run) for run in clusters]
        if k == CLUSTERS[0]:
            found["accuracy"] = [100 * accuracy(labels, run) for run in clusters]
    write_json(path, {"basis": basis, "purity": found})
    return found


def _published(study: Study, net: str, code: int) -> list[tuple[float | None, float | None]]:
    """Return the published mean and standard deviation by K."""
    by_k = PUBLISHED.get((net, study.data_name), {})
    return [by_k[k][CODES.index(code)] if by_k else (None, None) for k in CLUSTERS]


def random_kmeans(codes: Floats, k: int, seed: int) -> Ints:
    """Run k-means from one random choice of centres, as the paper does."""
    from sklearn.cluster import KMeans

    fitted = KMeans(k, init="random", n_init=1, random_state=seed).fit(codes)
    return np.asarray(fitted.labels_, dtype=np.int64)


def _tables(
    study: Study,
    purities: dict[str, dict[int, Values]],
    accuracies: dict[str, Values],
    labels: Ints,
) -> list[Table]:
    rng = np.random.default_rng(0)
    columns = [f"code {code}" for code in CODES]
    tables = []
    for number, net in enumerate(NETS, 1):
        if net not in purities:
            continue
        published = PUBLISHED.get((net, study.data_name), {})
        rows = {}
        for k in CLUSTERS:
            trivial = 100 * purity(labels, rng.integers(0, k, len(labels)))
            rows[f"K = {k}"] = [
                Cell(mean, tuple(purities[net][k][code]), trivial, sd)
                for code, (mean, sd) in zip(CODES, published.get(k, UNPUBLISHED), strict=True)
            ]
        title = f"Table {number}: purity in % of k-means on the code, {net}, {study.whole.name}"
        table = Table(title, columns, rows, "purity of clusters drawn at random", digits=2)
        near = [
            n for cells in rows.values() for n in (cell.near for cell in cells) if n is not None
        ]
        if near:
            table.notes.append(f"{sum(near)} of {len(near)} cells are within 2 published sd.")
        tables.append(table)
    rows = {
        net: [Cell(None, tuple(by_code[code]), 10.0) for code in CODES]
        for net, by_code in accuracies.items()
    }
    title = "Hungarian accuracy in % at K = 10 (not in the paper)"
    return [*tables, Table(title, columns, rows, "1/K", digits=2)]
