"""Every registered model: sizes, shapes, gradients, keys and a round trip through a checkpoint."""

import pytest
import torch

from histoseek.errors import BadInput, Damaged, Mismatch
from histoseek.training.checkpoint import load_backbone, load_tensors, save_tensors
from histoseek.training.models import MODELS, build
from histoseek.training.models.mobilenet_v3 import MobileNetV3Small


@pytest.mark.parametrize("name", MODELS)
def test_shape_gradient_and_round_trip(name, tmp_path):
    torch.manual_seed(0)
    model = build(name)
    tiles = torch.rand(2, 3, model.size_px, model.size_px)
    embedding = model(tiles)
    assert embedding.shape == (2, model.dim)
    (embedding * torch.randn_like(embedding)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    save_tensors(tmp_path / "weights.safetensors", model.state_dict(), {"model": name})
    tensors, about = load_tensors(tmp_path / "weights.safetensors")
    other = build(name)
    other.load_state_dict(tensors)
    assert about == {"model": name}
    assert torch.equal(model.eval()(tiles), other.eval()(tiles))


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
