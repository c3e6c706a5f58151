"""Tissue detection by several methods: tiles labelled by eye, and artefacts on glass.

tissue_labels.json has squares of 112 µm (approximately) on ten real pictures, labelled by eye: T has tissue
on at least about a quarter (spaces between cells and alveoli included), G hardly any; "?" does not count.
The artefacts are drawn on a glass of grey level 240 with noise, and ink on the pictures, too. The network
was trained on none of the pictures, and on artefacts that other code draws. `--sheet` draws what each
method finds.
"""

import argparse
import json
import os
import platform
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from encoder import table
from judged import SHARED
from PIL import Image, ImageDraw
from scipy import ndimage
from skimage.filters import threshold_otsu

from histoseek.serving.embedding.tissue_network import SMALL, open_network
from histoseek.serving.slides import tissue
from histoseek.serving.slides.slide import open_slide

OUT = Path(__file__).parents[2] / "docs" / "results" / "tissue"
LABELS = Path(__file__).with_name("tissue_labels.json")
TILE_UM, SHARE = 112, 0.25
INKS = {
    "green": (0, 130, 70), "blue": (25, 70, 190), "red": (200, 20, 40), "black": (25, 25, 30),
}  # fmt: skip


def by_texture(picture, mpp):
    """Standard deviation of the grey levels around each pixel, divided by Otsu's method."""
    grey = picture.astype(np.float32).mean(2)
    mean = ndimage.gaussian_filter(grey, 3)
    spread = np.sqrt(np.maximum(0, ndimage.gaussian_filter(grey**2, 3) - mean**2))
    return spread > np.clip(threshold_otsu(spread), 3, 8)


