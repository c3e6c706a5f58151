"""Identifies the encoder behind a Triton model, by the server's metadata and a reference image."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from ...artifacts.manifest import (
    INPUT,
    OUTPUT,
    TRITON_MANIFEST,
    TRITON_PRECISION,
    TRITON_PROBE,
    TRITON_SHA256,
    Manifest,
)
from ...errors import BadInput, Mismatch
from .triton_address import TritonAddress

MAX_PROBE_COSINE = 1e-3


class NotReady(BadInput):
    """The server answers, but the model is not ready."""


@dataclass(frozen=True)
class Served:
    """A model as the server describes it; ``probe``: its embedding of the reference image, in base64."""

    manifest: Manifest
    version: str
    max_batch: int
    precision: str
    probe: str


def read_identity(
    client: Any, address: TritonAddress, version: str, call_options: dict[str, Any]
) -> Served:
    """Read the identity of the model's ``version``, or of its newest loaded one, from the server.

    Raises:
        NotReady: the model is not ready; the message names the models that are.
        Mismatch: the model does not state its encoder, or does not match its contract.
    """
    model = address.model
    if not client.is_model_ready(model, version, **call_options):
        raise NotReady(
            f"{address.where} this model is not ready; models that are ready: "
            f"{ready_models(client, call_options)}"
        )
    metadata = client.get_model_metadata(model, version, **call_options)
    version = version or max(metadata.versions, key=int)
    config = client.get_model_config(model, version, **call_options).config
    stated = {key: value.string_value for key, value in config.parameters.items()}
    text = stated.get(f"{TRITON_MANIFEST}.{version}")
    if text is None:
        raise Mismatch(
            f"{address.where} the model does not state its encoder; write its repository "
            "with `histoseek triton repository`"
        )
    try:
        manifest = Manifest.model_validate(json.loads(text))
    except (ValidationError, json.JSONDecodeError) as error:
        raise Mismatch(
            f"{address.where} the manifest of its encoder is invalid ({error})"
        ) from error
    if stated.get(f"{TRITON_SHA256}.{version}") != manifest.sha256:
        raise Mismatch(
            f"{address.where} its manifest and its sha256 are of two encoders; write its repository again"
        )
    _check_contract(metadata, manifest, address.where)
    return Served(
        manifest,
        version,
        max(1, int(config.max_batch_size)),
        stated.get(f"{TRITON_PRECISION}.{version}", "fp32"),
        stated.get(f"{TRITON_PROBE}.{version}", ""),
    )


def _check_contract(metadata: Any, manifest: Manifest, where: str) -> None:
    size = manifest.size_px
    sides = metadata.inputs, metadata.outputs
    served = [[(t.name, t.datatype, list(t.shape)) for t in side] for side in sides]
    expected = [
        [(INPUT, "UINT8", [-1, size, size, 3])],
        [(OUTPUT, "FP32", [-1, manifest.dim])],
    ]
    if served != expected:
        raise Mismatch(f"{where} its inputs and outputs are {served}; expected {expected}")


def check_probe(served: Served, embedding: NDArray[np.float32], where: str) -> None:
    """Compare the server's embedding of the reference image, (D,), with the bundle's.

    Raises:
        Mismatch: they differ by more than half precision explains.
    """
    try:
        expected = np.frombuffer(base64.b64decode(served.probe, validate=True), "<f4")
    except ValueError:
        expected = np.zeros(0, np.float32)
    if expected.shape != embedding.shape:
        raise Mismatch(
            f"{where} its embedding of the reference image is missing; write its repository again"
        )
    lengths = float(np.linalg.norm(expected) * np.linalg.norm(embedding))
    error = 1 - float(expected @ embedding) / max(lengths, 1e-12)
    if not error <= MAX_PROBE_COSINE:
        raise Mismatch(
            f"{where} its name is {served.manifest.name}, but it embeds the reference image differently "
            f"(1 - cosine {error:.3f}); its model.onnx was replaced: write the repository again"
        )


def ready_models(client: Any, call_options: dict[str, Any]) -> str:
    """Return the names of the ready models for an error message: ``a, b``, or ``none``."""
    try:
        index = client.get_model_repository_index(**call_options)
        return ", ".join(sorted({m.name for m in index.models if m.state == "READY"})) or "none"
    except Exception:  # the names only improve an error message
        return "none"
