"""Write an encoder bundle from the checkpoint of a published encoder."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from ..artifacts import files
from ..artifacts.files import sha256_file, write_atomic, write_json
from ..artifacts.manifest import CARD, CHECKPOINT, MANIFEST, Manifest, probe_tile
from ..artifacts.tilesets import TileSet, sample_tiles
from ..errors import BadInput
from .bundle import encoder_name, write_graph
from .card import card_head
from .checkpoints import Loaded, load, read_checkpoint
from .nets.vit import VitEncoder
from .onnx_graph import LARGEST_FILE, OPSET, Graph
from .options import NOT_STATED, ExportOptions
from .published import PUBLISHED, Published

FEW = 8
"""Tiles of the parity test, and its batch: a large network computes about one tile per second."""


def find_published(name: str) -> Published:
    """Return the row of a published encoder.

    Raises:
        BadInput: the name is unknown; the message lists the known ones.
    """
    if name not in PUBLISHED:
        raise BadInput(f"--as {name!r} is no known encoder; expected one of {', '.join(PUBLISHED)}")
    return PUBLISHED[name]


def build_published(known: Published, depth: int | None = None) -> nn.Module:
    """Return the network of a published encoder, without memory for its weights.

    Args:
        known: row of the encoder.
        depth: number of blocks, if not that of the row (for tests).
    """
    shape = known.shape if depth is None else known.shape.shallow(depth)
    with torch.device("meta"):
        return VitEncoder(shape, known.pool).eval()


def describe(name: str, known: Published) -> dict[str, Any]:
    """Return what a user needs to choose an encoder, ready for JSON; multiply-adds (``macs``) per tile."""
    shape, net = known.shape, build_published(known)
    tokens = shape.prefix + shape.grid**2
    layers = [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    weights = sum(layer.weight.numel() for layer in layers)
    attention = 2 * shape.depth * tokens**2 * shape.width
    return {
        "name": name,
        "source": known.source,
        "licence": known.licence,
        "gated": known.gated,
        "parameters": sum(p.numel() for p in net.parameters()),
        "dim": known.dim,
        "size_px": shape.size_px,
        "mpp": known.mpp,
        "pool": known.pool,
        "macs": weights * tokens + attention,
        "unconfirmed": known.unconfirmed,
    }


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    options: ExportOptions,
    tileset: TileSet | None = None,
    depth: int | None = None,
    largest: int = LARGEST_FILE,
) -> Manifest:
    """Export the checkpoint of a published encoder as a bundle.

    Args:
        checkpoint: a .safetensors file, or a pickle of plain tensors.
        out: folder of the bundle, which must not exist.
        options: options of the graph and the manifest; ``published`` names the encoder.
        tileset: tiles for the parity test; without them, a pattern and noise.
        depth: number of blocks, if not that of the published encoder (for tests).
        largest: largest weights in bytes that the graph holds itself; above, they are in a file beside it.

    Returns:
        The bundle's manifest.

    Raises:
        BadInput: the encoder is unknown, the checkpoint does not fit it, or ``out`` exists.
        Damaged: the checkpoint cannot be read.
        Mismatch: a difference in the parity test exceeds its bound; nothing is written.
    """
    options.only_for("a checkpoint", "published", "pool", "views")
    known = find_published(options.published or "")
    if options.pool:
        known = replace(known, pool=options.pool)
    name = encoder_name(options, out)
    net: Any = build_published(known, depth)
    tensors, notes = read_checkpoint(checkpoint)
    report = load(net, tensors, str(checkpoint))
    report.notes[:0] = notes
    mean, std = known.colours
    graph = Graph(net, mean, std, views=options.views)
    size_px = known.shape.size_px
    tiles = sample_tiles(tileset, size_px, FEW) if tileset else made_tiles(size_px)
    record = _record(checkpoint, options.published or "", known, report, tileset is None)
    with files.publish_folder(out) as folder:
        sha256, parity = write_graph(folder, graph, size_px, tiles, FEW, largest)
        manifest = _manifest(name, known, record, sha256, options)
        write_json(folder / MANIFEST, manifest.model_dump())
        write_json(folder / CHECKPOINT, record)
        text = files.read_text(options.notes) if options.notes else ""
        write_atomic(folder / CARD, _card(manifest, record, parity, text))
    return manifest


def made_tiles(size_px: int, count: int = FEW) -> NDArray[np.uint8]:
    """Return tiles for the parity test if no real ones are given: a pattern, and noise of several sizes."""
    rng = np.random.default_rng(0)
    tiles = [probe_tile(size_px)]
    for number in range(count - 1):
        side = max(1, size_px >> number)
        small = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        steps = -(-size_px // side)
        tiles.append(np.kron(small, np.ones((steps, steps, 1), np.uint8))[:size_px, :size_px])
    return np.stack(tiles)


def _record(
    checkpoint: Path, name: str, known: Published, report: Loaded, made: bool
) -> dict[str, Any]:
    return {
        "checkpoint": {
            "file": checkpoint.name,
            "bytes": checkpoint.stat().st_size,
            "sha256": sha256_file(checkpoint),
            **asdict(report),
        },
        "encoder": name,
        "source": known.source,
        "network": asdict(known.shape),
        "pool": known.pool,
        "tile_um": known.tile_um,
        "unconfirmed": known.unconfirmed,
        "parity_tiles": "a pattern and noise" if made else "real tiles",
    }


def _manifest(
    name: str, known: Published, record: dict[str, Any], sha256: str, options: ExportOptions
) -> Manifest:
    return Manifest(
        name=name,
        sha256=sha256,
        arch=record["encoder"],
        size_px=known.shape.size_px,
        mpp=options.mpp if options.mpp is not None else known.mpp,
        dim=known.dim,
        metric="cosine",
        normalised=True,
        views=options.views,
        training={
            "published": record["encoder"],
            "source": known.source,
            "checkpoint_sha256": record["checkpoint"]["sha256"],
            "pool": known.pool,
        },
        licence=known.licence if options.licence == NOT_STATED else options.licence,
        opset=OPSET,
        versions={"torch": torch.__version__, "onnx": onnx.__version__},
    )


def _card(manifest: Manifest, record: dict[str, Any], parity: dict[str, Any], notes: str) -> str:
    checkpoint = record["checkpoint"]
    rows = (
        f"| checkpoint | {checkpoint['file']}, {checkpoint['bytes']:,} bytes, `{checkpoint['sha256']}` |",
        f"| names of its parameters | {checkpoint['convention']} |",
        f"| tokens that form the embedding | {record['pool']} |",
    )
    lines = [
        *card_head(
            manifest, f"The published encoder {record['encoder']} ({record['source']})", *rows
        ),
        "An atlas keeps a copy of its encoder: whoever gets the atlas, a snapshot or an image of a server "
        "gets these weights. Check that their licence allows it.",
        "",
    ]
    if record["unconfirmed"]:
        lines += [f"No source confirmed {record['unconfirmed']}.", ""]
    lines += [f"While loading: {note}." for note in checkpoint["notes"]]
    if checkpoint["dropped"]:
        lines += [f"Not needed for embedding: {', '.join(checkpoint['dropped'][:8])}.", ""]
    lines += [
        "## Parity of the graph with torch",
        f"On {parity['tiles']} tiles ({record['parity_tiles']}): largest difference "
        f"{parity['max_abs']:.1e} (allowed {parity['bounds']['max_abs']:.0e}), largest cosine error "
        f"{parity['max_cosine_error']:.1e}, batch of 1 against batch of {parity['batch']} "
        f"{parity['batch_max_abs']:.1e}. This does not compare with the authors' code.",
        "",
        notes.strip(),
    ]
    return "\n".join(lines).rstrip() + "\n"
