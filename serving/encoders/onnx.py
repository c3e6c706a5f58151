"""The in-process encoder, on ONNX Runtime or OpenVINO."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...artifacts.manifest import read_manifest
from .engine_choice import offers_cuda, open_engine
from .protocol import in_batches

CUDA_NOT_USED = (
    "ONNX Runtime is built for CUDA but could not use it, so the CPU does the work; check `nvidia-smi`, "
    "and that its CUDA and cuDNN libraries are installed (pip install 'onnxruntime-gpu[cuda,cudnn]')"
)


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
        self.notes: list[str] = []
        if not self.offloads and engine != "openvino" and precision == "f32" and offers_cuda():
            self.notes.append(CUDA_NOT_USED)

    def describe(self) -> dict[str, Any]:
        """Return the engine, its precision and its settings, and what else the user should know."""
        device = "cuda" if self.offloads else "cpu"
        return {**asdict(self._engine.plan), "device": device, "notes": self.notes}

    def embed(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See :class:`.protocol.Encoder`; errors as in :func:`.protocol.in_batches`."""
        return in_batches(tiles, self.manifest, self.batch, self.parallel, self._engine.run)

    def close(self) -> None:
        """Do nothing: the engine is freed when the process ends."""
