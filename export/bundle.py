"""Write an encoder bundle from a run: graph, manifest, parity and model card, all or nothing."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import nn

from ..artifacts import files
from ..artifacts.files import read_json, sha256_file, write_atomic, write_json
from ..artifacts.manifest import CARD, CLUSTERS, GRAPH, MANIFEST, PARITY, RUN, Manifest
from ..artifacts.onnx_files import LARGEST_FILE
from ..artifacts.tileset_files import open_tiles
from ..artifacts.tilesets import TileSet, sample_tiles
from ..errors import BadInput, Damaged
from .card import model_card
from .half_precision import store_fp16
from .onnx_graph import (
    OPSET,
    TOGETHER,
    Graph,
    check_parity,
    measure_parity,
    save_onnx,
)
from .options import ExportOptions, encoder_name

Build = Callable[..., Any]
Open = Callable[[Path], TileSet]

LEAST_SPREAD = 1e-4
"""Components whose standard deviation is below this fraction of the first one's are left out as noise."""


def load_run(run: Path, build: Build) -> tuple[dict[str, Any], nn.Module, dict[str, torch.Tensor]]:
    """Read a run folder: its record, its encoder with weights, and its fitted PCA basis and clusters.

    Args:
        run: a folder written by ``histoseek train``.
        build: builds an architecture: ``build(model=name, **sizes)``.

    Raises:
        BadInput: the folder has no finished run.
        Damaged: the weights do not match the architecture that the file names.
    """
    weights = run / "weights.safetensors"
    if not (run / "run.json").is_file() or not weights.is_file():
        raise BadInput(
            f"{run} has no finished run (run.json and weights.safetensors); repeat its `histoseek train` "
            "command to finish it"
        )
    record = read_json(run / "run.json")
    try:
        with safe_open(weights, framework="pt") as stored:
            about = json.loads((stored.metadata() or {}).get("about", "{}"))
            tensors = {k: stored.get_tensor(k) for k in stored.keys()}  # noqa: SIM118
        encoder = build(**about["architecture"])
        fitted = {k: tensors.pop(k) for k in list(tensors) if k.startswith(("pca.", "clusters."))}
        encoder.load_state_dict(tensors)
    except (SafetensorError, KeyError, RuntimeError, json.JSONDecodeError) as error:
        raise Damaged(
            f"{weights} does not match the architecture that it names ({error}); copy the run again"
        ) from error
    return record, encoder.eval(), fitted


def parity_tiles(run: Path, tiles: Path | None, open_source: Open = open_tiles) -> TileSet:
    """Open the tiles for the parity test: the given ones, else the run's training data.

    Args:
        run: a finished run.
        tiles: real tiles, or None.
        open_source: function that opens a data set; training's also knows the layouts of the papers' data.

    Raises:
        BadInput: no tiles are given, and the run's training data was not found.
    """
    if tiles is not None:
        return open_source(tiles)
    record = read_json(run / "run.json")
    sources = record["data"].get("selection", {}).get("sources", [])
    for source in sources:
        if Path(source).exists():
            return open_source(Path(source))
    raise BadInput(
        f"the training data of {run} was not found ({', '.join(sources) or 'its path is unknown'}); pass "
        "--tiles with real tiles for the parity test"
    )


def export_run(
    run: Path, out: Path, tileset: TileSet, build: Build, options: ExportOptions | None = None
) -> Manifest:
    """Export a run as a bundle.

    Args:
        run: a finished run.
        out: folder of the bundle, which must not exist.
        tileset: real tiles for the parity test.
        build: builds an architecture by name.
        options: options of the graph, the manifest and the model card.

    Returns:
        The bundle's manifest.

    Raises:
        BadInput: ``run`` is not a finished run or has no PCA basis, or ``out`` exists.
        Mismatch: a difference in the parity test exceeds its bound; nothing is written.
    """
    options = options or ExportOptions()
    options.only_for("a run", "pca", "whiten", "views", "precision")
    name = encoder_name(options, out)
    notes = files.read_text(options.notes) if options.notes else ""
    record, encoder, fitted = load_run(run, build)
    components = _components(fitted, options, run)
    graph = Graph(encoder, encoder.mean, encoder.std, components, options.views)  # type: ignore[arg-type]
    size_px = int(encoder.size_px)  # type: ignore[arg-type]
    tiles = sample_tiles(tileset, size_px)
    with files.publish_folder(out) as folder:
        sha256, parity = write_graph(folder, graph, size_px, tiles, precision=options.precision)
        manifest = _manifest(name, graph, record, sha256, options)
        write_json(folder / MANIFEST, manifest.model_dump())
        write_json(folder / RUN, record)
        unchanged = components is None and options.views == 1 and graph.gate is None
        if "clusters.reach" in fitted and unchanged:
            write_atomic(folder / CLUSTERS, _clusters(fitted))
        write_atomic(folder / CARD, model_card(manifest, record, parity, notes))
    return manifest


