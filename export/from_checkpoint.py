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
from torch.utils.flop_counter import FlopCounterMode

from ..artifacts import files
from ..artifacts.files import sha256_file, write_atomic, write_json
from ..artifacts.manifest import (
    CARD,
    CHECKPOINT,
    MANIFEST,
    PROJECTION,
    PROJECTION_SHA256,
    Manifest,
    TextPart,
    probe_tile,
)
from ..artifacts.onnx_files import LARGEST_FILE
from ..artifacts.tilesets import TileSet, sample_tiles
from ..errors import BadInput
from .bundle import weights_stated, write_graph
from .card import card_head
from .checkpoints import Loaded, Tensors, has_text, load, read_checkpoint
from .nets.build import image_net
from .nets.vit import VitEncoder, VitShape
from .onnx_graph import OPSET, Crop, Graph, Parity, Resize, check_parity
from .options import NOT_STATED, ExportOptions, encoder_name
from .published import PUBLISHED, Published
from .text import export_text, find_tokenizer
from .unlisted import unlisted_vit

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
    return image_net(shape, known.pool)


def describe(name: str, known: Published) -> dict[str, Any]:
    """Return what a user needs to choose an encoder, ready for JSON; multiply-adds (``macs``) per tile."""
    net = build_published(known)
    return {
        "name": name,
        "source": known.source,
        "licence": known.licence,
        "gated": known.gated,
        "parameters": sum(p.numel() for p in net.parameters()),
        "dim": known.dim,
        "size_px": known.side,
        "mpp": known.mpp,
        "pool": known.pool,
        "macs": _macs(net, known),
        "text": known.text is not None,
        "unconfirmed": known.unconfirmed,
    }


