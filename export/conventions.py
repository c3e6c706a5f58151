"""How libraries name the parameters of image and text networks, and the same parameters in our names.

The names of image networks are timm's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

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
        split: a name whose parameter is split into equal parts along its first axis, and their names.
        absent: patterns of names here that the convention's networks do not have: zeros.
    """

    name: str
    sign: str
    rules: tuple[Rule, ...] = ()
    dropped: tuple[str, ...] = ()
    joined: tuple[tuple[tuple[str, ...], str], ...] = ()
    split: tuple[tuple[str, tuple[str, ...]], ...] = ()
    absent: tuple[str, ...] = ()


CHANGES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = MappingProxyType(
    {
        ".transposed": lambda value: value.T,
        ".after2": lambda value: value[2:],
        ".first": lambda value: value[0],
    }
)
"""Endings of names in rules, and what is done to the parameter: BEiT-3 keeps two unused positions."""


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
_SCALES: Rule = (r"(?:{})blocks\.(\d+)\.(ls[12])\.(?:weight|gamma)", r"trunk.blocks.\1.\2.gamma")
_POOL = r"(?:visual\.)?attn_pool_contrast\."
_POOLER: tuple[Rule, ...] = (
    (_SCALES[0].format(r"(?:visual\.)?trunk\."), _SCALES[1]),
    (r"(?:visual\.)?trunk\.(.+)", r"trunk.\1"),
    (_POOL + r"query", "pooler.query"),
    (_POOL + r"ln_q\.(.+)", r"pooler.norm_query.\1"),
    (_POOL + r"ln_k\.(.+)", r"pooler.norm_tokens.\1"),
    (_POOL + r"attn\.([qkv])_proj_weight", r"pooler.\1.weight"),
    (_POOL + r"attn\.in_proj_bias", "pooler.qkv.bias"),
    (_POOL + r"attn\.out_proj\.(.+)", r"pooler.proj.\1"),
    (_POOL + r"to_q\.weight", "pooler.q.weight"),
    (_POOL + r"to_kv\.weight", "pooler.kv.weight"),
    (_POOL + r"to_out\.weight", "pooler.proj.weight"),
    (r"(?:visual\.)?ln_contrast\.(.+)", r"pooler.norm.\1"),
    (r"(?:visual\.)?proj_contrast", "project.weight.transposed"),
)
_BEIT = r"beit3\.encoder\.layers\.(\d+)\."
_SWIN_DROPPED = (r".+\.attn_mask", r".+\.relative_position_index", r"head\..+")

