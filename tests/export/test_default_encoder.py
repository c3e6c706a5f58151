"""The shipped encoder: consistent wherever it is named, and reproducible from its committed run."""

import json
import re
import shlex
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from histoseek.artifacts.files import sha256_file
from histoseek.artifacts.manifest import CARD, GRAPH, read_manifest
from histoseek.artifacts.tileset_files import open_tiles
from histoseek.artifacts.tilesets import sample_tiles
from histoseek.export.bundle import export_run
from histoseek.export.options import ExportOptions
from histoseek.serving.encoders.onnx import OnnxEncoder
from histoseek.serving.encoders.open import DEFAULT_BUNDLE
from histoseek.training.models import build
from histoseek.training.recipes import find_recipe
from histoseek.ui.cli.options import parse

ROOT = Path(__file__).parents[2]
RUN = ROOT / "training" / "default_run"
NAME = read_manifest(DEFAULT_BUNDLE, check_graph=False).name
NOTES = ROOT / "docs" / "model-cards" / f"{NAME}.notes.md"


def test_its_hash_is_the_same_in_manifest_card_docs_and_results():
    sha256 = sha256_file(DEFAULT_BUNDLE / GRAPH)
    manifest = read_manifest(DEFAULT_BUNDLE)
    report = json.loads((ROOT / "docs/results/encoder/report.json").read_text())
    viewed = json.loads((ROOT / "docs/results/viewer/report.json").read_text())
    about = {"name": manifest.name, "sha256": sha256}
    assert manifest.sha256 == sha256 and report["bundle"] == viewed["bundle"] == about
    for page in (
        DEFAULT_BUNDLE / CARD,
        ROOT / "docs/model-cards/README.md",
        ROOT / "docs/results.md",
    ):
        text = page.read_text()
        assert sha256 in text and manifest.name in text
        assert set(re.findall(r"\b[0-9a-f]{64}\b", text)) <= {sha256}
    assert NOTES.read_text().strip() in (DEFAULT_BUNDLE / CARD).read_text()
    assert (DEFAULT_BUNDLE / GRAPH).stat().st_size <= 6e6 and manifest.dim <= 128


def test_the_documented_command_is_that_of_its_run():
    page = (ROOT / "docs/training.md").read_text()
    (command,) = re.findall(r"    histoseek train arcface \.\./shared(?:.*\\\n)+.*", page)
    words = shlex.split(command.replace("\\\n", " "))[3:]
    record = json.loads((RUN / "run.json").read_text())
    selection = record["data"]["selection"]
    count = len(selection["sources"])
    assert words[:count] == selection["sources"]
    kept = []
    asked = {"--exclude": [], "--label-from": [], "--out": []}
    rest = iter(words[count:])
    for word in rest:
        if word in asked:
            asked[word].append(next(rest))
        elif word == "--shared-groups":
            assert selection["shared_groups"]
        else:
            kept.append(word)
    assert asked["--exclude"] == selection["exclude"]
    assert asked["--label-from"] == selection["label_from"]
    model = find_recipe("arcface").options
    since = asdict(model())  # options that came after the run have their defaults
    assert asdict(parse(model, kept, "arcface")) == {**since, **record["options"]}


@pytest.mark.shared
def test_it_is_exported_again_from_its_run(shared, tmp_path):
    assert (RUN / "run.json").read_text() == (DEFAULT_BUNDLE / "run.json").read_text()
    shipped = read_manifest(DEFAULT_BUNDLE)
    source = open_tiles(shared / "lc25000.tar")
    options = ExportOptions(
        shipped.name, shipped.mpp, views=shipped.views, licence=shipped.licence, notes=NOTES
    )
    made = export_run(RUN, tmp_path / "again", source, build, options)
    assert (made.dim, made.tissue_gate, made.size_px) == (
        shipped.dim,
        shipped.tissue_gate,
        shipped.size_px,
    )
    tiles = sample_tiles(source, shipped.size_px, 64)
    again, ours = (OnnxEncoder(b).embed(tiles) for b in (tmp_path / "again", DEFAULT_BUNDLE))
    assert np.abs(again - ours).max() <= 1e-5
