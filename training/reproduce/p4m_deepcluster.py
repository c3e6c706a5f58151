"""Paper 002: DeepCluster with Sobel-AlexNet and the P4M CNN; NMI between epochs, linear probe, AUC."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score

from ...console import counted
from ..data import LabelledTiles, split
from ..evaluate import embed, embed_numbers, pixel_features
from ..kmeans import assign
from ..models.cost import summarise
from ..probe import linear_probe
from . import figures
from .report import Cell, Report, Table, difference, fewer_epochs, row, said
from .study import Study, spread, values

Records = dict[str, list[dict[str, Any]]]
NETS: dict[str, dict[str, Any]] = {
    "Sobel-AlexNet": {"model": "sobel-alexnet", "rotation_deg": 360.0},
    "P4M CNN": {"model": "p4m-cnn"},
}
PROBE = ("probe accuracy", "micro-AUC", "macro-AUC")
PROBE_NAMES = ("probe_accuracy", "probe_micro_auc", "probe_macro_auc")
PUBLISHED: dict[str, tuple[float | None, float | None, float | None]] = {
    "Sobel-AlexNet": (0.5640, 0.94, None),
    "P4M CNN": (0.5673, None, None),
}
STEPS, CLUSTERINGS = 100, 20
"""Smallest number of steps between two clusterings, and smallest number of clusterings."""
EPOCHS = 100
"""The paper's number of epochs."""
LAST_NMI = {"Sobel-AlexNet": 0.635, "P4M CNN": 0.428}
CHEST = "chestxray14"


