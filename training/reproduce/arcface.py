"""Paper 004: MobileNetV3-Small + ArcFace by folds; k-means and HDBSCAN cluster the held-out tiles."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...console import counted
from ..data import split
from ..evaluate import embed_numbers, pca_basis, project
from ..pretrained import LITE0
from . import figures
from .report import FOLDS_OVERLAP, Cell, Report, Table, difference, fewer_epochs, row, said
from .study import Study, values

Records = dict[str, list[dict[str, Any]]]
LOSSES = {"ArcFace": "arcface", "softmax": "softmax", "triplet": "triplet"}
MARGINS = {"arcface": 0.5, "softmax": 0.5, "triplet": 0.2}
LITE0_ROW = "ArcFace on EfficientNet-Lite0 (ImageNet)"
COLUMNS = ("ACC", "F1", "ARI", "NMI", "noise")
NAMES = ("accuracy", "macro_f1", "ari", "nmi", "noise_share")
CLUSTERINGS = {"k-means, K = classes": "kmeans_k_classes", "HDBSCAN": "hdbscan"}
PUBLISHED: dict[tuple[str, str], tuple[float, ...]] = {
    ("ArcFace", "kmeans_k_classes"): (0.945, 0.945, 0.792, 0.695),
    ("ArcFace", "hdbscan"): (0.9255, 0.9258, 0.702, 0.618),
}
FOLDS, EPOCHS = 10, 30


def reproduce(study: Study) -> Report:
    """Train every fold and loss; fit PCA on the training part and cluster the held-out fold."""
    options = study.options
    count, folds = study.fold_count(FOLDS), study.folds(FOLDS, 2)
    epochs = study.pick(EPOCHS, 1, options.epochs)
    size_px = options.size_px or 224
    lite0 = "lite0" in study.parts
    study.cells = folds * (len(LOSSES) + lite0)
    report = study.report(
        "MobileNetV3-Small and ArcFace: k-means and HDBSCAN on held-out folds", "004",
        seeds=f"{folds} of {count} folds", epochs=epochs,
        network=f"MobileNetV3-Small at {size_px} px from random weights, head 576-256-64, batch 32, "
        "AdamW 1e-3 with cosine; ArcFace s = 30, m = 0.5; triplet margin 0.2",
    )  # fmt: skip
    report.fewer = fewer_epochs(epochs, EPOCHS)
    report.notes += [
        "The published numbers are of a breast ultrasound set of 6,000 images in two classes, with "
        "ImageNet weights; its folds most likely have augmented copies of one lesion on both sides.",
        "ArcFace is supervised: it trains on the labels of the training part; only held-out tiles are "
        "clustered.",
        "HDBSCAN noise counts as wrong in ACC and F1, and as a separate cluster in ARI and NMI.",
        FOLDS_OVERLAP,
        "HDBSCAN: min_cluster_size is max(15, n / 40); the paper does not state it.",
    ]
    records: Records = {name: [] for name in (*LOSSES, *[LITE0_ROW] * lite0)}
    shared: dict[str, Any] = {"size_px": size_px, "split": options.split, "stain": 0.0}
    half = max(1, epochs // 2)
    tuned: dict[str, Any] = {
        "model": LITE0,
        "weights": LITE0,
        "epochs_head": half,
        "epochs_tail": half,
    }
    study.check_fits(size_px)
    for fold in range(folds):
        shared |= {"fold": fold, "folds": count}
        if lite0:
            records[LITE0_ROW].append(study(f"lite0-{fold}", "arcface", **tuned, **shared))
        for name, loss in LOSSES.items():
            chosen: dict[str, Any] = {"loss": loss, "margin": MARGINS[loss], "epochs": epochs}
            records[name].append(study(f"{loss}-{fold}", "arcface", **chosen, **shared))
    study.all_asked()
    for title, key in CLUSTERINGS.items():
        report.tables.append(_table(f"{title}, held-out folds of {study.whole.name}", key, records))
    report.tables.append(_retrieval(records))
    report.says = _says(*(table.rows for table in report.tables[:2]))
    _draw(study, report, size_px, count)
    return report


def _says(rows: dict[str, list[Cell]], dense: dict[str, list[Cell]]) -> tuple[str, str, str]:
    """Return the report's first sentences, of the tables of k-means and of HDBSCAN."""
    ours, softmax, triplet = (rows[name][0] for name in LOSSES)
    pixels = rows["pixels (16 x 16)"][0]
    by_density = difference(dense["ArcFace"][0], dense["softmax"][0])
    return (
        "k-means on the embeddings of ArcFace finds the classes of breast ultrasound: .945 are right.",
        f"Of held-out tiles {said(ours)} are right with ArcFace, {said(softmax)} with softmax, "
        f"{said(triplet)} with triplets and {said(pixels)} with pixels "
        f"({counted(len(ours.ours), 'fold')}).",
        f"What the margin is worth, ArcFace minus softmax: {difference(ours, softmax)}; by HDBSCAN "
        f"{by_density}.",
    )


