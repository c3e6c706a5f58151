"""Text networks: loaded, exported with their tokenizer, and compared with independent references."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import transformers
from checkpoints import (
    WORDS,
    biomedclip,
    byte_pairs,
    coca,
    conch_tokens,
    hugging_face_clip,
    keep,
    open_clip,
    seeded,
    word_pieces,
)
from torch import nn

from histoseek.artifacts.manifest import TEXT_GRAPH, TOKENIZER, check_bundle_graph, read_manifest
from histoseek.artifacts.tokens import Tokens
from histoseek.errors import BadInput, Damaged
from histoseek.export.checkpoints import load_text
from histoseek.export.from_checkpoint import build_published, export_checkpoint
from histoseek.export.nets.text import TextShape, text_net
from histoseek.export.options import ExportOptions
from histoseek.export.published import PUBLISHED
from histoseek.serving.encoders.text import TEMPLATES, TextEncoder


def random_texts(count):
    rng = np.random.default_rng(0)
    words = " ".join(WORDS).split()
    return [" ".join(rng.choice(words, rng.integers(0, 12))) for _ in range(count)]


def with_random_weights(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def numbers_of(shape, lengths=(5, 12, 2), end=99):
    """Token numbers of texts of several lengths, filled up."""
    rng = np.random.default_rng(1)
    rows = np.full((len(lengths), shape.context), shape.pad, np.int64)
    for row, length in zip(rows, lengths, strict=True):
        row[:length] = rng.integers(1, end, length)
        row[length - 1] = end
    return torch.from_numpy(rows)


def test_the_tokens_are_those_of_another_reader_of_the_file(tmp_path):
    byte_pairs(tmp_path / TOKENIZER)
    texts = random_texts(100)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / TOKENIZER), pad_token="!"
    )
    wanted = theirs(texts, padding="max_length", max_length=77, return_tensors="np").input_ids
    pad = theirs.pad_token_id
    np.testing.assert_array_equal(Tokens(tmp_path / TOKENIZER, 77, pad).of(texts), wanted)
    with pytest.raises(BadInput, match=r"has \d+ tokens; this encoder takes at most 77"):
        Tokens(tmp_path / TOKENIZER, 77, pad).of(["z" * 90])


@pytest.mark.parametrize("quick", [False, True])
def test_the_text_network_of_clip_computes_what_transformers_computes(quick):
    shape = TextShape("clip", 100, 20, 64, 2, 4, 128, 24, quick=quick)
    config = transformers.CLIPTextConfig(
        vocab_size=100, hidden_size=64, intermediate_size=128, projection_dim=24, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=20, eos_token_id=99, bos_token_id=1, pad_token_id=0,
        hidden_act="quick_gelu" if quick else "gelu",
    )  # fmt: skip
    model = with_random_weights(transformers.CLIPTextModelWithProjection(config))
    net, numbers = text_net(shape), numbers_of(shape)
    load_text(net, model.state_dict(), "a checkpoint")
    with torch.inference_mode():
        torch.testing.assert_close(net(numbers), model(numbers).text_embeds, atol=1e-5, rtol=1e-5)


def test_the_text_network_of_keep_computes_what_transformers_computes():
    shape = TextShape("bert", 100, 20, 64, 2, 4, 128, 64, eps=1e-12)
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32,
    )  # fmt: skip
    model = with_random_weights(transformers.BertModel(config))
    net, numbers = text_net(shape), numbers_of(shape)
    report = load_text(net, {f"text.{k}": v for k, v in model.state_dict().items()}, "keep")
    assert report.notes == ["kept the first 20 of 32 positions of the text"]
    with torch.inference_mode():
        wanted = model(numbers, attention_mask=(numbers != 0).long()).pooler_output
        torch.testing.assert_close(net(numbers), wanted, atol=1e-5, rtol=1e-5)


def test_the_text_network_of_conch_attends_as_published():
    """One block, written with torch's own attention and a mask made place by place."""
    shape = TextShape("coca", 100, 12, 32, 1, 4, 64, 16)
    net = seeded(text_net(shape))
    numbers = numbers_of(shape, (5, 12, 2))
    block = net.blocks[0]
    attention = nn.MultiheadAttention(32, 4, batch_first=True)
    attention.load_state_dict(
        {
            "in_proj_weight": block.attn.qkv.weight, "in_proj_bias": block.attn.qkv.bias,
            "out_proj.weight": block.attn.proj.weight, "out_proj.bias": block.attn.proj.bias,
        }
    )  # fmt: skip
    wanted = []
    for text in numbers:
        blocked = torch.zeros(13, 13, dtype=torch.bool)
        for row in range(13):
            for column in range(13):
                later = column > row
                padding = row == 12 and column > 0 and text[column - 1] == 0
                blocked[row, column] = later or padding
        tokens = torch.cat([net.token_embed(text), net.cls_token[None]]) + net.pos_embed
        normed = block.norm1(tokens)[None]
        found, _ = attention(normed, normed, normed, attn_mask=blocked, need_weights=False)
        tokens = tokens + found[0]
        tokens = tokens + block.mlp(block.norm2(tokens))
        wanted.append(net.norm(tokens[-1]) @ net.project.weight.T)
    torch.testing.assert_close(net(numbers), torch.stack(wanted), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "write", "tokenizer"),
    [
        ("quiltnet-b32", open_clip, byte_pairs),
        ("plip", hugging_face_clip, byte_pairs),
        ("conch", coca, conch_tokens),
        ("biomedclip", biomedclip, word_pieces),
        ("keep", keep, word_pieces),
    ],
)
def test_a_bundle_embeds_text_as_its_network_does(name, write, tokenizer, tmp_path):
    known = PUBLISHED[name]
    net = seeded(build_published(known, depth=1))
    text = seeded(text_net(known.text.shallow(1)), 1)
    torch.save(write(net, text), tmp_path / "checkpoint.bin")
    tokenizer(tmp_path / TOKENIZER)
    bundle = tmp_path / name
    manifest = export_checkpoint(
        tmp_path / "checkpoint.bin", bundle, ExportOptions(published=name), depth=1
    )
    assert manifest == read_manifest(bundle) and manifest.text.context == known.text.context
    pad = known.text.pad
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(bundle / TOKENIZER))
    theirs.add_special_tokens({"pad_token": theirs.convert_ids_to_tokens(pad)})
    phrases = [template.format("signet ring cells") for template in TEMPLATES]
    numbers = theirs(
        phrases, padding="max_length", max_length=manifest.text.context, return_tensors="pt"
    ).input_ids
    with torch.inference_mode():
        wanted = nn.functional.normalize(nn.functional.normalize(text(numbers)).mean(0), dim=0)
    found = TextEncoder(bundle, manifest).embed(["  signet ring  cells "])[0]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert math.isclose(np.linalg.norm(found), 1, rel_tol=1e-5)


