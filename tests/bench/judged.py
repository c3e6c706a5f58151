"""Data to evaluate encoders on: tiles of held-out groups, altered tiles, images out of distribution.

Groups are source images, slides or patients; no group is on both sides of a split.
"""

import io
import json
import math
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from histoseek.artifacts.images import square
from histoseek.artifacts.tileset_files import open_tiles
from histoseek.serving.encoders.open import DEFAULT_BUNDLE
from histoseek.serving.slides.slide import open_slide
from histoseek.training.commands import select
from histoseek.training.data import load, split
from histoseek.ui.cli.demo import covers, rotated_crop

SHARED = Path(__file__).parents[3] / "shared" / "data"
FOREIGN = 200
"""Pictures of each foreign kind."""
NO_PATIENTS = {"crc_val7k"}
"""Sources whose tiles are not told apart by patient: one group, in which everything is found."""
STAINED = {
    "histo_mix.tar": {"deepliif_ihc", "skimage_ihc", "openslide_os"},
    "histo_mix2.tar": {"lyon19_crops"},
}
"""Sources of immunohistochemistry; openslide_os also has H&E, with the label `he`."""
HAEMATOXYLIN_EOSIN = ((0.650, 0.704, 0.286), (0.072, 0.990, 0.105), (0.268, 0.570, 0.776))


@dataclass(frozen=True)
class Tiles:
    """Tiles uint8 (N, S, S, 3) with class and group numbers (N,), and the classes' names."""

    tiles: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    names: tuple[str, ...] = ()

    def part(self, rows):
        """Some of them."""
        return Tiles(self.tiles[rows], self.labels[rows], self.groups[rows], self.names)


def trained_and_held_out(bundle=DEFAULT_BUNDLE):
    """The tiles that a bundle's run trained on, and those held out, by collection."""
    run = json.loads((bundle / "run.json").read_text())
    selection, options = run["data"]["selection"], run["options"]
    sources = [SHARED / name.rsplit("/", 1)[-1] for name in selection["sources"]]
    tiles = select(
        sources,
        selection["exclude"],
        selection["label_from"],
        selection.get("shared_groups", False),
    )
    side = run["architecture"]["size_px"]
    data = load(tiles, side, lambda *_: None, int(options["cut"]))
    parts = split(data, options["folds"], options["fold"], options["seed"])
    assert len(parts.test) == run["split"]["held_out_tiles"]
    whole = Tiles(data.tiles, data.labels, data.groups, data.label_names)
    origin = np.array([data.files[n].split("/")[0] for n in parts.test])
    held_out = {str(name): whole.part(parts.test[origin == name]) for name in np.unique(origin)}
    return whole.part(parts.train), held_out


def left_out(bundle=DEFAULT_BUNDLE):
    """The sources that a bundle's run left out."""
    run = json.loads((bundle / "run.json").read_text())
    rules = [r.split("=", 1) for r in run["data"]["selection"]["exclude"]]
    return {v for column, values in rules if column == "source_id" for v in values.split(",")}


def of_sources(pack, names, size, label_from):
    """Tiles of some sources of a pack; label_from as for `histoseek train --label-from`."""
    tiles = select([SHARED / pack], [], label_from)
    rows = [n for n, tile in enumerate(tiles.tiles) if tile.column("source_id") in names]
    data = load(tiles.take(rows), size, lambda *_: None)
    return Tiles(data.tiles, data.labels, data.groups, data.label_names)


def never_trained(size, bundle=DEFAULT_BUNDLE):
    """The sources of histo_mix that a bundle's run left out; the class of a tile is its source."""
    return of_sources("histo_mix.tar", left_out(bundle) - NO_PATIENTS, size, ["source_id"])


def controls(size):
    """Classes of tissue in laboratories that no bundle here was trained on.

    CRC-VAL-HE-7K names no patients: every tile is its own group.
    """
    glands = of_sources("histo_mix.tar", {"glas"}, size, ["label"])
    colon = of_sources("histo_mix.tar", {"crc_val7k"}, size, ["label"])
    alone = Tiles(colon.tiles, colon.labels, np.arange(len(colon.tiles)), colon.names)
    return {"GlaS, benign or malignant": glands, "CRC-VAL-HE-7K, kinds of tissue": alone}


def other_kinds(size):
    """Pictures that are no tissue, with classes and patients: what an H&E encoder was not made for."""
    found = {}
    for name, pack in (("chest X-rays", "cxr_pneumonia.tar"), ("breast ultrasound", "busi.tar")):
        data = load(select([SHARED / pack], [], ["label"]), size, lambda *_: None)
        found[name] = Tiles(data.tiles, data.labels, data.groups, data.label_names)
    return found


def immunohistochemistry(size, bundle=DEFAULT_BUNDLE):
    """Tiles that an antibody marked brown, of sources that a bundle's run left out."""
    found = [
        of_sources(pack, STAINED[pack] & left_out(bundle), size, ["label"])
        for pack in STAINED
        if STAINED[pack] & left_out(bundle)
    ]
    return np.concatenate([t.tiles[[t.names[n] != "he" for n in t.labels]] for t in found])


def changed(tiles, change):
    """The same tiles, seen another way."""
    return np.stack([np.asarray(change(Image.fromarray(tile))) for tile in tiles])


