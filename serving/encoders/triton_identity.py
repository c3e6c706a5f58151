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
    """A model as the server describes it.

    Attributes:
        manifest: the encoder's manifest.
        version: the version that answers.
        max_batch: maximum tiles per request.
        precision: the model's precision.
        probe: embedding of the reference image, base64 of float32.
    """

    manifest: Manifest
    version: str
    max_batch: int
    precision: str
    probe: str


def read_identity(
    client: Any, address: TritonAddress, wanted: str, asking: dict[str, Any]
) -> Served:
    """Read the model's identity from the server.

    Args:
        client: tritonclient's client.
        address: the model's address.
        wanted: version, or "" for the newest that is loaded.
        asking: headers and timeout of every request.

    Raises:
        NotReady: the model is not ready; the message names the models that are.
        Mismatch: the model does not state its encoder, or does not match its contract.
    """
    model = address.model
    if not client.is_model_ready(model, wanted, **asking):
        raise NotReady(
            f"{address.where} has no such model ready; it offers: "
            f"{', '.join(offers(client, asking)) or 'none'}"
        )
    about = client.get_model_metadata(model, wanted, **asking)
    version = wanted or max(about.versions, key=int)
    config = client.get_model_config(model, version, **asking).config
    stated = {key: value.string_value for key, value in config.parameters.items()}
    text = stated.get(f"{TRITON_MANIFEST}.{version}")
    if text is None:
        raise Mismatch(
            f"{address.where} does not say which encoder it is; write its repository with "
            "`histoseek triton repository`"
        )
    try:
        manifest = Manifest.model_validate(json.loads(text))
    except (ValidationError, json.JSONDecodeError) as error:
        raise Mismatch(f"{address.where} describes its encoder wrongly ({error})") from error
    if stated.get(f"{TRITON_SHA256}.{version}") != manifest.sha256:
        raise Mismatch(f"{address.where} names two encoders; write its repository again")
    _check_contract(about, manifest, address.where)
    return Served(
        manifest,
        version,
        max(1, int(config.max_batch_size)),
        stated.get(f"{TRITON_PRECISION}.{version}", "fp32"),
        stated.get(f"{TRITON_PROBE}.{version}", ""),
    )


def _check_contract(about: Any, manifest: Manifest, where: str) -> None:
    size = manifest.size_px
    sides = about.inputs, about.outputs
    found = [[(t.name, t.datatype, list(t.shape)) for t in side] for side in sides]
    wanted = [
        [(INPUT, "UINT8", [-1, size, size, 3])],
        [(OUTPUT, "FP32", [-1, manifest.dim])],
    ]
    if found != wanted:
        raise Mismatch(f"{where} takes and gives {found}; its encoder has {wanted}")


def check_probe(served: Served, found: NDArray[np.float32], where: str) -> None:
    """Compare the server's embedding of the reference image, (D,), with the bundle's.

    Raises:
        Mismatch: they differ by more than half precision explains: the server runs another graph.
    """
    try:
        wanted = np.frombuffer(base64.b64decode(served.probe, validate=True), "<f4")
    except ValueError:
        wanted = np.zeros(0, np.float32)
    if wanted.shape != found.shape:
        raise Mismatch(f"{where} has no known picture; write its repository again")
    lengths = float(np.linalg.norm(wanted) * np.linalg.norm(found))
    error = 1 - float(wanted @ found) / max(lengths, 1e-12)
    if not error <= MAX_PROBE_COSINE:
        raise Mismatch(
            f"{where} says that it is encoder {served.manifest.name}, but embeds a known picture "
            f"otherwise (1 - cosine {error:.3f}); its model.onnx was exchanged: write the repository "
            "again"
        )


def offers(client: Any, asking: dict[str, Any]) -> list[str]:
    """Return the names of the ready models."""
    try:
        index = client.get_model_repository_index(**asking)
        return sorted({m.name for m in index.models if m.state == "READY"})
    except Exception:  # the names only improve an error message
        return []