def reproduce(study: Study) -> Report:
    """Train both nets with DeepCluster, split by patient; probe and cluster the held-out tiles."""
    options = study.options
    batch = min(256, max(32, len(study.tiles) // 400))
    steps = max(1, len(study.tiles) * 4 // 5 // batch)
    reassign = 1 if options.quick else max(1, round(STEPS / steps))
    epochs = study.pick(max(EPOCHS, CLUSTERINGS * reassign), 2, options.epochs)
    seeds = study.pick(3, 1, options.seeds)
    size_px = options.size_px or 64
    k = min(200, max(4, len(study.tiles) // 20))
    widths = options.widths or "16"
    study.cells = len(NETS) * seeds
    report = study.report(
        "DeepCluster: Sobel-AlexNet against the P4M CNN", "002", epochs=epochs, seeds=seeds,
        network=f"{size_px} px, K = {k}, P4M widths {widths}, PCA to at most 128, Adam 1e-3, batch {batch}",
    )  # fmt: skip
    report.fewer = fewer_epochs(epochs, EPOCHS, paper_names_them=True)
    report.notes += [
        "The published curves cannot be targets: the authors' P4M loop learns from the image number "
        "modulo 200, three quarters of the rows that it clusters are zeros, and a constant predictor "
        "reaches micro-AUC .977 on its labels.",
        "NMI grows with K if there are few tiles: read AMI, or compare NMI with that of shuffled clusters.",
    ]
    if widths != "published":
        report.notes.append(
            f"P4M widths {widths}; the published net is 64-128-256 (`--widths published`, 9.7 GMACs)."
        )
    if len(study.tiles) < 20 * 200:
        report.notes.append(f"K is {k}, one cluster per 20 tiles; the paper has 200 for 112,120.")
    if reassign > 1:
        report.notes.append(
            f"The tiles are clustered every {reassign} epochs ({reassign * steps} steps), and the learning "
            "rate is constant. The paper clusters every epoch (some 400 steps there) and lowers the rate "
            "when the loss does not fall: with few tiles neither net then learns its pseudo-labels."
        )
    if study.whole.name != CHEST:
        report.notes.append(
            "The published numbers are of ChestX-ray14, not of this data set: they only give orientation."
        )
    common: dict[str, Any] = {
        "size_px": size_px, "epochs": epochs, "clusters": k, "split": options.split, "judge": False,
        "batch": batch, "reassign": reassign, "plateau": 0 if reassign > 1 else 5,
    }  # fmt: skip
    study.check_fits(size_px)
    records: Records = {name: [] for name in NETS}
    for seed in range(seeds):
        for name, net in NETS.items():
            net = net | ({"model_options": f"widths={widths}"} if name == "P4M CNN" else {})
            cell = f"{net['model']}-{seed}"
            records[name].append(
                study(cell, "deepcluster", seed=seed, fold=seed % 5, **net, **common)
            )
    study.all_asked()
    data = study.load(size_px)
    report.tables += [
        _clusters(study, records, data, k), _probes(study, records, data),
        _turned(study, records, data), _training(study, records),
    ]  # fmt: skip
    report.says = _says(report.tables[1].rows, report.tables[2].rows)
    _draw(study, report, records, data)
    return report


def _says(probe: dict[str, list[Cell]], turned: dict[str, list[Cell]]) -> tuple[str, str, str]:
    """Return the report's first sentences."""
    alexnet, p4m = (probe[name][0] for name in NETS)
    pixels = list(probe.values())[-1][0]
    return (
        "A P4M CNN, whose features do not change under turns and reflections, learns from pseudo-labels as "
        f"well as Sobel-AlexNet: a linear classifier is right for {p4m.published} and {alexnet.published} "
        "of chest X-rays.",
        f"The classifier is right for {said(p4m)} of held-out tiles with the P4M CNN, {said(alexnet)} with "
        f"Sobel-AlexNet and {said(pixels)} with pixels ({counted(len(p4m.ours), 'seed')}). "
        "Turned and reflected tiles "
        f"keep their cluster: {said(turned['P4M CNN'][1])} and {said(turned['Sobel-AlexNet'][1])}.",
        f"The P4M CNN minus Sobel-AlexNet: {difference(p4m, alexnet)}.",
    )


def _last(record: dict[str, Any], name: str) -> float:
    values = [epoch[name] for epoch in record["epochs"] if name in epoch]
    return float(values[-1]) if values else float("nan")


def _clusters(study: Study, records: Records, data: LabelledTiles, k: int) -> Table:
    """Tabulate NMI and AMI: last clustering against the one before, held-out clusters against labels."""
    rows: dict[str, list[Cell]] = {}
    rng = np.random.default_rng(0)
    for name, runs in records.items():
        nmi, ami, shuffled = [], [], []
        for seed in range(len(runs)):
            cell = f"{NETS[name]['model']}-{seed}"
            test = split(data, 5, seed % 5, seed, study.options.split).test
            vectors, readable = embed_numbers(study.encoder(cell), data, test)
            clusters = assign(vectors, study.tensor(cell, "clusters.centres"))
            labels = data.labels[readable]
            nmi.append(normalized_mutual_info_score(labels, clusters))
            ami.append(adjusted_mutual_info_score(labels, clusters))
            shuffled.append(normalized_mutual_info_score(labels, rng.permutation(clusters)))
        rows[name] = [
            Cell(LAST_NMI[name], tuple(_last(run, "nmi_previous") for run in runs)),
            Cell(None, tuple(_last(run, "ami_previous") for run in runs), 0.0),
            Cell(None, tuple(nmi), float(np.mean(shuffled))),
            Cell(None, tuple(ami), 0.0),
        ]
    columns = ("NMI(t, t-1)", "AMI(t, t-1)", "NMI to labels", "AMI to labels")
    return Table(f"Clusters, K = {k}", columns, rows, "the same clusters, shuffled")


def _probes(study: Study, records: Records, data: LabelledTiles) -> Table:
    rows: dict[str, list[Cell]] = {}
    trivial: list[float] = []
    for name, runs in records.items():
        probes = [run["metrics"]["probe"] for run in runs]
        trivial = np.mean([[m["baseline"] for m in probe] for probe in probes], 0).tolist()
        rows[name] = row(PROBE_NAMES, [values(probe) for probe in probes], PUBLISHED[name], trivial)
    flat = pixel_features(data.tiles)
    runs_on_pixels = []
    for seed in range(len(next(iter(records.values())))):
        parts = split(data, 5, seed % 5, seed, study.options.split)
        probe = linear_probe(
            flat[parts.train], data.labels[parts.train], flat[parts.test], data.labels[parts.test],
            data.label_names,
        )  # fmt: skip
        runs_on_pixels.append({metric.name: metric.value for metric in probe})
    rows["pixels (16 x 16)"] = row(PROBE_NAMES, runs_on_pixels, trivial=trivial)
    trivial_is = "the largest class; class shares as constant scores; chance"
    return Table("Linear probe on held-out tiles", PROBE, rows, trivial_is)


def _turned(study: Study, records: Records, data: LabelledTiles) -> Table:
    """Compare held-out tiles with their quarter turns and mirror images, in the trained nets."""
    rows: dict[str, list[Cell]] = {}
    for name, runs in records.items():
        cosines, kept = [], []
        for seed in range(len(runs)):
            cell = f"{NETS[name]['model']}-{seed}"
            encoder, centres = study.encoder(cell), study.tensor(cell, "clusters.centres")
            tiles = data.read(split(data, 5, seed % 5, seed, study.options.split).test)[0]
            vectors = embed(encoder, tiles)
            changed = [np.rot90(tiles, turns, (1, 2)) for turns in (1, 2, 3)] + [tiles[:, :, ::-1]]
            others = [embed(encoder, np.ascontiguousarray(part)) for part in changed]
            cosines.append(float(np.mean([(vectors * other).sum(1) for other in others])))
            clusters = assign(vectors, centres)
            kept.append(float(np.mean([assign(other, centres) == clusters for other in others])))
        rows[name] = [Cell(None, tuple(cosines)), Cell(None, tuple(kept))]
    columns = ("mean cosine", "same cluster")
    return Table("Held-out tiles after a quarter turn, a half turn or a reflection", columns, rows)


def _training(study: Study, records: Records) -> Table:
    """Tabulate what the nets cost, and how much of the pseudo-labels they learnt."""
    rows: dict[str, list[Cell]] = {}
    for name, runs in records.items():
        layers = summarise(study.encoder(f"{NETS[name]['model']}-0"))
        last = [_last(run, "loss") / np.log(max(2, _last(run, "clusters_used"))) for run in runs]
        rows[name] = [
            Cell(None, (sum(layer.macs for layer in layers) / 1e6,)),
            Cell(None, (sum(layer.parameters for layer in layers) / 1e6,)),
            Cell(None, tuple(run["seconds"] / 60 for run in runs)),
            Cell(None, tuple(last), 1.0),
        ]
    columns = ("million MACs a tile", "million weights", "minutes", "last loss / ln K")
    note = "Both nets get the same tiles, epochs and steps. The minutes are those of the machine above."
    return Table("Training", columns, rows, "a net that learns nothing", notes=[note])


def _draw(study: Study, report: Report, records: Records, data: LabelledTiles) -> None:
    def line(name: str, key: str) -> list[float]:
        curves = [[epoch[key] for epoch in run["epochs"] if key in epoch] for run in records[name]]
        return [float(value) for value in np.mean(curves, 0)]

    agreement = {f"{name}: {key.split('_')[0].upper()}": line(name, key)
                 for name in records for key in ("nmi_previous", "ami_previous")}  # fmt: skip
    losses = {name: line(name, "loss") for name in records}
    used = int(max(_last(run, "clusters_used") for runs in records.values() for run in runs))
    report.add_figure(
        figures.curves(
            study.out / "agreement.png", agreement, "clustering", "agreement with the clustering before",
            at=range(2, 1000),
        ),
        "Agreement of the clusters with those of the clustering before, mean over seeds",
    )  # fmt: skip
    levels = {"ln K": float(np.log(used))}
    report.add_figure(
        figures.curves(study.out / "loss.png", losses, "epoch", "cross-entropy", levels),
        "Loss by epoch; a net that learns nothing stays at ln K",
    )
    numbers = spread(np.arange(len(data)), 2000)
    for name in records:
        model = NETS[name]["model"]
        vectors, readable = embed_numbers(study.encoder(f"{model}-0"), data, numbers)
        file = study.tsne(f"tsne-{model}.png", vectors, data, readable, name)
        report.add_figure(file, f"t-SNE of the embeddings of {name}, seed 0, by label")
