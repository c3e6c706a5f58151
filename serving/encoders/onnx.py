"""The in-process encoder, on ONNX Runtime or OpenVINO."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...artifacts.manifest import read_manifest
from .engine_choice import open_engine
from .protocol import in_batches


class OnnxEncoder:
    """An encoder bundle in this process, on ONNX Runtime or OpenVINO; see :class:`.protocol.Encoder`."""

    def __init__(
        self,
        bundle: Path,
        engine: str = "onnxruntime",
        precision: str = "f32",
        batch: int | None = None,
        streams: int | None = None,
    ) -> None:
        """Load a bundle; options: see :func:`~histoseek.serving.encoders.engine_choice.open_engine`.

        Raises:
            BadInput: the folder is not a bundle, or an option is invalid.
            Damaged: the graph does not match the manifest's hash or contract.
            MissingPart: the engine is not installed.
        """
        self.bundle = bundle
        self.manifest = read_manifest(bundle)
        self._engine = open_engine(bundle, self.manifest, engine, precision, batch, streams)
        plan = self._engine.plan
        self.batch, self.parallel, self.offloads = plan.batch, plan.streams, self._engine.offloads

    def describe(self) -> dict[str, Any]:
        """Return the engine, its precision and its settings."""
        return {**asdict(self._engine.plan), "device": "cuda" if self.offloads else "cpu"}

    def embed(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See :class:`.protocol.Encoder`; errors as in :func:`.protocol.in_batches`."""
        return in_batches(tiles, self.manifest, self.batch, self.parallel, self._engine.run)

    def close(self) -> None:
        """Do nothing: the engine is freed when the process ends."""
