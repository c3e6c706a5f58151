"""Figures of a report, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import need
from ...metrics import Floats, Ints

MOST_POINTS = 3000
# Okabe & Ito's palette, which colour-blind readers can distinguish, then more colours and greys.
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#000000", "#7F7F7F",
    "#B15928",
)  # fmt: skip


def _plot() -> Any:
    need("matplotlib", "train").use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    _plot().close(figure)
    return path.name


def curves(
    path: Path,
    lines: Mapping[str, Sequence[float]],
    x: str,
    y: str,
    levels: Mapping[str, float] | None = None,
    at: Sequence[float] | None = None,
) -> str:
    """Plot one line per name over 1..n (or ``at``); ``levels`` are dotted lines, such as baselines."""
    figure, axes = _plot().subplots(figsize=(7, 4))
    for number, (name, values) in enumerate(lines.items()):
        axes.plot(
            (at or range(1, len(values) + 1))[: len(values)], values, marker="o", markersize=3, label=name,
            color=COLOURS[number % len(COLOURS)], linestyle="-" if number < len(COLOURS) else "--",
        )  # fmt: skip
    for name, level in (levels or {}).items():
        axes.axhline(level, linestyle=":", color="#555555")
        axes.annotate(
            name, (0.99, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
        )  # fmt: skip
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return _save(figure, path)


def tsne(path: Path, vectors: Floats, labels: Ints, names: Sequence[str], title: str) -> str:
    """Draw a t-SNE map of at most 3,000 vectors, coloured by label (grey: unlabelled)."""
    from sklearn.manifold import TSNE

    if len(vectors) > MOST_POINTS:
        chosen = np.sort(np.random.default_rng(0).choice(len(vectors), MOST_POINTS, replace=False))
        vectors, labels = vectors[chosen], labels[chosen]
    perplexity = min(30.0, max(2.0, (len(vectors) - 1) / 3))
    flat = TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(vectors)
    figure, axes = _plot().subplots(figsize=(6, 5))
    for label in np.unique(labels):
        part = labels == label
        name = names[label] if label >= 0 else "unlabelled"
        colour = COLOURS[label % len(COLOURS)] if label >= 0 else "#BBBBBB"
        axes.scatter(flat[part, 0], flat[part, 1], s=5, color=colour, label=name[:24], linewidths=0)
    axes.set_title(title, fontsize=10)
    axes.set(xticks=[], yticks=[])
    if len(np.unique(labels)) <= 20:
        axes.legend(fontsize=7, markerscale=3, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return _save(figure, path)


def confusion(path: Path, table: NDArray[np.int64], names: Sequence[str], title: str) -> str:
    """Draw a table of clusters (rows) by classes (columns): shades are shares of a row, text is counts."""
    share = table / np.maximum(table.sum(1, keepdims=True), 1)
    clusters, classes = table.shape
    figure, axes = _plot().subplots(figsize=(1.2 + 0.55 * classes, 1.2 + 0.45 * clusters))
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in np.ndindex(*table.shape):
        axes.text(
            column, row, str(table[row, column]), ha="center", va="center", fontsize=7,
            color="white" if share[row, column] > 0.55 else "black",
        )  # fmt: skip
    axes.set_xticks(range(len(names)), [n[:14] for n in names], rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(clusters), [str(n) for n in range(clusters)], fontsize=8)
    axes.set_ylabel("cluster")
    axes.set_title(title, fontsize=10)
    return _save(figure, path)


Images = dict[str, NDArray[Any]]
"""By name of the row: tiles, uint8 (N, H, W, 3), or a net's reconstructions of them, in 0..1."""


def reconstructions(path: Path, rows: Images) -> str:
    """Draw tiles and their reconstructions, one row of images per name."""
    count = min(map(len, rows.values()))
    figure, axes = _plot().subplots(
        len(rows), count, figsize=(0.9 * count + 1.4, 0.95 * len(rows)), squeeze=False
    )
    for row, (name, images) in enumerate(rows.items()):
        if images.dtype == np.uint8:
            images = images.astype(np.float32) / 255
        for column in range(count):
            cell = axes[row][column]
            cell.imshow(np.clip(images[column], 0, 1), interpolation="nearest")
            cell.set(xticks=[], yticks=[])
        axes[row][0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    figure.subplots_adjust(wspace=0.05, hspace=0.05)
    return _save(figure, path)


def grid(
    path: Path, values: NDArray[np.float64], rows: Sequence[object], columns: Sequence[object],
    row_name: str, column_name: str, title: str,
) -> str:  # fmt: skip
    """Draw a table of numbers as shaded cells with the numbers in them."""
    figure, axes = _plot().subplots(figsize=(1.5 + 0.7 * len(columns), 1.3 + 0.45 * len(rows)))
    shades = axes.imshow(values, cmap="viridis", aspect="auto")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for row, column in np.ndindex(*values.shape):
        colour = "white" if values[row, column] < middle else "black"
        text = f"{values[row, column]:.3f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel=column_name, ylabel=row_name)
    axes.set_title(title, fontsize=10)
    figure.colorbar(shades)
    return _save(figure, path)
