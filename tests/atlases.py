"""Feature files and atlases made for tests."""

import json
from pathlib import Path

import numpy as np
import pytest

from histoseek.artifacts.feature_files import Features
from histoseek.artifacts.feature_writer import write_features
from histoseek.index.atlas import Atlas
from histoseek.index.store.rows import Hit
from histoseek.serving.encoders.open import DEFAULT_BUNDLE

DIM = json.loads((DEFAULT_BUNDLE / "manifest.json").read_text())["dim"]
SHA = json.loads((DEFAULT_BUNDLE / "manifest.json").read_text())["sha256"]


def unit(rng, count, dim=DIM):
    vectors = rng.normal(size=(count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def features(path: Path, count=30, seed=0, **changes) -> Path:
    rng = np.random.default_rng(seed)
    known = {
        "name": path.stem,
        "encoder": "default",
        "encoder_sha256": SHA,
        "features": unit(rng, count),
        "coords": rng.integers(0, 9999, (count, 2)),
        "source": f"/slides/{path.stem}.svs",
        "size_px": 224,
        "size_px_level0": 448,
        "mpp": 0.25,
        "target_mpp": 0.5,
        "width": 9999,
        "height": 9999,
    }
    write_features(path, Features(**{**known, **changes}))
    return path


def grouped(rng, count, groups=12, spread=0.5):
    """Unit vectors around a few directions."""
    centres = unit(np.random.default_rng(99), groups)
    vectors = centres[rng.integers(0, groups, count)] + unit(rng, count) * spread
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def filled(folder: Path, slides=6, count=200, seed=0, metadata=None, **changes) -> Atlas:
    """An atlas of slides around a few directions, of two patients' worth each."""
    made = Atlas.create(folder / "atlas", DEFAULT_BUNDLE)
    files = []
    for number in range(slides):
        rng = np.random.default_rng(seed + number)
        path = folder / f"slide-{number}.h5"
        files.append(features(path, count, seed + number, features=grouped(rng, count), **changes))
    given = {
        f"slide-{n}": {
            "label": "ab"[n % 2],
            "patient": f"P{n // 2}",
            "organ": ("colon", "lung")[n % 2],
        }
        for n in range(slides)
    }
    results = made.add(files, given if metadata is None else metadata)
    assert all(result.state == "added" for result in results)
    return made


def same(a: list[list[Hit]], b: list[list[Hit]]) -> None:
    """The same hits in the same order, but that scores which rounding alone tells apart may swap places."""
    for mine, theirs in zip(a, b, strict=True):
        scores = [hit.score for hit in theirs]
        assert [hit.score for hit in mine] == pytest.approx(scores, abs=2e-6)
        known = {hit.tile: hit for hit in theirs}
        for one in mine:
            other = known[one.tile]
            assert one.score == pytest.approx(other.score, abs=2e-6)
            assert one._replace(score=0, rank=0) == other._replace(score=0, rank=0)
