"""How libraries name the parameters of image transformers, and the same parameters in timm's names."""

from __future__ import annotations

from dataclasses import dataclass

Rule = tuple[str, str]


@dataclass(frozen=True)
class Convention:
    """How a library names the parameters of a network.

    Attributes:
        name: of the convention, for messages.
        sign: pattern of a key that only this convention has.
        rules: patterns of keys and their names here, the first that matches the whole key.
        dropped: patterns of keys that training needed and embedding does not.
        joined: groups of names that are joined to one along their first axis, and the joined name.
    """

    name: str
    sign: str
    rules: tuple[Rule, ...] = ()
    dropped: tuple[str, ...] = ()
    joined: tuple[tuple[tuple[str, ...], str], ...] = ()


_QKV = ((("{}.query.{}", "{}.key.{}", "{}.value.{}"), "{}.qkv.{}"),)
_BLOCK = r"(?:encoder\.layer|layer|encoder\.layers|layers)\.(\d+)\."
_HUGGING_FACE: tuple[Rule, ...] = (
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.register_tokens", "reg_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.(.+)", r"patch_embed.proj.\1"),
    (_BLOCK + r"attention\.(?:attention\.)?(query|key|value)\.(.+)", r"blocks.\1.attn.\2.\3"),
    (_BLOCK + r"attention\.q_proj\.(.+)", r"blocks.\1.attn.query.\2"),
    (_BLOCK + r"attention\.k_proj\.(.+)", r"blocks.\1.attn.key.\2"),
    (_BLOCK + r"attention\.v_proj\.(.+)", r"blocks.\1.attn.value.\2"),
    (_BLOCK + r"attention\.(?:output\.dense|o_proj)\.(.+)", r"blocks.\1.attn.proj.\2"),
    (_BLOCK + r"(?:layernorm_before|norm1)\.(.+)", r"blocks.\1.norm1.\2"),
    (_BLOCK + r"(?:layernorm_after|norm2)\.(.+)", r"blocks.\1.norm2.\2"),
    (_BLOCK + r"layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (_BLOCK + r"(?:intermediate\.dense|mlp\.fc1|mlp\.weights_in)\.(.+)", r"blocks.\1.mlp.fc1.\2"),
    (_BLOCK + r"(?:output\.dense|mlp\.fc2|mlp\.weights_out|mlp\.down_proj)\.(.+)", r"blocks.\1.mlp.fc2.\2"),
    (_BLOCK + r"mlp\.(gate_proj|up_proj)\.(.+)", r"blocks.\1.mlp.\2.\3"),
    (r"layernorm\.(.+)", r"norm.\1"),
)  # fmt: skip
_CLIP = r"vision_model\.encoder\.layers\.(\d+)\."
_OPEN_CLIP = r"visual\.transformer\.resblocks\.(\d+)\."
_GATED = (("{}.gate_proj.{}", "{}.up_proj.{}"), "{}.fc1.{}")
DINO_DROPPED = (r"mask_token", r"(dino|ibot)_head\..+")

CONVENTIONS = (
    Convention(
        "Hugging Face CLIP",
        r"vision_model\.embeddings\.class_embedding",
        (
            (r"vision_model\.embeddings\.class_embedding", "trunk.cls_token"),
            (r"vision_model\.embeddings\.position_embedding\.weight", "trunk.pos_embed"),
            (r"vision_model\.embeddings\.patch_embedding\.(.+)", r"trunk.patch_embed.proj.\1"),
            (r"vision_model\.pre_layrnorm\.(.+)", r"trunk.norm_pre.\1"),
            (r"vision_model\.post_layernorm\.(.+)", r"trunk.norm.\1"),
            (_CLIP + r"self_attn\.q_proj\.(.+)", r"trunk.blocks.\1.attn.query.\2"),
            (_CLIP + r"self_attn\.k_proj\.(.+)", r"trunk.blocks.\1.attn.key.\2"),
            (_CLIP + r"self_attn\.v_proj\.(.+)", r"trunk.blocks.\1.attn.value.\2"),
            (_CLIP + r"self_attn\.out_proj\.(.+)", r"trunk.blocks.\1.attn.proj.\2"),
            (_CLIP + r"layer_norm([12])\.(.+)", r"trunk.blocks.\1.norm\2.\3"),
            (_CLIP + r"mlp\.(fc[12])\.(.+)", r"trunk.blocks.\1.mlp.\2.\3"),
            (r"visual_projection\.weight", "project.weight"),
        ),
        (
            r"text_model\..+", r"text_projection\..+", r"logit_scale",
            r"vision_model\.embeddings\.position_ids",
        ),
        _QKV,
    ),
    Convention(
        "open_clip",
        r"visual\.class_embedding",
        (
            (r"visual\.class_embedding", "trunk.cls_token"),
            (r"visual\.positional_embedding", "trunk.pos_embed"),
            (r"visual\.conv1\.(.+)", r"trunk.patch_embed.proj.\1"),
            (r"visual\.ln_pre\.(.+)", r"trunk.norm_pre.\1"),
            (r"visual\.ln_post\.(.+)", r"trunk.norm.\1"),
            (_OPEN_CLIP + r"ln_([12])\.(.+)", r"trunk.blocks.\1.norm\2.\3"),
            (_OPEN_CLIP + r"attn\.in_proj_(.+)", r"trunk.blocks.\1.attn.qkv.\2"),
            (_OPEN_CLIP + r"attn\.out_proj\.(.+)", r"trunk.blocks.\1.attn.proj.\2"),
            (_OPEN_CLIP + r"mlp\.c_fc\.(.+)", r"trunk.blocks.\1.mlp.fc1.\2"),
            (_OPEN_CLIP + r"mlp\.c_proj\.(.+)", r"trunk.blocks.\1.mlp.fc2.\2"),
            (r"visual\.proj", "project.weight.transposed"),
        ),
        (
            r"transformer\..+", r"token_embedding\..+", r"positional_embedding", r"ln_final\..+",
            r"text_projection", r"logit_scale", r"attn_mask",
        ),
    ),
    Convention(
        "Hugging Face ViT or DINOv2",
        r"embeddings\.patch_embeddings\.projection\.weight",
        _HUGGING_FACE,
        (r"embeddings\.mask_token", r"pooler\..+"),
        (*_QKV, _GATED),
    ),
    Convention(
        "DINOv2",
        r"(mask_token|register_tokens|blocks\.\d+(\.\d+)?\.mlp\.w12\.weight)",
        (
            (r"register_tokens", "reg_token"),
            (r"blocks\.(?:\d+\.)?(\d+)\.mlp\.w12\.(.+)", r"blocks.\1.mlp.fc1.\2"),
            (r"blocks\.(?:\d+\.)?(\d+)\.mlp\.w3\.(.+)", r"blocks.\1.mlp.fc2.\2"),
            (r"blocks\.(?:\d+\.)?(\d+)\.([a-z].+)", r"blocks.\1.\2"),
        ),
        DINO_DROPPED,
    ),
    Convention(
        "timm",
        r"patch_embed\.proj\.weight",
        ((r"blocks\.(\d+)\.(ls[12])\.(?:weight|gamma)", r"blocks.\1.\2.gamma"),),
        (r"head\.(weight|bias)", r"fc_norm\..+", *DINO_DROPPED),
    ),
)  # fmt: skip
"""In the order in which they are tried: a key of a later one may also be in an earlier one."""
TRUNKS = ("visual.trunk.", "trunk.", "visual.", "vit.", "dinov2.")
"""Prefixes of an image network inside a larger model."""
