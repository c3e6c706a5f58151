"""Texts as token numbers of fixed length, by the package ``tokenizers``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import BadInput, Damaged, need


class Tokens:
    """A tokenizer that fills up each text to the same number of tokens.

    Args:
        path: a tokenizer.json.
        context: number of tokens of a text.
        pad: number of the token that fills up a text.

    Raises:
        Damaged: the file is no tokenizer.
        MissingPart: the package tokenizers is not installed.
    """

    def __init__(self, path: Path, context: int, pad: int) -> None:
        """Read the file."""
        tokenizers = need("tokenizers", "text")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises bare exceptions
            raise Damaged(f"{path} is no tokenizer ({error}); copy it again") from error
        # the numbers of a text itself; filling up and cutting off are done, or refused, here
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.context, self.pad = context, pad

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the tokenizer knows: the highest number plus one."""
        numbers = self._tokenizer.get_vocab(with_added_tokens=True).values()
        return max(numbers, default=-1) + 1

    def numbers(self, text: str) -> list[int]:
        """Return the token numbers of one text, of any length."""
        return [int(number) for number in self._tokenizer.encode(text).ids]

    def name(self, number: int) -> str:
        """Return a token; "" if there is no such number."""
        return str(self._tokenizer.id_to_token(number) or "")

    def of(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Return the token numbers of texts, (N, context).

        Raises:
            BadInput: a text has more tokens than ``context``.
        """
        numbers = np.full((len(texts), self.context), self.pad, np.int64)
        encodings = self._tokenizer.encode_batch(list(texts))
        for row, text, encoding in zip(numbers, texts, encodings, strict=True):
            found = encoding.ids
            if len(found) > self.context:
                raise BadInput(
                    f"the text {text[:60]!r} … has {len(found)} tokens; this encoder takes at most "
                    f"{self.context}: shorten it"
                )
            row[: len(found)] = found
        return numbers