def by_network(picture, mpp):
    """The network of the package, on the picture as a slide."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slide.png"
        Image.fromarray(picture).save(path)
        with open_slide(path, assume_mpp=mpp) as slide:
            return open_network(SMALL).mask(slide, picture)


METHODS = {
    "saturation": lambda picture, mpp: tissue.by_saturation(picture),
    "texture": by_texture,
    "absorbance": tissue.tissue_mask,
    "network": by_network,
}


def pictures():
    """Each labelled picture as a thumbnail, uint8 (H, W, 3), with its labels."""
    for row in json.loads(LABELS.read_text()):
        with tarfile.open(SHARED / row["pack"]) as archive, tempfile.TemporaryDirectory() as folder:
            member = next(m for m in archive if row["file"] in m.name)
            archive.extract(member, folder, filter="data")
            with open_slide(Path(folder) / member.name, assume_mpp=0.5) as slide:
                thumbnail = Image.fromarray(slide.thumbnail(1024))
        yield row, np.asarray(thumbnail.resize(row["size"], Image.Resampling.BOX))


def judged():
    """Recall, and false tissue, of each method on each labelled picture."""
    found = {}
    for row, picture in pictures():
        corners = np.array(row["corners"], dtype=float)
        boxes = np.concatenate([corners, corners + row["side"]], 1)
        labels = np.array(list(row["labels"]))
        facts = found[row["file"]] = {
            "T": int((labels == "T").sum()),
            "G": int((labels == "G").sum()),
        }
        for name, method in METHODS.items():
            mask = method(picture, TILE_UM / row["side"])
            kept = tissue.tissue_share(mask, boxes) >= SHARE
            facts[name] = {
                "tissue kept": int((kept & (labels == "T")).sum()),
                "glass kept": int((kept & (labels == "G")).sum()),
                "mask": round(float(mask.mean()), 3),
            }
    return found


def glass(side=1024):
    """Bright glass with the noise of a scanner."""
    rng = np.random.default_rng(0)
    return 240 + rng.normal(0, 1.5, (side, side, 3))


def artefacts():
    """What is no tissue, drawn on glass: each uint8 (H, W, 3) and where it is (H, W)."""
    plain = glass()
    side = len(plain)
    y, x = np.mgrid[:side, :side]
    yield "clean glass", plain, np.ones((side, side), bool)
    for dark in (0.04, 0.08, 0.15):
        shade = 1 - dark * (x / side)
        yield (
            f"shading, {dark:.0%} across the slide",
            plain * shade[:, :, None],
            np.ones((side, side), bool),
        )
    edge = np.abs(y - 0.3 * side - 0.02 * x) < 3
    yield "edge of a coverslip", np.where(edge[:, :, None], plain * 0.7, plain), edge
    bubbles, at = plain.copy(), np.zeros((side, side), bool)
    for cx, cy, radius in ((200, 300, 60), (700, 600, 110), (500, 200, 35)):
        distance = np.abs(np.hypot(x - cx, y - cy) - radius)
        bubbles[distance < 4] *= 0.55
        at |= np.hypot(x - cx, y - cy) < radius + 4
    yield "air bubbles", bubbles, at
    dust, at = plain.copy(), np.zeros((side, side), bool)
    rng = np.random.default_rng(1)
    for cx, cy in rng.integers(0, side, (150, 2)):
        at |= np.hypot(x - cx, y - cy) < rng.uniform(1, 3)
    dust[at] *= 0.5
    yield "dust", dust, at
    for name in INKS:
        yield f"pen, {name}", *inked(plain, name, rng)


def inked(picture, name, rng):
    """A picture (H, W, 3) with a stroke of a pen, and where the ink is (H, W)."""
    height, width = picture.shape[:2]
    sheet = Image.new("L", (width, height))
    stroke = [(x * width, y * height) for x, y in ((0.1, 0.2), (0.5, 0.8), (0.9, 0.7))]
    ImageDraw.Draw(sheet).line(stroke, fill=255, width=round(0.044 * width), joint="curve")
    ink = ndimage.gaussian_filter(np.asarray(sheet) / 255.0, 2)[:, :, None]
    streaks = ndimage.gaussian_filter(rng.normal(0, 1, (height, width)), (1, 8))
    depth = (0.8 + 0.12 * streaks / streaks.std())[:, :, None]
    below = picture * (np.array(INKS[name]) / 255) ** depth
    return picture * (1 - ink) + below * ink, ink[:, :, 0] > 0.5


def on_tissue():
    """With ink on the labelled pictures: tiles mostly below it, and tiles of tissue without it, kept."""
    rng = np.random.default_rng(2)
    found = {}
    for row, picture in pictures():
        corners = np.array(row["corners"], dtype=float)
        boxes = np.concatenate([corners, corners + row["side"]], 1)
        labelled = np.array(list(row["labels"])) == "T"
        step = row["side"]
        grid = [(x, y) for y in range(0, picture.shape[0] - step, step)
                for x in range(0, picture.shape[1] - step, step)]  # fmt: skip
        every = np.concatenate([np.array(grid, float), np.array(grid, float) + step], 1)
        for name in INKS:
            drawn, at = inked(picture.astype(float), name, rng)
            below = tissue.tissue_share(at, every) > 0.5
            free = labelled & (tissue.tissue_share(at, boxes) == 0)
            facts = found.setdefault(name, {"below ink": 0, "free of ink": 0})
            facts["below ink"] += int(below.sum())
            facts["free of ink"] += int(free.sum())
            for method, find in METHODS.items():
                mask = find(drawn.clip(0, 255).astype(np.uint8), TILE_UM / row["side"])
                kept = facts.setdefault(method, [0, 0])
                kept[0] += int((below & (tissue.tissue_share(mask, every) >= SHARE)).sum())
                kept[1] += int((free & (tissue.tissue_share(mask, boxes) >= SHARE)).sum())
    return found


def seconds():
    """Time in s to find tissue on 10 x 10 mm of a slide that was read already."""
    picture = np.tile(next(pictures())[1], (3, 3, 1))[:1250, :1250]
    found = {}
    for name, method in METHODS.items():
        method(picture, 8.0)
        started = time.perf_counter()
        method(picture, 8.0)
        found[name] = round(time.perf_counter() - started, 2)
    return found


def on_glass(mpp=8.0):
    """Share of the tiles that touch an artefact and are kept as tissue, by method."""
    found = {}
    for name, drawn, at in artefacts():
        picture = drawn.clip(0, 255).astype(np.uint8)
        step = round(TILE_UM / mpp)
        corners = np.array(
            [(x, y) for y in range(0, 1024 - step, step) for x in range(0, 1024 - step, step)],
            float,
        )
        boxes = np.concatenate([corners, corners + step], 1)
        touched = tissue.tissue_share(at, boxes) > 0
        found[name] = {"tiles": int(touched.sum())}
        for method, find in METHODS.items():
            kept = tissue.tissue_share(find(picture, mpp), boxes) >= SHARE
            found[name][method] = round(float((kept & touched).sum() / touched.sum()), 3)
    return found


def draw_sheet(path):
    """Draw the mask of each method over each labelled picture."""
    cells = []
    for row, picture in pictures():
        line = [Image.fromarray(picture)]
        for method in METHODS.values():
            mask = method(picture, TILE_UM / row["side"])[:, :, None]
            line.append(
                Image.fromarray(
                    np.where(mask, picture // 2 + np.array([0, 110, 0], np.uint8), picture)
                )
            )
        for one in line:
            one.thumbnail((300, 240))
        cells.append(line)
    sheet = Image.new("RGB", (300 * len(cells[0]), 250 * len(cells)), "white")
    for y, line in enumerate(cells):
        for x, one in enumerate(line):
            sheet.paste(one, (300 * x, 250 * y))
    sheet.save(path, quality=85)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument(
        "--sheet", type=Path, help="draw the masks to this file, and do nothing else"
    )
    given = parser.parse_args()
    if given.sheet is not None:
        draw_sheet(given.sheet)
        return
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "labelled": judged(),
        "artefacts": on_glass(),
        "ink on tissue": on_tissue(),
        "seconds for 10 x 10 mm": seconds(),
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "report.json").write_text(json.dumps(facts, indent=1) + "\n")
    (given.out / "report.md").write_text(page(facts))
    print(page(facts))


def page(facts):
    """The report as Markdown."""
    labelled = facts["labelled"]
    tissues, glasses = (sum(row[key] for row in labelled.values()) for key in "TG")
    lines = [
        "# Tissue detection",
        "",
        f"`python tests/bench/tissue.py`, {facts['date']}, {facts['machine']}. Tiles of about {TILE_UM} µm "
        f"on {len(labelled)} real pictures, labelled by eye: {tissues} with tissue, {glasses} of glass. A "
        f"tile is kept if at least {SHARE:.0%} of it is tissue.",
        "",
        "## Tiles with tissue that are kept",
        "",
    ]
    rows = [
        [name, f"{row['T']}", *(f"{row[m]['tissue kept'] / row['T']:.2f}" for m in METHODS)]
        for name, row in labelled.items()
    ]
    kept = {m: sum(row[m]["tissue kept"] for row in labelled.values()) for m in METHODS}
    false = {m: sum(row[m]["glass kept"] for row in labelled.values()) for m in METHODS}
    rows.append(["all", str(tissues), *(f"{kept[m] / tissues:.3f}" for m in METHODS)])
    rows.append(["precision", "", *(f"{kept[m] / (kept[m] + false[m]):.3f}" for m in METHODS)])
    lines += table(["picture", "tiles", *METHODS], rows)
    lines += ["## Artefacts on glass: share of the tiles touched that are kept", ""]
    rows = [
        [name, str(row["tiles"]), *(f"{row[m]:.2f}" for m in METHODS)]
        for name, row in facts["artefacts"].items()
    ]
    lines += table(["artefact", "tiles", *METHODS], rows)
    lines += [
        "## Ink on the labelled pictures",
        "",
        "Share kept of the tiles with more than half of their area below ink / of the tiles with tissue "
        "that no ink touches.",
        "",
    ]
    rows = []
    for name, row in facts["ink on tissue"].items():
        of = row["below ink"], row["free of ink"]
        shares = [[kept / max(1, n) for kept, n in zip(row[m], of, strict=True)] for m in METHODS]
        rows.append([name, f"{of[0]} / {of[1]}", *(f"{a:.2f} / {b:.3f}" for a, b in shares)])
    lines += table(["ink", "tiles", *METHODS], rows)
    took = facts["seconds for 10 x 10 mm"]
    lines += [
        "Time for 10 x 10 mm at 8 µm per pixel: "
        + ", ".join(f"{m} {took[m]} s" for m in METHODS)
        + ".",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
