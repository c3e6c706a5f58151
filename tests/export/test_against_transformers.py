"""Networks of Hugging Face's transformers as an independent reference: full width, two blocks."""

import re

import pytest
import torch
import transformers
from checkpoints import seeded
from safetensors.torch import load_file

from histoseek.export.checkpoints import load
from histoseek.export.from_checkpoint import build_published
from histoseek.export.nets.vit import Vit
from histoseek.export.published import PUBLISHED


def written(model, folder):
    """A model with random weights, as its files hold it."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.eval().save_pretrained(folder)
    return load_file(next(folder.glob("*.safetensors")))


def renamed(state, names):
    found = {}
    for key, value in state.items():
        for pattern, name in names:
            key = re.sub(pattern, name, key)
        found[key] = value
    return found


def sizes(shape):
    return {
        "hidden_size": shape.width, "num_hidden_layers": 2, "num_attention_heads": shape.heads,
        "image_size": shape.size_px, "patch_size": shape.patch, "layer_norm_eps": shape.eps,
    }  # fmt: skip


def model_of(name, shape):
    """The class that reads the encoder's files, with two blocks."""
    if name == "phikon":
        config = transformers.ViTConfig(intermediate_size=shape.hidden, **sizes(shape))
        return transformers.ViTModel(config, add_pooling_layer=False)
    if name == "plip":
        config = transformers.CLIPVisionConfig(
            intermediate_size=shape.hidden, projection_dim=shape.project, **sizes(shape)
        )
        return transformers.CLIPVisionModelWithProjection(config)
    gated = shape.mlp == "swiglu"
    if name == "hibou-b":
        config = transformers.Dinov2WithRegistersConfig(
            mlp_ratio=4, use_swiglu_ffn=gated, num_register_tokens=4, **sizes(shape)
        )
        return transformers.Dinov2WithRegistersModel(config)
    config = transformers.Dinov2Config(mlp_ratio=4, use_swiglu_ffn=gated, **sizes(shape))
    return transformers.Dinov2Model(config)


def test_resnet_50_computes_what_transformers_computes(tmp_path):
    known = PUBLISHED["lunit-resnet50"]
    config = transformers.ResNetConfig(depths=[1, 1, 1, 1], layer_type="bottleneck")
    model = transformers.ResNetModel(config)
    state = written(model, tmp_path)
    names = (
        (r"^embedder\.embedder\.convolution", "conv1"), (r"^embedder\.embedder\.normalization", "bn1"),
        (r"^encoder\.stages\.(\d)\.layers\.", lambda m: f"layer{int(m[1]) + 1}."),
        (r"\.layer\.(\d)\.convolution", lambda m: f".conv{int(m[1]) + 1}"),
        (r"\.layer\.(\d)\.normalization", lambda m: f".bn{int(m[1]) + 1}"),
        (r"\.shortcut\.convolution", ".downsample.0"), (r"\.shortcut\.normalization", ".downsample.1"),
    )  # fmt: skip
    net = build_published(known, depth=1)
    load(net, renamed(state, names), "lunit-resnet50")
    tiles = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted = model(tiles).pooler_output.flatten(1)
        torch.testing.assert_close(net(tiles), wanted, atol=1e-5, rtol=1e-4)


def test_swin_computes_what_transformers_computes_behind_the_same_stem(tmp_path):
    """transformers has no convolutional stem, so that of ours takes the place of its patches."""
    net = build_published(PUBLISHED["ctranspath"], depth=2)
    config = transformers.SwinConfig(depths=[2, 2, 2, 2], layer_norm_eps=1e-5)
    model = transformers.SwinModel(config)
    state = written(model, tmp_path)
    stem = seeded(build_published(PUBLISHED["ctranspath"], depth=2)).patch_embed
    names = (
        (r"^encoder\.layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample"),
        (r"^encoder\.", ""), (r"^layernorm\.", "norm."), (r"layernorm_before", "norm1"),
        (r"layernorm_after", "norm2"), (r"attention\.output\.dense", "attn.proj"),
        (r"attention\.self\.relative_position_bias_table", "attn.relative_position_bias_table"),
        (r"intermediate\.dense", "mlp.fc1"), (r"\.output\.dense", ".mlp.fc2"),
    )  # fmt: skip
    found = renamed({k: v for k, v in state.items() if not k.startswith("embeddings.")}, names)
    for key in [k for k in found if ".attention.self.query." in k]:
        parts = [found.pop(key.replace("query", part)) for part in ("query", "key", "value")]
        found[key.replace("attention.self.query", "attn.qkv")] = torch.cat(parts)
    found = {k: v for k, v in found.items() if "relative_position_index" not in k}
    load(
        net,
        {**found, **{f"patch_embed.{k}": v for k, v in stem.state_dict().items()}},
        "ctranspath",
    )
    tiles = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    model.embeddings.forward = lambda pixels, **_: (stem(pixels).flatten(1, 2), (56, 56))
    with torch.inference_mode():
        wanted = model(tiles).pooler_output
        torch.testing.assert_close(net(tiles), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["phikon", "phikon-v2", "midnight", "hibou-b", "plip"])
def test_our_network_computes_what_transformers_computes(name, tmp_path):
    known = PUBLISHED[name]
    model = model_of(name, known.shape)
    net = build_published(known, depth=2)
    load(net, written(model, tmp_path), name)
    assert isinstance(net.trunk, Vit)
    tiles = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        theirs, ours = model(tiles), net(tiles)
    if name == "plip":
        wanted = theirs.image_embeds
    else:
        tokens = theirs.last_hidden_state
        wanted = tokens[:, 0]
        if known.pool == "cls+mean":
            wanted = torch.cat([wanted, tokens[:, 1:].mean(1)], 1)
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)
