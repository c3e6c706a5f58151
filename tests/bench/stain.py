"""Stains: which one a slide has, and whether bringing all slides to the same colours helps to search.

The first part counts how often the stain of a group of tiles (a slide or patient) is told right; groups
of few pixels are counted as if there were more of the same kind. The second part normalises tiles by the
methods of Reinhard and Macenko, fitted to each group, and embeds them again.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import viewer
from encoder import table as markdown
from judged import SHARED, controls, never_trained, trained_and_held_out

from histoseek.artifacts.tileset_files import open_tiles
from histoseek.errors import BadInput
from histoseek.export.normalising import export_normalising
from histoseek.export.options import ExportOptions
from histoseek.serving.encoders.open import DEFAULT_BUNDLE, open_encoder
from histoseek.serving.encoders.stain_normalisation import (
    embed_images,
    embed_normalised,
    fitted,
    normalised,
    sampled,
)
from histoseek.serving.slides.stain import COLOURS, stain_of, tally

OUT = Path(__file__).parents[2] / "docs" / "results" / "stain"
IHC = {"deepliif_ihc", "ki67_immunoratio", "lymphoma_myc_ihc", "skimage_ihc", "lyon19_crops"}
OTHER = {
    "birl_sections/proSPC", "liver_steatosis/fibrosis",
    "muscle_myoquant/ATPase (enzyme)", "muscle_myoquant/SDH (enzyme)",
}  # fmt: skip
BY_LABEL = {"birl_sections", "liver_steatosis", "muscle_myoquant", "openslide_os"}
METHODS = ("none", "reinhard", "macenko")
TWICE = "OS-2 (Olympus, Ki67)"
LARGER = 20


def kinds():
    """How often each stain was named, by true stain, and the sources named wrongly."""
    counts = defaultdict(lambda: np.zeros(len(COLOURS), np.int64))
    for pack in ("lc25000.tar", "histo_mix.tar", "histo_mix2.tar"):
        tiles = open_tiles(SHARED / pack)
        for number, tile in enumerate(tiles.tiles):
            source = tile.column("source_id") or "lc25000"
            if source in BY_LABEL:
                source = f"{source}/{tile.label}"
            counts[source, tile.group] += tally(tiles.read(number)[None])
    found, wrong = defaultdict(Counter), defaultdict(Counter)
    for (source, _), colours in counts.items():
        ihc = source in IHC or source.endswith("/ki67_ihc")
        truth = "IHC" if ihc else "other" if source in OTHER else "H&E"
        told = stain_of(colours * LARGER) or "too few pixels"
        found[truth][told] += 1
        if told != truth:
            wrong[source][told] += 1
    return {"found": found, "wrong": wrong}


def by_group(tiles, groups, method):
    """Tiles (N, S, S, 3) normalised by a fit to each group; those of groups without a fit stay."""
    if method == "none":
        return tiles, 0
    made, without = tiles.copy(), 0
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        try:
            table = fitted(sampled(tiles[rows]), method)
        except BadInput:
            without += 1
            continue
        made[rows] = normalised(tiles[rows], table)
    return made, without


def nearest(vectors, groups, others_only):
    """The nearest tile of each; of another group only, or any but itself."""
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -np.inf)
    if others_only:
        scores[groups[:, None] == groups] = -np.inf
    return scores.argmax(1)


def searched(encoder):
    """What is found with each method."""
    found = {}
    sets = {f"{name}: class of the nearest tile": (t, "class") for name, t in controls(224).items()}
    sets["never trained on: same source at rank 1"] = never_trained(224), "group"
    held_out = trained_and_held_out()[1]
    for name in ("histo_mix", "histo_mix2", "lc25000"):
        sets[f"{name}, held out: same source at rank 1"] = held_out[name], "group"
    for name, (tiles, what) in sets.items():
        row = found[name] = {"tiles": len(tiles.tiles)}
        alone = "CRC" in name  # names no patients: one laboratory
        for method in METHODS:
            fits = np.zeros_like(tiles.groups) if alone else tiles.groups
            made, without = by_group(tiles.tiles, fits, method)
            vectors = embed_normalised(encoder.embed, encoder.manifest, made, tiles.tiles)
            near = nearest(vectors, tiles.groups, what == "class")
            if what == "class":
                right = tiles.labels[near] == tiles.labels
            else:
                several = np.bincount(tiles.groups)[tiles.groups] > 1
                right = (tiles.groups[near] == tiles.groups)[several]
            row[method] = round(float(right.mean()), 3)
            row["groups without a fit"] = without
    return found


def rescanned(encoder):
    """Squares of a slide found in a scan by another scanner, by the number of squares of a fit."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        tiles, asked, places = viewer.read(TWICE, Path(folder))
        queries = viewer.rescanned(TWICE, places, Path(folder))["as it is"]
    for method in METHODS:
        whole = np.zeros(len(tiles), int)
        made = by_group(tiles, whole, method)[0]
        atlas = embed_normalised(encoder.embed, encoder.manifest, made, tiles)
        for count, name in ((len(queries), "slide"), (9, "9 squares"), (1, "the square alone")):
            made = queries.copy()
            for n in range(len(queries)):
                around = np.abs(np.arange(len(queries)) - n).argsort(kind="stable")[:count]
                made[n] = by_group(queries[around], np.zeros(count, int), method)[0][0]
            vectors = embed_normalised(encoder.embed, encoder.manifest, made, queries)
            hits = (vectors @ atlas.T).argmax(1) == asked
            found.setdefault(name, {"tiles": len(asked)})[method] = round(float(hits.mean()), 3)
    return found


