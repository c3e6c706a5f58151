"""Make an encoder bundle from an ONNX image encoder of another program.

The bundle's graph is the given one with two ends. In front, raw pixels are scaled, normalised and brought
to its layout. Behind, its output is pooled if it is a map or tokens, and scaled to length 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, compose, helper, numpy_helper

from ..artifacts import files
from ..artifacts.files import sha256_file, write_atomic, write_json
from ..artifacts.manifest import CARD, CHECKPOINT, GRAPH, INPUT, MANIFEST, OUTPUT, PARITY, Manifest
from ..artifacts.onnx_files import check_graph_whole
from ..artifacts.tilesets import TileSet, sample_tiles
from ..errors import BadInput, Damaged, need
from .card import card_head
from .from_checkpoint import FEW, made_tiles
from .onnx_graph import Parity, check_parity, parity_of
from .options import ExportOptions, encoder_name

LEAST_OPSET = 13
"""Oldest opset whose operators the two ends of the graph use."""
PREFIX = "given/"
constant: Any = numpy_helper.from_array
ARCH = "onnx"


def export_onnx(
    model: Path, out: Path, options: ExportOptions, tileset: TileSet | None = None
) -> Manifest:
    """Export an ONNX image encoder as a bundle.

    Args:
        model: an .onnx file in one piece, from float images (N, 3, S, S) or (N, S, S, 3) to embeddings
            (N, D), maps (N, D, H, W) or tokens (N, T, D); N must be variable.
        out: folder of the bundle, which must not exist.
        options: options of the graph and the manifest; ``mean`` and ``std`` are required.
        tileset: tiles for the parity test; without them, a pattern and noise.

    Raises:
        BadInput: an option is missing, the graph is no such encoder, or ``out`` exists.
        Damaged: the file is no ONNX graph.
        Mismatch: the new graph differs from the given one; nothing is written.
    """
    check_graph_whole(model)
    options.only_for("an .onnx file", "mean", "std", "layout", "pool")
    mean, std = map(list, options.colours())
    name = encoder_name(options, out)
    given = load_graph(model)
    size_px = size_of(given, options.layout, model)
    whole, dim = _with_ends(given, mean, std, options, model, size_px)
    tiles = sample_tiles(tileset, size_px, FEW) if tileset else made_tiles(size_px)
    with files.publish_folder(out) as folder:
        write_atomic(folder / GRAPH, whole.SerializeToString())
        onnx.checker.check_model(str(folder / GRAPH), full_check=True)
        parity = _parity(model, folder / GRAPH, tiles, mean, std, options)
        check_parity(parity)
        write_json(folder / PARITY, parity.as_dict())
        record = {
            "file": model.name,
            "bytes": model.stat().st_size,
            "sha256": sha256_file(model),
            "mean": mean,
            "std": std,
            "layout": options.layout,
            "pool": options.pool,
            "parity_tiles": "real tiles" if tileset else "a pattern and noise",
        }
        manifest = Manifest(
            name=name, sha256=sha256_file(folder / GRAPH), arch=ARCH, size_px=size_px,
            mpp=options.mpp, dim=dim, metric="cosine", normalised=True,
            training={"onnx_sha256": record["sha256"]}, licence=options.licence,
            opset=opset_of(given), versions={"onnx": onnx.__version__},
        )  # fmt: skip
        write_json(folder / MANIFEST, manifest.model_dump())
        write_json(folder / CHECKPOINT, {"onnx": record})
        notes = files.read_text(options.notes) if options.notes else ""
        write_atomic(folder / CARD, _card(manifest, record, parity, notes))
    return manifest


def load_graph(path: Path) -> Any:
    """Read and check an ONNX file.

    Raises:
        Damaged: it is no valid graph.
    """
    try:
        given = onnx.load(path)
        onnx.checker.check_model(given)
    except Exception as error:  # onnx raises many kinds
        raise Damaged(f"{path} is not a valid ONNX graph ({error})") from error
    return given


def opset_of(model: Any) -> int:
    """Return the version of a model's standard operators."""
    return max(
        (int(part.version) for part in model.opset_import if part.domain in ("", "ai.onnx")),
        default=0,
    )


