"""Checkpoints of published encoders, written under the names of each library from one seeded network."""

import json
import re

import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers


def seeded(net, seed=0):
    """Random weights in every parameter, so that each of them counts."""
    generator = torch.Generator().manual_seed(seed)
    net.to_empty(device="cpu")
    with torch.no_grad():
        for name, buffer in net.named_buffers():
            buffer.fill_(1 if name.endswith("running_var") else 0)
        for name, parameter in net.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
            if re.search(r"(norm.*|bn\d|downsample\.1|proj\.[14])\.weight|gamma", name):
                parameter.add_(0.5)
    return net.eval()


def timm(net):
    """Names of timm."""
    return _copy(getattr(net, "trunk", net))


def _copy(net):
    return {key: value.clone() for key, value in net.state_dict().items()}


def _renamed(state, names):
    found = {}
    for key, value in state.items():
        for pattern, name in names:
            key = re.sub(pattern, name, key)
        found[key] = value
    return found


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


def hugging_face_clip(net, text=None):
    """Names of CLIPModel, with its text network or some of it."""
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
    words = {"text_projection.weight": torch.zeros(2, 2)}
    words = words if text is None else hugging_face_clip_text(text)
    return {**found, **words, "logit_scale": torch.tensor(2.0)}


def open_clip(net, text=None):
    """Names of open_clip, with its text network or some of it."""
    names = (
        ("trunk.cls_token", "visual.class_embedding"),
        ("trunk.pos_embed", "visual.positional_embedding"),
        ("trunk.patch_embed.proj.", "visual.conv1."), ("trunk.norm_pre.", "visual.ln_pre."),
        ("trunk.norm.", "visual.ln_post."), ("trunk.blocks.", "visual.transformer.resblocks."),
        (".attn.qkv.", ".attn.in_proj_"), (".attn.proj.", ".attn.out_proj."), (".norm1.", ".ln_1."),
        (".norm2.", ".ln_2."), (".mlp.fc1.", ".mlp.c_fc."), (".mlp.fc2.", ".mlp.c_proj."),
    )  # fmt: skip
    found = {"positional_embedding": torch.zeros(2, 2), "token_embedding.weight": torch.zeros(2, 2)}
    found = found if text is None else open_clip_text(text)
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


def coca(net, text=None):
    """Names of CONCH: an attentional pooler behind timm's network, and a text network."""
    state = _copy(net)
    biases = [state.pop(f"pooler.{part}.bias") for part in "qkv"]
    found = _renamed(
        state,
        (
            (r"^trunk\.", "visual.trunk."), (r"^pooler\.query$", "visual.attn_pool_contrast.query"),
            (r"^pooler\.([qkv])\.weight", r"visual.attn_pool_contrast.attn.\1_proj_weight"),
            (r"^pooler\.proj\.", "visual.attn_pool_contrast.attn.out_proj."),
            (r"^pooler\.norm_query\.", "visual.attn_pool_contrast.ln_q."),
            (r"^pooler\.norm_tokens\.", "visual.attn_pool_contrast.ln_k."),
            (r"^pooler\.norm\.", "visual.ln_contrast."), (r"^project\.weight", "visual.proj_contrast"),
        ),
    )  # fmt: skip
    found["visual.attn_pool_contrast.attn.in_proj_bias"] = torch.cat(biases)
    found["visual.proj_contrast"] = found["visual.proj_contrast"].T.contiguous()
    found["visual.ln_caption.weight"] = torch.zeros(2)
    found["text_decoder.ln_final.weight"] = torch.zeros(2)
    words = {} if text is None else {f"text.{k}": v for k, v in open_clip_text(text).items()}
    return {**found, **words, "logit_scale": torch.tensor(2.0)}


def conch_v1_5(net):
    """Names of CONCH v1.5: a pooler without biases."""
    state = {k: v for k, v in _copy(net).items() if not re.match(r"pooler\.[a-z]+\.bias", k)}
    state["pooler.norm.bias"] = net.pooler.norm.bias.detach().clone()
    keys = state.pop("pooler.k.weight"), state.pop("pooler.v.weight")
    if hasattr(net, "stored_positions"):
        state["trunk.pos_embed"] = net.stored_positions
    found = _renamed(
        state,
        (
            (r"^pooler\.query$", "attn_pool_contrast.query"),
            (r"^pooler\.q\.", "attn_pool_contrast.to_q."),
            (r"^pooler\.proj\.", "attn_pool_contrast.to_out."),
            (r"^pooler\.norm_query\.", "attn_pool_contrast.ln_q."),
            (r"^pooler\.norm_tokens\.", "attn_pool_contrast.ln_k."),
            (r"^pooler\.norm\.", "ln_contrast."),
        ),
    )  # fmt: skip
    return {**found, "attn_pool_contrast.to_kv.weight": torch.cat(keys)}


