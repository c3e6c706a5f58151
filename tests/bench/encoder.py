"""Benchmark of the default encoder against common alternatives, always split by group.

The same run evaluates EfficientNet-Lite0 (ImageNet, 4.65 M parameters), the same averaged over the eight
rotations and reflections of the tile, the encoder's net with random weights, and pixels. Writes
docs/results/encoder, with figures. `--bundle` evaluates another bundle; `--quick` skips the slow parts.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from encoder_figures import curves_figure, examples_figure, map_figure
from judged import (
    CHANGES,
    CURVES,
    FOREIGN,
    changed,
    controls,
    crops_found,
    foreign,
    immunohistochemistry,
    never_trained,
    other_kinds,
    trained_and_held_out,
)

from histoseek.artifacts.feature_files import Features
from histoseek.artifacts.feature_writer import write_features
from histoseek.artifacts.files import sha256_file
from histoseek.artifacts.manifest import INPUT, OUTPUT, above_threshold
from histoseek.export.onnx_graph import Graph, to_onnx
from histoseek.index.atlas import Atlas
from histoseek.index.clusters.fit import fit as fit_clusters
from histoseek.index.studies.scores import average_precision, votes
from histoseek.metrics import clustering_report
from histoseek.serving.encoders.open import DEFAULT_BUNDLE
from histoseek.training.checkpoint import load_backbone
from histoseek.training.evaluate import calibrate, embed
from histoseek.training.models import build

OUT = Path(__file__).parents[2] / "docs" / "results" / "encoder"
LITE0, LITE0_D4 = "EfficientNet-Lite0", "EfficientNet-Lite0, 8 views"
DRAWS = 1000
FEWEST = 50
"""Held-out parts of fewer tiles say nothing."""
OVERLAPS = (0, 112, 168)
ROUNDS = 5
CLUSTER_SCORES = ("ari", "nmi", "ami", "noise_share")
METRICS = {
    "same_r1": "same source R@1",
    "mmv5": "mMV@5",
    "map5": "mAP@5",
    "top1": "1-NN",
    "knn5": "5-NN",
    "source1": "1-NN in its data set",
}


class OnnxEncoder:
    """A graph from raw pixels to embeddings in ONNX Runtime on the CPU."""

    def __init__(self, model):
        self.session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])

    def embed(self, tiles, batch=16):
        parts = [
            self.session.run([OUTPUT], {INPUT: tiles[n : n + batch]})[0]
            for n in range(0, len(tiles), batch)
        ]
        return np.concatenate(parts)


def lite0(views):
    """EfficientNet-Lite0's pooled features as a graph like ours."""
    net = build("efficientnet-lite0")
    load_backbone(net.backbone, "efficientnet-lite0")
    return OnnxEncoder(to_onnx(Graph(net.eval(), net.mean, net.std, views=views), 224))


def random_net(arch, some):
    """The encoder's net before training, with batch norms set on tiles."""
    torch.manual_seed(0)
    net = build(**arch)
    calibrate(net, some)
    return lambda tiles: embed(net, tiles)


def pixels(tiles):
    """Tiles shrunk to 16 x 16, less their mean."""
    small = tiles[:, ::14, ::14].reshape(len(tiles), -1).astype(np.float32)
    return small - small.mean(1, keepdims=True)


