"""CONCH's features from before its last map are projected, bound to the bundle, and searched by text."""

import h5py
import numpy as np
import pytest
import torch
from checkpoints import coca, conch_tokens, seeded
from PIL import Image

from histoseek.artifacts.manifest import PROJECTION
from histoseek.export.from_checkpoint import build_published, export_checkpoint
from histoseek.export.nets.text import text_net
from histoseek.export.options import ExportOptions
from histoseek.export.published import PUBLISHED

SIDE = 512


@pytest.fixture(scope="module")
def theirs(tmp_path_factory, make_slide):
    """A bundle of CONCH with one block, and features by Pillow and torch, before the last map."""
    folder = tmp_path_factory.mktemp("conch")
    known = PUBLISHED["conch"]
    net, text = build_published(known, depth=1), text_net(known.text.shallow(1))
    torch.save(coca(seeded(net), seeded(text, 1)), folder / "net.bin")
    conch_tokens(folder / "tokenizer.json")
    export_checkpoint(
        folder / "net.bin", folder / "bundle", ExportOptions(published="conch"), depth=1
    )
    slide = make_slide(folder / "a.tif", side=1536, mpp=0.5)
    whole = Image.open(slide).convert("RGB")
    corners = [(x, y) for y in range(0, 1536, SIDE) for x in range(0, 1536, SIDE)]
    tiles = [
        whole.crop((x, y, x + SIDE, y + SIDE)).resize((448, 448), Image.Resampling.BICUBIC)
        for x, y in corners
    ]
    pixels = torch.from_numpy(np.stack([np.asarray(t) for t in tiles])).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(v)[:, None, None] for v in known.colours)
    with torch.inference_mode():
        features = net.pooled(net.trunk((pixels / 255 - mean) / std), "pooler").numpy()
    with h5py.File(folder / "a.h5", "w") as out:
        out.create_dataset("features", data=features).attrs["encoder"] = "conch_v1"
        out.create_dataset("coords", data=np.array(corners)).attrs.update(
            {"patch_size": SIDE, "patch_size_level0": SIDE, "target_magnification": 20,
             "level0_magnification": 20, "level0_width": 1536, "level0_height": 1536, "name": "a"}
        )  # fmt: skip
    return folder


def test_projected_features_are_bound_and_searched_by_text(
    theirs, tmp_path, cli, cli_json, cli_answers
):
    words = (theirs / "a.h5", "--encoder", "conch_v1", "--mpp", 0.5)
    atlas = tmp_path / "atlas"
    cli("index", "import", atlas, *words, "--project", theirs / "bundle", check=True)
    refused = cli("index", "import", atlas, *words, "--replace")
    assert refused.returncode == 1 and "bound to encoder 'conch_v1-projected'" in refused.stderr
    bound = cli_json("index", "bind", atlas, theirs / "bundle", "--slides", theirs / "a.tif")
    assert max(bound["cosines"].values()) > 0.999
    (hits,) = cli_answers("index", "search", atlas, "--text", "signet ring cells", "-k", 3)
    assert len(hits) == 3
    plain = tmp_path / "plain"
    cli("index", "import", plain, *words, check=True)
    refused = cli("index", "bind", plain, theirs / "bundle", "--slides", theirs / "a.tif")
    assert refused.returncode == 1 and "--project" in refused.stderr
    (theirs / "bundle" / PROJECTION).write_bytes(b"")
    damaged = cli("index", "import", tmp_path / "c", *words, "--project", theirs / "bundle")
    assert f"{PROJECTION} is missing or is not" in damaged.stderr


def test_an_encoder_without_a_projection_says_so(text_bundle, tmp_path, cli):
    words = ("index", "import", tmp_path / "a", tmp_path / "b.h5", "--encoder", "x")
    (tmp_path / "b.h5").write_bytes(b"")
    refused = cli(*words, "--project", text_bundle / "bundle")
    assert refused.returncode == 1 and "has no projection.npy" in refused.stderr