def write_graph(
    folder: Path,
    graph: Graph,
    size_px: int,
    tiles: NDArray[np.uint8],
    together: int = TOGETHER,
    largest: int = LARGEST_FILE,
    precision: str = "fp32",
) -> tuple[str, dict[str, Any]]:
    """Write a graph and its parity test to a bundle's folder; returns its sha256 and the test's numbers.

    Args:
        folder: of the bundle.
        graph: network from raw pixels to embeddings.
        size_px: side of a tile.
        tiles: uint8 (N, S, S, 3), for the parity test.
        together: size of the parity test's batch.
        largest: largest weights in bytes that the graph holds itself.
        precision: of the weights: fp32 or fp16.

    Raises:
        BadInput: a weight is too large for fp16.
        Mismatch: a difference in the parity test exceeds its bound.
    """
    save_onnx(graph, size_px, folder / GRAPH, largest)
    if precision == "fp16":
        store_fp16(folder / GRAPH, largest)
    onnx.checker.check_model(str(folder / GRAPH), full_check=True)
    parity = measure_parity(graph, folder / GRAPH, tiles, together, precision)
    check_parity(parity)
    write_json(folder / PARITY, parity.as_dict())
    return sha256_file(folder / GRAPH), parity.as_dict()


def _manifest(
    name: str, graph: Graph, record: dict[str, Any], sha256: str, options: ExportOptions
) -> Manifest:
    encoder, data = graph.encoder, record["data"]
    dim = len(graph.pca_components) if graph.has_pca else int(encoder.dim)  # type: ignore[arg-type]
    return Manifest(
        name=name,
        sha256=sha256,
        arch=record["architecture"]["model"],
        size_px=int(encoder.size_px),  # type: ignore[arg-type]
        mpp=options.mpp,
        dim=dim + (graph.gate is not None),
        metric="cosine",
        normalised=True,
        views=options.views,
        gate=graph.gate is not None,
        training={
            "recipe": record["recipe"],
            "paper": record["paper"],
            "data": {k: data[k] for k in ("name", "fingerprint", "tiles", "groups")},
            "seed": record["options"]["seed"],
            **weights_stated(options),
        },
        licence=options.licence,
        opset=OPSET,
        versions={"torch": torch.__version__, "onnx": onnx.__version__},
    )


def weights_stated(options: ExportOptions) -> dict[str, str]:
    """Return what the manifest says of the weights' precision: nothing if it is the usual one."""
    return {"weights": "float16"} if options.precision == "fp16" else {}


def _clusters(fitted: dict[str, torch.Tensor]) -> bytes:
    """Return the clusters of a run as an .npz file: ``centroids`` (K, D) and ``reach`` (K,)."""
    buffer = io.BytesIO()
    centroids, reach = fitted["clusters.centres"].numpy(), fitted["clusters.reach"].numpy()
    np.savez(buffer, allow_pickle=False, centroids=centroids, reach=reach)
    return buffer.getvalue()


def _components(
    fitted: dict[str, torch.Tensor], options: ExportOptions, run: Path
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return mean (D,) and scaled components (R, D) of the PCA; None without ``pca``."""
    if options.pca is None:
        return None
    if "pca.components" not in fitted:
        raise BadInput(f"{run} has no PCA basis; train it again with this version")
    shares = torch.cumsum(fitted["pca.variance"], 0)
    count = min(int((shares < options.pca).sum()) + 1, len(shares))
    spread = fitted["pca.variance"][:count].sqrt()
    usable = spread > LEAST_SPREAD * spread[0]
    weights = (spread[0] / spread[usable]) ** options.whiten
    return fitted["pca.mean"], fitted["pca.components"][:count][usable] * weights[:, None]