def cost(encoder):
    """CPU time in ms: of normalising a tile of a slide, of embedding it, and of a query image."""
    tiles = np.random.default_rng(0).integers(0, 256, (64, 224, 224, 3), dtype=np.uint8)
    table = fitted(sampled(tiles // 2), "macenko")
    encoder.embed(tiles)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "macenko"
        export_normalising(DEFAULT_BUNDLE, bundle, ExportOptions(stain_normalise="macenko"))
        normalising = open_encoder(bundle)
    for name, work in (
        ("normalise", lambda: normalised(tiles, table)),
        ("embed", lambda: encoder.embed(tiles)),
        ("query", lambda: embed_images(normalising, tiles // 2)),
    ):
        started = time.process_time()
        for _ in range(5):
            work()
        found[name] = round((time.process_time() - started) * 1000 / 5 / len(tiles), 2)
    return found


def page(facts):
    """The report as Markdown."""
    stains = ("H&E", "IHC", "other", "too few pixels")
    lines = [
        "# Stains",
        "",
        f"`python tests/bench/stain.py`, {facts['date']}, {facts['machine']}.",
        "",
        "## Stain told from colours",
        "",
        "Groups of tiles (slides, patients, source tiles) by true stain, and what was told.",
        "",
    ]
    rows = [
        [truth, *(str(told.get(stain, 0)) for stain in stains)]
        for truth, told in facts["kinds"]["found"].items()
    ]
    lines += markdown(["true stain", *stains], rows)
    lines += ["Sources with mistakes:", ""]
    rows = [
        [source, ", ".join(f"{count} {stain}" for stain, count in told.items())]
        for source, told in facts["kinds"]["wrong"].items()
    ]
    lines += markdown(["source", "told wrongly"], rows)
    lines += [
        "## Search after stain normalisation",
        "",
        "Share found by the default encoder. Each method is fitted to each group (slide or patient).",
        "",
    ]
    rows = [
        [name, str(row["tiles"]), *(f"{row[m]:.3f}" for m in METHODS)]
        for name, row in facts["searched"].items()
    ]
    lines += markdown(["what", "tiles", *METHODS], rows)
    lines += [
        f"## Another scanner: {TWICE}",
        "",
        "Squares of the scan by Hamamatsu that find their place in the scan by Olympus, when the method is "
        "fitted to the whole scan, and to fewer squares of the query.",
        "",
    ]
    rows = [
        [name, str(row["tiles"]), *(f"{row[m]:.3f}" for m in METHODS)]
        for name, row in facts["rescanned"].items()
    ]
    lines += markdown(["query fitted to", "squares", *METHODS], rows)
    ms = facts["cost_ms"]
    lines += [
        f"CPU time per tile: {ms['normalise']} ms to normalise it, {ms['embed']} ms to embed it with the "
        "default encoder. Normalised tiles are embedded twice, because its tissue gate looks at them as "
        f"they are. A query image, to which the method is fitted, takes {ms['query']} ms.",
        "",
    ]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    encoder = open_encoder("default")
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "kinds": kinds(),
        "searched": searched(encoder),
        "rescanned": rescanned(encoder),
        "cost_ms": cost(encoder),
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "report.json").write_text(json.dumps(facts, indent=1) + "\n")
    (given.out / "report.md").write_text(page(facts))
    print(page(facts))


if __name__ == "__main__":
    main()
