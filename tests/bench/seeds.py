"""How much do the default encoder's numbers vary with the seed?

The runs are trained by the command in docs/training.md with other values of --seed. Each seed also splits
the groups anew into training and held-out ones. Every run is exported as the shipped one and judged as
`make bench-encoder` and `make bench-viewer` do. Writes docs/results/encoder/seeds.md and seeds.json; seeds
that the report already has and that are not given again are kept.
"""

import argparse
import dataclasses
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import viewer
from encoder import FEWEST, OUT, OnnxEncoder, crops, retrieval, table, unknown
from judged import (
    SHARED,
    controls,
    foreign,
    immunohistochemistry,
    never_trained,
    trained_and_held_out,
)
from playwright.sync_api import sync_playwright

from histoseek.artifacts import files
from histoseek.artifacts.tileset_files import open_tiles
from histoseek.export.bundle import export_run
from histoseek.export.options import ExportOptions
from histoseek.training.models import build
from histoseek.training.recipes import find_recipe

SHIPPED = Path(__file__).parents[2] / "training" / "default_run"
MAY_DIFFER = {"seed", "accelerator", "stream", "tensorboard"}
ROWS = {
    "LC25000: R@1": ("lc25000, held out", "same_r1"),
    "LC25000: mMV@5": ("lc25000, held out", "mmv5"),
    "histo_mix: R@1": ("histo_mix, held out", "same_r1"),
    "histo_mix: mMV@5": ("histo_mix, held out", "mmv5"),
    "histo_mix2: R@1": ("histo_mix2, held out", "same_r1"),
    "histo_mix2: mMV@5": ("histo_mix2, held out", "mmv5"),
    "never trained on: R@1": ("histo_mix, sources never trained on", "same_r1"),
    "never trained on: mMV@5": ("histo_mix, sources never trained on", "mmv5"),
    "CRC-VAL-HE-7K: 1-NN": ("CRC-VAL-HE-7K, kinds of tissue", "top1"),
    "GlaS: 1-NN": ("GlaS, benign or malignant", "top1"),
}
"""Set and metric of `encoder.retrieval` by the row's name."""


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="*", default=[SHIPPED], help="folders of runs")
    given = parser.parse_args()
    path = OUT / "seeds.json"
    facts = json.loads(path.read_text()) if path.exists() else {"seeds": {}}
    wanted = comparable(SHIPPED)
    if facts.setdefault("options", wanted) != wanted:
        raise SystemExit(f"{path} is of other options than {SHIPPED}; remove it to begin anew")
    for run in given.runs:
        if comparable(run) != wanted:
            raise SystemExit(f"{run} has other options or data than {SHIPPED}")
        seed = json.loads((run / "run.json").read_text())["options"]["seed"]
        facts["seeds"][str(seed)] = {"shipped": run.samefile(SHIPPED), **judged(run)}
        facts |= {
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        }
        files.write_atomic(path, (json.dumps(facts, indent=1) + "\n").encode())
        files.write_atomic(OUT / "seeds.md", page(facts).encode())


def comparable(run):
    """The options and the data of a run, without what may differ between seeds.

    Options that are newer than the run have their usual values.
    """
    record = json.loads((run / "run.json").read_text())
    filled = dataclasses.asdict(find_recipe("arcface").options(**record["options"]))
    options = {k: v for k, v in filled.items() if k not in MAY_DIFFER}
    selection = {k: v for k, v in record["data"]["selection"].items() if k != "sources"}
    return {"options": options, "selection": selection, "data": record["data"]["fingerprint"]}


def judged(run):
    """Every number of a run, by the row's name."""
    with tempfile.TemporaryDirectory() as temp:
        bundle = Path(temp) / "bundle"
        tiles = open_tiles(SHARED / "lc25000.tar")
        manifest = export_run(run, bundle, tiles, build, ExportOptions(name="seed", mpp=0.5))
        encode = OnnxEncoder(str(bundle / "encoder.onnx")).embed
        own = {manifest.name: encode}
        train, held_out = trained_and_held_out(bundle)
        size = manifest.size_px
        sets = {f"{k}, held out": v for k, v in held_out.items() if len(v.tiles) >= FEWEST}
        sets["histo_mix, sources never trained on"] = never_trained(size, bundle)
        sets |= controls(size)
        found = retrieval(own, sets)
        values = {
            row: found[name]["of"][manifest.name][metric]["value"]
            for row, (name, metric) in ROWS.items()
            if name in found
        }
        values |= on_slides(encode)
        on_grid = crops(own)[manifest.name]
        values["turned crops on the grid, of 100"] = on_grid["0"][0]
        for overlap, (_, between) in on_grid.items():
            values[f"crops between tiles, overlap {overlap} px, of 100"] = between
        tissue = {name: data.tiles for name, data in sets.items()}
        tissue["immunohistochemistry never trained on"] = immunohistochemistry(size, bundle)
        shares = unknown(own, bundle, train, tissue, foreign(size))[manifest.name]
        gate = shares["tissue gate alone"]
        for name in gate:
            values[f"called unknown: {name}"] = shares["kmeans"].get(name)  # None: k-means failed
            values[f"called unknown by the tissue gate alone: {name}"] = gate[name]
    return values


def on_slides(encode):
    """How many crops made by other programs are found."""
    cells, cosines, values = [], [], {}
    with tempfile.TemporaryDirectory() as temp, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=viewer.FLAGS)
        for name, tiles, asked, seen, other in viewer.shown(browser, Path(temp)):
            rows = viewer.judge(encode, tiles, asked, seen, None)
            cells += [row["found"] for row in rows.values()]
            cosines += [row["cosine"] for row in rows.values()]
            if other:
                for how, row in viewer.judge(encode, tiles, asked, other, None).items():
                    values[f"another scanner, {how}"] = row["found"]
            print(name, min(row["found"] for row in rows.values()), flush=True)
        browser.close()
    return {
        "crops by other programs: found, mean": float(np.mean(cells)),
        "crops by other programs: worst cell": min(cells),
        f"crops by other programs: cells below .98, of {len(cells)}": sum(c < 0.98 for c in cells),
        "crops by other programs: mean cosine": float(np.mean(cosines)),
        **values,
    }


def page(facts):
    """The report as Markdown."""
    seeds = sorted(facts["seeds"], key=int)
    shipped = [f"seed {seed}" for seed in seeds if facts["seeds"][seed]["shipped"]]
    names = dict.fromkeys(name for values in facts["seeds"].values() for name in values)
    del names["shipped"]
    rows = []
    for name in names:
        found = [facts["seeds"][seed].get(name) for seed in seeds]  # None: too few tiles held out
        known = [value for value in found if value is not None]
        digits = 1 if all(isinstance(value, int) for value in known) else 3
        spread = f" ± {np.std(known, ddof=1):.{digits}f}" if len(known) > 1 else ""
        rows.append([name, *map(_number, found), f"{np.mean(known):.{digits}f}{spread}"])
    return "\n".join(
        [
            "# The default encoder with other seeds",
            "",
            f"`python tests/bench/seeds.py RUN…`, {facts['date']}, {facts['machine']}. The shipped run: "
            f"{', '.join(shipped) or 'none of them'}. Each seed has its own split into training and "
            "held-out groups, so the held-out tiles of a data set differ. The sources never trained on, "
            "the slides and the crops do not.",
            "",
            *table(["", *(f"seed {seed}" for seed in seeds), "mean ± sd"], rows),
        ]
    )


def _number(value):
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


if __name__ == "__main__":
    main()
