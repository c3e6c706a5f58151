"""From a trained encoder to one ONNX graph, and the proof that both give the same embeddings."""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from onnxscript.optimizer import optimize_ir
from torch import nn

from ..artifacts.manifest import FOREIGN_ANGLE, INPUT, OUTPUT
from ..errors import BadInput, Mismatch, need

OPSET = 18
"""Loads in ONNX Runtime 1.24 (Triton 26.04) and in far older ones."""

VIEWS = (1, 2, 4, 8)
LARGEST_FOLDED = 2**16
"""Most values of a constant that is computed when the graph is written; larger ones stay compact."""
MAX_ABS = 1e-4
MAX_COSINE = 1e-6
MAX_BATCH_ABS = 1e-5


class Graph(nn.Module):
    """Raw pixels to embedding: scaling, normalisation, the net, optional PCA, length 1.

    With two views the embedding is the mean over the tile and its half turn, with four over its quarter
    turns, with eight over its mirror image's too: exactly the same for a tile that lies so, at that many
    times the cost.

    A tissue gate scores a tile from its pixels: 0 tissue, 1 out of distribution. It adds one component to
    the embedding: the sine of that share of :data:`FOREIGN_ANGLE`; all others are multiplied by its cosine.
    A tile out of distribution then has a cosine of at most .5 with tissue, and such tiles still differ.

    Args:
        encoder: float (N, 3, S, S) normalised -> (N, D).
        mean: per channel, for pixels in 0..1.
        std: per channel.
        pca: ``mean`` (D,) and ``components`` (R, D), of any scale, of unit embeddings, or None.
        views: 1, 2, 4 or 8.
    """

    def __init__(
        self,
        encoder: nn.Module,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        pca: tuple[torch.Tensor, torch.Tensor] | None = None,
        views: int = 1,
    ) -> None:
        """Fold scaling and normalisation into one factor and one offset."""
        super().__init__()
        self.encoder = encoder
        scale = 1 / (255 * torch.tensor(std))
        offset = -torch.tensor(mean) / torch.tensor(std)
        self.scale = nn.Buffer(scale[:, None, None])
        self.offset = nn.Buffer(offset[:, None, None])
        if views not in VIEWS:
            raise BadInput(f"--views is {views}; expected one of {', '.join(map(str, VIEWS))}")
        self.views = views
        self.gate = getattr(encoder, "gate", None)
        self.has_pca = pca is not None
        mean_of, components = pca if pca is not None else (torch.zeros(0), torch.zeros(0, 0))
        self.pca_mean = nn.Buffer(mean_of)
        self.pca_components = nn.Buffer(components)

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """uint8 (N, S, S, 3) -> float32 (N, D), or (N, D + 1) with a gate, of length 1."""
        pixels = tiles.permute(0, 3, 1, 2).float()
        scaled = pixels * self.scale + self.offset
        unit = nn.functional.normalize(self.encoder(self._all_views(scaled)), dim=1)
        if self.views > 1:
            mean = unit.reshape(self.views, -1, unit.shape[1]).mean(0)
            unit = nn.functional.normalize(mean, dim=1)
        if self.has_pca:
            unit = nn.functional.normalize((unit - self.pca_mean) @ self.pca_components.T, dim=1)
        if self.gate is not None:
            # Shrunk first, then scaled back: cheap, and engines still fuse the scaling.
            small = (self.gate.shrink(scaled) - self.offset) / self.scale / 255
            angle = self.gate(small)[:, None] * FOREIGN_ANGLE
            unit = torch.cat([unit * torch.cos(angle), torch.sin(angle)], 1)
        return unit

    def _all_views(self, tiles: torch.Tensor) -> torch.Tensor:
        """(N, C, S, S) -> (views * N, C, S, S), all tiles of one view after those of another."""
        if self.views == 1:
            return tiles
        sides = [tiles, tiles.flip(3)] if self.views == 8 else [tiles]
        turns = (0, 2) if self.views == 2 else range(4)
        return torch.cat([torch.rot90(side, k, (2, 3)) for side in sides for k in turns])


