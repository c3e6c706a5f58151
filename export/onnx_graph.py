"""Convert a trained encoder to one ONNX graph, and prove that both give the same embeddings."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnxscript.optimizer import optimize_ir
from torch import nn

from ..artifacts.files import write_atomic
from ..artifacts.manifest import INPUT, OOD_ANGLE, OUTPUT
from ..artifacts.onnx_files import DATA, LARGEST_FILE, data_properties
from ..errors import BadInput, Mismatch, need
from ..metrics import cosine_error

OPSET = 18
"""ONNX opset; ONNX Runtime 1.24 (Triton 26.04) and much older versions load it."""

VIEWS = (1, 2, 4, 8)
LARGEST_FOLDED = 2**16
"""Constants of up to this many values are computed when the graph is written; larger ones stay compact."""
TOGETHER = 64
"""Size of the batch with which the parity test compares single tiles."""
BOUNDS = {
    "fp32": {"max_abs": 1e-4, "max_cosine_error": 1e-6, "batch_max_abs": 1e-5},
    "fp16": {"max_abs": 1e-2, "max_cosine_error": 1e-4, "batch_max_abs": 1e-5},
}
"""Largest accepted differences of the parity test, by the precision of the weights; see :class:`Parity`."""


PILLOW_UNIT = 2**22
"""Pillow's weights of pixels are whole numbers of this fraction; the rounding decides half grey levels."""


class Graph(nn.Module):
    """Map raw pixels to embeddings: scaling, normalisation, the net, optional PCA, scaling to length 1.

    With several views the embedding is a mean over orientations of the tile: 2 for the half turn, 4 for the
    quarter turns, 8 for the quarter turns of the tile and of its mirror image. A tile in any of these
    orientations has exactly the same embedding. The cost grows with the number of views.

    A tissue gate scores a tile from its pixels: 0 is tissue, 1 is out of distribution. The score times
    :data:`OOD_ANGLE` is an angle. Its sine is appended to the embedding as the last component, and all
    other components are multiplied by its cosine. A tile that is out of distribution then has a cosine of
    at most .5 with tissue, and such tiles still differ from each other.

    Args:
        encoder: network from normalised float tiles (N, 3, S, S) to embeddings (N, D).
        mean: mean per channel, for pixels in 0..1.
        std: standard deviation per channel, for pixels in 0..1.
        pca: ``mean`` (D,) and ``components`` (R, D), in any scale, fitted to unit embeddings, or None.
        views: number of orientations: 1, 2, 4 or 8.
        fit: makes tiles (N, 3, T, T) of another side to the encoder's, or None.
    """

    def __init__(
        self,
        encoder: nn.Module,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        pca: tuple[torch.Tensor, torch.Tensor] | None = None,
        views: int = 1,
        fit: nn.Module | None = None,
    ) -> None:
        """Merge scaling and normalisation into one factor and one offset."""
        super().__init__()
        self.encoder, self.fit = encoder, fit
        self.scale = nn.Buffer((1 / (255 * torch.tensor(std)))[:, None, None])
        self.offset = nn.Buffer((-torch.tensor(mean) / torch.tensor(std))[:, None, None])
        if views not in VIEWS:
            raise BadInput(f"--views is {views}; expected one of {', '.join(map(str, VIEWS))}")
        self.views = views
        self.gate = getattr(encoder, "gate", None)
        self.has_pca = pca is not None
        pca_mean, components = pca if pca is not None else (torch.zeros(0), torch.zeros(0, 0))
        self.pca_mean = nn.Buffer(pca_mean)
        self.pca_components = nn.Buffer(components)

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """uint8 (N, S, S, 3) -> float32 (N, D), or (N, D + 1) with a gate, of length 1."""
        pixels = tiles.permute(0, 3, 1, 2).float()
        if self.fit is not None:
            pixels = self.fit(pixels)
        scaled = pixels * self.scale + self.offset
        unit = nn.functional.normalize(self.encoder(self._all_views(scaled)), dim=1)
        if self.views > 1:
            mean = unit.reshape(self.views, -1, unit.shape[1]).mean(0)
            unit = nn.functional.normalize(mean, dim=1)
        if self.has_pca:
            unit = nn.functional.normalize((unit - self.pca_mean) @ self.pca_components.T, dim=1)
        if self.gate is not None:
            # Shrink first, then undo the scaling: this is cheap, and engines can still fuse the scaling.
            small = (self.gate.shrink(scaled) - self.offset) / self.scale / 255
            angle = self.gate(small)[:, None] * OOD_ANGLE
            unit = torch.cat([unit * torch.cos(angle), torch.sin(angle)], 1)
        return unit

    def _all_views(self, tiles: torch.Tensor) -> torch.Tensor:
        """(N, C, S, S) -> (views * N, C, S, S), ordered by view first."""
        if self.views == 1:
            return tiles
        sides = [tiles, tiles.flip(3)] if self.views == 8 else [tiles]
        turns = (0, 2) if self.views == 2 else range(4)
        return torch.cat([torch.rot90(side, k, (2, 3)) for side in sides for k in turns])


