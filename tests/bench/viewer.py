"""Does a crop from another program find its own place?

Every slide is embedded by histoseek from a pyramidal TIFF. The queries never pass through histoseek's
reader: Pillow, OpenCV and Chromium cut them from the slide's pixels and resample, turn, sharpen, compress
or recolour them. A query counts as found if the tile at its place is the nearest of all tiles of the slide,
and of an atlas with further tiles of other slides. The report names slides that the bundle was trained on.

`--bundle` evaluates another bundle; `--atlas` sets the number of further tiles (0 for none).
"""

import argparse
import base64
import functools
import io
import json
import os
import platform
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import openslide
import tifffile
from encoder import LITE0, LITE0_D4, OnnxEncoder, lite0, pixels, table, unit
from judged import SHARED
from PIL import Image, ImageCms, ImageEnhance, ImageFilter
from playwright.sync_api import sync_playwright

from histoseek.artifacts.files import sha256_file
from histoseek.artifacts.images import decode, square
from histoseek.serving.encoders.open import DEFAULT_BUNDLE
from histoseek.serving.slides.slide import open_slide
from histoseek.training.augment import Augmentation, augment
from histoseek.training.commands import select
from histoseek.training.data import load

sys.path.append(str(Path(__file__).parents[1]))
from colour import ADOBE, DISPLAY_P3, rgb_profile

OUT = Path(__file__).parents[2] / "docs" / "results" / "viewer"
SIZE = 224
TISSUE = 0.3
"""Least share of tissue of a tile."""
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run",
]  # fmt: skip
SLIDES = {
    "CMU-1 (Aperio, skin)": ("wsi_regions.tar", "CMU-1-Small-Region.svs", 1, "CMU-1"),
    "OS-1 (Hamamatsu, H&E)": ("formats.tar", "OS-1-detail.ome.tif", 1, "openslide_os"),
    "OS-2 (Hamamatsu, Ki67)": ("formats.tar", "OS-2-ndpi.ome.tif", 1, "openslide_os"),
    "OS-2 (Olympus, Ki67)": ("formats.tar", "OS-2-vsi.ome.tif", 1, "openslide_os"),
    "HistoPrep (prostate)": ("wsi_regions.tar", "histoprep_slide.jpeg", 1, "hp1"),
    "HistoPrep, level 1": ("wsi_regions.tar", "histoprep_slide.jpeg", 2, "hp1"),
    "CMU-1, level 1": ("wsi_regions.tar", "CMU-1-Small-Region.svs", 2, "CMU-1"),
}
"""Pack, file, pixels of the file per pixel of a tile, and the group or source that training leaves out."""
WHOLE = {"OS-2 (Olympus, Ki67)"}
"""Slides whose whole grid is used, since the search for tissue finds none: it is grey and pale."""
RESCANNED = {"OS-2 (Olympus, Ki67)": ("formats.tar", "OS-2-ndpi.ome.tif", (0, -4))}
"""The same glass slide by another scanner, and the shift (x, y) in pixels that aligns it."""
P3 = np.array([[0.8225, 0.1774, 0.0], [0.0332, 0.9669, 0.0], [0.0171, 0.0724, 0.9108]])
"""Linear sRGB to linear Display P3: what a screenshot on a wide-gamut screen stores without a profile."""
DISTRACTORS = 50_000
QUERIES = 48
"""Largest number of tiles of a slide that are asked for, evenly spaced; all are in the atlas."""