def _macs(net: nn.Module, known: Published) -> int:
    """Return the multiply-adds of one tile; those of a head are left out."""
    shape = known.shape
    if isinstance(net, VitEncoder) and isinstance(shape, VitShape):
        # much faster than counting, which runs the network
        tokens = shape.prefix + shape.grid**2
        layers = [m for m in net.trunk.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        weights = sum(layer.weight.numel() for layer in layers)
        return weights * tokens + 2 * shape.depth * tokens**2 * shape.width
    counter = FlopCounterMode(display=False)
    with counter:
        net.requires_grad_(False)(torch.empty(1, 3, shape.size_px, shape.size_px, device="meta"))
    return int(counter.get_total_flops() // 2)


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
    tensors, notes = read_checkpoint(checkpoint)
    known, changed = chosen(options, tensors, str(checkpoint))
    if options.arch and not (options.mean and options.std):
        raise BadInput(
            "--arch needs --mean and --std: the colours with which the network was trained, such as "
            "--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 (ImageNet's)"
        )
    name = encoder_name(options, out)
    net: Any = build_published(known, depth)
    report = load(net, tensors, str(checkpoint))
    report.notes[:0] = [*changed, *notes]
    tokenizer = _tokenizer(known, options, checkpoint, tensors, report)
    mean, std = known.colours
    graph = Graph(net, mean, std, views=options.views, fit=fit_of(known))
    tiles = sample_tiles(tileset, known.side, FEW) if tileset else made_tiles(known.side)
    record = _record(
        checkpoint, options.published or f"{options.arch}", known, report, tileset is None
    )
    with files.publish_folder(out) as folder:
        sha256, parity = write_graph(
            folder, graph, known.side, tiles, FEW, largest, options.precision
        )
        text = None
        if tokenizer is not None and known.text is not None:
            shape = known.text if depth is None else known.text.shallow(depth)
            text, loaded, alike = export_text(
                folder, shape, tensors, tokenizer, str(checkpoint), options.precision
            )
            check_parity(alike)
            record["text"] = _text_record(tokenizer, loaded, alike)
        projection = _write_projection(folder, net, known)
        manifest = _manifest(name, known, record, sha256, options, text, projection)
        write_json(folder / MANIFEST, manifest.model_dump())
        write_json(folder / CHECKPOINT, record)
        added = files.read_text(options.notes) if options.notes else ""
        write_atomic(folder / CARD, _card(manifest, record, parity, added))
    return manifest


def chosen(options: ExportOptions, tensors: Tensors, source: str) -> tuple[Published, list[str]]:
    """Return the encoder with the options' changes, and a note of each change and each guess.

    Args:
        options: ``published`` names the encoder, or ``arch`` its architecture.
        tensors: of the checkpoint, from which the sizes of an ``arch`` are read.
        source: name of the checkpoint, for messages.

    Raises:
        BadInput: the encoder is unknown, or an option is not for checkpoints.
    """
    used = ("published", "pool", "views", "tile_px", "fit", "tokenizer", "mean", "std", "precision")
    if options.arch:
        if options.published:
            raise BadInput("--arch and --as cannot be combined; give one of them")
        options.only_for("a checkpoint", *used, "arch", "heads", "activation", "input_px")
        known, notes = unlisted_vit(tensors, source, options)
    else:
        options.only_for("a checkpoint of a published encoder", *used)
        known, notes = find_published(options.published or ""), []
    changes: dict[str, Any] = {}
    if options.pool:
        changes["pool"] = options.pool
    if options.tile_px:
        changes["tile_px"] = options.tile_px
    if options.fit:
        changes["fit"] = options.fit
    if options.mean or options.std:
        changes["colours"] = options.colours()
    if options.mpp is not None:
        changes["mpp"] = options.mpp
    if not options.arch:
        notes = [
            f"{name} is {value}, not {getattr(known, name)} as of the authors"
            for name, value in changes.items()
            if value != getattr(known, name)
        ]
    return replace(known, **changes), notes


def fit_of(known: Published) -> nn.Module | None:
    """Return what makes a tile the network's input; None if it is already."""
    side, size = known.side, known.shape.size_px
    if side == size:
        return None
    if known.fit != "crop":
        return Resize(side, size, known.fit)
    whole = known.crop_from or side
    if whole < size:
        raise BadInput(
            f"a tile of {whole} px has no middle of {size} px; pass --fit bilinear or a larger --tile-px"
        )
    crop = Crop(whole, size)
    return crop if whole == side else nn.Sequential(Resize(side, whole, "bicubic"), crop)


def _tokenizer(
    known: Published, options: ExportOptions, checkpoint: Path, tensors: Tensors, report: Loaded
) -> Path | None:
    """Return the tokenizer of the text network to export, if any; say why there is none."""
    if known.text is None or not has_text(tensors):
        if options.tokenizer is not None:
            why = "its file has no text network" if known.text else "it cannot be searched by text"
            raise BadInput(f"--tokenizer is not for {options.published}: {why}; leave it out")
        if known.text is not None:
            report.notes.append("found no text network in the file, so there is no search by text")
        return None
    if known.pool != "head":
        if options.tokenizer is not None:
            raise BadInput(
                f"--tokenizer is for search by text, but with --pool {known.pool} the embeddings cannot be "
                "compared with text; leave out one of them"
            )
        report.notes.append("left out the text network: with this --pool it cannot be compared")
        return None
    found = find_tokenizer(options.tokenizer, checkpoint)
    if found is None:
        report.notes.append(
            "left out the text network; for search by text pass --tokenizer tokenizer.json"
        )
    elif options.tokenizer is None:
        report.notes.append(f"took {found.name} beside it as the tokenizer of the text network")
    return found


def _text_record(tokenizer: Path, report: Loaded, parity: Parity) -> dict[str, Any]:
    return {
        "tokenizer": tokenizer.name,
        "convention": report.convention,
        "notes": report.notes,
        "parity": parity.as_dict(),
    }


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
        "mean": known.colours[0],
        "std": known.colours[1],
        "tile": _tile(known),
        "unconfirmed": known.unconfirmed,
        "parity_tiles": "a pattern and noise" if made else "real tiles",
    }


def _write_projection(folder: Path, net: Any, known: Published) -> dict[str, str]:
    """Write the last map of a head behind a pooler, if there is one; return its checksum by key."""
    shape = known.shape
    if not isinstance(shape, VitShape) or not shape.pooled or known.pool != "head":
        return {}
    path = folder / PROJECTION
    np.save(path, net.project.weight.detach().numpy().T, allow_pickle=False)
    return {PROJECTION_SHA256: sha256_file(path)}


def _tile(known: Published) -> dict[str, Any]:
    """Return the field of view: the side of a tile, and how it becomes the network's input."""
    side, size, mpp = known.side, known.shape.size_px, known.mpp
    seen = side
    if known.fit == "crop" and side != size:
        seen = side * size // (known.crop_from or side)
    return {
        "px": side,
        "um": mpp and round(side * mpp, 3),
        "seen_um": mpp and round(seen * mpp, 3),
        "input_px": size,
        "fit": known.fit if side != size else "none",
    }


def _manifest(
    name: str,
    known: Published,
    record: dict[str, Any],
    sha256: str,
    options: ExportOptions,
    text: TextPart | None,
    projection: dict[str, str],
) -> Manifest:
    return Manifest(
        name=name,
        sha256=sha256,
        arch=record["encoder"],
        size_px=known.side,
        mpp=known.mpp,
        dim=known.dim,
        metric="cosine",
        normalised=True,
        views=options.views,
        training={
            "published": record["encoder"],
            "source": known.source,
            "checkpoint_sha256": record["checkpoint"]["sha256"],
            "pool": known.pool,
            "tile": record["tile"],
            **projection,
            **weights_stated(options),
        },
        licence=known.licence if options.licence == NOT_STATED else options.licence,
        opset=OPSET,
        versions={"torch": torch.__version__, "onnx": onnx.__version__},
        text=text,
    )


def _card(manifest: Manifest, record: dict[str, Any], parity: dict[str, Any], notes: str) -> str:
    checkpoint = record["checkpoint"]
    rows = (
        f"| checkpoint | {checkpoint['file']}, {checkpoint['bytes']:,} bytes, `{checkpoint['sha256']}` |",
        f"| names of its parameters | {checkpoint['convention']} |",
        f"| what forms the embedding | {record['pool']} |",
        f"| a tile becomes the network's input | {_fit_text(record['tile'])} |",
        f"| search by text | {'yes' if manifest.text else 'no'} |",
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
    ]
    if "text" in record:
        alike = record["text"]["parity"]
        lines += [
            f"Text network, on {alike['tiles']} texts: largest difference {alike['max_abs']:.1e}, largest "
            f"cosine error {alike['max_cosine_error']:.1e}.",
            "",
        ]
    return "\n".join([*lines, notes.strip()]).rstrip() + "\n"


def _fit_text(tile: dict[str, Any]) -> str:
    side, size = tile["px"], tile["input_px"]
    how = {
        "none": "as it is",
        "crop": f"its middle, as {size} px",
    }.get(tile["fit"], f"resized from {side} to {size} px ({tile['fit']}, as Pillow does)")
    if tile["um"]:
        how += f"; a tile shows {tile['um']:g} µm, the network sees {tile['seen_um']:g} µm"
    return how
