"""What the shipped encoder reaches on tiles that it was not trained on; run by `make bench`.

The held-out part is fold 0 of 5, by group, of the selection that its run names; nothing here gates on
a number. Peers in the same run: the same net with random weights, and raw pixels.
"""

import json
import time

import numpy as np
import pytest

from histoseek.demo import covers, rotated_crop
from histoseek.metrics import retrieval_report
from histoseek.serving.encoder import DEFAULT_BUNDLE, open_encoder
from histoseek.serving.slides import open_slide
from histoseek.training.commands import select
from histoseek.training.data import load, split
from histoseek.training.evaluate import calibrate, embed
from histoseek.training.models import build


def nudge(place: int, limit: int, side: int, rng: np.random.Generator) -> int:
    """Move a place by up to half a tile, within the slide."""
    moved = place + int(rng.integers(-side // 2, side // 2))
    return int(np.clip(moved, 0, limit - side))


@pytest.fixture(scope="module")
def encoder():
    return open_encoder("default")


@pytest.mark.shared
@pytest.mark.timeout(1800)
def test_held_out_retrieval(shared, encoder):
    chosen = json.loads((DEFAULT_BUNDLE / "run.json").read_text())
    selection, options = chosen["data"]["selection"], chosen["options"]
    sources = [shared / name.rsplit("/", 1)[-1] for name in selection["sources"]]
    tiles = select(sources, selection["exclude"], selection["label_from"])
    data = load(tiles, options["size_px"], lambda *_: None, options["cut"])
    parts = split(data, options["folds"], options["fold"], options["seed"])
    train, held_out = parts.train, parts.test
    assert len(held_out) == chosen["split"]["held_out_tiles"]
    random = build("mobilenet-v3-small")
    calibrate(random, data.tiles[train[::8]])
    small = data.tiles[held_out][:, ::14, ::14].reshape(len(held_out), -1).astype(np.float32)
    rows = {
        "shipped": encoder.embed(data.tiles[held_out]),
        "random weights": embed(random, data.tiles[held_out]),
        "pixels 16x16": small - small.mean(1, keepdims=True),
    }
    origin = np.array([data.files[n].split("/")[0] for n in held_out])
    for pack in np.unique(origin):
        part = origin == pack
        for name, vectors in rows.items():
            report = retrieval_report(
                vectors[part], data.labels[held_out][part], data.groups[held_out][part]
            )
            values = ", ".join(f"{m.name} {m.value:.3f} (chance {m.baseline:.3f})" for m in report)
            print(f"{pack:12} {part.sum():5} tiles  {name:15} {values}")
    assert len(rows) == 3


@pytest.mark.shared
def test_a_crop_finds_its_place(cmu_slide, encoder):
    """Rank-1 place of 100 crops; on the atlas's grid, and at random places between its tiles."""
    with open_slide(cmu_slide) as slide:
        base = slide.grid(224, 0.5, min_tissue=0.5)
        for overlap in (0, 112, 168):
            grid = slide.grid(224, 0.5, overlap)
            side = grid.size_px_level0
            vectors = encoder.embed(
                np.stack([slide.read_tile(int(x), int(y), side, 224) for x, y in grid.coords])
            )
            for where in ("on the grid", "anywhere"):
                rng, found = np.random.default_rng(2024), 0
                for _ in range(100):
                    x, y = (int(v) for v in base.coords[rng.integers(len(base.coords))])
                    if where == "anywhere":
                        x = nudge(x, slide.width, side, rng)
                        y = nudge(y, slide.height, side, rng)
                    crop = rotated_crop(slide, x, y, side, 224, rng)
                    best = int((vectors @ encoder.embed(crop[None])[0]).argmax())
                    found += covers(*(int(v) for v in grid.coords[best]), side, x, y)
                print(
                    f"overlap {overlap:3} px, {len(vectors):4} tiles, crops {where}: {found} of 100"
                )
                assert 0 <= found <= 100


def test_speed_beside_one_view_of_the_same_net(encoder, tissue):
    """Tiles per second of the graph beside torch eager on the same net, in one run."""
    import torch

    torch.set_num_threads(2)
    tiles = np.stack([tissue[:224, :224]] * 64)
    net = build("mobilenet-v3-small").eval()

    def rate(call):
        call()
        started = time.perf_counter()
        for _ in range(3):
            call()
        return 3 * len(tiles) / (time.perf_counter() - started)

    ours, eager = rate(lambda: encoder.embed(tiles)), rate(lambda: embed(net, tiles))
    views = encoder.manifest.views
    print(
        f"ONNX Runtime, {views} views: {ours:.0f} tiles/s; torch eager, 1 view: {eager:.0f} tiles/s; "
        f"ratio {ours / eager:.2f}, per view {views * ours / eager:.2f}"
    )
    assert ours > 0 and eager > 0
