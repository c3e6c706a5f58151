"""Opening an encoder by its name, folder or address."""

from __future__ import annotations

from pathlib import Path

from ...artifacts.manifest import Manifest
from ...errors import BadInput
from .onnx import OnnxEncoder
from .protocol import Encoder, check_identity

DEFAULT = "default"
DEFAULT_BUNDLE = Path(__file__).parents[1] / "default_encoder"


def bundle_path(spec: str) -> Path:
    """Return the bundle's folder for ``default`` or a path.

    Raises:
        BadInput: ``spec`` names a server.
    """
    if spec == DEFAULT:
        return DEFAULT_BUNDLE
    if "://" in spec:
        raise BadInput(f"encoder {spec!r} is on a server; expected a bundle folder or {DEFAULT!r}")
    return Path(spec)


def open_encoder(
    spec: str | Path,
    expect: Manifest | None = None,
    engine: str = "onnxruntime",
    precision: str = "f32",
    batch: int | None = None,
    streams: int | None = None,
) -> Encoder:
    """Open an encoder from a bundle's folder, the default one, or one on a Triton server.

    Args:
        spec: the folder, ``default`` for the one that ships with histoseek, or
            ``triton://HOST:PORT/MODEL[@VERSION]`` (``tritons://`` for TLS).
        expect: manifest of the expected encoder; any encoder is accepted when None.
        engine: for this process only: ``onnxruntime``, ``openvino`` or ``auto``.
        precision: for this process only: ``f32`` or ``bf16``.
        batch: tiles per run; measured, or the server's value, when None.
        streams: for this process only: parallel runs; one per core when None.

    Raises:
        Mismatch: it is a different encoder; the message names both.
    """
    spec = str(spec)
    if "://" in spec:
        from .triton import TritonEncoder

        return TritonEncoder(spec, expect, batch)
    encoder = OnnxEncoder(bundle_path(spec), engine, precision, batch, streams)
    check_identity(encoder.manifest, expect)
    return encoder