def unit(vectors):
    """Vectors of length 1."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def similarities(vectors):
    """Cosine of every two rows; -inf of a row to itself."""
    flat = unit(vectors.astype(np.float64))
    found = flat @ flat.T
    np.fill_diagonal(found, -np.inf)
    return found


def nearest(vectors, groups, labels, names=()):
    """Per tile: is the nearest other tile of its group (nan: no partner), and what others say of it.

    With class names DATA_SET/CLASS, also what the nearest tile of another group of its data set says: a
    laboratory's look cannot win this.
    """
    similarity = similarities(vectors)
    whole = similarity.copy()
    same = groups[:, None] == groups[None, :]
    partner = same.sum(1) > 1
    hit = np.where(partner, groups[similarity.argmax(1)] == groups, np.nan)
    similarity[same] = -np.inf
    order = np.argsort(-similarity, 1)[:, :5]
    found = labels[order]
    found[~np.isfinite(np.take_along_axis(similarity, order, 1))] = -1
    reachable = ((labels[:, None] == labels[None, :]) & ~same).sum(1)
    asked = (labels >= 0) & (reachable > 0)
    none = np.full(len(labels), np.nan)
    source1 = none
    if names:
        sources = np.array([name.rpartition("/")[0] for name in names])[labels]
        whole[same | (sources[:, None] != sources)] = -np.inf
        kinds = np.array([len(set(labels[sources == source])) for source in sources])
        known = asked & (kinds > 1) & np.isfinite(whole.max(1))
        source1 = np.where(known, labels[whole.argmax(1)] == labels, none)
    return {
        "source1": source1,
        "same_r1": hit,
        "mmv5": np.where(asked, votes(found, 5) == labels, none),
        "map5": np.where(asked, average_precision(found, labels, reachable), none),
        "top1": np.where(asked, found[:, 0] == labels, none),
        "knn5": np.where(asked, (found == labels[:, None]).sum(1) >= 3, none),
    }


def summary(values, groups, seed=0):
    """Mean with 95 % of a bootstrap over groups; None where nothing could be asked."""
    if not np.isfinite(values).any():
        return None
    number = np.unique(groups, return_inverse=True)[1]
    known = np.isfinite(values)
    total = np.bincount(number, np.where(known, values, 0))
    count = np.bincount(number, known.astype(float))
    weights = np.random.default_rng(seed).multinomial(
        len(total), np.full(len(total), 1 / len(total)), DRAWS
    )
    drawn = (weights @ total) / np.maximum(weights @ count, 1e-12)
    return {
        "value": float(total.sum() / count.sum()),
        "interval_95": [float(v) for v in np.percentile(drawn, (2.5, 97.5))],
        "asked": int(known.sum()),
    }


def retrieval(encoders, sets):
    """Every metric of every encoder on every set."""
    report = {}
    for name, data in sets.items():
        report[name] = {"tiles": len(data.tiles), "groups": len(np.unique(data.groups)), "of": {}}
        for who, encode in encoders.items():
            names = data.names if name.endswith("held out") else ()
            values = nearest(encode(data.tiles), data.groups, data.labels, names)
            found = {key: summary(v, data.groups) for key, v in values.items()}
            report[name]["of"][who] = found
            print(name, who, {k: v and round(v["value"], 3) for k, v in found.items()}, flush=True)
    return report


def robustness(encoders, data, changes):
    """Changed tiles asked of all others unchanged: same-source R@1, and how near their own original."""
    report = {}
    looked = {who: unit(encode(data.tiles).astype(np.float64)) for who, encode in encoders.items()}
    partner = np.array([(data.groups == g).sum() > 1 for g in data.groups])
    for how, change in changes.items():
        tiles = changed(data.tiles, change)
        report[how] = {}
        for who, encode in encoders.items():
            asked = unit(encode(tiles).astype(np.float64))
            similarity = asked @ looked[who].T
            own = float(similarity.diagonal().mean())
            np.fill_diagonal(similarity, -np.inf)
            hit = (data.groups[similarity.argmax(1)] == data.groups)[partner]
            report[how][who] = {"same_r1": float(hit.mean()), "own_similarity": own}
        print(how, {w: round(v["same_r1"], 3) for w, v in report[how].items()}, flush=True)
    return report


def clustering(encoders, data):
    """Clusters as `index fit` makes them, K unknown or known, against the labels."""
    report = {}
    truth = np.unique(data.labels, return_inverse=True)[1].astype(np.int64)
    ways = {
        "k-means, K by silhouette": ("kmeans", None),
        "k-means, K classes": ("kmeans", int(truth.max()) + 1),
        "HDBSCAN": ("hdbscan", None),
    }
    for who, encode in encoders.items():
        vectors = unit(encode(data.tiles)).astype(np.float32)
        report[who] = {}
        for name, (method, k) in ways.items():
            _, placed = fit_clusters(vectors, method, k)
            scores = {m.name: m.value for m in clustering_report(vectors, truth, placed.cluster)}
            report[who][name] = {"k": int(placed.cluster.max()) + 1, **scores}
        shown = {m: round(r["ami"], 3) for m, r in report[who].items()}
        print("clusters, AMI", who, shown, flush=True)
    return report


def unknown(encoders, bundle, train, tissue, others):
    """Shares called `unknown` by the clusters that `index fit` makes of the training tiles.

    The atlas of the first encoder is bound to its bundle, those of the others to a name.
    """
    own = next(iter(encoders))
    report = {}
    for who, encode in encoders.items():
        with tempfile.TemporaryDirectory() as temp:
            atlas = atlas_of(
                Path(temp), unit(encode(train.tiles)), train, bundle if who == own else None
            )
            report[who] = {}
            if who == own:
                report[who]["tissue gate alone"] = {
                    name: float(above_threshold(unit(encode(tiles))).mean())
                    for name, tiles in {**tissue, **others}.items()
                }
            for method in ("kmeans", "hdbscan"):
                try:
                    atlas.fit(method)
                except Exception as error:
                    report[who][method] = {"error": str(error)}
                    continue
                _, clusters = atlas.clustering(method)
                shares = {
                    name: float(clusters.assign(unit(encode(tiles))).unknown.mean())
                    for name, tiles in {**tissue, **others}.items()
                }
                report[who][method] = shares
                print(who, method, {k: round(v, 3) for k, v in shares.items()}, flush=True)
    return report


def atlas_of(folder, vectors, data, bundle=None):
    """An atlas of vectors of tiles, each group a patient."""
    path = folder / "atlas"
    if bundle is None:
        atlas = Atlas.create_external(path, "judged", vectors.shape[1])
    else:
        atlas = Atlas.create(path, bundle)
    item = Features(
        name="tiles", encoder=atlas.manifest.name, encoder_sha256=atlas.manifest.sha256,
        features=vectors.astype(np.float32), coords=np.zeros((len(vectors), 2), int), kind="tiles",
        files=tuple(str(n) for n in range(len(vectors))), labels=None,
        groups=tuple(str(g) for g in data.groups),
    )  # fmt: skip
    write_features(folder / "tiles.h5", item)
    assert atlas.add([folder / "tiles.h5"])[0].state == "added"
    return atlas


def speed(graphs, tiles):
    """Tiles per second of each graph in ONNX Runtime, batches of 16, the median of rounds taken in turn."""
    rates = {name: [] for name in graphs}
    for _ in range(ROUNDS + 1):
        for name, graph in graphs.items():
            started = time.perf_counter()
            graph.embed(tiles)
            rates[name].append(len(tiles) / (time.perf_counter() - started))
    return {name: float(np.median(values[1:])) for name, values in rates.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    run = json.loads((options.bundle / "run.json").read_text())
    manifest = json.loads((options.bundle / "manifest.json").read_text())
    train, held_out = trained_and_held_out(options.bundle)
    size = manifest["size_px"]
    sets = {f"{k}, held out": v for k, v in held_out.items() if len(v.tiles) >= FEWEST}
    sets["histo_mix, sources never trained on"] = never_trained(size, options.bundle)
    sets |= controls(size)
    graphs = {
        manifest["name"]: OnnxEncoder(str(options.bundle / "encoder.onnx")),
        LITE0: lite0(1),
        LITE0_D4: lite0(8),
    }
    encoders = {name: graph.embed for name, graph in graphs.items()}
    if not options.quick:
        encoders["random weights"] = random_net(run["architecture"], train.tiles[::8])
        encoders["pixels 16 x 16"] = pixels
    main_set = held_out["lc25000"]
    report = {
        "bundle": {
            "name": manifest["name"],
            "sha256": sha256_file(options.bundle / "encoder.onnx"),
        },
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "onnxruntime": onnxruntime.__version__,
        "seed": run["options"]["seed"],
        "tiles_per_s": speed(graphs, main_set.tiles[:192]),
        "retrieval": retrieval(encoders, sets),
    }
    print(report["tiles_per_s"])
    if not options.quick:
        few = {k: v for k, v in encoders.items() if k != LITE0_D4}
        report["other_kinds"] = retrieval(few, other_kinds(size))
        for found in report["other_kinds"].values():  # numbers of patients are not all one person's
            for scores in found["of"].values():
                scores["same_r1"] = None
        report["robustness"] = robustness(few, main_set, {"unchanged": lambda p: p, **CHANGES})
        report["curves"] = {
            name: robustness(few, main_set, {str(s): _at(how, s) for s in strengths})
            for name, (strengths, how) in CURVES.items()
        }
        report["crops"] = crops({k: v for k, v in few.items() if not k.startswith("pixels")})
        report["clustering"] = clustering(few, main_set)
        tissue = {name: data.tiles for name, data in sets.items()}
        tissue["immunohistochemistry, never trained on"] = immunohistochemistry(
            size, options.bundle
        )
        report["unknown"] = unknown(few, options.bundle, train, tissue, foreign(size))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "report.md").write_text(page(report))
    if not options.quick:
        own = encoders[manifest["name"]]
        curves_figure(report["curves"], options.out / "robustness.png")
        both = [data for data in held_out.values() if len(data.tiles) >= FEWEST]
        map_figure([(own(data.tiles), data) for data in both], options.out / "map.png")
        examples_figure(own, main_set, options.out / "examples.jpg")


def _at(how, strength):
    """A change at one strength."""
    return lambda picture: how(picture, strength)


def crops(encoders):
    """How many of 100 crops of a slide are found, by overlap of the atlas's tiles."""
    report = {}
    for who, encode in encoders.items():
        flat = lambda tiles, e=encode: unit(e(tiles))  # noqa: E731
        report[who] = {
            str(overlap): [crops_found(flat, overlap, anywhere)[0] for anywhere in (False, True)]
            for overlap in OVERLAPS
        }
        print("crops", who, report[who], flush=True)
    return report


