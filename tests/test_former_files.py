"""Files written before the modules were reorganised still open and give the same answers as then.

That version of the package created the archive, with tests/former_make.py.
"""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from histoseek.artifacts.feature_files import read_features

ARCHIVE = Path(__file__).with_name("former.tar.gz")


@pytest.fixture(scope="module")
def former(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(folder, filter="data")
    return folder / "former"


@pytest.fixture(scope="module")
def answers(former):
    return json.loads((former / "answers.json").read_text())


def same(now, then):
    """Compare two documents: numbers that are not whole within rounding, paths by their last part."""
    if isinstance(then, dict):
        return set(now) >= set(then) and all(same(now[key], then[key]) for key in then)
    if isinstance(then, list):
        return len(now) == len(then) and all(same(a, b) for a, b in zip(now, then, strict=True))
    if isinstance(then, float):
        return now == pytest.approx(then, abs=2e-5)
    if isinstance(then, str) and then.startswith("/"):
        return Path(now).name == Path(then).name
    return now == then


def test_the_atlas_opens_and_answers_as_before(cli_json, cli_answers, former, answers):
    atlas = former / "atlas"
    assert cli_json("index", "verify", atlas)["problems"] == []
    asked = former / "tiles/tissue/03.png"
    assert same(cli_answers("index", "search", atlas, asked, "-k", 5), answers["hits"])
    assert same(cli_answers("index", "similar", atlas, "case-1"), answers["similar"])
    stats = cli_json("index", "stats", atlas)
    more = [name for name in stats["fields"] if name.startswith("annotation.")]
    assert len(more) == 3  # newer than the atlas
    stats["fields"] = [name for name in stats["fields"] if name not in more]
    assert same(stats, answers["stats"])


def test_the_atlas_can_be_changed(cli_json, former, answers, tmp_path):
    atlas = shutil.copytree(former / "atlas", tmp_path / "atlas")
    cli_json("index", "remove", atlas, "tiles")
    assert cli_json("index", "fit", atlas, "--k", 4, "--name", "new")
    assert cli_json("index", "add", atlas, former / "features")["ok"]
    assert cli_json("index", "verify", atlas)["problems"] == []
    tiles = cli_json("index", "stats", atlas)["tiles"]
    assert tiles == answers["stats"]["tiles"]


def test_features_go_into_a_new_atlas(cli_json, cli_answers, former, answers, tmp_path):
    atlas = tmp_path / "atlas"
    cli_json("index", "create", atlas, "--encoder", former / "bundle")
    table = former / "cases.csv"
    assert cli_json("index", "add", atlas, former / "features", "--metadata", table)["ok"]
    (first, *_) = cli_answers("index", "search", atlas, former / "tiles/tissue/03.png", "-k", 5)
    assert [h["score"] for h in first] == pytest.approx(
        [h["score"] for h in answers["hits"][0]], abs=2e-5
    )


def test_the_run_exports_the_same_encoder(cli_json, former, tmp_path):
    out = tmp_path / "again"
    cli_json(
        "export", former / "run", "--out", out, "--name", "former", "--mpp", 0.5,
        "--tiles", former / "tiles",
    )  # fmt: skip
    embedded = "embed", former / "slides", "--encoder", out, "--out", tmp_path / "f"
    done = cli_json(*embedded, "--min-sharpness", 0, "--max-pen", 1)
    for one in done["results"]:
        now = read_features(Path(one["features"]))
        (path,) = (former / "features").rglob(f"{one['name']}.h5")
        then = read_features(path)
        row_of = {tuple(corner): row for row, corner in enumerate(now.coords.tolist())}
        rows = [row_of[corner] for corner in map(tuple, then.coords.tolist()) if corner in row_of]
        kept = [corner in row_of for corner in map(tuple, then.coords.tolist())]
        # today more tiles count as tissue; nearly all of those that did still do
        assert np.mean(kept) > 0.97 and len(now.coords) > len(then.coords)
        assert np.abs(now.features[rows] - then.features[kept]).max() < 1e-4