@dataclass(frozen=True)
class Place:
    """A tile's square on a slide: uint8 pixels (H, W, 3) of the whole slide, corner and side in pixels."""

    slide: np.ndarray
    x: int
    y: int
    side: int

    def around(self, factor=1.0):
        """The square, or one ``factor`` times as large with the same centre; mirrored beyond the edge."""
        side = round(self.side * factor)
        pad = max(0, side - self.side)
        left, top = self.x - (side - self.side) // 2, self.y - (side - self.side) // 2
        if 0 <= left <= self.slide.shape[1] - side and 0 <= top <= self.slide.shape[0] - side:
            return Image.fromarray(self.slide[top : top + side, left : left + side])
        padded = np.pad(self.slide, ((pad, pad), (pad, pad), (0, 0)), "reflect")
        return Image.fromarray(padded[top + pad :, left + pad :][:side, :side])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--atlas", type=int, default=DISTRACTORS)
    options = parser.parse_args()
    manifest = json.loads((options.bundle / "manifest.json").read_text())
    own = manifest["name"]
    encoders = {
        own: OnnxEncoder(str(options.bundle / "encoder.onnx")).embed,
        LITE0: lite0(1).embed,
        LITE0_D4: lite0(8).embed,
        "pixels 16 x 16": pixels,
    }
    # Not with eight views: they would take an hour.
    compared = (own, LITE0) if options.atlas else ()
    parts = [
        [unit(encoders[who](tiles)) for who in compared] for tiles in further_tiles(options.atlas)
    ]
    far = {
        who: np.concatenate(vectors)
        for who, vectors in zip(compared, zip(*parts, strict=True), strict=True)
    }
    report = {}
    with tempfile.TemporaryDirectory() as temp, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=FLAGS)
        for name, tiles, asked, seen, other in shown(browser, Path(temp)):
            report[name] = {"tiles": len(tiles), "queries": len(asked), "of": {}}
            for who, encode in encoders.items():
                rows = judge(encode, tiles, asked, seen, far.get(who))
                report[name]["of"][who] = rows
                if other:
                    report[name].setdefault("rescanned", {})[who] = judge(
                        encode, tiles, asked, other, None
                    )
                worst = min(rows, key=lambda how: rows[how]["found"])
                print(f"{name}: {who}: worst {worst} {rows[worst]['found']:.3f}", flush=True)
        browser.close()
    facts = {
        "bundle": {"name": own, "sha256": sha256_file(options.bundle / "encoder.onnx")},
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "onnxruntime": onnxruntime.__version__,
        "atlas": options.atlas,
        "trained_on": trained_on(options.bundle),
        "slides": report,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "report.json").write_text(json.dumps(facts, indent=1) + "\n")
    (options.out / "report.md").write_text(page(facts))


def shown(browser, folder):
    """Of every slide: its name, tiles, numbers of those to ask for, queries, and those of another scan."""
    for name in SLIDES:
        tiles, asked, places = read(name, folder)
        seen = queries(places, CHANGES | PROFILED)
        seen |= as_queries(screenshots(browser, places[0].slide, places))
        yield (
            name, tiles, asked, seen, rescanned(name, places, folder) if name in RESCANNED else {},
        )  # fmt: skip


