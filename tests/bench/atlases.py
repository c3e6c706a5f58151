"""Data for the benchmark of the index: synthetic and real vectors, and atlases of them."""

import json
from pathlib import Path

import numpy as np

from histoseek.artifacts.feature_files import Features
from histoseek.artifacts.feature_writer import write_features
from histoseek.artifacts.tileset_files import open_tiles
from histoseek.index.atlas import Atlas
from histoseek.serving.encoders.open import DEFAULT_BUNDLE, open_encoder

SHARED = Path(__file__).parents[3] / "shared" / "data"
MANIFEST = json.loads((DEFAULT_BUNDLE / "manifest.json").read_text())
DIM = MANIFEST["dim"]
SLIDE = 10_000
EMBEDDED = {}


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def clustered(count, seed, clusters=2_000, spread=0.6):
    """Unit vectors around random directions; noise of a length of 0.6."""
    centres = unit(np.random.default_rng(77).normal(size=(clusters, DIM)).astype(np.float32))
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(count, DIM)).astype(np.float32) * np.float32(spread / DIM**0.5)
    return unit(centres[rng.integers(0, clusters, count)] + noise)


def repeated(count, seed, spread=0.3):
    """Real embeddings (the default encoder on lc25000 and histo_mix), repeated with noise of length 0.3."""
    encoder = open_encoder("default")
    parts = []
    for pack in ("lc25000.tar", "histo_mix.tar"):
        tiles = open_tiles(SHARED / pack)
        for start in range(0, len(tiles.tiles), 256):
            numbers = range(start, min(start + 256, len(tiles.tiles)))
            parts.append(encoder.embed(np.stack([_square(tiles.read(n)) for n in numbers])))
    real = np.concatenate(parts)
    EMBEDDED.update(tiles=len(real), encoder=MANIFEST["name"], noise=spread)
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(count, DIM)).astype(np.float32) * np.float32(spread / DIM**0.5)
    return unit(real[rng.integers(0, len(real), count)] + noise)


def _square(picture):
    from histoseek.artifacts.images import square

    return square(picture, MANIFEST["size_px"])


def write_slide(path, vectors, name):
    rng = np.random.default_rng(len(vectors))
    write_features(
        path,
        Features(
            name=name, encoder=MANIFEST["name"], encoder_sha256=MANIFEST["sha256"], features=vectors,
            coords=rng.integers(0, 90_000, (len(vectors), 2)), size_px=224, size_px_level0=448,
            mpp=0.25, target_mpp=0.5, width=100_000, height=100_000,
        ),
    )  # fmt: skip
    return path


def make_atlas(folder, vectors, prefix="slide"):
    """An atlas of slides of 10,000 tiles (fewer for few), with columns to filter by.

    ``prefix`` begins the names of the slides and patients.

    ``percent`` is one of 100 values per slide, ``half`` one of 2, and ``look`` goes with what tiles look
    like if the vectors come sorted: every tenth of the slides has a value. Tile ids count the vectors
    from 1.
    """
    folder.mkdir(parents=True)
    atlas = Atlas.create(folder / "atlas", DEFAULT_BUNDLE)
    size = min(SLIDE, len(vectors) // 100)
    files, metadata = [], {}
    for number, start in enumerate(range(0, len(vectors), size)):
        name = f"{prefix}-{number:04d}"
        part = vectors[start : start + size]
        files.append(write_slide(folder / f"{name}.h5", part, name))
        metadata[name] = {
            "label": f"L{number % 5}",
            "patient": f"{prefix}-P{number // 2}",
            "percent": str(number % 100),
            "half": "ab"[number % 2],
            "look": str(number * 10 // max(1, len(vectors) // size)),
        }
    results = atlas.add(files, metadata)
    assert all(r.state == "added" for r in results)
    for file in files:
        file.unlink()
    return atlas
