"""Training speed of every recipe, compared with the same net, loss and optimiser in a bare loop.

The bare loop trains on one batch that is on the device already, scaled and augmented. The recipe's time
comes from its record and covers the steps of an epoch: reading tiles from memory, scaling, augmentation
if it is on, checks and sums, but not the work between epochs (clustering of features, checkpoints). The
bare loop runs right after each epoch on the same net; the ratio is of medians over epochs and rounds.
Neither counts its first steps, during which libraries set themselves up: the recipe's first epoch, the
bare loop's first step.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from histoseek.artifacts.tilesets import Tile, TileSet
from histoseek.training.arcface_options import ArcFaceOptions
from histoseek.training.fit_autoencoder import AutoencoderOptions
from histoseek.training.fit_classifier import ClassifierOptions
from histoseek.training.fit_dac import DacOptions
from histoseek.training.fit_deepcluster import DeepClusterOptions
from histoseek.training.job import Job
from histoseek.training.recipes import RECIPES

ROUNDS = 3
CPU = {"accelerator": "auto", "folds": 0, "judge": False}
AE = {"epochs": 3, "keep_best": False, **CPU}
STILL = {"epochs": 3, "rotation_deg": 0, "zoom": 0, "flip": False, "stain": 0, "colour": 0, **CPU}
CASES = {
    "autoencoder (cnn-ae)": (160, AutoencoderOptions(model="cnn-ae", batch=32, **AE)),
    "autoencoder (topology-cae)": (6400, AutoencoderOptions(model="topology-cae", batch=256, **AE)),
    "classifier (densenet)": (160, ClassifierOptions(batch=32, **AE)),
    "dac (dac-fmnist)": (12800, DacOptions(method="dac", epochs=3, judge_every=0, **CPU)),
    "deepcluster (p4m-cnn, widths 8)": (
        256,
        DeepClusterOptions(
            model="p4m-cnn", model_options="widths=8", epochs=3, batch=64, clusters=8, **CPU
        ),
    ),
    "arcface (mobilenet-v3-small, no augmentation)": (256, ArcFaceOptions(**STILL)),
    "arcface (mobilenet-v3-small, as by default)": (256, ArcFaceOptions(epochs=3, **CPU)),
    "arcface (the default encoder's, without teacher)": (
        256,
        ArcFaceOptions(
            model_options="deviation=true,symmetry=true,layers=3+6+8+12",
            epochs=3,
            batch=64,
            rotation_deg=180,
            zoom=0.3,
            stain=0.15,
            colour=0,
            crop_px=128,
            viewing=True,
            consistency=1,
            layer_consistency=1,
            **CPU,
        ),
    ),
}


def noise(count, size_px):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (count, size_px, size_px, 3), dtype=np.uint8)
    tiles = tuple(Tile(f"{n:05d}", str(n % 4)) for n in range(count))
    return TileSet("noise", "noise", tiles, "noise", lambda n: pictures[n])


def bare(net, optimizer, tiles, numbers, steps):
    """Tiles per second of steps on one ready batch."""
    started = time.monotonic()
    for _ in range(steps):
        loss = net(tiles, numbers)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    float(loss.detach())
    return steps * len(tiles) / (time.monotonic() - started)


def measure(recipe, options, tiles):
    """Tiles/s of the recipe and of the bare loop, which runs after every epoch on the same net."""
    caught = {}
    real_epoch = Job._epoch

    def epoch(self, net, model, optimizer, phase, number, done):
        row = real_epoch(self, net, model, optimizer, phase, number, done)
        share = np.tile(self.parts.train[: self._step_size], net.views)
        pixels, numbers = self.data.read(share)
        tiles = torch.from_numpy(pixels).to(self.fabric.device)
        ready = self.change(net.encoder, tiles, torch.Generator().manual_seed(0))[0]
        net.begin_phase(phase)
        weights = [p for p in net.parameters() if p.requires_grad]
        plain = torch.optim.Adam(weights, lr=1e-9, fused=self.fabric.device.type == "cpu" or None)
        ids = torch.from_numpy(numbers).to(self.fabric.device)
        steps = self._steps()
        bare(net, plain, ready, ids, 1)
        views_per_s = bare(net, plain, ready, ids, steps)
        caught.setdefault("bare", []).append(views_per_s / net.views)
        caught.setdefault("recipe", []).append(row["tiles_per_s"])
        return row

    Job._epoch = epoch
    try:
        with tempfile.TemporaryDirectory() as folder:
            RECIPES[recipe].fit(options, tiles, Path(folder) / "run", lambda *_: None)
    finally:
        Job._epoch = real_epoch
    return caught


def main():
    chosen = sys.argv[1:]
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.cuda.is_available()=}"
    )
    print("| recipe | recipe tiles/s | bare loop tiles/s | ratio |\n|---|---|---|---|")
    for name, (count, options) in CASES.items():
        recipe = name.split()[0]
        if chosen and recipe not in chosen:
            continue
        tiles = noise(count, options.architecture()["size_px"])
        rounds = [measure(recipe, options, tiles) for _ in range(ROUNDS)]
        own = statistics.median(v for r in rounds for v in r["recipe"][1:])
        loop = statistics.median(v for r in rounds for v in r["bare"][1:])
        print(f"| {name} | {own:,.0f} | {loop:,.0f} | {own / loop:.2f} |", flush=True)


if __name__ == "__main__":
    main()
