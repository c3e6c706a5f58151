"""Tissue bundles: a network that finds tissue, and its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import BadInput, Damaged
from .files import read_json, sha256_file
from .manifest import MANIFEST, NAME
from .onnx_files import check_graph_whole

FORMAT = 1
TISSUE_GRAPH = "tissue.onnx"
TISSUE_OUTPUT = "tissue"
"""Name of the graph's output; its input has the same name as that of an encoder."""


class TissueManifest(BaseModel):
    """A tissue network's identity and contract.

    The graph takes ``tiles``, uint8 (N, size_px, size_px, 3), squares of a slide at ``mpp``, and returns
    ``tissue``, float32 (N, s, s) in 0..1: how certain it is of tissue in each part of the square. N is the
    only dynamic axis; s divides size_px.

    Attributes:
        format: version of the manifest format.
        kind: tells the bundle from that of an encoder.
        name: short name of the network.
        sha256: of ``tissue.onnx``.
        size_px: side of a square in pixels.
        mpp: micrometres per pixel of the square.
        threshold: values above are tissue.
        training: origin of the weights.
        licence: of the weights.
        opset: ONNX operator set of the graph.
        versions: of the software that made the bundle.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    kind: Literal["tissue"] = "tissue"
    name: str = Field(pattern=f"^{NAME}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size_px: int = Field(ge=8, le=4096)
    mpp: float = Field(ge=0.1, le=100)
    threshold: float = Field(default=0.5, gt=0, lt=1)
    training: dict[str, Any]
    licence: str
    opset: int
    versions: dict[str, str]


def read_tissue_manifest(bundle: Path) -> TissueManifest:
    """Read a tissue bundle's manifest, and compare the graph with it.

    Raises:
        BadInput: the folder is no tissue bundle, or has a newer format.
        Damaged: the manifest is invalid, or the graph is missing or does not match it.
    """
    path = bundle / MANIFEST
    document = read_json(path) if path.is_file() else None
    if not isinstance(document, dict) or document.get("kind") != "tissue":
        what = "is an encoder bundle, not" if isinstance(document, dict) else "is not"
        raise BadInput(
            f"{bundle} {what} a bundle of a tissue network; make one with `histoseek tissue export`"
        )
    version = document.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise BadInput(
            f"{path} has format {version}; this histoseek reads formats up to {FORMAT}: upgrade histoseek"
        )
    try:
        manifest = TissueManifest.model_validate(document)
    except ValidationError as error:
        raise Damaged(f"{path} is not a valid manifest: {error}") from error
    graph = bundle / TISSUE_GRAPH
    if not graph.is_file() or sha256_file(graph) != manifest.sha256:
        raise Damaged(
            f"{graph} is missing or is not the file that the manifest states; copy the whole bundle again"
        )
    check_graph_whole(graph)
    return manifest
