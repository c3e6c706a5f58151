"""Checks the weights that an ONNX graph has in other files, without the package ``onnx``.

A graph may name a file from which a runtime reads a tensor's bytes (external data): relative to the graph,
relative to the working directory, or absolute. The graph's checksum does not cover such a file. One file is
accepted: ``<graph>.data`` beside the graph, whose checksum and size the graph itself states, as our export
writes large graphs. So the graph's checksum covers it, too. The graph's format is Protocol Buffers:
numbered fields with their length, which can be nested (onnx.proto, ONNX 1.20).
"""

from __future__ import annotations

from pathlib import Path

from ..errors import BadInput, Damaged
from .files import sha256_file

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

_EXTERNAL, _LOCATION, _NAME, _PROPERTIES = 13, 14, 8, 14
_VARINT, _BYTES = 0, 2
_FIXED_SIZES = {1: 8, 5: 4}
_DEEPEST = 64


DATA = ".data"
"""Ending that the name of the file with a large graph's weights adds to the graph's."""
DATA_SHA256, DATA_BYTES = "histoseek_data_sha256", "histoseek_data_bytes"
"""Properties of a graph that state the checksum and size of the file with its weights."""
HASHED = 2**30
"""A file of weights up to this size is hashed whenever it is opened; larger ones by a whole check."""


LARGEST_FILE = 2**29
"""Weights of more bytes go to a file beside their graph, which takes less memory than one file."""
LARGE = 64 * 2**20
"""A graph with at least this many bytes of weights is large: several cores share each run."""


def graph_bytes(path: Path) -> int:
    """Return the bytes of a graph and of the file with its weights."""
    files = [file for file in (path, data_file(path)) if file is not None and file.is_file()]
    return sum(file.stat().st_size for file in files)


def data_properties(data: Path) -> dict[str, str]:
    """Return the properties by which a graph states the file with its weights."""
    return {DATA_SHA256: sha256_file(data), DATA_BYTES: str(data.stat().st_size)}


def with_property(model: bytes, key: str, value: str) -> bytes:
    """Return a graph with one more property, which does not change what it computes."""

    def field(number: int, content: bytes) -> bytes:
        if len(content) > 0x7F:
            raise ValueError(f"{content[:40]!r} is too long for a property")
        return bytes([number << 3 | _BYTES, len(content)]) + content

    return model + field(_PROPERTIES, field(1, key.encode()) + field(2, value.encode()))


def data_file(path: Path) -> Path | None:
    """Return the file that has a graph's weights, or None if the graph has them itself."""
    file = path.with_name(path.name + DATA)
    return file if file.is_file() else None


def check_graph_whole(path: Path, whole: bool = False) -> None:
    """Refuse a graph with parts in files that its checksum does not cover.

    Args:
        path: of the graph.
        whole: also hash a file of weights above :data:`HASHED`; otherwise its size is compared.

    Raises:
        BadInput: the graph has external data; the message names the tensor and the file.
        Damaged: the file is not an ONNX graph, or its file of weights is missing or changed.
    """
    blob = memoryview(path.read_bytes())
    todo = [("model", blob, 0)]
    found: list[tuple[str, str]] = []
    try:
        properties = _properties(blob)
        while todo:
            kind, message, depth = todo.pop()
            if depth > _DEEPEST:
                raise ValueError(f"it has more than {_DEEPEST} nested levels")
            if kind == "tensor":
                found += _external(message)
                continue
            nested = _NESTED[kind]
            for number, value in _fields(message):
                if number in nested and isinstance(value, memoryview):
                    todo.append((nested[number], value, depth + 1))
    except (ValueError, IndexError) as error:
        raise Damaged(
            f"{path} is not a complete ONNX graph ({error}); copy the bundle again"
        ) from error
    own = path.name + DATA
    for tensor, file in found:
        if file != own or DATA_SHA256 not in properties:
            raise BadInput(
                f"{path} reads the tensor {tensor!r} from the file {file!r} (external data), which its "
                "checksum does not cover; expected all weights in the graph: save it as one file, and "
                "export the bundle again"
            )
    if found:
        _check_data(path.with_name(own), properties, whole)


def _check_data(file: Path, properties: dict[str, str], whole: bool) -> None:
    if file.is_symlink() or not file.is_file():
        raise Damaged(f"{file} with the graph's weights is missing; copy the whole bundle again")
    size = file.stat().st_size
    wrong = str(size) != properties.get(DATA_BYTES)
    if not wrong and (whole or size <= HASHED):
        wrong = sha256_file(file) != properties[DATA_SHA256]
    if wrong:
        raise Damaged(f"{file} is not the file that the graph states; copy the whole bundle again")


def _properties(model: memoryview) -> dict[str, str]:
    entries = [value for number, value in _fields(model) if number == _PROPERTIES]
    pairs = [
        {n: _text(v) for n, v in _fields(entry) if isinstance(v, memoryview)}
        for entry in entries
        if isinstance(entry, memoryview)
    ]
    return {pair.get(1, ""): pair.get(2, "") for pair in pairs}


def _external(message: memoryview) -> list[tuple[str, str]]:
    """Return name and file of a tensor if it is in another file."""
    name, entries, external = "", [], False
    for number, value in _fields(message):
        if number == _NAME and isinstance(value, memoryview):
            name = _text(value)
        elif number == _LOCATION:
            external = value == 1
        elif number == _EXTERNAL and isinstance(value, memoryview):
            pair = {n: _text(v) for n, v in _fields(value) if isinstance(v, memoryview)}
            entries.append((pair.get(1, ""), pair.get(2, "")))
    if not external and not entries:
        return []
    return [(name, dict(entries).get("location", "another file"))]


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
