"""The estimate before a run with a slow encoder."""

import time
from pathlib import Path

import numpy as np
import pytest

from histoseek.artifacts.feature_files import read_about
from histoseek.artifacts.manifest import read_manifest
from histoseek.serving.embedding.estimate import Estimate, estimate
from histoseek.serving.embedding.jobs import find_jobs
from histoseek.serving.embedding.pipeline import embed_jobs
from histoseek.serving.embedding.results import EmbedOptions
from histoseek.serving.encoders.open import DEFAULT_BUNDLE


class Slow:
    """An encoder that takes some time per tile."""

    batch, parallel, offloads = 4, 1, False
    manifest = read_manifest(DEFAULT_BUNDLE)

    def __init__(self, seconds):
        self.seconds = seconds

    def describe(self):
        return {"precision": "f32"}

    def embed(self, tiles):
        time.sleep(self.seconds * len(tiles))
        vectors = np.zeros((len(tiles), self.manifest.dim), np.float32)
        vectors[:, 0] = 1
        return vectors


def test_tiles_are_counted_and_the_speed_is_measured(tmp_path, make_slide, tile_folder):
    slides = [make_slide(tmp_path / f"{n}.tiff", side=1400, seed=n) for n in range(2)]
    jobs = find_jobs([*slides, tile_folder])
    found = estimate(jobs, Slow(0.05), tmp_path / "out", EmbedOptions())
    results = embed_jobs(jobs, Slow(0), tmp_path / "out", EmbedOptions(), lambda *_: None)
    assert found.tiles == sum(result.tiles for result in results)
    assert (found.counted, found.inputs) == (3, 3)
    assert found.tiles_per_s == pytest.approx(20, rel=0.2)
    assert found.seconds == pytest.approx(found.tiles / found.tiles_per_s, abs=0.2)
    # all is there already
    assert estimate(jobs, Slow(0.05), tmp_path / "out", EmbedOptions()) is None
    # a slide that was moved is not recorded by looking: the run itself does that, and says so
    features = results[0].features
    (tmp_path / "moved").mkdir()
    moved = slides[0].rename(tmp_path / "moved" / slides[0].name)
    assert estimate(find_jobs([moved]), Slow(0.05), tmp_path / "out", EmbedOptions()) is None
    assert read_about(Path(features))["source"] == str(slides[0].resolve())
    (tmp_path / "broken.tiff").write_bytes(b"no slide")
    broken = find_jobs([tmp_path / "broken.tiff", tile_folder])
    assert estimate(broken, Slow(0.05), tmp_path / "new", EmbedOptions()).tiles == 72
    assert estimate(jobs, Slow(0), tmp_path / "out", EmbedOptions()) is None


def test_a_long_run_suggests_a_faster_machine():
    short, long = (Estimate(4000, 4, 40, 1.4, seconds) for seconds in (60, 10000))
    assert "counted on 4 of 40" in short.text and "about 60 s" in short.text
    assert "--ray" not in short.text
    assert "about 2.8 hours; a GPU server" in long.text


def test_embed_prints_the_estimate(tmp_path, tile_folder, cli_json, cli, monkeypatch):
    monkeypatch.setattr("histoseek.serving.embedding.estimate.SLOW", 1e9)
    done = cli("embed", tile_folder, "--out", tmp_path / "out", check=True)
    assert "estimate: about 72 tiles, at" in done.stdout
    document = cli_json("embed", tile_folder, "--out", tmp_path / "other")
    assert document["inputs"]["estimate"]["tiles"] == 72
    for wrong in (("--overlap", "224"), ("--tissue-model", tmp_path / "none")):
        refused = cli("embed", tile_folder, "--out", tmp_path / "no", *wrong)
        assert refused.returncode == 1 and refused.stdout == "", wrong  # nothing was counted before
        assert not (tmp_path / "no").exists()