def without_ends(path):
    byte_pairs(path)
    document = json.loads(path.read_text())
    document["post_processor"] = None
    path.write_text(json.dumps(document))


def export(folder, out, **options):
    return export_checkpoint(
        folder / "net.bin", out, ExportOptions(published="quiltnet-b32", **options), depth=1
    )


def test_what_is_left_out_or_does_not_fit_is_said(text_bundle, tmp_path):
    assert export(text_bundle, tmp_path / "a").text is None
    assert "pass --tokenizer" in (tmp_path / "a" / "MODEL_CARD.md").read_text()
    assert export(text_bundle, tmp_path / "b", pool="cls").dim == 768
    words = text_bundle / "words.json"
    with pytest.raises(BadInput, match="--pool cls the embeddings cannot be compared"):
        export(text_bundle, tmp_path / "c", pool="cls", tokenizer=words)
    for write, message in (
        (conch_tokens, r"has 32,007 tokens, but the text network knows 49,408"),
        (
            lambda path: byte_pairs(path, 49408, ("<pad>", "<start>", "<end>")),
            "ends a text with token 2",
        ),
        (without_ends, "does not put the same token before and behind"),
    ):
        write(tmp_path / "other.json")
        with pytest.raises(BadInput, match=message):
            export(text_bundle, tmp_path / "c", tokenizer=tmp_path / "other.json")
    (tmp_path / "none.json").write_text("no tokenizer")
    with pytest.raises(Damaged, match="is no tokenizer"):
        export(text_bundle, tmp_path / "c", tokenizer=tmp_path / "none.json")
    assert not (tmp_path / "c").exists()


def test_changed_files_and_bad_texts_are_refused(text_bundle, tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(text_bundle / "bundle", bundle)
    manifest = read_manifest(bundle)
    encoder = TextEncoder(bundle, manifest)
    for text, message in (
        ("  ", "is empty"),
        ("tumour " * 200, "characters"),
        ("q" * 300, "tokens"),
    ):
        with pytest.raises(BadInput, match=message):
            encoder.embed([text])
    whole = (bundle / TOKENIZER).read_bytes()
    (bundle / TOKENIZER).write_bytes(whole + b" ")
    with pytest.raises(Damaged, match=r"tokenizer\.json is missing or is not the file"):
        TextEncoder(bundle, manifest)
    with pytest.raises(Damaged, match=r"tokenizer\.json"):
        check_bundle_graph(bundle, manifest, whole=True)
    (bundle / TOKENIZER).write_bytes(whole)
    (bundle / TEXT_GRAPH).unlink()
    with pytest.raises(Damaged, match=r"text\.onnx is missing"):
        TextEncoder(bundle, manifest)
    with pytest.raises(BadInput, match="has no text network"):
        TextEncoder(bundle, manifest.model_copy(update={"text": None}))