def to_onnx(graph: Graph, size_px: int) -> bytes:
    """Export to ONNX with the batch as the only dynamic axis; returns the serialised model."""
    example = torch.zeros(2, size_px, size_px, 3, dtype=torch.uint8)
    graph.eval()
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own notices; parity is what counts
            program = torch.onnx.export(
                graph,
                (example,),
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes={"tiles": {0: torch.export.Dim("batch", min=1)}},
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    finally:
        quiet.setLevel(level)
    assert program is not None
    # Kernels that are computed from weights (symmetric, P4M) are constants too; the exporter alone folds
    # only those of up to 8,192 values.
    optimize_ir(program.model, input_size_limit=LARGEST_FOLDED)
    program.optimize()
    model = program.model_proto
    for node in model.graph.node:  # the exporter's notes: stack traces with this machine's paths
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        value.ClearField("metadata_props")
    model.graph.ClearField("metadata_props")
    model.ClearField("metadata_props")
    blob: bytes = model.SerializeToString()
    return blob


@dataclass(frozen=True)
class Parity:
    """How far the graph is from torch on real tiles, and a batch of 1 from a batch of 64.

    Attributes:
        tiles: how many were compared.
        max_abs: largest difference of one component.
        max_cosine_error: largest 1 - cosine of two embeddings of one tile.
        batch_max_abs: largest difference between a tile's embedding alone and in a batch of 64.
        providers: ONNX Runtime's execution providers.
        onnxruntime: its version.
    """

    tiles: int
    max_abs: float
    max_cosine_error: float
    batch_max_abs: float
    providers: list[str]
    onnxruntime: str

    def as_dict(self) -> dict[str, object]:
        """Return the numbers with the bounds they were held to."""
        bounds = {
            "max_abs": MAX_ABS,
            "max_cosine_error": MAX_COSINE,
            "batch_max_abs": MAX_BATCH_ABS,
        }
        return {**asdict(self), "bounds": bounds}


def measure_parity(graph: Graph, model: Path | bytes, tiles: NDArray[np.uint8]) -> Parity:
    """Compare ONNX Runtime (CPU) with torch on ``tiles``, uint8 (N, S, S, 3)."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    onnxruntime = need("onnxruntime", "cpu")
    source = model if isinstance(model, bytes) else str(model)
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])

    def run(part: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.asarray(session.run([OUTPUT], {INPUT: part})[0])

    with torch.inference_mode():
        expected = torch.cat(
            [graph(torch.from_numpy(tiles[n : n + 16])) for n in range(0, len(tiles), 16)]
        ).numpy()
    found = np.concatenate([run(tiles[n : n + 64]) for n in range(0, len(tiles), 64)])
    alone = np.concatenate([run(tiles[n : n + 1]) for n in range(min(64, len(tiles)))])
    filled = run(np.resize(tiles, (64, *tiles.shape[1:])))[: len(alone)]
    both = expected.astype(np.float64), found.astype(np.float64)
    cosine = (both[0] * both[1]).sum(1) / np.maximum(
        np.linalg.norm(both[0], axis=1) * np.linalg.norm(both[1], axis=1), 1e-12
    )
    return Parity(
        tiles=len(tiles),
        max_abs=float(np.abs(expected - found).max()),
        max_cosine_error=float(max(0.0, 1 - cosine.min())),
        batch_max_abs=float(np.abs(alone - filled).max()),
        providers=list(session.get_providers()),
        onnxruntime=onnxruntime.__version__,
    )


def check_parity(parity: Parity) -> None:
    """Refuse a graph that is not the net it came from.

    Raises:
        Mismatch: a bound is passed; names it with both numbers.
    """
    for name, bound in (
        ("max_abs", MAX_ABS),
        ("max_cosine_error", MAX_COSINE),
        ("batch_max_abs", MAX_BATCH_ABS),
    ):
        value = getattr(parity, name)
        if not value <= bound:
            raise Mismatch(
                f"the ONNX graph differs from torch: {name} is {value:.2e} on {parity.tiles} tiles, "
                f"allowed is {bound:.0e}; no bundle was written: report this with the run's run.json"
            )
