"""Which tiles `embed` leaves out as blurred or pen: false alarms on real tiles, and made cases caught.

The tiles are centre squares of the pictures in four packs. Blur and ink are made by SciPy and NumPy, then
Pillow compresses the tiles as JPEG. The last lines say which share of the CPU time of `embed` the measures
take. `--picture` draws only the overlay of a slide with a blurred part and pen strokes.
"""

import argparse
import csv
import io
import json
import os
import platform
import statistics
import tarfile
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import openslide
import tifffile
from encoder import table
from judged import SHARED
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter
from scipy.signal import fftconvolve

from histoseek.serving.embedding import pipeline
from histoseek.serving.embedding.jobs import find_jobs
from histoseek.serving.embedding.results import EmbedOptions
from histoseek.serving.encoders.open import open_encoder
from histoseek.serving.slides.quality import PEN, SHARPNESS, measure

DOCS = Path(__file__).parents[2] / "docs"
PACKS = ("histo_mix", "histo_mix2", "lc25000", "wsi_regions")
SIZE, MOST, FEWEST = 224, 60, 5
"""Side of a tile; most pictures of a source; sources with fewer pictures are left out."""
CHANGED = 8
"""Pictures of each source that are blurred and drawn on."""
ENLARGED = ("dsb2018",)
"""Sources whose pictures are enlarged or blurred by their makers."""
THRESHOLDS = (0.08, 0.1, 0.12, 0.15, 0.2)
INKS = {
    "green": (0, 130, 70), "blue": (25, 70, 190), "turquoise": (0, 140, 170), "dark blue": (20, 25, 110),
    "red": (200, 20, 40), "black": (25, 25, 30),
}  # fmt: skip
RUNS = 7


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DOCS / "results" / "quality")
    parser.add_argument(
        "--picture", type=Path, help="write the overlay of a made slide to this file"
    )
    given = parser.parse_args()
    if given.picture is not None:
        draw_picture(given.picture)
        return
    tiles = {source: rows for source, rows in pictures().items() if len(rows) >= FEWEST}
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "tiles": sum(map(len, tiles.values())),
        "limits": {
            "min_sharpness": EmbedOptions().min_sharpness,
            "max_pen": EmbedOptions().max_pen,
        },
        "real": {source: of_real(rows) for source, rows in tiles.items()},
        "blurred": blurred(tiles),
        "pen": inked(tiles),
        "speed": speed(),
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "report.json").write_text(json.dumps(facts, indent=1) + "\n")
    (given.out / "report.md").write_text(page(facts))
    print(page(facts))


def pictures():
    """Centre squares by source, uint8 (N, S, S, 3)."""
    found = {}
    for pack in PACKS:
        with tarfile.open(SHARED / f"{pack}.tar") as archive:
            rows = list(
                csv.DictReader(io.TextIOWrapper(archive.extractfile("manifest.csv"), "utf-8"))
            )
            for row in rows:
                source = (
                    row["source_id"] if pack.startswith("histo_mix") else f"{pack} {row['label']}"
                )
                kept = found.setdefault(source, [])
                if len(kept) >= MOST or Path(row["file"]).suffix not in {".jpg", ".jpeg", ".png"}:
                    continue
                picture = Image.open(io.BytesIO(archive.extractfile(row["file"]).read()))
                left, top = (picture.width - SIZE) // 2, (picture.height - SIZE) // 2
                if min(left, top) >= 0:
                    box = (left, top, left + SIZE, top + SIZE)
                    kept.append(np.asarray(picture.convert("RGB").crop(box)))
    return {source: np.stack(rows) for source, rows in found.items() if rows}


def of_real(tiles):
    """Sharpness of a source's tiles, and the shares that the default limits leave out."""
    measures = measure(tiles)
    limits = EmbedOptions()
    return {
        "tiles": len(tiles),
        "sharpness": [
            round(float(v), 3) for v in np.quantile(measures[:, SHARPNESS], (0.02, 0.5, 0.98))
        ],
        "most_pen": round(float(measures[:, PEN].max()), 3),
        "blurred": {
            str(t): round(float((measures[:, SHARPNESS] < t).mean()), 4) for t in THRESHOLDS
        },
        "pen": round(float((measures[:, PEN] > limits.max_pen).mean()), 4),
    }


def compressed(tiles, quality=80):
    """The tiles as Pillow's JPEG returns them."""
    done = []
    for tile in tiles:
        buffer = io.BytesIO()
        Image.fromarray(tile).save(buffer, "JPEG", quality=quality)
        done.append(np.asarray(Image.open(buffer).convert("RGB")))
    return np.stack(done)


def disk(radius):
    """A filter of a lens out of focus."""
    reach = int(np.ceil(radius))
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    kernel = (np.hypot(x, y) <= radius).astype(float)
    return (kernel / kernel.sum())[:, :, None]


