"""Detects ONNX graphs with weights in other files, without the package ``onnx``.

A graph may name a file from which a runtime reads a tensor's bytes (external data): relative to the graph,
relative to the working directory, or absolute. The graph's checksum does not cover such a file. The file's
format is Protocol Buffers: numbered fields with their length, which can be nested (onnx.proto, ONNX 1.20).
"""

from __future__ import annotations

from pathlib import Path

from ..errors import BadInput, Damaged

_NESTED: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
"""For each message type, the numbers of its nested message fields and their types."""

_EXTERNAL, _LOCATION, _NAME = 13, 14, 8
_VARINT, _BYTES = 0, 2
_FIXED_SIZES = {1: 8, 5: 4}
_DEEPEST = 64


def check_graph_whole(path: Path) -> None:
    """Refuse a graph with parts in other files.

    Raises:
        BadInput: the graph has external data; the message names the tensor and the file.
        Damaged: the file is not an ONNX graph.
    """
    blob = memoryview(path.read_bytes())
    todo = [("model", blob, 0)]
    try:
        while todo:
            kind, message, depth = todo.pop()
            if depth > _DEEPEST:
                raise ValueError(f"it has more than {_DEEPEST} nested levels")
            if kind == "tensor":
                _check_tensor(message, path)
                continue
            nested = _NESTED[kind]
            for number, value in _fields(message):
                if number in nested and isinstance(value, memoryview):
                    todo.append((nested[number], value, depth + 1))
    except (ValueError, IndexError) as error:
        raise Damaged(
            f"{path} is not a complete ONNX graph ({error}); copy the bundle again"
        ) from error


def _check_tensor(message: memoryview, path: Path) -> None:
    name, entries, external = "", [], False
    for number, value in _fields(message):
        if number == _NAME and isinstance(value, memoryview):
            name = _text(value)
        elif number == _LOCATION:
            external = value == 1
        elif number == _EXTERNAL and isinstance(value, memoryview):
            pair = {n: _text(v) for n, v in _fields(value) if isinstance(v, memoryview)}
            entries.append((pair.get(1, ""), pair.get(2, "")))
    if external or entries:
        file = dict(entries).get("location", "another file")
        raise BadInput(
            f"{path} reads the tensor {name!r} from the file {file!r} (external data), which its checksum "
            "does not cover; expected all weights in the graph: save it as one file, and export the "
            "bundle again"
        )


def _text(value: memoryview) -> str:
    return bytes(value[:300]).decode("utf-8", "replace")


def _fields(message: memoryview) -> list[tuple[int, int | memoryview]]:
    """Return number and value of each field of a message."""
    fields: list[tuple[int, int | memoryview]] = []
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, at = _varint(message, at)
            fields.append((number, value))
            continue
        if kind == _BYTES:
            size, at = _varint(message, at)
        elif kind in _FIXED_SIZES:
            size = _FIXED_SIZES[kind]
        else:
            raise ValueError(f"field {number} has the unknown type {kind}")
        if at + size > len(message):
            raise ValueError(f"it ends inside field {number}")
        fields.append((number, message[at : at + size]))
        at += size
    return fields


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number in it is too long")