def page(report):
    """The report as Markdown."""
    own = report["bundle"]["name"]
    rates = report["tiles_per_s"]
    lines = [
        f"# {own} beside its peers",
        "",
        f"`make bench-encoder`, {report['date']}, {report['machine']}, ONNX Runtime "
        f"{report['onnxruntime']}; encoder sha256 `{report['bundle']['sha256']}`, split by groups with "
        f"seed {report['seed']}. In brackets: 95 % of {DRAWS:,} bootstrap draws of groups.",
        "",
        "## Speed",
        "Batches of 16, median of rounds taken in turn.",
        "",
        *table(
            ["", "tiles/s", f"times {LITE0}"],
            [[n, f"{r:.0f}", f"{r / rates[LITE0]:.2f}"] for n, r in rates.items()],
        ),
        "## Crops made by other programs",
        "[The viewer's report](../viewer/report.md): resampled, sharpened, compressed, recoloured and "
        "turned crops of six slides that the encoder was not trained on.",
        "",
        "## Retrieval",
        "Same source: the nearest other tile is of the same source picture, slide or patient. All else "
        "is asked of tiles of other groups only. The class of a tile of a source never trained on is that "
        "source; immunohistochemistry is among them. 1-NN in its data set: of the nearest tile of another "
        "group of the same data set, so that a laboratory's look cannot help.",
        "",
    ]
    for name, found in {**report["retrieval"], **report.get("other_kinds", {})}.items():
        lines += [
            f"### {name}",
            f"{found['tiles']} tiles of {found['groups']} groups.",
            "",
            *table(
                ["", *METRICS.values()],
                [[w, *(_cell(v[k]) for k in METRICS)] for w, v in found["of"].items()],
            ),
        ]
    if "robustness" in report:
        lines += [
            "![Held-out tiles by t-SNE](map.png)",
            "",
            "![Queries with their five nearest tiles of other groups](examples.jpg)",
            "",
            *_more(report),
        ]
    return "\n".join(lines)


