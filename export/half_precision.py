"""Half precision: store a graph's weights in float16, or convert its layers too.

:func:`store_fp16` halves the file only: a runtime makes the weights float32 again when it loads the graph,
and computes in float32. :func:`to_fp16` converts the layers as well, for a GPU. The operations before the
first layer with weights (scaling of pixels) and after the last one (normalising the embedding) stay in
float32: they cost nothing there and would lose most in half precision.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..artifacts.files import write_atomic
from ..artifacts.onnx_files import DATA, LARGEST_FILE, data_properties
from ..errors import BadInput, need

_HEAVY = {"Conv", "Gemm", "MatMul"}
_LARGEST = 65504.0
LEAST_HALVED = 256
"""Weights of fewer values stay in float32."""
SHAPES = 1024
"""Tensors of up to this many bytes are read before shapes are inferred: they may be shapes."""
PAGE = 4096
"""Tensors in a file of weights begin at multiples of this many bytes, so that they can be mapped."""


def store_fp16(path: Path, largest: int = LARGEST_FILE) -> None:
    """Store the weights of a graph in float16, in place. It still computes in float32.

    Args:
        path: an .onnx file; its weights may be in ``<path>.data``.
        largest: largest weights in bytes that the graph holds itself.

    Raises:
        BadInput: a weight is larger than float16 can hold.
    """
    onnx = need("onnx", "train")
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    given = {value.name for value in graph.input}  # old graphs list their weights there, too
    halved = {
        weight.name
        for weight in graph.initializer
        if weight.data_type == onnx.TensorProto.FLOAT
        and np.prod(weight.dims) >= LEAST_HALVED
        and weight.name not in given
    }
    casts = [
        onnx.helper.make_node("Cast", [f"{name}.half"], [name], to=onnx.TensorProto.FLOAT)
        for name in sorted(halved)
    ]
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend([*casts, *nodes])
    _write(onnx, model, path, path, halved, set(), largest, clip=False)


def to_fp16(source: Path, target: Path, largest: int = LARGEST_FILE) -> None:
    """Convert an ONNX graph; its input and output keep their types.

    Args:
        source: the graph; its weights may be in ``<source>.data``.
        target: file to write.
        largest: largest weights in bytes that the graph holds itself.

    Raises:
        BadInput: the graph has no layer with weights, or has parts that cannot be converted.
        MissingPart: onnx is not installed.
    """
    onnx = need("onnx", "triton")
    need("onnx.shape_inference", "triton")
    model = onnx.load(source, load_external_data=False)
    for weight in model.graph.initializer:
        if np.prod(weight.dims) * 4 <= SHAPES:
            _read(onnx, weight, source)
    model = onnx.shape_inference.infer_shapes(model)
    graph = model.graph
    heavy = [n for n, node in enumerate(graph.node) if node.op_type in _HEAVY]
    if not heavy:
        raise BadInput("the graph has no layer with weights; serve it without --fp16")
    nodes, first, end = list(graph.node), heavy[0], heavy[-1] + 1
    head, middle, tail = nodes[:first], nodes[first:end], nodes[end:]
    if any(attribute.HasField("g") for node in middle for attribute in node.attribute):
        raise BadInput("the graph has branches or loops; serve it without --fp16")
    floats = _float_values(onnx, graph)
    computed = {name for node in middle for name in node.output}
    used = {name for node in middle for name in node.input}
    elsewhere = {name for node in (*head, *tail) for name in node.input}
    halved = {
        weight.name
        for weight in graph.initializer
        if weight.data_type == onnx.TensorProto.FLOAT and weight.name in used
    }
    # A node whose inputs are the graph's outputs, so that these count as used.
    outputs = onnx.helper.make_node("Identity", [value.name for value in graph.output], [])
    into = _inputs(middle, floats - computed - halved)
    out = _inputs([*tail, outputs], (floats & computed) - halved)
    _rename(middle, {name: f"{name}.half" for name in [*into, *halved, *out]})
    for node in middle:
        _halve_node(onnx, node)
    node_of = onnx.helper.make_node
    before = [node_of("Cast", [n], [f"{n}.half"], to=onnx.TensorProto.FLOAT16) for n in into]
    after = [node_of("Cast", [f"{n}.half"], [n], to=onnx.TensorProto.FLOAT) for n in out]
    del graph.node[:], graph.value_info[:]
    graph.node.extend([*head, *before, *middle, *after, *tail])
    _write(onnx, model, source, target, halved, halved & elsewhere, largest, clip=True)
    try:
        onnx.checker.check_model(str(target), full_check=True)
    except Exception as error:
        raise BadInput(
            f"the graph cannot be computed in half precision ({error}); serve it without --fp16"
        ) from error


def _read(onnx: Any, weight: Any, graph: Path) -> Any:
    """Read a tensor's bytes into it, if they are in the file beside the graph."""
    if weight.data_location == onnx.TensorProto.EXTERNAL:
        onnx.external_data_helper.load_external_data_for_tensor(weight, str(graph.parent))
        weight.data_location = onnx.TensorProto.DEFAULT
        del weight.external_data[:]
    return weight


