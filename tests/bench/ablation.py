"""Ablation of the default encoder's recipe: the whole recipe, and the recipe without each of its parts.

All variants are trained in the same way, for fewer epochs than the shipped encoder, with three seeds (of
the weights and of the split). Each is evaluated on the tiles that its seed holds out. The report in
docs/results/encoder/ablation is written after every run. Runs with the same options that it already has
are not repeated (but with --again), so an ablation may be spread over days.
"""

import argparse
import functools
import itertools
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import viewer
from encoder import FEWEST, METRICS, OUT, nearest, summary, table
from judged import SHARED, never_trained, trained_and_held_out

from histoseek.artifacts import files
from histoseek.serving.encoders.open import DEFAULT_BUNDLE
from histoseek.training.checkpoint import load_encoder
from histoseek.training.commands import train
from histoseek.training.evaluate import embed
from histoseek.training.recipes import find_recipe

SEEDS = (0, 1, 2)
SAME = {"epochs": 8, "gate": False}
"""What differs from the shipped encoder's options in every variant."""
MODEL = "deviation=true,symmetry=true,layers=3+6+8+12"
VARIANTS = {
    "the recipe": {},
    "no viewing changes": {"viewing": False},
    "no loss on two views": {"consistency": 0.0, "layer_consistency": 0.0},
    "no loss on two views of each layer": {"layer_consistency": 0.0},
    "last layer alone": {
        "layer_consistency": 0.0, "model_options": MODEL.replace("layers=3+6+8+12", "layers=12"),
    },
    "blur in front": {"model_options": MODEL + ",blur=5"},
    "without histo_mix2": {},
    "softmax instead of ArcFace": {"loss": "softmax"},
    "no teacher": {"teacher": ""},
    "no places": {"target": "label"},
    "no stain augmentation": {"stain": 0.0},
    "mean pooling": {"model_options": MODEL.replace("deviation=true,", "")},
    "kernels not symmetric": {"model_options": MODEL.replace("symmetry=true,", "")},
}  # fmt: skip
VIEWED = ("CMU-1 (Aperio, skin)", "OS-1 (Hamamatsu, H&E)", "OS-2 (Hamamatsu, Ki67)")
"""Slides whose tiles are shown to every variant as other programs show them; none is trained on."""
SHOWN = 24
"""Largest number of tiles of each that are asked for."""


TITLES = {**METRICS, "viewed": "found at rank 1", "worst": "worst change", "cosine": "mean cosine"}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--again", action="store_true", help="repeat the runs that the report has")
    given = parser.parse_args()
    shipped = json.loads((given.bundle / "run.json").read_text())
    selection = shipped["data"]["selection"]
    sources = [SHARED / name.rsplit("/", 1)[-1] for name in selection["sources"]]
    facts, slides = begun(shipped, given.again), viewed()
    for seed, variant in itertools.product(given.seeds, given.only):
        runs = facts["values"].setdefault(variant, {})
        if str(seed) in runs:
            continue
        options = {**shipped["options"], **SAME, **VARIANTS[variant], "seed": seed}
        left_out = variant.removeprefix("without ") + ".tar"
        used = [source for source in sources if source.name != left_out]
        out = given.work / f"{variant.replace(' ', '-')}-{seed}"
        train(
            "arcface", find_recipe("arcface").options(**options), used, out, selection["exclude"],
            selection["label_from"], False, selection.get("shared_groups", False),
        )  # fmt: skip
        runs[str(seed)] = judged(out, slides)
        facts["date"] = time.strftime("%Y-%m-%d")
        OUT.mkdir(parents=True, exist_ok=True)
        files.write_atomic(OUT / "ablation.json", (json.dumps(facts, indent=1) + "\n").encode())
        files.write_atomic(OUT / "ablation.md", page(facts).encode())
        shown = {k: {m: round(x, 3) for m, x in v.items()} for k, v in runs[str(seed)].items()}
        print(variant, seed, shown, flush=True)