def unfocused(tile, radius):
    kernel = disk(radius)
    reach = kernel.shape[0] // 2
    padded = np.pad(tile.astype(float), ((reach, reach), (reach, reach), (0, 0)), "reflect")
    return fftconvolve(padded, kernel, "valid")


def gaussian(tile, sigma):
    return gaussian_filter(tile.astype(float), (sigma, sigma, 0))


BLURS = {
    **{f"Gaussian {s:g} px": partial(gaussian, sigma=s) for s in (1, 1.5, 2, 2.5, 3, 4)},
    **{f"out of focus, radius {r} px": partial(unfocused, radius=r) for r in (3, 5)},
}


def blurred(tiles):
    """Share of made blurred tiles below each threshold, with little and with more noise, as JPEG 80."""
    rng, found = np.random.default_rng(0), {}
    some = [t for source, rows in tiles.items() if source not in ENLARGED for t in rows[:CHANGED]]
    for name, blur in BLURS.items():
        soft = [blur(tile) for tile in some]
        for noise in (1, 3):
            noisy = [
                (t + rng.normal(0, noise, t.shape)).clip(0, 255).astype(np.uint8) for t in soft
            ]
            values = measure(compressed(noisy))[:, SHARPNESS]
            found[f"{name}, noise {noise}"] = {
                str(t): round(float((values < t).mean()), 3) for t in THRESHOLDS
            }
    return found


def ink_over(tile, colour, opacity, rng):
    """A tile below ink: every channel is multiplied by the ink's transmission, with streaks."""
    streaks = gaussian_filter(rng.normal(0, 1, tile.shape[:2]), (1, 12))
    depth = (opacity + 0.15 * streaks / streaks.std())[:, :, None].clip(0.05, 1.5)
    return tile * (np.array(colour) / 255.0) ** depth


def inked(tiles):
    """Share of tiles below ink, wholly or by half, over tissue or glass, that are left out as pen."""
    rng, found, limit = np.random.default_rng(0), {}, EmbedOptions().max_pen
    tissue = [t for source, rows in tiles.items() if source not in ENLARGED for t in rows[:CHANGED]]
    glass = [np.full((SIZE, SIZE, 3), rng.integers(225, 250), np.uint8) for _ in range(40)]
    for name, colour in INKS.items():
        row = {}
        for ground, some in (("tissue", tissue), ("glass", glass)):
            for covered, share in (("wholly", 1.0), ("half", 0.5)):
                drawn = []
                for tile in some:
                    below = tile.astype(float)
                    wide = round(SIZE * share)
                    below[:, :wide] = ink_over(below[:, :wide], colour, rng.uniform(0.5, 1.0), rng)
                    drawn.append(below.clip(0, 255).astype(np.uint8))
                measures = measure(compressed(drawn))
                row[f"{ground}, {covered}"] = round(float((measures[:, PEN] > limit).mean()), 3)
        found[name] = row
    return found


