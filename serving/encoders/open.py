"""Opening an encoder by its name, folder or address."""

from __future__ import annotations

from pathlib import Path

from ...artifacts.manifest import Manifest
from ...artifacts.remote import is_url
from ...errors import BadInput
from .fetched import fetched, is_server
from .onnx import OnnxEncoder
from .protocol import Encoder, check_identity
from .stain_normalisation import NormalisingEncoder

DEFAULT = "default"
DEFAULT_BUNDLE = Path(__file__).parents[1] / "default_encoder"


def bundle_path(spec: str) -> Path:
    """Return the bundle's folder for ``default``, a path, or a URL (a local copy).

    Raises:
        BadInput: ``spec`` names a server, or there is no bundle at the URL.
    """
    if spec == DEFAULT:
        return DEFAULT_BUNDLE
    if is_url(spec) and not is_server(spec):
        return fetched(spec)
    if is_server(spec):
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
        spec: the folder, its URL (``s3://…``), ``default`` for the one that ships with histoseek, or
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
    if is_server(spec):
        from .triton import TritonEncoder

        return _with_normalisation(TritonEncoder(spec, expect, batch))
    encoder = OnnxEncoder(bundle_path(spec), engine, precision, batch, streams)
    check_identity(encoder.manifest, expect)
    return _with_normalisation(encoder)


def _with_normalisation(encoder: Encoder) -> Encoder:
    return NormalisingEncoder(encoder) if encoder.manifest.stain_normalise else encoder
