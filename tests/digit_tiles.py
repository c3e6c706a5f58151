"""A small labelled tile set for trainings: scikit-learn's digits."""

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from histoseek.artifacts.tilesets import Tile, TileSet


def digits(count=200, side=28):
    """scikit-learn's digits as tiles, enlarged; ten classes, no groups."""
    data = load_digits()
    pictures = [
        np.asarray(Image.fromarray((p * 15).astype(np.uint8)).resize((side, side)).convert("RGB"))
        for p in data.images[:count]
    ]
    tiles = tuple(Tile(f"{n:04d}", str(data.target[n])) for n in range(count))
    return TileSet("mnist", "digits", tiles, "digits", lambda n: pictures[n])