class Resize(nn.Module):
    """Resize tiles (N, 3, T, T) in 0..255 as Pillow does: along the rows, then along the columns.

    Each step is rounded to whole numbers, as Pillow's are. Both steps are products with a constant matrix,
    which every engine computes.

    Args:
        side: T.
        size: side of the result.
        how: filter: ``bilinear`` or ``bicubic``, widened for a smaller result (antialiasing).
    """

    def __init__(self, side: int, size: int, how: str) -> None:
        """Compute the weights of each pixel of a row."""
        super().__init__()
        self.weights = nn.Buffer(torch.from_numpy(_weights(side, size, how)))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return tiles (N, 3, size, size) in 0..255."""
        rows = torch.floor(pixels @ self.weights.T + 0.5).clamp(0, 255)
        return torch.floor(self.weights @ rows + 0.5).clamp(0, 255)


def _weights(side: int, size: int, how: str) -> NDArray[np.float32]:
    """Return the weight of each pixel of a row in each pixel of the resized row, (size, side)."""
    scale = side / size
    centres = (np.arange(size)[:, None] + 0.5) * scale
    apart = np.abs(np.arange(side)[None] + 0.5 - centres) / max(scale, 1.0)
    if how == "bicubic":  # Keys' kernel with a = -0.5
        near = (1.5 * apart - 2.5) * apart**2 + 1
        far = ((-0.5 * apart + 2.5) * apart - 4) * apart + 2
        weights = np.where(apart < 1, near, np.where(apart < 2, far, 0))
    else:
        weights = np.maximum(1 - apart, 0)
    weights /= weights.sum(1, keepdims=True)
    return np.asarray(np.round(weights * PILLOW_UNIT) / PILLOW_UNIT, np.float32)


class Crop(nn.Module):
    """Keep the middle (N, 3, size, size) of tiles (N, 3, side, side)."""

    def __init__(self, side: int, size: int) -> None:
        """Compute the first row and column to keep."""
        super().__init__()
        self.first, self.size = (side - size) // 2, size

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the middle of the tiles."""
        kept = slice(self.first, self.first + self.size)
        return pixels[:, :, kept, kept]


def to_onnx(graph: Graph, size_px: int) -> bytes:
    """Export to ONNX with the batch as the only dynamic axis; returns the serialised model."""
    return to_onnx_of(graph, (_example(size_px),), INPUT)


def to_onnx_of(
    graph: nn.Module, example: tuple[torch.Tensor], name: str, output: str = OUTPUT
) -> bytes:
    """Export a network of one input to ONNX.

    Args:
        graph: the network.
        example: its input, whose first axis is the batch.
        name: of the input.
        output: name of the output.
    """
    model = _cleaned(_program(graph, example, name, output).model_proto)
    blob: bytes = model.SerializeToString()
    return blob


def save_onnx(graph: Graph, size_px: int, path: Path, largest: int = LARGEST_FILE) -> None:
    """Export to an ONNX file.

    If the weights have more than ``largest`` bytes, they go to ``<path>.data``, whose sha256 and size the
    graph states.
    """
    weights = 4 * sum(parameter.numel() for parameter in graph.parameters())
    if weights <= largest:
        write_atomic(path, to_onnx(graph, size_px))
        return
    _program(graph, (_example(size_px),), INPUT).save(str(path), external_data=True)
    model = _cleaned(onnx.load(path, load_external_data=False))
    data = path.with_name(path.name + DATA)
    for key, value in data_properties(data).items():
        model.metadata_props.add(key=key, value=value)
    write_atomic(path, model.SerializeToString())


