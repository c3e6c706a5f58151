"""Acceptance: the project's promises on real data, with the commands that a user would type."""

import json
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from histoseek.serving.slides.slide import open_slide
from histoseek.ui.cli.demo import covers, rotated_crop

ROOT = Path(__file__).parents[1]
CROPS = 100


@pytest.mark.shared
def test_a_rotated_crop_of_the_slide_finds_its_own_place(
    cmu_slide, cli_json, cli_answers, tmp_path
):
    """100 crops, each of a random tile of the atlas turned by any angle and mirrored half the time."""
    report = cli_json("embed", cmu_slide, "--out", tmp_path / "features")
    atlas = tmp_path / "atlas"
    cli_json("index", "create", atlas)
    cli_json("index", "add", atlas, tmp_path / "features")
    from histoseek.artifacts.feature_files import read_features

    item = read_features(Path(report["results"][0]["features"]))
    rng = np.random.default_rng(2024)
    queries, places = [], []
    with open_slide(cmu_slide) as slide:
        for number in range(CROPS):
            x, y = (int(v) for v in item.coords[rng.integers(len(item.coords))])
            crop = rotated_crop(slide, x, y, item.size_px_level0, item.size_px, rng)
            queries.append(tmp_path / f"crop-{number}.png")
            Image.fromarray(crop).save(queries[-1])
            places.append((x, y))
    answers = cli_answers("index", "search", atlas, *queries, "-k", 1)
    found = sum(
        covers(hit["x"], hit["y"], item.size_px_level0, x, y)
        for (hit,), (x, y) in zip(answers, places, strict=True)
    )
    print(f"{found} of {CROPS} crops found their own place at rank 1")
    assert found >= 95


def test_without_torch_a_newcomer_embeds_indexes_and_searches(make_slide, tmp_path):
    """`pip install .[cpu]` in an empty environment; torch is not there and is not needed."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    copy = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(copy)], check=True)
    install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*install, "-c", str(copy / "constraints.txt"), f"{copy}[cpu]"], check=True)
    assert subprocess.run([python, "-c", "import torch"], capture_output=True).returncode == 1
    slide = make_slide(tmp_path / "case-1.tiff")
    Image.fromarray(np.asarray(Image.open(slide))[100:324, 100:324]).save(tmp_path / "query.png")

    def run(*words):
        command = [tmp_path / "venv/bin/histoseek", *map(str, words), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr + done.stdout
        return json.loads(done.stdout)

    assert run("embed", slide, "--out", "features")["ok"]
    run("index", "create", "atlas")
    assert run("index", "add", "atlas", "features")["ok"]
    assert run("index", "fit", "atlas", "--k", 3)["clusters"] == 3
    (hits,) = run("index", "search", "atlas", "query.png", "-k", 3)["answers"]
    assert [h["rank"] for h in hits] == [1, 2, 3] and hits[0]["slide"] == "case-1"
    (placed,) = run("index", "assign", "atlas", "query.png")["answers"]
    assert 0 <= placed["cluster"] < 3
    assert run("index", "verify", "atlas")["ok"] and run("doctor")["ok"]


def test_importing_histoseek_itself_loads_nothing_heavy():
    heavy = ("numpy", "faiss", "gradio", "torch", "onnxruntime")
    code = f"import histoseek.__main__, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
