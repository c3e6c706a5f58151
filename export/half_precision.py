"""Convert a graph to half precision: float16 weights and layers, float32 input scaling and output.

The operations before the first layer with weights (scaling of pixels) and after the last one (normalising
the embedding) stay in float32: they cost nothing there and would lose most in half precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import BadInput, need

_HEAVY = {"Conv", "Gemm", "MatMul"}
_LARGEST = 65504.0


def to_fp16(blob: bytes) -> bytes:
    """Convert a serialised ONNX graph; its input and output keep their types.

    Raises:
        BadInput: the graph has no layer with weights, or has parts that cannot be converted.
        MissingPart: onnx is not installed.
    """
    onnx = need("onnx", "triton")
    need("onnx.shape_inference", "triton")
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(blob))
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
    halved = _halve_weights(onnx, graph, middle, [*head, *tail])
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
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:
        raise BadInput(
            f"the graph cannot be computed in half precision ({error}); serve it without --fp16"
        ) from error
    serialised: bytes = model.SerializeToString()
    return serialised


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


def _halve_weights(onnx: Any, graph: Any, middle: Sequence[Any], rest: Sequence[Any]) -> set[str]:
    """Add a float16 copy of every float32 weight that the layers use; delete originals no longer used."""
    used = {name for node in middle for name in node.input}
    used_elsewhere = {name for node in rest for name in node.input}
    halved, weights = set(), []
    for weight in graph.initializer:
        if weight.data_type == onnx.TensorProto.FLOAT and weight.name in used:
            values = np.clip(onnx.numpy_helper.to_array(weight), -_LARGEST, _LARGEST)
            name = f"{weight.name}.half"
            weights.append(onnx.numpy_helper.from_array(values.astype(np.float16), name))
            halved.add(weight.name)
            if weight.name not in used_elsewhere:
                continue
        weights.append(weight)
    del graph.initializer[:]
    graph.initializer.extend(weights)
    return halved


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