def _sides(records: Records) -> Records:
    """Return the metrics by row: the losses, then the untrained net and the pixels."""
    sides = {name: [run["metrics"]["trained"] for run in runs] for name, runs in records.items()}
    first = records["ArcFace"]
    sides["random weights"] = [run["metrics"]["random_init"] for run in first]
    sides["pixels (16 x 16)"] = [run["metrics"]["pixels"] for run in first]
    return sides


def _table(title: str, key: str, records: Records) -> Table:
    rows = {}
    for name, sides in _sides(records).items():
        scores = [side[key]["scores"] for side in sides if key in side]
        baselines = [{metric["name"]: metric["baseline"] for metric in run} for run in scores]
        trivial = [float(np.mean([run[metric] for run in baselines])) for metric in NAMES]
        published = (*PUBLISHED.get((name, key), (None,) * 4), None)
        rows[name] = row(NAMES, [values(run) for run in scores], published, trivial)
    return Table(title, COLUMNS, rows, "the same clusters, shuffled")


def _retrieval(records: Records) -> Table:
    rows: dict[str, list[Cell]] = {}
    for name, sides in _sides(records).items():
        rows[name] = []
        for metric in ("same_group_r1", "knn5"):
            runs = [run for side in sides for run in side["retrieval"] if run["name"] == metric]
            trivial = float(np.mean([run["baseline"] for run in runs])) if runs else None
            rows[name].append(Cell(None, tuple(run["value"] for run in runs), trivial))
    return Table(
        "Retrieval on held-out folds (not in the paper)", ("same-group R@1", "5-NN of other groups"),
        rows, "a random other tile; always the largest class",
    )  # fmt: skip


def _draw(study: Study, report: Report, size_px: int, folds: int) -> None:
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    data = study.load(size_px)
    parts = split(data, folds, 0, 0, study.options.split)
    counts = [k for k in range(2, 11) if k < len(parts.test)]
    lines = {}
    for name, loss in LOSSES.items():
        encoder = study.encoder(f"{loss}-0")
        basis = pca_basis(embed_numbers(encoder, data, parts.train)[0])
        vectors, readable = embed_numbers(encoder, data, parts.test)
        flat = project(vectors, basis)
        lines[name] = [
            float(silhouette_score(flat, KMeans(k, n_init=10, random_state=0).fit_predict(flat)))
            for k in counts
        ]
        file = study.tsne(f"tsne-{loss}.png", vectors, data, readable, name)
        report.add_figure(file, f"t-SNE of held-out embeddings, {name}, fold 0")
    file = figures.curves(
        study.out / "silhouette.png", lines, "K", "silhouette of k-means", at=counts
    )
    caption = "Silhouette by K on the held-out fold 0 (paper 004 chooses K by it)"
    report.figures.insert(0, (file, caption))
