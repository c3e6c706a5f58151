"""Networks of Hugging Face's transformers as an independent reference: full width, two blocks."""

import pytest
import torch
import transformers
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