def _more(report):
    changes = report["robustness"]
    names = list(changes["unchanged"])
    crop_kinds = list(next(iter(report["crops"].values())))
    lines = [
        "## Robustness",
        "Held-out LC25000 tiles, changed, asked of all others unchanged: same source R@1, in brackets the "
        "mean similarity of a changed tile to itself.",
        "",
        *table(
            ["", *names],
            [
                [how, *(f"{v[n]['same_r1']:.3f} ({v[n]['own_similarity']:.3f})" for n in names)]
                for how, v in changes.items()
            ],
        ),
        "![Same source R@1 as a change grows](robustness.png)",
        "",
        "## Crops of a slide",
        "100 crops of CMU-1-Small-Region (not trained on), turned by any angle and mirrored half the time; "
        "found: the tile of the best hit covers the crop's centre. On the grid of tiles without overlap / "
        "anywhere between them.",
        "",
        *table(
            ["", *(f"tiles overlap by {k} px" if int(k) else "no overlap" for k in crop_kinds)],
            [[who, *(f"{a} / {b}" for a, b in r.values())] for who, r in report["crops"].items()],
        ),
        "## Clusters",
        "Of held-out LC25000 tiles, as `index fit` makes them.",
        "",
    ]
    rows = [
        [who, method, str(r["k"]), *(f"{r[k]:.3f}" for k in CLUSTER_SCORES)]
        for who, found in report["clustering"].items()
        for method, r in found.items()
    ]  # fmt: skip
    lines += table(["", "method", "K", "ARI", "NMI", "AMI", "noise"], rows)
    first = next(iter(report["unknown"].values()))
    kinds = list(next(iter(first.values())))
    lines += [
        "## Unknown",
        "Shares called `unknown` by the clusters of an atlas of the training tiles (`index fit`): false "
        f"alarms on tissue, catches on {FOREIGN} pictures of each foreign kind. A picture is unknown "
        "because of the tissue gate or because no cluster is near. One row has the gate alone.",
        "",
    ]
    rows = [
        [who, method, *(f"{r[k]:.3f}" if k in r else "–" for k in kinds)]
        for who, found in report["unknown"].items()
        for method, r in found.items()
    ]
    return lines + table(["", "method", *kinds], rows)


def table(head, rows):
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines] + [""]


def _cell(found):
    if found is None:
        return "–"
    low, high = found["interval_95"]
    return f"{found['value']:.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    main()