def made_slide(path, marked=False):
    """A pyramid of real tissue (CMU-1-Small-Region, 2 x 2); `marked`: once, with blur and pen strokes."""
    with (
        tarfile.open(SHARED / "wsi_regions.tar") as archive,
        tempfile.TemporaryDirectory() as folder,
    ):
        member = next(m for m in archive if m.name.endswith("CMU-1-Small-Region.svs"))
        archive.extract(member, folder, filter="data")
        with openslide.OpenSlide(Path(folder) / member.name) as slide:
            part = np.array(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
    if not marked:
        part = np.concatenate([np.concatenate([part, part[:, ::-1]], 1)] * 2, 0)
    else:
        part = marked_picture(part)
    with tifffile.TiffWriter(path) as out:
        for number in range(3):
            level = part[:: 2**number, :: 2**number]
            scale = 1e4 / (0.499 * 2**number)
            out.write(
                level, tile=(256, 256), photometric="rgb", subfiletype=int(number > 0),
                resolution=(scale, scale), resolutionunit="CENTIMETER", compression="jpeg",
            )  # fmt: skip


def marked_picture(part):
    """Tissue whose lower left is out of focus, with strokes of three pens."""
    height, width = part.shape[:2]
    soft = np.zeros((height, width, 1))
    soft[height * 11 // 20 :, : width * 2 // 5] = 1
    soft = gaussian_filter(soft, (40, 40, 0))
    part = part * (1 - soft) + gaussian_filter(part.astype(float), (4, 4, 0)) * soft
    rng = np.random.default_rng(0)
    for colour, points in (
        (INKS["green"], [(0.55, 0.05), (0.75, 0.22), (0.95, 0.18)]),
        (INKS["blue"], [(0.62, 0.95), (0.7, 0.6), (0.9, 0.55)]),
        (INKS["red"], [(0.1, 0.1), (0.3, 0.3)]),
    ):
        sheet = Image.new("L", (width, height))
        line = [(x * width, y * height) for x, y in points]
        ImageDraw.Draw(sheet).line(line, fill=255, width=230, joint="curve")
        ink = gaussian_filter(np.asarray(sheet) / 255.0, 8)[:, :, None]
        part = part * (1 - ink) + ink_over(part, colour, 0.8, rng) * ink
    return part.clip(0, 255).astype(np.uint8)


def embed(slide, out, **options):
    """Embed a slide with the default encoder; seconds of CPU, and the result."""
    encoder = open_encoder("default", engine="onnxruntime")
    started = time.process_time()
    try:
        results = pipeline.embed_jobs(
            find_jobs([slide]), encoder, out, EmbedOptions(**options), lambda *_: None
        )
        return time.process_time() - started, results[0]
    finally:
        encoder.close()


def speed():
    """Share of the CPU time of whole runs of `embed` that the measures take."""
    measured, shares, tiles = pipeline.measure, [], 0
    keeping = {"min_sharpness": 0.0, "max_pen": 1.0, "overlays": False, "overlap_px": 112}
    spent = []

    def timed(some):
        started = time.thread_time()
        try:
            return measured(some)
        finally:
            spent.append(time.thread_time() - started)

    with tempfile.TemporaryDirectory() as temp:
        made_slide(Path(temp) / "slide.tif")
        pipeline.measure = timed
        try:
            for run in range(RUNS):
                spent.clear()
                seconds, result = embed(Path(temp) / "slide.tif", Path(temp) / str(run), **keeping)
                shares.append(sum(spent) / seconds)
                tiles = result.tiles
        finally:
            pipeline.measure = measured
    return {
        "tiles": tiles,
        "runs": RUNS,
        "share_of_cpu_time": round(statistics.median(shares), 4),
        "from": round(min(shares), 4),
        "to": round(max(shares), 4),
    }


def draw_picture(path):
    """Write the overlay of a slide with a blurred part and strokes of three pens."""
    with tempfile.TemporaryDirectory() as temp:
        slide = Path(temp) / "marked.tif"
        made_slide(slide, marked=True)
        _, result = embed(slide, Path(temp) / "out")
        path.write_bytes((Path(temp) / "out" / "overlays" / "marked.jpg").read_bytes())
        print(result.tiles, "tiles embedded; left out:", result.left_out_tiles)


def page(facts):
    """The report as Markdown."""
    limits = facts["limits"]
    usual = str(limits["min_sharpness"])
    sharp = {s: row for s, row in facts["real"].items() if s not in ENLARGED}
    count = sum(row["tiles"] for row in sharp.values())
    false = {
        t: sum(row["blurred"][t] * row["tiles"] for row in sharp.values()) / count
        for t in map(str, THRESHOLDS)
    }
    lines = [
        "# Tiles left out as blurred or pen",
        "",
        f"`make bench-quality`, {facts['date']}, {facts['machine']}; {facts['tiles']} tiles of "
        f"{len(facts['real'])} sources. Defaults: sharpness below {usual}, ink on more than "
        f"{limits['max_pen']:.0%} of the pixels.",
        "",
        "## Blur",
        "",
        "Share of tiles below a threshold of sharpness. Blur and noise (grey levels) are made; then JPEG.",
        "",
    ]
    rows = [
        [f"real tiles as they are ({count})", *(f"{false[t]:.3f}" for t in map(str, THRESHOLDS))]
    ]
    rows += [
        [name, *(f"{row[t]:.2f}" for t in map(str, THRESHOLDS))]
        for name, row in facts["blurred"].items()
    ]
    lines += table(["tiles", *(f"< {t}" for t in THRESHOLDS)], rows)
    worst = sorted(sharp, key=lambda s: -sharp[s]["blurred"][usual])[:3]
    named = [f"{s} {sharp[s]['blurred'][usual]:.0%}" for s in worst if sharp[s]["blurred"][usual]]
    lines += [f"Sources with such tiles at the default: {', '.join(named) or 'none'}.", ""]
    lines += ["## Pen", "", "Share of tiles below made ink that are left out as pen.", ""]
    grounds = list(next(iter(facts["pen"].values())))
    rows = [[ink, *(f"{row[g]:.2f}" for g in grounds)] for ink, row in facts["pen"].items()]
    lines += table(["ink", *grounds], rows)
    most = max(facts["real"], key=lambda s: facts["real"][s]["most_pen"])
    share = sum(row["pen"] * row["tiles"] for row in facts["real"].values()) / facts["tiles"]
    fast = facts["speed"]
    lines += [
        f"Of the real tiles, {share:.4f} are left out as pen; the largest share of ink colours on one of "
        f"them is {facts['real'][most]['most_pen']:.2f} ({most}).",
        "",
        "## Speed",
        "",
        f"The measures take {fast['share_of_cpu_time']:.1%} of the CPU time of `embed` (median of "
        f"{fast['runs']} runs, {fast['from']:.1%} to {fast['to']:.1%}; {fast['tiles']} tiles, default "
        "encoder on ONNX Runtime).",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