def begun(shipped, again):
    """Facts of the report, if it is of the same options; otherwise those of one without any run."""
    facts = {
        "encoder": shipped.get("name", ""),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "torch": torch.__version__,
        "options": {**shipped["options"], **SAME},
        "variants": VARIANTS,
    }
    path = OUT / "ablation.json"
    if again or not path.exists():
        return {**facts, "values": {}}
    former = json.loads(path.read_text())
    if other := [key for key in facts if key != "variants" and former.get(key) != facts[key]]:
        raise SystemExit(f"{path} has another {', '.join(other)}; --again begins a new report")
    kept = {
        name: runs for name, runs in former["values"].items()
        if former["variants"].get(name) == VARIANTS.get(name)
    }  # fmt: skip
    return {**facts, "values": kept}


def viewed():
    """Tiles, numbers of those to ask for, and queries of each slide in VIEWED."""
    with tempfile.TemporaryDirectory() as folder:
        found = {name: viewer.read(name, Path(folder), SHOWN) for name in VIEWED}
    return {
        n: (tiles, asked, viewer.queries(places)) for n, (tiles, asked, places) in found.items()
    }


def judged(run, slides):
    """Metrics of a run's net on its held-out tiles, sources never trained on, and slides as viewed."""
    encoder = load_encoder(run)
    _, held_out = trained_and_held_out(run)
    sets = {k: v for k, v in held_out.items() if len(v.tiles) >= FEWEST}
    sets["never trained on"] = never_trained(encoder.size_px, run)
    found = {}
    for name, data in sets.items():
        vectors = embed(encoder, data.tiles)
        rows = nearest(vectors, data.groups, data.labels)
        scores = {key: summary(values, data.groups) for key, values in rows.items()}
        found[name] = {key: score["value"] for key, score in scores.items() if score}
    rows = [
        viewer.judge(functools.partial(embed, encoder), tiles, asked, seen, None)
        for tiles, asked, seen in slides.values()
    ]
    shares = [[row[how]["found"] for row in rows] for how in viewer.CHANGES]
    cosines = [row[how]["cosine"] for row in rows for how in viewer.CHANGES]
    found["tiles as other programs show them"] = {
        "viewed": float(np.mean(shares)),
        "worst": float(np.mean(shares, 1).min()),
        "cosine": float(np.mean(cosines)),
    }
    return found


def _mean_and_deviation(values):
    mean = f"{np.mean(values):.3f}"
    return f"{mean} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else mean


def page(facts):
    """The report as Markdown, of the seeds that every variant has."""
    shown = ", ".join(f"{name} {value}" for name, value in SAME.items())
    variants = {name: runs for name in VARIANTS if (runs := facts["values"].get(name))}
    common = sorted(set.intersection(*(set(runs) for runs in variants.values())))
    lines = [
        "# What each part of the recipe is worth",
        "",
        f"`make bench-ablation`, {facts['date']}, {facts['machine']}, torch {facts['torch']}; the shipped "
        f"encoder's options but {shown}; mean ± standard deviation over the seeds ({', '.join(common)}), "
        "each with its own split by groups.",
        "",
    ]
    if missing := [name for name in VARIANTS if name not in variants]:
        lines += [f"Not run: {', '.join(missing)}.", ""]
    more = [
        f"{name} (seed {', '.join(sorted(set(runs) - set(common)))})"
        for name, runs in variants.items() if set(runs) - set(common)
    ]  # fmt: skip
    if more:
        lines += [f"In ablation.json, but not in these tables: {'; '.join(more)}.", ""]
    if not common:
        return "\n".join(lines)
    compared = {name: [runs[seed] for seed in common] for name, runs in variants.items()}
    runs_of_all = [run for runs in compared.values() for run in runs]
    for name in runs_of_all[0]:
        if not all(name in run for run in runs_of_all):
            continue  # too few of its tiles are held out with some seed
        metrics = [key for key in TITLES if all(key in run[name] for run in runs_of_all)]
        rows = []
        for variant, runs in compared.items():
            cells = [[run[name][key] for run in runs] for key in metrics]
            rows.append([variant, *map(_mean_and_deviation, cells)])
        lines += [f"## {name}", "", *table(["", *(TITLES[key] for key in metrics)], rows)]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