def _example(size_px: int) -> torch.Tensor:
    return torch.zeros(2, size_px, size_px, 3, dtype=torch.uint8)


def _program(
    graph: nn.Module, example: tuple[torch.Tensor], name: str, output: str = OUTPUT
) -> Any:
    graph.eval()
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's notices; the parity test decides
            program = torch.onnx.export(
                graph, example, input_names=[name], output_names=[output], opset_version=OPSET,
                dynamic_shapes={name: {0: torch.export.Dim("batch", min=1)}}, dynamo=True, verbose=False,
            )  # fmt: skip
    finally:
        quiet.setLevel(level)
    assert program is not None
    # Kernels computed from weights (symmetric, P4M) are constants too, but the exporter folds only those of
    # up to 8,192 values.
    optimize_ir(program.model, input_size_limit=LARGEST_FOLDED)
    program.optimize()
    return program


def _cleaned(model: Any) -> Any:
    """Return the model without stack traces, which have local paths."""
    for node in model.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    for part in (*values, model.graph, model):
        part.ClearField("metadata_props")
    return model


@dataclass(frozen=True)
class Parity:
    """Differences between the graph and torch, and between tiles alone and in a batch.

    Attributes:
        tiles: number of tiles compared.
        max_abs: largest absolute difference of a component between the graph and torch.
        max_cosine_error: largest 1 - cosine between the two embeddings of a tile.
        batch_max_abs: largest difference between a tile's embedding alone and in a batch.
        batch: size of that batch.
        providers: execution providers of ONNX Runtime.
        onnxruntime: version of ONNX Runtime.
        precision: of the graph's weights: fp32 or fp16.
    """

    tiles: int
    max_abs: float
    max_cosine_error: float
    batch_max_abs: float
    batch: int
    providers: list[str]
    onnxruntime: str
    precision: str = "fp32"

    @property
    def bounds(self) -> dict[str, float]:
        """The largest accepted differences."""
        return BOUNDS[self.precision]

    def as_dict(self) -> dict[str, object]:
        """Return the numbers with their bounds."""
        return {**asdict(self), "bounds": self.bounds}


def measure_parity(
    graph: Graph,
    model: Path,
    tiles: NDArray[np.uint8],
    together: int = TOGETHER,
    precision: str = "fp32",
) -> Parity:
    """Compare ONNX Runtime (CPU) with torch on ``tiles``, uint8 (N, S, S, 3), alone and in a batch."""

    def expected(part: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return graph(torch.from_numpy(part)).numpy()  # type: ignore[no-any-return]

    return replace(parity_of(expected, model, tiles, together), precision=precision)


def parity_of(
    expected: Callable[[NDArray[Any]], NDArray[np.float32]],
    model: Path,
    tiles: NDArray[Any],
    together: int,
    name: str = INPUT,
) -> Parity:
    """Compare an ONNX graph with a function that returns the expected embeddings of tiles (or texts)."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    onnxruntime = need("onnxruntime", "cpu")
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])

    def run(part: NDArray[Any]) -> NDArray[np.float32]:
        return np.asarray(session.run([OUTPUT], {name: part})[0])

    wanted = np.concatenate([expected(tiles[n : n + 16]) for n in range(0, len(tiles), 16)])
    parts = range(0, len(tiles), together)
    actual = np.concatenate([run(tiles[n : n + together]) for n in parts])
    alone = np.concatenate([run(tiles[n : n + 1]) for n in range(min(together, len(tiles)))])
    filled = run(np.resize(tiles, (together, *tiles.shape[1:])))[: len(alone)]
    return Parity(
        tiles=len(tiles),
        max_abs=float(np.abs(wanted - actual).max()),
        max_cosine_error=cosine_error(wanted, actual),
        batch_max_abs=float(np.abs(alone - filled).max()),
        batch=together,
        providers=list(session.get_providers()),
        onnxruntime=onnxruntime.__version__,
    )


def check_parity(parity: Parity) -> None:
    """Check that the graph gives the same embeddings as the net.

    Raises:
        Mismatch: a difference exceeds its bound; the message states both.
    """
    for name, bound in parity.bounds.items():
        value = getattr(parity, name)
        if not value <= bound:
            raise Mismatch(
                f"the ONNX graph differs from torch: {name} is {value:.2e} on {parity.tiles} tiles, "
                f"expected at most {bound:.0e}; no bundle was written: report this with the run's run.json"
            )