def read(name, folder, most=QUERIES):
    """A slide's tiles, the numbers of those to ask for, and their places."""
    pack, file, pixels_per_pixel, _ = SLIDES[name]
    slide = pixels_of(pack, file, folder)
    tissue = 0.0 if name in WHOLE else TISSUE
    tiles, places = read_by_histoseek(slide, pixels_per_pixel, folder, tissue)
    asked = np.arange(0, len(tiles), -(-len(tiles) // most))
    return tiles, asked, [places[n] for n in asked]


def queries(places, changes=None):
    """The squares after each change (all of ``CHANGES`` when None), as the search receives them."""
    changes = CHANGES if changes is None else changes
    return as_queries({how: map(change, places) for how, change in changes.items()})


def as_queries(pictures):
    """Pictures by change as arrays (N, S, S, 3)."""
    return {
        how: np.stack([as_query(picture) for picture in some]) for how, some in pictures.items()
    }


def rescanned(name, places, folder):
    """The squares as another scanner saw them, as they are and with the colours of the slide searched.

    The colours are matched as Reinhard et al. (2001) do: mean and deviation of each Lab channel.
    """
    pack, file, shift = RESCANNED[name]
    ours = places[0].slide
    other = pixels_of(pack, file, folder)
    other = cv2.resize(other, ours.shape[1::-1], interpolation=cv2.INTER_AREA)
    other = np.roll(other, shift, (1, 0))
    lab, own = (cv2.cvtColor(scan, cv2.COLOR_RGB2LAB).astype(np.float32) for scan in (other, ours))
    lab = (lab - lab.mean((0, 1))) / lab.std((0, 1)) * own.std((0, 1)) + own.mean((0, 1))
    matched = cv2.cvtColor(lab.clip(0, 255).astype(np.uint8), cv2.COLOR_LAB2RGB)
    scans = {"as it is": other, "colours matched": matched}
    return as_queries(
        {
            how: [replace(place, slide=scan).around() for place in places]
            for how, scan in scans.items()
        }
    )


def trained_on(bundle):
    """The slides that the bundle's run did not leave out."""
    rules = json.loads((bundle / "run.json").read_text())["data"]["selection"]["exclude"]
    left_out = {value for rule in rules for value in rule.split("=", 1)[1].split(",")}
    return [name for name, (*_, unit_of_split) in SLIDES.items() if unit_of_split not in left_out]


def pixels_of(pack, file, folder):
    """The pixels of a slide as OpenSlide, tifffile or Pillow reads them, uint8 (H, W, 3)."""
    with tarfile.open(SHARED / pack) as archive:
        member = next(m for m in archive if m.name.endswith(file))
        archive.extract(member, folder, filter="data")
    path = folder / member.name
    if path.suffix == ".svs":
        with openslide.OpenSlide(path) as slide:
            return np.array(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
    if path.suffix == ".tif":
        return tifffile.imread(path, key=0)
    return np.array(Image.open(path).convert("RGB"))


def read_by_histoseek(slide, pixels_per_pixel, folder, tissue=TISSUE):
    """Write a pyramid as scanners do, and read the tiles of its grid: uint8 (N, S, S, 3), and places."""
    path, levels = folder / "slide.tif", [slide]
    while min(levels[-1].shape[:2]) > 2 * SIZE:
        levels.append(cv2.resize(levels[-1], None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA))
    with tifffile.TiffWriter(path) as out:
        for number, level in enumerate(levels):
            scale = 1e4 / (0.25 * 2**number)
            out.write(
                level, tile=(256, 256), photometric="rgb", subfiletype=int(number > 0),
                resolution=(scale, scale), resolutionunit="CENTIMETER", compression="deflate",
            )  # fmt: skip
    with open_slide(path) as opened:
        grid = opened.grid(SIZE, 0.25 * pixels_per_pixel, min_tissue=tissue)
        side = grid.size_px_level0
        coords = [(int(x), int(y)) for x, y in grid.coords]
        tiles = np.stack([opened.read_tile(x, y, side, SIZE) for x, y in coords])
    return tiles, [Place(slide, x, y, side) for x, y in coords]


def as_query(image):
    """A picture as the search receives it: PNG bytes, decoded and made a square tile."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return square(decode(buffer.getvalue()), SIZE)


def judge(encode, tiles, numbers, seen, far):
    """Per change: share of queries whose own tile is the nearest, and their mean cosine with it."""
    known = unit(encode(tiles))
    rows = {}
    for how, queries in seen.items():
        asked = unit(encode(queries))
        cosines = asked @ known.T
        own = cosines[np.arange(len(numbers)), numbers]
        nearest = cosines.argmax(1) == numbers
        rows[how] = {"found": float(nearest.mean()), "cosine": float(own.mean())}
        if far is not None and len(far):
            among_all = nearest & (own >= (asked @ far.T).max(1))
            rows[how]["found_in_atlas"] = float(among_all.mean())
    return rows


def further_tiles(count):
    """Yield ``count`` tiles of other slides, a few at a time: parts of images, turned and zoomed."""
    if not count:
        return
    import torch

    packs = [SHARED / "lc25000.tar", SHARED / "histo_mix.tar"]
    chosen = select(packs, ["source_id=openslide_os"], ["label"])
    tiles = load(chosen, SIZE, lambda *_: None).tiles
    generator = torch.Generator().manual_seed(0)
    ranges = Augmentation(180, 0.4, 0.1, True, 0.1, 0.0)
    yield tiles[:count]
    made = len(tiles)
    while made < count:
        for start in range(0, len(tiles), 256):
            some = torch.from_numpy(tiles[start : start + 256]).permute(0, 3, 1, 2).float() / 255
            changed = augment(some, ranges, generator).permute(0, 2, 3, 1)
            yield (changed * 255).round().byte().numpy()[: count - made]
            made += len(changed)
            if made >= count:
                return


def resized(place, how, px=SIZE):
    """The square as Pillow resamples it; a tile that needs no resampling is shown at three quarters."""
    px = px if place.side != px else 3 * px // 4
    return place.around().resize((px, px), how)


def opencv(place, how):
    """The square as OpenCV resamples it."""
    px = SIZE if place.side != SIZE else 3 * SIZE // 4
    return Image.fromarray(cv2.resize(np.asarray(place.around()), (px, px), interpolation=how))


def turned(place, degrees):
    """The square cut out after the slide was turned around its centre."""
    wide = place.around(1.5).rotate(degrees, Image.Resampling.BICUBIC)
    at = (wide.width - place.side) // 2
    return wide.crop((at, at, at + place.side, at + place.side))


def compressed(place, quality):
    """The square as a JPEG file."""
    buffer = io.BytesIO()
    place.around().save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def coarser(place):
    """The square read from the next level of the pyramid."""
    return place.around().resize((place.side // 2,) * 2, Image.Resampling.BOX)


def gamma(image, power):
    """Every value to this power."""
    return image.point([round(255 * (n / 255) ** power) for n in range(256)] * 3)


def wide_gamut(image):
    """The values that a Display P3 screen stores for the same colours."""
    values = np.asarray(image, dtype=np.float64) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4) @ P3.T
    coded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return Image.fromarray((coded.clip(0, 1) * 255).round().astype(np.uint8))


def profiled(place, primaries, gamma_):
    """The square as a viewer shows it that applies the slide's ICC profile: converted to sRGB."""
    profile = ImageCms.ImageCmsProfile(io.BytesIO(rgb_profile(primaries, gamma_, "scanner")))
    return ImageCms.profileToProfile(place.around(), profile, ImageCms.createProfile("sRGB"))


FILTERS = Image.Resampling
CHANGES = {
    "as it is": lambda p: p.around(),
    **{f"Pillow {f.name.lower()}": functools.partial(resized, how=f) for f in FILTERS},
    "OpenCV area": lambda p: opencv(p, cv2.INTER_AREA),
    "OpenCV linear": lambda p: opencv(p, cv2.INTER_LINEAR),
    "OpenCV cubic": lambda p: opencv(p, cv2.INTER_CUBIC),
    "OpenCV Lanczos": lambda p: opencv(p, cv2.INTER_LANCZOS4),
    "next level": coarser,
    **{f"JPEG {q}": functools.partial(compressed, quality=q) for q in (40, 60, 80, 95)},
    "blur 0.7 px": lambda p: tile_of(p).filter(ImageFilter.GaussianBlur(0.7)),
    "blur 1.2 px": lambda p: tile_of(p).filter(ImageFilter.GaussianBlur(1.2)),
    "sharpened": lambda p: tile_of(p).filter(ImageFilter.UnsharpMask(1, 100, 0)),
    "Display P3": lambda p: wide_gamut(p.around()),
    "gamma 0.8": lambda p: gamma(p.around(), 0.8),
    "gamma 1.25": lambda p: gamma(p.around(), 1.25),
    "saturation 0.75": lambda p: ImageEnhance.Color(p.around()).enhance(0.75),
    "saturation 1.3": lambda p: ImageEnhance.Color(p.around()).enhance(1.3),
    "turned 90°, mirrored": lambda p: p.around().transpose(Image.Transpose.TRANSPOSE),
    **{f"turned {a}°": functools.partial(turned, degrees=a) for a in (20, 37, 45, 115)},
    "field x 0.8": lambda p: p.around(0.8),
    "field x 1.25": lambda p: p.around(1.25),
}  # fmt: skip
PROFILED = {
    "ICC, P3 primaries, gamma 2.2": lambda p: profiled(p, DISPLAY_P3, 2.2),
    "ICC, Adobe RGB, gamma 2.2": lambda p: profiled(p, ADOBE, 2.2),
    "ICC, Adobe RGB, gamma 1.8": lambda p: profiled(p, ADOBE, 1.8),
}
"""Slides with a colour profile: tiles are embedded as stored, and a viewer applies the profile."""
LENIENT = {"blur 1.2 px", "field x 0.8"}
"""Changes that take away a part of the tile: .95 are to be found; of all others .98."""


def tile_of(place):
    """The square at the size of a tile."""
    return place.around().resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def screenshots(browser, slide, places):
    """What a browser shows of each square at several zooms, cut from a screenshot of the slide."""
    buffer = io.BytesIO()
    Image.fromarray(slide).save(buffer, "PNG")
    source = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    height, width = slide.shape[:2]
    found = {}
    for zoom, ratio in ((0.67, 1), (1.0, 1), (1.5, 1), (0.5, 2)):
        scale = zoom * ratio * SIZE / places[0].side  # 100 %: a tile takes as many pixels as it has
        css = zoom * SIZE / places[0].side
        view = {"width": round(width * css), "height": round(height * css)}
        context = browser.new_context(device_scale_factor=ratio, viewport=view)
        page = context.new_page()
        page.set_content(
            f'<body style="margin:0"><img src="{source}" style="width:{width * css}px;display:block">'
        )
        page.wait_for_function("document.images[0].complete && document.images[0].naturalWidth")
        shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        context.close()
        found[f"screenshot {zoom:.0%}" + (" on a 2 x screen" if ratio == 2 else "")] = [
            shot.crop([round(v * scale) for v in (p.x, p.y, p.x + p.side, p.y + p.side)])
            for p in places
        ]
    return found


def page(facts):
    """The report as Markdown."""
    whole = facts["slides"]
    own = facts["bundle"]["name"]
    names = list(next(iter(whole.values()))["of"])
    lines = [
        "# Does a crop from another program find its own place?",
        "",
        f"`make bench-viewer`, {facts['date']}, {facts['machine']}, ONNX Runtime "
        f"{facts['onnxruntime']}; bundle `{facts['bundle']['sha256'][:12]}`. Share of queries whose own "
        "tile is the nearest among the tiles of the slide. Slides that the bundle was trained on: "
        f"{', '.join(facts['trained_on']) or 'none'}.",
        "",
        "## Worst change on each slide",
        "",
    ]
    rows = []
    for slide, found in whole.items():
        cells = []
        for who in names:
            worst = min(found["of"][who].items(), key=lambda item: item[1]["found"])
            cells.append(f"{worst[1]['found']:.2f} ({worst[0]})")
        rows.append([slide, str(found["tiles"]), *cells])
    lines += table(["slide", "tiles", *names], rows)
    changes = list(next(iter(whole.values()))["of"][own])
    lines += ["## All changes, mean over the slides", ""]
    mean = lambda who, how, key: np.mean([s["of"][who][how][key] for s in whole.values()])  # noqa: E731
    rows = [
        [how, *(f"{mean(who, how, 'found'):.3f} ({mean(who, how, 'cosine'):.2f})" for who in names)]
        for how in changes
    ]
    lines += table(["change", *(f"{who}: found (cosine)" for who in names)], rows)
    if facts["atlas"]:
        far = [
            who
            for who in names
            if "found_in_atlas" in whole[next(iter(whole))]["of"][who][changes[0]]
        ]
        lines += [f"## Among {facts['atlas']:,} further tiles, mean over the slides", ""]
        rows = [
            [how, *(f"{mean(who, how, 'found_in_atlas'):.3f}" for who in far)] for how in changes
        ]
        lines += table(["change", *far], rows)
    for slide, found in whole.items():
        if again := found.get("rescanned"):
            lines += [f"## {slide}: tiles found by the same glass slide from another scanner", ""]
            rows = [
                [how, *(f"{of[how]['found']:.3f} ({of[how]['cosine']:.2f})" for of in again.values())]
                for how in again[own]
            ]  # fmt: skip
            lines += table(["query", *(f"{who}: found (cosine)" for who in names)], rows)
    return "\n".join(lines)


if __name__ == "__main__":
    main()
