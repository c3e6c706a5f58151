"""Writing an encoder bundle from a run: graph, manifest, parity and card, all or nothing."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..artifacts.files import publish_folder, read_json, sha256_file, write_atomic, write_json
from ..artifacts.manifest import CARD, CLUSTERS, GRAPH, MANIFEST, NAME, PARITY, RUN, Manifest
from ..artifacts.tileset_files import open_tiles
from ..artifacts.tilesets import TileSet, sample_tiles
from ..errors import BadInput, Damaged
from .card import model_card
from .onnx_graph import OPSET, Graph, check_parity, measure_parity, to_onnx

Build = Callable[..., Any]
Open = Callable[[Path], TileSet]

LEAST_SPREAD = 1e-4
"""Components that vary less than this share of the first are noise, and are left out."""


def load_run(run: Path, build: Build) -> tuple[dict[str, Any], nn.Module, dict[str, torch.Tensor]]:
    """Read a run folder: its record, its encoder with weights, its PCA basis and clusters.

    Args:
        run: the folder that ``histoseek train`` wrote.
        build: makes an architecture: ``build(model=name, **sizes)``.

    Raises:
        BadInput: the folder holds no finished run.
        Damaged: the weights do not fit the architecture they name.
    """
    weights = run / "weights.safetensors"
    if not (run / "run.json").is_file() or not weights.is_file():
        raise BadInput(
            f"{run} holds no finished run (run.json and weights.safetensors); "
            "finish it by repeating its `histoseek train` command"
        )
    record = read_json(run / "run.json")
    try:
        with safe_open(weights, framework="pt") as stored:
            about = json.loads((stored.metadata() or {}).get("about", "{}"))
            tensors = {k: stored.get_tensor(k) for k in stored.keys()}  # noqa: SIM118
        encoder = build(**about["architecture"])
        encoder.load_state_dict(
            {k: v for k, v in tensors.items() if not k.startswith(("pca.", "clusters."))}
        )
    except (SafetensorError, KeyError, RuntimeError, json.JSONDecodeError) as error:
        raise Damaged(f"{weights} does not fit the architecture it names ({error})") from error
    beside = {k: v for k, v in tensors.items() if k.startswith(("pca.", "clusters."))}
    return record, encoder.eval(), beside


def parity_tiles(run: Path, tiles: Path | None, open_source: Open = open_tiles) -> TileSet:
    """Open the tiles on which parity is measured: those given, else the run's own data.

    Args:
        run: a finished run.
        tiles: real tiles, or None.
        open_source: opens what is there; training knows more layouts than a plain tile set.

    Raises:
        BadInput: none given, and the run's data is no longer where it was.
    """
    if tiles is not None:
        return open_source(tiles)
    record = read_json(run / "run.json")
    sources = record["data"].get("selection", {}).get("sources", [])
    for source in sources:
        if Path(source).exists():
            return open_source(Path(source))
    raise BadInput(
        f"the data that {run} was trained on is not at {', '.join(sources) or 'a known place'}; pass "
        "--tiles with real tiles for the parity test"
    )


def export_run(
    run: Path,
    out: Path,
    tileset: TileSet,
    build: Build,
    name: str | None = None,
    mpp: float | None = None,
    pca: float | None = None,
    whiten: float = 0.0,
    views: int = 1,
    licence: str = "not stated",
    notes: str = "",
) -> Manifest:
    """Turn a run into a bundle.

    Args:
        run: a finished run.
        out: the bundle's folder, which must not exist.
        tileset: real tiles on which parity is measured.
        build: makes an architecture by name.
        name: of the encoder; the folder's name when left out.
        mpp: micrometres per pixel at which slides are to be read, if known.
        pca: keep the components with this share of the variance inside the graph.
        whiten: with ``pca``, divide each component by its standard deviation to this power: 0 does
            not, 1 makes all count alike.
        views: average over 2 half turns, 4 quarter turns, or 8 with mirror images, inside the graph; 1
            does not.
        licence: of the weights, as the card will state it.
        notes: Markdown that is added to the card.

    Returns:
        The bundle's manifest.

    Raises:
        BadInput: no finished run, ``out`` exists, or no PCA basis in the run.
        Mismatch: parity is over its bound; nothing is written.
    """
    _check_names(name or out.name, mpp)
    record, encoder, beside = load_run(run, build)
    graph = Graph(encoder, encoder.mean, encoder.std, _components(beside, pca, whiten, run), views)  # type: ignore[arg-type]
    size_px = int(encoder.size_px)  # type: ignore[arg-type]
    dim = len(graph.pca_components) if graph.has_pca else int(encoder.dim)  # type: ignore[arg-type]
    dim += graph.gate is not None
    tiles = sample_tiles(tileset, size_px)
    with publish_folder(out) as folder:
        write_atomic(folder / GRAPH, to_onnx(graph, size_px))
        onnx.checker.check_model(str(folder / GRAPH), full_check=True)
        parity = measure_parity(graph, folder / GRAPH, tiles)
        check_parity(parity)
        manifest = Manifest(
            name=name or out.name,
            sha256=sha256_file(folder / GRAPH),
            arch=record["architecture"]["model"],
            size_px=size_px,
            mpp=mpp,
            dim=dim,
            metric="cosine",
            normalised=True,
            views=views,
            gate=graph.gate is not None,
            training=_provenance(record),
            licence=licence,
            opset=OPSET,
            versions={"torch": torch.__version__, "onnx": onnx.__version__},
        )
        write_json(folder / MANIFEST, manifest.model_dump())
        write_json(folder / PARITY, parity.as_dict())
        write_json(folder / RUN, record)
        if "clusters.reach" in beside and pca is None and views == 1 and graph.gate is None:
            write_atomic(folder / CLUSTERS, _clusters(beside))
        write_atomic(folder / CARD, model_card(manifest, record, parity.as_dict(), notes))
    return manifest


def _clusters(beside: dict[str, torch.Tensor]) -> bytes:
    """Return the clusters of a run as .npz: ``centroids`` (K, D) and ``reach`` (K,)."""
    buffer = io.BytesIO()
    arrays = {"centroids": "clusters.centres", "reach": "clusters.reach"}
    np.savez(buffer, allow_pickle=False, **{k: beside[v].numpy() for k, v in arrays.items()})
    return buffer.getvalue()


def _check_names(name: str, mpp: float | None) -> None:
    if not re.fullmatch(NAME, name):
        raise BadInput(
            f"encoder name {name!r}: expected letters, digits, '.', '_' and '-'; pass --name"
        )
    if mpp is not None and not 0.01 <= mpp <= 100:
        raise BadInput(f"--mpp is {mpp}; expected 0.01 to 100 µm")


def _components(
    basis: dict[str, torch.Tensor], keep: float | None, whiten: float, run: Path
) -> tuple[torch.Tensor, torch.Tensor] | None:
    if not 0 <= whiten <= 1:
        raise BadInput(f"--whiten is {whiten}; expected 0 (not at all) to 1 (wholly)")
    if keep is None:
        if whiten:
            raise BadInput(
                f"--whiten {whiten} needs --pca: principal components are what is whitened"
            )
        return None
    if not 0 < keep <= 1:
        raise BadInput(f"--pca is {keep}; expected a share of the variance, over 0 and up to 1")
    if "pca.components" not in basis:
        raise BadInput(f"{run} holds no PCA basis; train it again with this version")
    shares = torch.cumsum(basis["pca.variance"], 0)
    count = min(int((shares < keep).sum()) + 1, len(shares))
    spread = basis["pca.variance"][:count].sqrt()
    counts = spread > LEAST_SPREAD * spread[0]
    weights = (spread[0] / spread[counts]) ** whiten
    return basis["pca.mean"], basis["pca.components"][:count][counts] * weights[:, None]


def _provenance(record: dict[str, Any]) -> dict[str, Any]:
    data = record["data"]
    return {
        "recipe": record["recipe"],
        "paper": record["paper"],
        "data": {k: data[k] for k in ("name", "fingerprint", "tiles", "groups")},
        "seed": record["options"]["seed"],
    }