def input_of(model: Any) -> Any:
    """Return the inputs of a model without those that are weights."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in weights]


def size_of(model: Any, layout: str, path: Path, side: int | None = None) -> int:
    """Return the side of the input in pixels; refuse a graph with another input.

    ``side``: that of a graph whose input has a variable side.
    """
    inputs = input_of(model)
    if len(inputs) != 1:
        raise BadInput(f"{path} has {len(inputs)} inputs; expected one, of images")
    kind = inputs[0].type.tensor_type
    shape = [dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim]
    text = " x ".join("?" if size is None else str(size) for size in shape)
    places = (1, 2, 3) if layout == "nchw" else (3, 1, 2)
    if len(shape) != 4 or shape[places[0]] != 3 or kind.elem_type != TensorProto.FLOAT:
        raise BadInput(
            f"{path} takes {text} ({TensorProto.DataType.Name(kind.elem_type)}); expected float images "
            f"in the layout {layout}; pass --layout if theirs is another"
        )
    if shape[0] is not None:
        raise BadInput(
            f"{path} takes batches of {shape[0]} only; export it with a variable first axis"
        )
    fixed = [shape[n] for n in places[1:] if shape[n] is not None]
    if side is not None and fixed and fixed != [side, side]:
        raise BadInput(f"{path} takes {text}; leave out --size-px, which is for variable sizes")
    height, width = (side if shape[n] is None else shape[n] for n in places[1:])
    if height is None or height != width:
        raise BadInput(f"{path} takes {text}; expected squares of a fixed size")
    if opset_of(model) < LEAST_OPSET:
        raise BadInput(
            f"{path} has opset {opset_of(model)}; expected at least {LEAST_OPSET}: export it again"
        )
    return int(height)


def _with_ends(
    given: Any,
    mean: list[float],
    std: list[float],
    options: ExportOptions,
    path: Path,
    size_px: int,
) -> tuple[Any, int]:
    """Return the graph with both ends, and the length of its embedding."""
    output = given.graph.output[0]
    shape = [dim.dim_value for dim in output.type.tensor_type.shape.dim]
    rank = len(shape)
    if rank not in (2, 3, 4):
        raise BadInput(
            f"{path} returns an output of {rank} axes ({output.name}); expected embeddings (N, D), tokens "
            "(N, T, D) or maps (N, D, H, W)"
        )
    if rank == 3 and options.pool not in ("cls", "mean", "cls+mean"):
        raise BadInput(f"{path} returns tokens; pass --pool cls, mean or cls+mean")
    if rank != 3 and options.pool:
        raise BadInput(f"{path} returns no tokens; leave out --pool")
    dim = shape[1] if rank == 4 else shape[-1]
    if not dim:
        raise BadInput(f"{path} does not state the length of its embedding ({output.name})")
    if options.pool == "cls+mean":
        dim *= 2
    first = front(size_px, mean, std, options.layout)
    last = _back(rank, int(dim), options.pool)
    return joined(given, first, last), int(dim)


def joined(given: Any, first: Any, last: Any) -> Any:
    """Return a model between two graphs; the second takes its first output as ``features``."""
    opset, version = [helper.make_opsetid("", opset_of(given))], given.ir_version
    ends = [
        helper.make_model(graph, opset_imports=opset, ir_version=version) for graph in (first, last)
    ]
    inner = compose.add_prefix(given, PREFIX)
    keep = {value.name for value in inner.graph.output[1:]}
    for value in [v for v in inner.graph.output if v.name in keep]:
        inner.graph.output.remove(value)
    source, output = PREFIX + input_of(given)[0].name, PREFIX + given.graph.output[0].name
    whole = compose.merge_models(ends[0], inner, [("scaled", source)])
    return compose.merge_models(whole, ends[1], [(output, "features")])


def front(side: int, mean: list[float], std: list[float], layout: str) -> Any:
    """Return the graph from raw pixels (N, side, side, 3) to a network's input."""
    scale = 1 / (255 * np.array(std, np.float32))
    offset = -np.array(mean, np.float32) / np.array(std, np.float32)
    constants = [constant(scale, "scale"), constant(offset, "offset")]
    last = "coloured" if layout == "nchw" else "scaled"
    nodes = [
        helper.make_node("Cast", [INPUT], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["floats", "scale"], ["brought"]),
        helper.make_node("Add", ["brought", "offset"], [last]),
    ]
    shape: list[str | int | None] = ["batch", side, side, 3]
    if layout == "nchw":
        nodes.append(helper.make_node("Transpose", [last], ["scaled"], perm=[0, 3, 1, 2]))
        shape = ["batch", 3, side, side]
    return helper.make_graph(
        nodes,
        "front",
        [helper.make_tensor_value_info(INPUT, TensorProto.UINT8, ["batch", side, side, 3])],
        [helper.make_tensor_value_info("scaled", TensorProto.FLOAT, shape)],
        constants,
    )


