"""Figures of the default encoder's results: map, examples with failures, robustness curves."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

MATCH, OTHER = "#2a9d5c", "#c1443c"
NEIGHBOURS = 5


def unit(vectors):
    """Vectors of length 1."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def curves_figure(curves, path):
    """Same-source R@1 against the strength of each change, a line per encoder."""
    figure, axes = plt.subplots(1, len(curves), figsize=(3.4 * len(curves), 3.3), sharey=True)
    for axis, (name, points) in zip(axes, curves.items(), strict=True):
        strengths = [float(s) for s in points]
        for who in next(iter(points.values())):
            values = [found[who]["same_r1"] for found in points.values()]
            axis.plot(strengths, values, marker="o", markersize=3, label=who)
        axis.set_xlabel(name)
        axis.set_ylim(0, 1.02)
        axis.grid(alpha=0.3)
        if name == "JPEG quality":
            axis.invert_xaxis()
    axes[0].set_ylabel("same source R@1")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="upper center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def map_figure(parts, path):
    """t-SNE of held-out tiles, each collection by itself, coloured by class."""
    from sklearn.manifold import TSNE

    figure, axes = plt.subplots(1, len(parts), figsize=(6.4 * len(parts), 6.6))
    for axis, (vectors, data) in zip(np.atleast_1d(axes), parts, strict=True):
        perplexity = min(30, len(vectors) // 4)
        flat = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(unit(vectors))
        known = np.unique(data.labels)
        colours = plt.get_cmap("tab20")(np.linspace(0, 1, max(2, len(known))))
        for colour, label in zip(colours, known, strict=True):
            mine = data.labels == label
            name = "/".join(data.names[label].split("/")[1:]).strip("/")
            axis.scatter(*flat[mine].T, s=14, color=colour, label=f"{name} ({mine.sum()})")
        axis.set(xticks=[], yticks=[], title=data.names[known[0]].split("/")[0] + ", held out")
        axis.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=3, fontsize=7, frameon=False
        )
    figure.tight_layout()
    figure.savefig(path, dpi=100, bbox_inches="tight")
    plt.close(figure)


def examples_figure(encode, data, path, count=4):
    """Queries with their nearest tiles of other groups: some that went well, and the worst failures."""
    flat = unit(encode(data.tiles).astype(np.float64))
    similarity = flat @ flat.T
    similarity[data.groups[:, None] == data.groups[None, :]] = -np.inf
    order = np.argsort(-similarity, 1)[:, :NEIGHBOURS]
    right = (data.labels[order] == data.labels[:, None]).sum(1)
    rng = np.random.default_rng(0)
    chosen = []
    good, failed = np.flatnonzero(right == NEIGHBOURS), np.flatnonzero(right < NEIGHBOURS)
    failed = failed[np.argsort(right[failed], kind="stable")]
    for rows, worst in ((rng.permutation(good), False), (failed, True)):
        groups, labels = set(), set()
        for row in rows:
            if data.groups[row] in groups or (not worst and data.labels[row] in labels):
                continue  # no picture and, of what went well, no class twice
            groups.add(data.groups[row])
            labels.add(data.labels[row])
            chosen.append(int(row))
            if len(groups) == count:
                break
    figure, axes = plt.subplots(len(chosen), NEIGHBOURS + 1, figsize=(9.6, 1.85 * len(chosen)))
    for line, row in zip(axes, chosen, strict=True):
        _picture(line[0], data, row, f"query: {_class(data, row)}", "black")
        for axis, hit in zip(line[1:], order[row], strict=True):
            colour = MATCH if data.labels[hit] == data.labels[row] else OTHER
            text = f"{_class(data, hit)}  {similarity[row, hit]:.2f}"
            _picture(axis, data, hit, text, colour)
    figure.tight_layout(pad=0.5)
    figure.savefig(path, dpi=90, pil_kwargs={"quality": 85})
    plt.close(figure)


def _class(data, row):
    return data.names[data.labels[row]].split("/")[-1]


def _picture(axis, data, row, text, colour):
    axis.imshow(data.tiles[row][::2, ::2])
    axis.set_title(text, fontsize=8, color=colour)
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(color=colour, linewidth=2.5)
