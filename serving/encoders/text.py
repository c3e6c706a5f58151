"""The text network of an encoder: text to embeddings that can be compared with those of images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...artifacts.manifest import (
    OUTPUT,
    TEXT_GRAPH,
    TOKENIZER,
    TOKENS,
    Manifest,
    check_text_files,
)
from ...artifacts.tokens import Tokens
from ...errors import BadInput, Damaged
from .engines import cores, load_onnxruntime

TEMPLATES = (
    "{}", "an H&E image of {}", "a histopathology image of {}", "a photomicrograph showing {}",
)  # fmt: skip
"""Phrases around a text, whose embeddings are averaged: one phrase alone is a matter of luck."""
BATCH = 64
LONGEST = 1000
"""Maximum number of characters of a text."""


def no_text(manifest: Manifest) -> str:
    """Return the message for an encoder without a text network."""
    return (
        f"the encoder {manifest.name!r} has no text network, so its images cannot be searched by text; "
        "use an encoder such as quiltnet-b32 or conch (docs/encoders.md)"
    )


class TextEncoder:
    """The text network of a bundle, on ONNX Runtime (CPU); thread-safe.

    Args:
        bundle: folder of the bundle, or an atlas's copy of it.
        manifest: of the bundle.

    Raises:
        BadInput: the encoder has no text network.
        Damaged: its files do not match the manifest, or cannot be loaded.
        MissingPart: the package tokenizers is not installed.
    """

    def __init__(self, bundle: Path, manifest: Manifest) -> None:
        """Check and load the graph and the tokenizer."""
        if manifest.text is None:
            raise BadInput(no_text(manifest))
        check_text_files(bundle, manifest)
        self.tokens = Tokens(bundle / TOKENIZER, manifest.text.context, manifest.text.pad)
        runtime = load_onnxruntime()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = cores()
        options.log_severity_level = 3
        path = bundle / TEXT_GRAPH
        try:
            self._session = runtime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise Damaged(f"{path} cannot be loaded by ONNX Runtime: {error}") from error

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return the embedding of each text (N, D), of length 1: the mean over :data:`TEMPLATES`.

        Raises:
            BadInput: a text is empty or too long.
        """
        texts = [checked(text) for text in texts]
        filled = [template.replace("{}", text) for text in texts for template in TEMPLATES]
        numbers = self.tokens.of(filled)
        parts = [
            self._session.run([OUTPUT], {TOKENS: numbers[start : start + BATCH]})[0]
            for start in range(0, len(numbers), BATCH)
        ]
        means = np.concatenate(parts).reshape(len(texts), len(TEMPLATES), -1).mean(1)
        length = np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
        return np.asarray(means / length, np.float32)


def checked(text: str) -> str:
    """Return a text without surrounding and double spaces.

    Raises:
        BadInput: the text is empty or too long.
    """
    text = " ".join(text.split())
    if not text:
        raise BadInput("the text is empty; expected words such as 'lymphocytes around a nerve'")
    if len(text) > LONGEST:
        raise BadInput(f"the text has {len(text)} characters; expected at most {LONGEST}")
    return text