def _write(
    onnx: Any,
    model: Any,
    source: Path,
    target: Path,
    halved: Collection[str],
    both: Collection[str],
    largest: int,
    clip: bool,
) -> None:
    """Write a graph with some weights in float16, one after the other.

    Args:
        onnx: the package.
        model: without the data of the file beside ``source``.
        source: file of the model.
        target: file to write.
        halved: names of the weights that become ``<name>.half``.
        both: those among them that are also kept as they are.
        largest: weights of more bytes in all go to a file beside ``target``.
        clip: limit values to those that float16 can hold, instead of refusing larger ones.
    """
    weights = list(model.graph.initializer)
    size = sum(int(np.prod(w.dims)) * (2 if w.name in halved else 4) for w in weights)
    del model.graph.initializer[:]
    beside = target.with_name(target.name + DATA)
    writing = beside.with_name(f"{beside.name}.writing") if size > largest else None
    with open(writing or os.devnull, "wb") as data:
        for weight in weights:
            values = onnx.numpy_helper.to_array(_read(onnx, weight, source))
            made = [weight] if weight.name not in halved or weight.name in both else []
            if weight.name in halved:
                if clip:
                    values = np.clip(values, -_LARGEST, _LARGEST)
                elif not np.abs(values).max(initial=0) <= _LARGEST:
                    raise BadInput(
                        f"{weight.name} has values above {_LARGEST:.0f}, the largest of half precision; "
                        "export with --precision fp32"
                    )
                name = f"{weight.name}.half"
                made.append(onnx.numpy_helper.from_array(values.astype(np.float16), name))
            for tensor in made:
                if writing is not None and len(tensor.raw_data) > SHAPES:
                    _move(onnx, tensor, data, beside.name)
                model.graph.initializer.append(tensor)
    del model.metadata_props[:]
    if writing is not None:
        writing.replace(beside)
        for key, value in data_properties(beside).items():
            model.metadata_props.add(key=key, value=value)
    else:
        beside.unlink(missing_ok=True)
    write_atomic(target, model.SerializeToString())


def _move(onnx: Any, tensor: Any, data: BinaryIO, location: str) -> None:
    """Move a tensor's bytes to the end of the file of weights."""
    data.write(b"\0" * (-data.tell() % PAGE))
    onnx.external_data_helper.set_external_data(tensor, location, data.tell(), len(tensor.raw_data))
    data.write(tensor.raw_data)
    tensor.ClearField("raw_data")


def _float_values(onnx: Any, graph: Any) -> set[str]:
    """Return the names of all float32 tensors."""
    float32 = onnx.TensorProto.FLOAT
    named = [*graph.value_info, *graph.input, *graph.output]
    values = {value.name for value in named if value.type.tensor_type.elem_type == float32}
    return values | {weight.name for weight in graph.initializer if weight.data_type == float32}


def _inputs(nodes: Sequence[Any], among: set[str]) -> list[str]:
    """Return the inputs of the nodes that are in ``among``, each once, in order."""
    names = dict.fromkeys(name for node in nodes for name in node.input)
    return [name for name in names if name in among]


def _rename(nodes: Sequence[Any], names: dict[str, str]) -> None:
    for node in nodes:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]


def _halve_node(onnx: Any, node: Any) -> None:
    """Change a constant or a cast between the layers from float32 to float16."""
    for attribute in node.attribute:
        if attribute.name == "to" and attribute.i == onnx.TensorProto.FLOAT:
            attribute.i = onnx.TensorProto.FLOAT16
        if attribute.HasField("t") and attribute.t.data_type == onnx.TensorProto.FLOAT:
            values = onnx.numpy_helper.to_array(attribute.t).astype(np.float16)
            attribute.t.CopyFrom(onnx.numpy_helper.from_array(values))
