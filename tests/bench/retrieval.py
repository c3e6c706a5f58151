"""Leave-one-patient-out retrieval on real tiles: the default encoder beside a random net and raw pixels.

Each is an atlas of its own, evaluated as `histoseek index evaluate` does. lc25000: the 609 tiles of groups
(source pictures, taken as patients) that the default encoder was not trained on. cxr_pneumonia: all chest
X-rays, a kind of picture that it never saw, by patient. Writes docs/results/retrieval.
"""

import json
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from histoseek.feature_files import Features
from histoseek.feature_writer import write_features
from histoseek.images import square
from histoseek.index.atlas import Atlas
from histoseek.index.evaluate import Options, evaluate
from histoseek.serving.encoder import DEFAULT_BUNDLE, open_encoder
from histoseek.tilesets import open_tiles
from histoseek.training.commands import select
from histoseek.training.data import load, split
from histoseek.training.evaluate import calibrate, embed
from histoseek.training.models import build

SHARED = Path(__file__).parents[3] / "shared" / "data"
OUT = Path(__file__).parents[2] / "docs" / "results" / "retrieval"
METRICS = ("top1", "mmv3", "mmv5", "mmv5_macro_f1", "map5")


def held_out_lc25000(size):
    """Tiles, labels, groups of fold 0, as the default encoder's run split them; and some to calibrate."""
    chosen = json.loads((DEFAULT_BUNDLE / "run.json").read_text())
    selection, options = chosen["data"]["selection"], chosen["options"]
    sources = [SHARED / name.rsplit("/", 1)[-1] for name in selection["sources"]]
    tiles = select(sources, selection["exclude"], selection["label_from"])
    data = load(tiles, size, lambda *_: None, options["cut"])
    parts = split(data, options["folds"], options["fold"], options["seed"])
    rows = [n for n in parts.test if data.files[n].startswith("lc25000")]
    names = {tile.file: tile for tile in open_tiles(SHARED / "lc25000.tar").tiles}
    known = [names[data.files[n].split("/", 1)[1]] for n in rows]
    return (
        data.tiles[rows],
        [t.label for t in known],
        [t.group for t in known],
        data.tiles[parts.train[::8]],
    )


def chest_x_rays(size):
    """All pictures of cxr_pneumonia."""
    source = open_tiles(SHARED / "cxr_pneumonia.tar")
    tiles = np.stack([square(source.read(n), size) for n in range(len(source.tiles))])
    return tiles, [t.label for t in source.tiles], [t.group for t in source.tiles], tiles[::8]


def atlas_of(folder, name, vectors, labels, groups):
    """An atlas of vectors, made here, with their labels and patients."""
    if name == "default":
        atlas = Atlas.create(folder / name, DEFAULT_BUNDLE)
    else:
        atlas = Atlas.create_external(folder / name, name, vectors.shape[1])
    item = Features(
        name="tiles", encoder=name, encoder_sha256=atlas.manifest.sha256, features=vectors,
        coords=np.zeros((len(vectors), 2), int), kind="tiles",
        files=tuple(str(n) for n in range(len(vectors))), labels=tuple(labels), groups=tuple(groups),
    )  # fmt: skip
    path = folder / f"{name}.h5"
    write_features(path, item)
    assert atlas.add([path])[0].state == "added"
    return atlas


def embeddings(encoder, tiles, some):
    torch.manual_seed(0)
    random = build("mobilenet-v3-small")
    calibrate(random, some)
    small = tiles[:, ::14, ::14].reshape(len(tiles), -1).astype(np.float32)
    return {
        "default": encoder.embed(tiles),
        "random-net": embed(random, tiles),
        "pixels-16x16": small - small.mean(1, keepdims=True),
    }


def main():
    encoder = open_encoder("default")
    size = encoder.manifest.size_px
    reports = {}
    for data, read in (("lc25000", held_out_lc25000), ("cxr_pneumonia", chest_x_rays)):
        tiles, labels, groups, some = read(size)
        with tempfile.TemporaryDirectory() as temp:
            for name, vectors in embeddings(encoder, tiles, some).items():
                atlas = atlas_of(Path(temp), name, vectors, labels, groups)
                encode = (lambda t=tiles: encoder.embed(t[:1])) if name == "default" else None
                report = evaluate(atlas, Options(), encode)
                del report["atlas"]
                reports[f"{data} {name}"] = report
                print(
                    data,
                    name,
                    {k: round(report["metrics"][k]["value"], 3) for k in METRICS},
                    flush=True,
                )
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "report.json").write_text(json.dumps(reports, indent=1) + "\n")
    (OUT / "report.md").write_text(page(reports))


def page(reports):
    lines = [
        "# Leave-one-patient-out retrieval",
        "",
        f"`make bench-retrieval`, {time.strftime('%Y-%m-%d')}, {platform.machine()}, "
        f"{os.cpu_count()} CPU cores. Each tile is asked of the tiles of all other patients; "
        "definitions in `index/evaluate.py`. In brackets: 95 % of 1,000 bootstrap draws of patients.",
        "",
    ]
    for data, title in (
        ("lc25000", "LC25000, tiles of groups that the default encoder was not trained on"),
        ("cxr_pneumonia", "Paediatric chest X-rays (bacteria, normal, virus), by patient"),
    ):
        own = {key.split(" ")[1]: r for key, r in reports.items() if key.startswith(data)}
        first = own["default"]
        lines += [
            f"## {title}",
            "",
            f"{first['queries']} tiles of {first['owners']} patients or groups.",
            "",
            f"| | {' | '.join(METRICS)} |",
            f"|---|{'---|' * len(METRICS)}",
        ]
        for name, report in own.items():
            cells = [_cell(report["metrics"][k]) for k in METRICS]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        for base in ("random", "majority"):
            values = (first["metrics"][k][base] for k in METRICS)
            cells = ["–" if v is None else f"{v:.3f}" for v in values]
            lines.append(f"| {base} answer | {' | '.join(cells)} |")
        lines += ["", "Majority of 5, default encoder:", "", "| class | tiles | recall | precision | F1 |",
                  "|---|---|---|---|---|"]  # fmt: skip
        for row in first["per_class_mmv5"]:
            precision = "–" if row["precision"] is None else f"{row['precision']:.3f}"
            facts = f"{row['recall']:.3f} | {precision} | {row['f1']:.3f}"
            lines.append(f"| {row['class']} | {row['queries']} | {facts} |")
        latency = first["latency"]
        lines += [
            "",
            f"One query: encoding {latency['encode_ms']} ms, search {latency['search_ms']} ms, both "
            f"{latency['end_to_end_ms']} ms.",
            "",
        ]
    return "\n".join(lines)


def _cell(metric):
    low, high = metric["interval_95"]
    return f"{metric['value']:.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    main()