def crops_found(encode, overlap, anywhere, size=224, mpp=0.5, count=100):
    """Of turned crops of CMU-1-Small-Region, how many have the best hit's tile cover their centre.

    Crops lie on the atlas's grid without overlap, or anywhere between its tiles.
    """
    with tempfile.TemporaryDirectory() as folder, tarfile.open(SHARED / "wsi_regions.tar") as pack:
        member = next(m for m in pack if m.name.endswith("CMU-1-Small-Region.svs"))
        pack.extract(member, folder, filter="data")
        with open_slide(Path(folder) / member.name) as slide:
            base = slide.grid(size, mpp, min_tissue=0.5)
            grid = slide.grid(size, mpp, overlap)
            side = grid.size_px_level0
            tiles = [slide.read_tile(int(x), int(y), side, size) for x, y in grid.coords]
            vectors = encode(np.stack(tiles))
            rng, places, crops = np.random.default_rng(2024), [], []
            for _ in range(count):
                x, y = (int(v) for v in base.coords[rng.integers(len(base.coords))])
                if anywhere:
                    x = _nudged(x, slide.width, side, rng)
                    y = _nudged(y, slide.height, side, rng)
                places.append((x, y))
                crops.append(rotated_crop(slide, x, y, side, size, rng))
            best = (encode(np.stack(crops)) @ vectors.T).argmax(1)
            hits = [
                covers(*map(int, grid.coords[row]), side, *place)  # type: ignore[call-arg]
                for row, place in zip(best, places, strict=True)
            ]
            return sum(hits), len(tiles)


def _nudged(place, limit, side, rng):
    """Move a place by up to half a tile, within the slide."""
    return int(np.clip(place + int(rng.integers(-side // 2, side // 2)), 0, limit - side))


def _turned(picture, degrees):
    side = picture.width
    pad = math.ceil(side * 0.25)
    wide = Image.fromarray(
        np.pad(np.asarray(picture), ((pad, pad), (pad, pad), (0, 0)), "reflect")
    ).rotate(degrees, Image.Resampling.BICUBIC)
    return wide.crop((pad, pad, pad + side, pad + side))


def _zoomed(picture, factor):
    side = picture.width
    pad = math.ceil(side * max(0, 1 / factor - 1) / 2)
    wide = np.pad(np.asarray(picture), ((pad, pad), (pad, pad), (0, 0)), "reflect")
    large = round(len(wide) * factor)
    scaled = Image.fromarray(wide).resize((large, large), Image.Resampling.BICUBIC)
    at = (large - side) // 2
    return scaled.crop((at, at, at + side, at + side))


def _compressed(picture, quality):
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def _stained(picture, haematoxylin, eosin):
    """Scale two stains in optical density (matrix of Ruifrok and Johnston 2001)."""
    basis = np.array(HAEMATOXYLIN_EOSIN)
    basis /= np.linalg.norm(basis, axis=1, keepdims=True)
    density = -np.log(np.maximum(np.asarray(picture, np.float64), 1) / 255)
    stains = density @ np.linalg.inv(basis) * (haematoxylin, eosin, 1.0)
    return Image.fromarray(np.clip(255 * np.exp(-stains @ basis), 0, 255).astype(np.uint8))


CHANGES = {
    "quarter turn": lambda p: p.transpose(Image.Transpose.ROTATE_90),
    "half turn": lambda p: p.transpose(Image.Transpose.ROTATE_180),
    "mirrored": lambda p: p.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "turned by 37°": lambda p: _turned(p, 37),
    "JPEG quality 50": lambda p: _compressed(p, 50),
    "blurred, radius 1.5 px": lambda p: p.filter(ImageFilter.GaussianBlur(1.5)),
    "haematoxylin x 1.3, eosin x 0.8": lambda p: _stained(p, 1.3, 0.8),
    "haematoxylin x 0.8, eosin x 1.3": lambda p: _stained(p, 0.8, 1.3),
    "0.8 x scale": lambda p: _zoomed(p, 0.8),
    "1.25 x scale": lambda p: _zoomed(p, 1.25),
}
"""What is asked of a robust encoder, one strength each."""
CURVES = {
    "turned, degrees": ((0, 10, 20, 30, 45, 60, 75, 90), _turned),
    "JPEG quality": ((95, 80, 65, 50, 35, 20, 10), _compressed),
    "blur, radius in px": (
        (0, 0.5, 1, 1.5, 2, 3, 4),
        lambda p, r: p.filter(ImageFilter.GaussianBlur(r)),
    ),
    "scale": ((0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.4, 1.6), _zoomed),
    "haematoxylin x s, eosin / s": (
        (0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.4, 1.6),
        lambda p, s: _stained(p, s, 1 / s),
    ),
}
"""The same with growing strength."""


def foreign(size):
    """Pictures that are no stained tissue, uint8 (N, S, S, 3) each."""
    kinds = {
        "ultrasound (BUSI)": _of_pack("busi.tar", size),
        "chest X-rays": _of_pack("cxr_pneumonia.tar", size),
        "photographs (CIFAR-10)": _of_cifar(size),
    }
    rng = np.random.default_rng(0)
    level = rng.integers(200, 256, (FOREIGN, 1, 1, 3))
    noise = rng.normal(0, 2, (FOREIGN, size, size, 3))
    kinds["blank tiles"] = np.clip(level + noise, 0, 255).astype(np.uint8)
    return kinds


def _of_pack(name, size):
    source = open_tiles(SHARED / name)
    rows = range(0, len(source.tiles), max(1, len(source.tiles) // FOREIGN))
    return np.stack([square(source.read(n), size) for n in rows][:FOREIGN])


def _of_cifar(size):
    found = []
    with tarfile.open(SHARED / "cifar10.tar.gz") as pack:
        for number, member in enumerate(m for m in pack if m.name.endswith((".jpg", ".png"))):
            if number % 40 == 0:
                picture = Image.open(io.BytesIO(pack.extractfile(member).read())).convert("RGB")
                found.append(square(np.asarray(picture), size))
            if len(found) == FOREIGN:
                break
    return np.stack(found)
