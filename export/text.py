"""Export the text network beside an image network, with its tokenizer."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..artifacts.files import sha256_file, write_atomic
from ..artifacts.manifest import TEXT_GRAPH, TOKENIZER, TOKENS, TextPart
from ..artifacts.tokens import Tokens
from ..errors import BadInput, Damaged
from .checkpoints import Loaded, Tensors, load_text
from .half_precision import store_fp16
from .nets.text import TextShape, text_net
from .onnx_graph import Parity, parity_of, to_onnx_of

TRIED = (
    "tissue", "an H&E image of lymphocytes around a nerve", "Ki-67 positive nuclei, 20x",
    "signet ring cells in mucin", "", "colonic mucosa without dysplasia", "é", "a b c d e f g h i j k",
)  # fmt: skip
"""Texts of the parity test: of several lengths, and one that is empty."""


class TextGraph(nn.Module):
    """Map token numbers (N, context) to embeddings (N, D) of length 1."""

    def __init__(self, net: nn.Module) -> None:
        """Wrap a text network."""
        super().__init__()
        self.net = net

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 (N, context) -> float32 (N, D)."""
        return nn.functional.normalize(self.net(tokens), dim=1)


def find_tokenizer(given: Path | None, checkpoint: Path) -> Path | None:
    """Return the tokenizer's file: the given one, else that beside the checkpoint, else None.

    Raises:
        BadInput: the given file does not exist.
    """
    if given is not None and not given.is_file():
        raise BadInput(f"--tokenizer {given} does not exist; expected a tokenizer.json")
    beside = checkpoint.with_name(TOKENIZER)
    return given or (beside if beside.is_file() else None)


def export_text(
    folder: Path,
    shape: TextShape,
    tensors: Tensors,
    tokenizer: Path,
    source: str,
    precision: str = "fp32",
) -> tuple[TextPart, Loaded, Parity]:
    """Write the text network's graph and its tokenizer to a bundle's folder.

    Args:
        folder: of the bundle.
        shape: sizes of the text network.
        tensors: of the checkpoint.
        tokenizer: a tokenizer.json.
        source: name of the checkpoint, for messages.
        precision: of the weights: fp32 or fp16.

    Returns:
        The manifest's part, what happened while loading, and the parity test.

    Raises:
        BadInput: the checkpoint or the tokenizer does not fit the network.
        Damaged: the tokenizer cannot be read.
    """
    net = text_net(shape)
    report = load_text(net, tensors, source)
    copied = folder / TOKENIZER
    shutil.copyfile(tokenizer, copied)
    try:
        json.loads(copied.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise Damaged(
            f"{tokenizer} is no tokenizer.json ({error}); a vocab.txt becomes one by `save_pretrained` of "
            "a fast tokenizer of transformers (docs/encoders.md)"
        ) from error
    tokens = Tokens(copied, shape.context, shape.pad)
    _check_vocabulary(tokens, shape, tokenizer)
    graph = TextGraph(net).eval()
    numbers = tokens.of(TRIED)
    example = (torch.from_numpy(numbers),)
    write_atomic(folder / TEXT_GRAPH, to_onnx_of(graph, example, TOKENS))
    if precision == "fp16":
        store_fp16(folder / TEXT_GRAPH)

    def expected(part: NDArray[np.int64]) -> NDArray[np.float32]:
        with torch.inference_mode():
            found: NDArray[np.float32] = graph(torch.from_numpy(part)).numpy()
        return found

    parity = parity_of(expected, folder / TEXT_GRAPH, numbers, len(TRIED), TOKENS)
    part = TextPart(
        sha256=sha256_file(folder / TEXT_GRAPH), tokenizer_sha256=sha256_file(copied),
        context=shape.context, pad=shape.pad,
    )  # fmt: skip
    return part, report, replace(parity, precision=precision)


def _check_vocabulary(tokens: Tokens, shape: TextShape, path: Path) -> None:
    """Refuse a tokenizer of another encoder: of another vocabulary, or without the ends of a text."""
    if tokens.vocabulary != shape.vocabulary:
        raise BadInput(
            f"{path} has {tokens.vocabulary:,} tokens, but the text network knows {shape.vocabulary:,}; "
            "expected the tokenizer of this encoder"
        )
    one, other = (tokens.numbers(text) for text in ("tissue", "a nerve"))
    if len(one) < 3 or one[0] != other[0] or one[-1] != other[-1]:
        raise BadInput(
            f"{path} does not put the same token before and behind each text (a post-processor); expected "
            "the tokenizer of this encoder, as its library saves it in tokenizer.json"
        )
    if shape.kind == "clip" and max(one) != one[-1]:
        raise BadInput(
            f"{path} ends a text with token {one[-1]}, but this network reads its result at the highest "
            f"token number, {max(one)}; expected the tokenizer of this encoder"
        )
    if shape.kind != "clip" and (shape.pad in one or "pad" not in tokens.name(shape.pad).lower()):
        raise BadInput(
            f"{path} calls token {shape.pad} {tokens.name(shape.pad)!r}, which this network takes for "
            "padding; expected the tokenizer of this encoder"
        )