CONVENTIONS = (
    Convention(
        "CoCa",
        r"visual\.attn_pool_contrast\.attn\.q_proj_weight",
        _POOLER,
        (
            r"text\..+", r"text_decoder\..+", r"logit_scale", r"visual\.attn_pool_caption\..+",
            r"visual\.ln_caption\..+",
        ),
        split=(("pooler.qkv.bias", ("pooler.q.bias", "pooler.k.bias", "pooler.v.bias")),),
    ),
    Convention(
        "CONCH v1.5",
        r"(?:visual\.)?attn_pool_contrast\.to_q\.weight",
        _POOLER,
        split=(("pooler.kv.weight", ("pooler.k.weight", "pooler.v.weight")),),
        absent=(r"pooler\.(q|k|v|proj)\.bias",),
    ),
    Convention(
        "KEEP",
        r"visual_head\.0\.weight",
        (
            (_SCALES[0].format(r"visual\."), _SCALES[1]),
            (r"visual\.(.+)", r"trunk.\1"),
            (r"visual_head\.(.+)", r"project.\1"),
        ),
        (r"text\..+", r"logit_scale"),
    ),
    Convention(
        "open_clip with timm's network",
        r"visual\.head\.proj\.weight",
        (
            (_SCALES[0].format(r"visual\.trunk\."), _SCALES[1]),
            (r"visual\.trunk\.(.+)", r"trunk.\1"),
            (r"visual\.head\.proj\.(.+)", r"project.\1"),
        ),
        (r"text\..+", r"logit_scale"),
    ),
    Convention(
        "BEiT-3",
        r"beit3\.encoder\.layers\.0\.self_attn\.q_proj\.A\.weight",
        (
            (r"beit3\.vision_embed\.cls_token", "trunk.cls_token"),
            (r"beit3\.vision_embed\.proj\.(.+)", r"trunk.patch_embed.proj.\1"),
            (r"beit3\.encoder\.embed_positions\.A\.weight", "trunk.pos_embed.after2"),
            (r"beit3\.encoder\.layer_norm\.A\.(.+)", r"trunk.norm.\1"),
            (_BEIT + r"self_attn\.q_proj\.A\.(.+)", r"trunk.blocks.\1.attn.query.\2"),
            (_BEIT + r"self_attn\.k_proj\.A\.(.+)", r"trunk.blocks.\1.attn.key.\2"),
            (_BEIT + r"self_attn\.v_proj\.A\.(.+)", r"trunk.blocks.\1.attn.value.\2"),
            (_BEIT + r"self_attn\.out_proj\.A\.(.+)", r"trunk.blocks.\1.attn.proj.\2"),
            (_BEIT + r"self_attn\.inner_attn_ln\.A\.(.+)", r"trunk.blocks.\1.attn.norm.\2"),
            (_BEIT + r"self_attn_layer_norm\.A\.(.+)", r"trunk.blocks.\1.norm1.\2"),
            (_BEIT + r"final_layer_norm\.A\.(.+)", r"trunk.blocks.\1.norm2.\2"),
            (_BEIT + r"ffn\.A\.(fc[12])\.(.+)", r"trunk.blocks.\1.mlp.\2.\3"),
            (_BEIT + r"ffn\.A\.ffn_layernorm\.(.+)", r"trunk.blocks.\1.mlp.norm.\2"),
            (r"vision_head\.weight", "project.weight"),
        ),
        (
            r".+\.B\..+", r"language_head\..+", r"beit3\.text_embed\..+", r"logit_scale",
            r"beit3\.vision_embed\.mask_token",
        ),
        _QKV,
    ),
    Convention(
        "Swin of older timm",
        r"layers\.0\.downsample\.norm\.weight",
        tuple((rf"layers\.{n}\.downsample\.(.+)", rf"layers.{n + 1}.downsample.\1") for n in range(3)),
        _SWIN_DROPPED,
    ),
    Convention("Swin of timm", r"layers\.1\.downsample\.norm\.weight", (), _SWIN_DROPPED),
    Convention("torchvision's ResNet", r"layer1\.0\.conv1\.weight", (), (r"fc\..+",)),
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

_TEXT_BLOCK = r"transformer\.resblocks\.(\d+)\."
_TEXT_CLIP = r"text_model\.encoder\.layers\.(\d+)\."
_IMAGE = (
    r"visual\..+", r"visual_.+", r"vision_.+", r"logit_scale", r"(text\.)?attn_mask",
    r"text_decoder\..+", r".+\.position_ids",
)  # fmt: skip


def _open_clip_text(prefix: str) -> tuple[Rule, ...]:
    block = prefix + _TEXT_BLOCK
    return (
        (prefix + r"token_embedding\.weight", "token_embed.weight"),
        (prefix + r"positional_embedding", "pos_embed"),
        (prefix + r"cls_emb", "cls_token"),
        (prefix + r"ln_final\.(.+)", r"norm.\1"),
        (prefix + r"text_projection", "project.weight.transposed"),
        (block + r"ln_([12])\.(.+)", r"blocks.\1.norm\2.\3"),
        (block + r"attn\.in_proj_(.+)", r"blocks.\1.attn.qkv.\2"),
        (block + r"attn\.out_proj\.(.+)", r"blocks.\1.attn.proj.\2"),
        (block + r"mlp\.c_fc\.(.+)", r"blocks.\1.mlp.fc1.\2"),
        (block + r"mlp\.c_proj\.(.+)", r"blocks.\1.mlp.fc2.\2"),
    )


def _bert(prefix: str, *ends: Rule) -> tuple[Rule, ...]:
    layer = prefix + r"encoder\.layer\.(\d+)\."
    return (
        (prefix + r"embeddings\.word_embeddings\.weight", "token_embed.weight"),
        (prefix + r"embeddings\.position_embeddings\.weight", "pos_embed"),
        (prefix + r"embeddings\.token_type_embeddings\.weight", "type_embed.first"),
        (prefix + r"embeddings\.LayerNorm\.(.+)", r"norm.\1"),
        (layer + r"attention\.self\.(query|key|value)\.(.+)", r"blocks.\1.attn.\2.\3"),
        (layer + r"attention\.output\.dense\.(.+)", r"blocks.\1.attn.proj.\2"),
        (layer + r"attention\.output\.LayerNorm\.(.+)", r"blocks.\1.norm1.\2"),
        (layer + r"intermediate\.dense\.(.+)", r"blocks.\1.mlp.fc1.\2"),
        (layer + r"output\.dense\.(.+)", r"blocks.\1.mlp.fc2.\2"),
        (layer + r"output\.LayerNorm\.(.+)", r"blocks.\1.norm2.\2"),
        *ends,
    )


TEXT_CONVENTIONS = (
    Convention(
        "Hugging Face CLIP",
        r"text_model\.embeddings\.token_embedding\.weight",
        (
            (r"text_model\.embeddings\.token_embedding\.weight", "token_embed.weight"),
            (r"text_model\.embeddings\.position_embedding\.weight", "pos_embed"),
            (r"text_model\.final_layer_norm\.(.+)", r"norm.\1"),
            (r"text_projection\.weight", "project.weight"),
            (_TEXT_CLIP + r"self_attn\.q_proj\.(.+)", r"blocks.\1.attn.query.\2"),
            (_TEXT_CLIP + r"self_attn\.k_proj\.(.+)", r"blocks.\1.attn.key.\2"),
            (_TEXT_CLIP + r"self_attn\.v_proj\.(.+)", r"blocks.\1.attn.value.\2"),
            (_TEXT_CLIP + r"self_attn\.out_proj\.(.+)", r"blocks.\1.attn.proj.\2"),
            (_TEXT_CLIP + r"layer_norm([12])\.(.+)", r"blocks.\1.norm\2.\3"),
            (_TEXT_CLIP + r"mlp\.(fc[12])\.(.+)", r"blocks.\1.mlp.\2.\3"),
        ),
        _IMAGE,
        _QKV,
    ),
    Convention("CoCa", r"text\.token_embedding\.weight", _open_clip_text(r"text\."), _IMAGE),
    Convention(
        "KEEP",
        r"text\.embeddings\.word_embeddings\.weight",
        _bert(r"text\.", (r"text\.pooler\.dense\.(.+)", r"project.0.\1")),
        _IMAGE,
        _QKV,
    ),
    Convention(
        "open_clip with BERT",
        r"text\.transformer\.embeddings\.word_embeddings\.weight",
        _bert(r"text\.transformer\.", (r"text\.proj\.(.+)", r"project.\1")),
        (*_IMAGE, r"text\.transformer\.pooler\..+"),
        _QKV,
    ),
    Convention("open_clip", r"token_embedding\.weight", _open_clip_text(""), _IMAGE),
)
"""How libraries name the parameters of text networks beside an image network."""