def as_conch_v1_5(net):
    """Set to zero what the pooler of CONCH v1.5 does not have, and resample positions as its code does."""
    shape = net.trunk.shape
    if shape.built_grid:
        side = shape.built_grid
        stored = torch.randn(
            1, 1 + side**2, shape.width, generator=torch.Generator().manual_seed(2)
        )
        net.stored_positions = stored * 0.05
        grid = net.stored_positions[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        factor = (shape.size_px // shape.patch + 0.1) / side
        grid = torch.nn.functional.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
        places = torch.cat([net.stored_positions[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)
        net.trunk.pos_embed.data.copy_(places)
    with torch.no_grad():
        for part in (net.pooler.q, net.pooler.k, net.pooler.v, net.pooler.proj):
            part.bias.zero_()
    return net


def keep(net, text=None):
    """Names of KEEP: an MLP behind timm's network, LayerScale as a weight, and BERT."""
    names = (
        (r"\.(ls[12])\.gamma", r".\1.weight"),
        (r"^trunk\.", "visual."),
        (r"^project\.", "visual_head."),
    )
    words = {} if text is None else bert(text, "text.")
    return {**_renamed(_copy(net), names), **words, "logit_scale": torch.tensor(2.0)}


def biomedclip(net, text=None):
    """Names of open_clip with timm's network and BERT."""
    names = ((r"^trunk\.", "visual.trunk."), (r"^project\.", "visual.head.proj."))
    words = {} if text is None else bert(text, "text.transformer.")
    return {**_renamed(_copy(net), names), **words, "logit_scale": torch.tensor(2.0)}


def beit3(net):
    """Names of BEiT-3: the branch of images is A, that of text B; two positions are not used."""
    state = _copy(net)
    places = state.pop("trunk.pos_embed")[0]
    found = {
        "beit3.encoder.embed_positions.A.weight": torch.cat(
            [torch.ones(2, places.shape[1]), places]
        ),
        "beit3.vision_embed.cls_token": state.pop("trunk.cls_token"),
        "beit3.vision_embed.mask_token": torch.zeros(1, 1, 2),
        "beit3.text_embed.weight": torch.zeros(2, 2),
        "vision_head.weight": state.pop("project.weight"),
        "language_head.weight": torch.zeros(2, 2),
    }
    names = (
        (r"^trunk\.patch_embed\.", "beit3.vision_embed."),
        (r"^trunk\.norm\.", "beit3.encoder.layer_norm.A."),
        (r"^trunk\.blocks\.", "beit3.encoder.layers."), (r"\.attn\.proj\.", ".self_attn.out_proj.A."),
        (r"\.attn\.norm\.", ".self_attn.inner_attn_ln.A."), (r"\.norm1\.", ".self_attn_layer_norm.A."),
        (r"\.norm2\.", ".final_layer_norm.A."), (r"\.mlp\.norm\.", ".ffn.A.ffn_layernorm."),
        (r"\.mlp\.(fc[12])\.", r".ffn.A.\1."),
    )  # fmt: skip
    for key, value in _renamed(state, names).items():
        if ".attn.qkv." in key:
            for part, each in zip("qkv", value.chunk(3), strict=True):
                found[key.replace("attn.qkv.", f"self_attn.{part}_proj.A.")] = each.clone()
        else:
            found[key] = value
            if ".A." in key:
                found[key.replace(".A.", ".B.")] = torch.zeros_like(value)
    return found


def ctranspath(net):
    """Names of timm 0.5: each merging of tokens is in the stage that it ends."""
    found = {}
    for key, value in _copy(net).items():
        key = re.sub(
            r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key
        )
        found[key] = value
    found["layers.0.blocks.1.attn_mask"] = torch.zeros(2)
    found["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(2)
    return {"model": found}


def resnet(net):
    """Names of torchvision, with its classifier."""
    return {**_copy(net), "fc.weight": torch.zeros(2, 2), "fc.bias": torch.zeros(2)}


def open_clip_text(net):
    """Names of open_clip's text network."""
    found = _renamed(
        _copy(net),
        (
            ("token_embed", "token_embedding"), ("pos_embed", "positional_embedding"),
            ("cls_token", "cls_emb"), (r"^norm\.", "ln_final."),
            (r"^blocks\.", "transformer.resblocks."), (r"\.attn\.qkv\.", ".attn.in_proj_"),
            (r"\.attn\.proj\.", ".attn.out_proj."), (r"\.norm([12])\.", r".ln_\1."),
            (r"\.mlp\.fc1\.", ".mlp.c_fc."), (r"\.mlp\.fc2\.", ".mlp.c_proj."),
        ),
    )  # fmt: skip
    found["text_projection"] = found.pop("project.weight").T.contiguous()
    return found


def hugging_face_clip_text(net):
    """Names of CLIPModel's text network."""
    names = (
        ("token_embed", "text_model.embeddings.token_embedding"),
        ("pos_embed", "text_model.embeddings.position_embedding.weight"),
        (r"^norm\.", "text_model.final_layer_norm."), (r"^blocks\.", "text_model.encoder.layers."),
        (r"\.attn\.proj\.", ".self_attn.out_proj."), (r"\.norm([12])\.", r".layer_norm\1."),
        (r"^project\.", "text_projection."),
    )  # fmt: skip
    return _parts(_renamed(_copy(net), names), "attn.qkv", "self_attn.{}_proj", "qkv")


def bert(net, prefix):
    """Names of BertModel, with its further positions and its second type of token."""
    names = (
        ("^token_embed", "embeddings.word_embeddings"), (r"^norm\.", "embeddings.LayerNorm."),
        ("^pos_embed", "embeddings.position_embeddings.weight"),
        ("^type_embed", "embeddings.token_type_embeddings.weight"),
        (r"^blocks\.", "encoder.layer."), (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.norm1\.", ".attention.output.LayerNorm."), (r"\.norm2\.", ".output.LayerNorm."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."), (r"\.mlp\.fc2\.", ".output.dense."),
    )  # fmt: skip
    state = _copy(net)
    head = {k: state.pop(k) for k in list(state) if k.startswith("project.")}
    places, kind = state["pos_embed"], state["type_embed"]
    state["pos_embed"] = torch.cat([places, torch.ones(3, places.shape[1])])
    state["type_embed"] = torch.stack([kind, torch.ones_like(kind)])
    parts = ("query", "key", "value")
    found = _parts(_renamed(state, names), "attn.qkv", "attention.self.{}", parts)
    found = {f"{prefix}{key}": value for key, value in found.items()}
    for key, value in head.items():
        middle = net.shape.middle
        found[key.replace("project.", "text.proj." if middle else "text.pooler.")] = value
    return {key.replace("pooler.0.", "pooler.dense."): value for key, value in found.items()}


def _parts(state, whole, name, parts):
    found = {}
    for key, value in state.items():
        if whole in key:
            for part, each in zip(parts, value.chunk(3), strict=True):
                found[key.replace(whole, name.format(part))] = each.clone()
        else:
            found[key] = value
    return found


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
    "conch": coca,
    "conch-v1.5": conch_v1_5,
    "ctranspath": ctranspath,
    "lunit-resnet50": resnet,
    "retccl": resnet,
    "keep": keep,
    "musk": beit3,
    "biomedclip": biomedclip,
}
"""How each encoder's file names its parameters; the others have timm's names."""


WORDS = (
    "lymphocytes around a nerve", "signet ring cells floating in mucin", "necrosis", "an H&E image of",
    "Ki-67 positive nuclei at 20x", "colonic mucosa without dysplasia", "fat, muscle and vessels",
    "café-au-lait: naïve β-catenin",
)  # fmt: skip


def _saved(path, model, first, ends):
    """Write a tokenizer with this model; the tokens of ``ends`` stand before and behind each text."""
    made = tokenizers.Tokenizer(model)
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = first
    made.add_special_tokens(list(ends))
    pair = [(token, made.token_to_id(token)) for token in ends]
    made.post_processor = processors.TemplateProcessing(
        single=f"{ends[0]} $A {ends[1]}", special_tokens=pair
    )
    made.save(str(path))


def _learned(model, first, trainer, count):
    """Vocabulary and merges learned from a few texts, with fillers up to a number of tokens."""
    made = tokenizers.Tokenizer(model)
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = first
    made.train_from_iterator(WORDS, trainer)
    found = json.loads(made.to_str())["model"]
    vocabulary = found["vocab"]
    for number in range(len(vocabulary), count):
        vocabulary[f"<filler {number}>"] = number
    return vocabulary, [tuple(pair) for pair in found.get("merges", [])]


def byte_pairs(path, vocabulary=49408, specials=()):
    """Write a tokenizer of CLIP's kind: the end has the highest number. With ``specials``, of CONCH's."""
    first = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=list(specials),
    )  # fmt: skip
    count = vocabulary if specials else vocabulary - 2
    words, merges = _learned(models.BPE(), first, trainer, count)
    _saved(path, models.BPE(words, merges), first, ("<start>", "<end>"))


def conch_tokens(path):
    """Write a tokenizer of CONCH's kind."""
    byte_pairs(path, 32007, ("<pad>", "<start>", "<end>"))


def word_pieces(path):
    """Write a tokenizer of BERT's kind."""
    first = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    words, _ = _learned(models.WordPiece(unk_token="[UNK]"), first, trainer, 30522)
    _saved(path, models.WordPiece(words, unk_token="[UNK]"), first, ("[CLS]", "[SEP]"))
