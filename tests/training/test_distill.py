"""Encoder bundles as teachers: of ``arcface``, and of ``distill``, which needs no labels."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from histoseek.artifacts.images import decode, square
from histoseek.artifacts.manifest import read_manifest
from histoseek.errors import BadInput, Mismatch
from histoseek.serving.encoders.onnx import OnnxEncoder
from histoseek.serving.encoders.open import DEFAULT_BUNDLE
from histoseek.training.arcface_options import ArcFaceOptions, DistillOptions
from histoseek.training.bundle_teacher import bundle_maps
from histoseek.training.fit_distill import follow, neighbours_found
from histoseek.training.models import build

SMALL = (
    "--size-px",
    64,
    "--epochs",
    2,
    "--batch",
    16,
    "--dim",
    24,
    "--folds",
    3,
    "--accelerator",
    "cpu",
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HISTOSEEK_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def plain_tiles(tile_folder, tmp_path_factory):
    """The tiles without their manifest and classes."""
    folder = tmp_path_factory.mktemp("plain") / "tiles"
    folder.mkdir()
    for kind in ("tissue", "retina", "cat"):
        for path in sorted((tile_folder / kind).glob("*.png")):
            shutil.copy(path, folder / f"{kind}-{path.name}")
    return folder


def test_the_teachers_embedding_is_the_mean_over_orientations(tile_folder):
    tiles = [decode(tile_folder / "tissue" / f"{n:02d}.png") for n in (0, 5)]
    encoder = OnnxEncoder(DEFAULT_BUNDLE)
    size = encoder.manifest.size_px
    turned = [
        [square(np.ascontiguousarray(np.rot90(tile[:, ::flip], turn)), size) for tile in tiles]
        for flip in (1, -1)
        for turn in range(4)
    ]
    wanted = {
        1: encoder.embed(np.stack(turned[0])),
        2: (encoder.embed(np.stack(turned[0])) + encoder.embed(np.stack(turned[2]))) / 2,
        8: np.mean([encoder.embed(np.stack(part)) for part in turned], axis=0),
    }
    for views, mean in wanted.items():
        manifest, see = bundle_maps(DEFAULT_BUNDLE, views)
        found = see(np.stack(tiles))
        assert found.shape == (2, manifest.dim, 1, 1)
        np.testing.assert_allclose(found[:, :, 0, 0], mean, atol=2e-2 if views > 1 else 1e-5)
    encoder.close()


def test_a_student_of_a_bundle_is_trained_exported_and_compared(
    plain_tiles, tmp_path, cli_json, cli
):
    run = tmp_path / "run"
    words = ("train", "distill", plain_tiles, "--teacher", DEFAULT_BUNDLE, *SMALL)
    cli(*words, "--out", run, check=True)
    record = json.loads((run / "run.json").read_text())
    assert record["recipe"] == "distill" and record["architecture"]["chain"] == 24
    assert record["options"]["teacher_sha256"] == read_manifest(DEFAULT_BUNDLE).sha256
    rows = {row["name"]: row for row in record["metrics"]["teacher"]}
    found = rows["neighbours_found_10"]
    assert found["baseline"] == pytest.approx(10 / 23, abs=0.05)
    assert found["value"] > found["baseline"] + 0.1
    made = cli_json(
        "export", run, "--out", tmp_path / "student", "--mpp", 0.5, "--tiles", plain_tiles
    )
    assert made["dim"] == 24
    assert "neighbours_found_10" in (tmp_path / "student" / "MODEL_CARD.md").read_text()
    again = cli(*words, "--out", run)
    assert again.returncode == 0  # finished already
    refused = cli("train", "distill", plain_tiles, *SMALL, "--out", tmp_path / "b")
    assert refused.returncode == 1 and "pass --teacher" in refused.stderr
    refused = cli(*words[:4], tmp_path, *SMALL, "--out", tmp_path / "b")
    assert "is not an encoder bundle" in refused.stderr


def test_arcface_takes_a_bundle_as_teacher(tile_folder, tmp_path, cli):
    words = (
        "train",
        "arcface",
        tile_folder,
        "--teacher",
        DEFAULT_BUNDLE,
        "--teacher-views",
        2,
        *SMALL,
    )
    cli(*words, "--out", tmp_path / "run", check=True)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    losses = [row["teacher"] for row in record["epochs"]]
    assert len(losses) == 2 and all(0 < loss < 1.5 for loss in losses)
    with pytest.raises(BadInput, match="teacher_views is 3"):
        ArcFaceOptions(teacher="x", teacher_views=3)
    with pytest.raises(Mismatch, match="it is another teacher"):
        ArcFaceOptions(teacher=str(DEFAULT_BUNDLE), teacher_sha256="0" * 64).with_known_teacher()
    with pytest.raises(BadInput, match="no --target"):
        DistillOptions(teacher="x", target="label")


def test_a_teacher_that_is_an_affine_map_of_the_features_is_met_exactly():
    torch.manual_seed(0)
    encoder = build(model="mobilenet-v3-small", size_px=64, dim=8, hidden=16).eval()
    rng = np.random.default_rng(0)
    tiles = rng.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    tiles = np.stack([np.asarray(Image.fromarray(t).resize((64, 64))) for t in tiles])
    groups = np.arange(60) // 3
    data = SimpleNamespace(
        read=lambda numbers: (tiles[numbers], numbers), groups=groups, tiles=tiles
    )
    job = SimpleNamespace(
        parts=SimpleNamespace(train=np.arange(60)), data=data, architecture={"dim": 8}
    )
    pooled = []
    with torch.inference_mode():
        normed = (torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255).float()
        mean, std = (torch.tensor(v)[:, None, None] for v in (encoder.mean, encoder.std))
        pooled = encoder.backbone((normed - mean) / std).flatten(1).numpy()
    centred = (pooled - pooled.mean(0)) / (pooled.std(0) + 1e-6)
    teacher = centred @ np.linalg.svd(centred, full_matrices=False)[2][:4].T
    teacher = np.concatenate([teacher, np.full((60, 1), 20.0)], 1).astype(np.float32)
    teacher /= np.linalg.norm(teacher, axis=1, keepdims=True)
    ask = lambda numbers: (torch.from_numpy(teacher[numbers])[:, :, None, None], numbers)  # noqa: E731
    follow(encoder, job, ask, 5)
    with torch.inference_mode():
        found = encoder((normed - mean) / std).numpy()
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    np.testing.assert_allclose(found @ found.T, teacher @ teacher.T, atol=0.02)
    assert job.architecture == {"dim": 0, "chain": 5}


def test_found_neighbours_are_counted_in_other_groups():
    rng = np.random.default_rng(0)
    teacher = rng.normal(size=(60, 9)).astype(np.float32)
    groups = np.arange(60) // 4
    same = {row.name: row for row in neighbours_found(teacher * 3, teacher, groups)}
    assert same["neighbours_found_10"].value == same["nearest_found"].value == 1
    other = rng.normal(size=(60, 5)).astype(np.float32)
    chance = {row.name: row for row in neighbours_found(other, teacher, groups)}
    assert chance["neighbours_found_10"].value == pytest.approx(10 / 56, abs=0.06)
    assert chance["neighbours_found_10"].baseline == pytest.approx(10 / 56)
    assert neighbours_found(teacher[:8], teacher[:8], groups[:8]) == []


def test_features_that_say_almost_the_same_can_be_fitted():
    from histoseek.training.fit_distill import _ridge

    rng = np.random.default_rng(0)
    one = rng.normal(size=(80, 1)).astype(np.float32)
    features = one + 1e-5 * rng.normal(size=(80, 1500)).astype(np.float32)
    weight, bias = _ridge(features, one, np.arange(80))  # a warning would be an error
    assert np.abs(features @ weight.T + bias - one).max() < 0.2