def _back(rank: int, dim: int, pool: str | None) -> Any:
    """Pool tokens or maps, and scale to length 1."""

    def ints(name: str, values: list[int]) -> Any:
        return constant(np.array(values, np.int64), name)

    constants: list[Any] = []
    nodes: list[Any] = []
    found = "features"
    if rank == 4:
        nodes += [
            helper.make_node("GlobalAveragePool", ["features"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["flat"]),
        ]
        found = "flat"
    if rank == 3:
        constants += [
            ints("zero", [0]), ints("one", [1]), ints("end", [2**31 - 1]), ints("tokens", [1]),
        ]  # fmt: skip
        nodes += [
            helper.make_node("Slice", ["features", "zero", "one", "tokens"], ["first"]),
            helper.make_node("Slice", ["features", "one", "end", "tokens"], ["others"]),
            helper.make_node("Flatten", ["first"], ["class"]),
            helper.make_node("Transpose", ["others"], ["turned"], perm=[0, 2, 1]),
            helper.make_node("GlobalAveragePool", ["turned"], ["averaged"]),
            helper.make_node("Flatten", ["averaged"], ["mean"]),
            helper.make_node("Concat", ["class", "mean"], ["both"], axis=1),
        ]
        found = {"cls": "class", "mean": "mean"}.get(pool or "", "both")
    constants += [ints("last", [1]), constant(np.array(1e-24, np.float32), "least")]
    nodes += [
        helper.make_node("Mul", [found, found], ["squares"]),
        helper.make_node("ReduceSum", ["squares", "last"], ["sum"], keepdims=1),
        helper.make_node("Max", ["sum", "least"], ["positive"]),
        helper.make_node("Sqrt", ["positive"], ["length"]),
        helper.make_node("Div", [found, "length"], [OUTPUT]),
    ]
    shape: list[str | None] = ["batch", *([None] * (rank - 1))]
    return helper.make_graph(
        nodes,
        "back",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", dim])],
        constants,
    )


def _parity(
    model: Path,
    graph: Path,
    tiles: NDArray[np.uint8],
    mean: list[float],
    std: list[float],
    options: ExportOptions,
) -> Parity:
    """Compare the bundle's graph with the given one, whose ends are computed by NumPy."""
    onnxruntime = need("onnxruntime", "cpu")
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    source, output = session.get_inputs()[0].name, session.get_outputs()[0].name

    def expected(part: NDArray[np.uint8]) -> NDArray[np.float32]:
        images = ((part / 255 - mean) / std).astype(np.float32)
        if options.layout == "nchw":
            images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        found = session.run([output], {source: images})[0]
        if found.ndim == 4:
            found = found.mean((2, 3))
        if found.ndim == 3:
            both = {"cls": found[:, 0], "mean": found[:, 1:].mean(1)}
            pooled = both.get(options.pool or "")
            found = np.concatenate(list(both.values()), 1) if pooled is None else pooled
        unit: NDArray[np.float32] = found / np.linalg.norm(found, axis=1, keepdims=True)
        return unit

    return parity_of(expected, graph, tiles, FEW)


def _card(manifest: Manifest, record: dict[str, Any], parity: Parity, notes: str) -> str:
    rows = (
        f"| mean and standard deviation of the colours | {record['mean']}, {record['std']} |",
        f"| layout of the given graph | {record['layout']} |",
        f"| tokens that form the embedding | {record['pool'] or 'the output as it is'} |",
    )
    lines = [
        *card_head(manifest, f"Made from {record['file']} (`{record['sha256']}`)", *rows),
        "## Parity with the given graph",
        f"On {parity.tiles} tiles ({record['parity_tiles']}): largest difference {parity.max_abs:.1e}, "
        f"largest cosine error {parity.max_cosine_error:.1e}.",
        "",
        notes.strip(),
    ]
    return "\n".join(lines).rstrip() + "\n"
