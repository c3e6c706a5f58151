"""Logs for TensorBoard: losses per epoch, and held-out embeddings for its projector."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from ..errors import need
from .data import LabelledTiles, Split
from .evaluate import embed_numbers
from .models import Encoder

MOST = 1000
THUMB_PX = 32


class Log:
    """Write to ``RUN/tensorboard`` if ``on``, else do nothing."""

    def __init__(self, run: Path, on: bool) -> None:
        """Set the folder of the log."""
        self.path = run / "tensorboard"
        self.on = on
        self._writer: Any = None

    def __enter__(self) -> Log:
        if self.on:
            tensorboard = need("torch.utils.tensorboard", "train")
            self._writer = tensorboard.SummaryWriter(str(self.path))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    def epoch(self, row: dict[str, Any]) -> None:
        """Add every number in the record of an epoch."""
        if self._writer is None:
            return
        for name, value in row.items():
            if isinstance(value, int | float) and name != "epoch":
                self._writer.add_scalar(f"{row['phase']}/{name}", value, row["epoch"])

    def projector(self, encoder: Encoder, data: LabelledTiles, parts: Split) -> None:
        """Add up to 1,000 embeddings, each with its label, group, file and a thumbnail."""
        if self._writer is None:
            return
        numbers = parts.test if len(parts.test) else parts.train
        numbers = numbers[:: max(1, len(numbers) // MOST)][:MOST]
        embeddings, kept = embed_numbers(encoder, data, numbers)
        pixels = torch.from_numpy(data.read(kept)[0]).permute(0, 3, 1, 2).float() / 255
        names = (*data.label_names, "unlabelled")
        rows = [
            [names[data.labels[n]], str(data.groups[n]), data.files[n].replace("\t", " ")]
            for n in kept
        ]
        self._writer.add_embedding(
            torch.from_numpy(np.ascontiguousarray(embeddings)),
            metadata=rows,
            metadata_header=["label", "group", "file"],
            label_img=torch.nn.functional.adaptive_avg_pool2d(pixels, THUMB_PX),
            tag="held-out",
        )
