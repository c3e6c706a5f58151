"""What an encoder bundle is: the model behind ``manifest.json``, and the check of the folder."""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import BadInput, Damaged
from .files import read_json, sha256_file
from .onnx_files import check_graph_whole

FORMAT = 1
GRAPH = "encoder.onnx"
MANIFEST = "manifest.json"
PARITY = "parity.json"
CARD = "MODEL_CARD.md"
CLUSTERS = "clusters.npz"
"""Clusters that training found, of embeddings as the graph gives them: centroids (K, D), reach (K,)."""
RUN = "run.json"
FOREIGN_ANGLE = math.pi / 3
"""By so much the embedding of a picture that is surely foreign is turned towards its last component."""
FOREIGN = math.sin(FOREIGN_ANGLE / 2)
"""A last component over this, half of that turn, says that a picture is foreign."""
EXTERNAL = "external"
"""``arch`` of an encoder that histoseek knows by name only: its features come from other tools."""
NAME = "[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
INPUT = "tiles"
OUTPUT = "embedding"

# Parameters by which a Triton model says which encoder a version of it is: "<name>.<version>"
# (export writes them, serving reads them). Plain "encoder_sha256" is the latest version's.
TRITON_MANIFEST = "histoseek_manifest"
TRITON_SHA256 = "encoder_sha256"
TRITON_PRECISION = "precision"
TRITON_PROBE = "probe_embedding"


def passed_limit(vectors: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return which embeddings (N, dim) with a gate's component are of foreign pictures, (N,)."""
    found: NDArray[np.bool_] = vectors[:, -1] > FOREIGN
    return found


class Manifest(BaseModel):
    """An encoder's identity and contract.

    The graph takes ``tiles``, uint8 (N, size_px, size_px, 3), and gives ``embedding``, float32
    (N, dim); N is the only dynamic axis, and all scaling and normalisation is inside.

    Attributes:
        format: version of this document.
        name: short name of the encoder.
        sha256: of ``encoder.onnx``; two encoders are the same only if it is equal.
        arch: registered name of the architecture.
        size_px: side of a tile in pixels.
        mpp: micrometres per pixel that slides are read at, or None if the encoder names none.
        dim: length of an embedding.
        metric: how two embeddings are compared.
        normalised: whether embeddings have length 1.
        views: over how many turned and mirrored views the graph averages; 1 is the tile alone.
        gate: whether the last component tells how foreign a picture is to what the encoder was made
            for: the sine of an angle from 0 to :data:`FOREIGN_ANGLE`; all others are scaled by its cosine.
        training: where the weights come from.
        licence: of the weights.
        opset: ONNX operator set of the graph.
        versions: of what made the bundle.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    name: str = Field(pattern=f"^{NAME}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    arch: str
    size_px: int = Field(ge=8, le=4096)
    mpp: float | None = Field(default=None, gt=0, lt=1000)
    dim: int = Field(ge=1, le=8192)
    metric: Literal["cosine", "l2"]
    normalised: bool
    views: int = Field(default=1, ge=1, le=8)
    gate: bool = False
    training: dict[str, Any]
    licence: str
    opset: int
    versions: dict[str, str]

    def foreign(self, vectors: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Return which embeddings (N, dim) are of foreign pictures, (N,); none if there is no gate."""
        if not self.gate:
            return np.zeros(len(vectors), dtype=bool)
        return passed_limit(vectors)

    @property
    def external(self) -> bool:
        """Whether the encoder is known by name only, and cannot embed anything here."""
        return self.arch == EXTERNAL


def external_manifest(name: str, dim: int, metric: str, mpp: float | None) -> Manifest:
    """Return the manifest of an encoder of another tool; its sha256 is that of its name and length.

    Raises:
        BadInput: a name or length that no encoder has.
    """
    try:
        return Manifest.model_validate(
            {
                "name": name,
                "sha256": hashlib.sha256(f"{EXTERNAL}:{name}:{dim}".encode()).hexdigest(),
                "arch": EXTERNAL,
                "size_px": 224,
                "mpp": mpp,
                "dim": dim,
                "metric": metric,
                "normalised": False,
                "training": {},
                "licence": "see the encoder's own",
                "opset": 0,
                "versions": {},
            }
        )
    except ValidationError as error:
        wrong = error.errors()[0]
        raise BadInput(
            f"an encoder {name!r} of {dim} dimensions and metric {metric!r} is not possible: "
            f"{wrong['loc'][0]} {wrong['msg']}"
        ) from error


def read_manifest(bundle: Path, check_graph: bool = True) -> Manifest:
    """Read and check a bundle's manifest.

    Args:
        bundle: the folder.
        check_graph: also compare the graph's sha256 with the manifest's.

    Raises:
        BadInput: the folder is no bundle, of a newer format, or refers to files outside of it.
        Damaged: the manifest or the graph is not what it should be.
    """
    path = bundle / MANIFEST
    if not path.is_file():
        raise BadInput(
            f"{bundle} is not an encoder bundle (no {MANIFEST}); make one with `histoseek export`"
        )
    _check_links(bundle)
    document = read_json(path)
    found = document.get("format") if isinstance(document, dict) else None
    if isinstance(found, int) and found > FORMAT:
        raise BadInput(
            f"{path} has format {found}; this histoseek reads up to {FORMAT}: upgrade it"
        )
    try:
        manifest = Manifest.model_validate(document)
    except ValidationError as error:
        raise Damaged(f"{path} is not a valid manifest: {error}") from error
    if check_graph:
        check_bundle_graph(bundle, manifest)
    return manifest


def _check_links(bundle: Path) -> None:
    """Refuse a bundle of which a file lies elsewhere: whoever copies or shows it would follow the link.

    Raises:
        BadInput: a symbolic link that leaves the folder; says where to.
    """
    root = bundle.resolve()
    for top, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(top) / name
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise BadInput(
                    f"{bundle / path.relative_to(root)} is a link to {path.resolve()}, outside of the "
                    "bundle; expected the files themselves: copy the bundle with `cp -rL`"
                )


def check_bundle_graph(bundle: Path, manifest: Manifest) -> None:
    """Compare the graph with the manifest.

    Raises:
        BadInput: an encoder without a graph, or parts of the graph lie in other files.
        Damaged: the graph is missing or is another one.
    """
    if manifest.external:
        raise BadInput(
            f"encoder {manifest.name!r} is known by name only: its features were made by another tool, and "
            "pictures cannot be embedded here; ask with tiles of the atlas, or by `similar --features`"
        )
    graph = bundle / GRAPH
    if not graph.is_file():
        raise Damaged(f"{graph} is missing; copy the whole bundle again")
    actual = sha256_file(graph)
    if actual != manifest.sha256:
        raise Damaged(
            f"{graph} has sha256 {actual[:12]}…, the manifest says {manifest.sha256[:12]}…; "
            "copy the whole bundle again"
        )
    check_graph_whole(graph)


def probe_tile(size_px: int) -> NDArray[np.uint8]:
    """Return the picture by whose embedding a server's encoder is recognised, (size_px, size_px, 3).

    A smooth colour pattern, computed in whole numbers, the same on every machine.
    """
    y, x = np.indices((size_px, size_px), dtype=np.int64)
    channels = [x * 255 // size_px, y * 255 // size_px, (x * y // size_px + 40) % 256]
    return np.stack(channels, axis=-1).astype(np.uint8)
