"""Checkpoints of published encoders, written under the names of each library from one seeded network."""

import re

import torch


def seeded(net, seed=0):
    """Random weights in every parameter, so that each of them counts."""
    generator = torch.Generator().manual_seed(seed)
    net.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
            if re.search(r"norm.*weight|gamma", name):
                parameter.add_(0.5)
    return net.eval()


def timm(net):
    """Names of timm."""
    return {key: value.clone() for key, value in net.trunk.state_dict().items()}


def dinov2(net, chunks=0):
    """Names of the code of DINOv2: registers apart, a packed gate, and what only training needs."""
    found = {}
    for key, value in timm(net).items():
        key = key.replace("reg_token", "register_tokens")
        if net.trunk.shape.mlp == "swiglu":
            key = key.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3.")
        if chunks:
            key = re.sub(r"blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) // chunks}.{m[1]}", key)
        found[key] = value
    found["mask_token"] = torch.zeros(1, net.trunk.shape.width)
    return _with_class_position(found, "pos_embed", "cls_token", net)


def teacher(net, chunks=0):
    """The same inside a checkpoint of its training program."""
    inner = {f"backbone.{key}": value for key, value in dinov2(net, chunks).items()}
    return {"teacher": {**inner, "dino_head.last_layer.weight": torch.zeros(2, 2)}}


def hugging_face_vit(net):
    """Names of ViTModel."""
    names = (
        (r"attn\.proj\.", "attention.output.dense."), (r"norm1\.", "layernorm_before."),
        (r"norm2\.", "layernorm_after."), (r"mlp\.fc1\.", "intermediate.dense."),
        (r"mlp\.fc2\.", "output.dense."),
    )  # fmt: skip
    found = _hugging_face(net, names)
    found["pooler.dense.weight"] = torch.zeros(2, 2)
    return found


def hugging_face_dinov2(net):
    """Names of Dinov2Model and Dinov2WithRegistersModel."""
    gated = net.trunk.shape.mlp == "swiglu"
    names = (
        (r"attn\.proj\.", "attention.output.dense."), (r"ls([12])\.gamma", r"layer_scale\1.lambda1"),
        (r"mlp\.fc1\.", "mlp.weights_in." if gated else "mlp.fc1."),
        (r"mlp\.fc2\.", "mlp.weights_out." if gated else "mlp.fc2."),
    )  # fmt: skip
    found = _hugging_face(net, names)
    found["embeddings.mask_token"] = torch.zeros(1, net.trunk.shape.width)
    return _with_class_position(
        found, "embeddings.position_embeddings", "embeddings.cls_token", net
    )


def _hugging_face(net, names):
    found = {}
    for key, value in timm(net).items():
        key = key.replace("cls_token", "embeddings.cls_token")
        key = key.replace("reg_token", "embeddings.register_tokens")
        key = key.replace("pos_embed", "embeddings.position_embeddings")
        key = key.replace("patch_embed.proj.", "embeddings.patch_embeddings.projection.")
        key = re.sub(r"^norm\.", "layernorm.", key)
        key = key.replace("blocks.", "encoder.layer.")
        for pattern, name in names:
            key = re.sub(pattern, name, key)
        if ".attn.qkv." in key:
            for part, each in zip(("query", "key", "value"), value.chunk(3), strict=True):
                found[key.replace("attn.qkv", f"attention.attention.{part}")] = each.clone()
        else:
            found[key] = value
    return found


def _with_class_position(found, positions, token, net):
    """With registers, these libraries keep a position of the class token, and add it before them."""
    if net.trunk.shape.positions == "patches":
        place = torch.full((1, 1, net.trunk.shape.width), 0.25)
        found[token] = found[token] - place
        found[positions] = torch.cat([place, found[positions]], 1)
    return found


def hugging_face_clip(net):
    """Names of CLIPModel, with some of its text tower."""
    names = (
        ("trunk.cls_token", "vision_model.embeddings.class_embedding"),
        ("trunk.pos_embed", "vision_model.embeddings.position_embedding.weight"),
        ("trunk.patch_embed.proj.", "vision_model.embeddings.patch_embedding."),
        ("trunk.norm_pre.", "vision_model.pre_layrnorm."),
        ("trunk.norm.", "vision_model.post_layernorm."),
        ("trunk.blocks.", "vision_model.encoder.layers."),
        (".attn.proj.", ".self_attn.out_proj."), (".norm1.", ".layer_norm1."),
        (".norm2.", ".layer_norm2."), ("project.", "visual_projection."),
    )  # fmt: skip
    found = {}
    for key, value in _flat_tokens(net).items():
        for ours, theirs in names:
            key = key.replace(ours, theirs)
        if ".attn.qkv." in key:
            for part, each in zip("qkv", value.chunk(3), strict=True):
                found[key.replace("attn.qkv", f"self_attn.{part}_proj")] = each.clone()
        else:
            found[key] = value
    return {**found, "logit_scale": torch.tensor(2.0), "text_projection.weight": torch.zeros(2, 2)}


def open_clip(net):
    """Names of open_clip, with some of its text tower."""
    names = (
        ("trunk.cls_token", "visual.class_embedding"),
        ("trunk.pos_embed", "visual.positional_embedding"),
        ("trunk.patch_embed.proj.", "visual.conv1."), ("trunk.norm_pre.", "visual.ln_pre."),
        ("trunk.norm.", "visual.ln_post."), ("trunk.blocks.", "visual.transformer.resblocks."),
        (".attn.qkv.", ".attn.in_proj_"), (".attn.proj.", ".attn.out_proj."), (".norm1.", ".ln_1."),
        (".norm2.", ".ln_2."), (".mlp.fc1.", ".mlp.c_fc."), (".mlp.fc2.", ".mlp.c_proj."),
    )  # fmt: skip
    found = {"positional_embedding": torch.zeros(2, 2), "token_embedding.weight": torch.zeros(2, 2)}
    for key, value in _flat_tokens(net).items():
        for ours, theirs in names:
            key = key.replace(ours, theirs)
        found[key] = value
    found["visual.proj"] = found.pop("project.weight").T.contiguous()
    return found


def _flat_tokens(net):
    state = {key: value.clone() for key, value in net.state_dict().items()}
    state["trunk.cls_token"] = state["trunk.cls_token"].flatten()
    state["trunk.pos_embed"] = state["trunk.pos_embed"][0]
    return state


WRITERS = {
    "phikon": hugging_face_vit,
    "phikon-v2": hugging_face_dinov2,
    "midnight": hugging_face_dinov2,
    "hibou-b": hugging_face_dinov2,
    "hibou-l": hugging_face_dinov2,
    "gpfm": lambda net: teacher(net, chunks=1),
    "openmidnight": teacher,
    "quiltnet-b32": open_clip,
    "quiltnet-b16": open_clip,
    "plip": hugging_face_clip,
}
"""How each encoder's file names its parameters; the others have timm's names."""
