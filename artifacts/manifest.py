"""Encoder bundles: the model of ``manifest.json``, and the checks of the folder."""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_serializer

from ..errors import BadInput, Damaged
from .files import read_json, sha256_file
from .onnx_files import check_graph_whole

FORMAT = 1
GRAPH = "encoder.onnx"
MANIFEST = "manifest.json"
PARITY = "parity.json"
CARD = "MODEL_CARD.md"
CLUSTERS = "clusters.npz"
"""File of the clusters found by training, for the graph's embeddings: centroids (K, D), reach (K,)."""
RUN = "run.json"
CHECKPOINT = "checkpoint.json"
"""File of a published encoder's bundle: the checkpoint that it was exported from."""
TEXT_GRAPH, TOKENIZER = "text.onnx", "tokenizer.json"
"""Files of an encoder's text network: its graph, and the tokenizer as the package tokenizers writes it."""
PROJECTION = "projection.npy"
"""File of the last map of an encoder's head (F, D), for features that other tools store before it."""
PROJECTION_SHA256 = "projection_sha256"
"""Key of that file's checksum in ``Manifest.training``."""
OOD_ANGLE = math.pi / 3
"""Maximum angle (radians) by which the tissue gate turns an embedding towards its last component.

The embedding of an image that is certainly not tissue is turned by this angle.
"""
OOD_THRESHOLD = math.sin(OOD_ANGLE / 2)
"""Threshold: an image with a larger last component is out of distribution (half the maximum angle)."""
EXTERNAL = "external"
"""``arch`` of an encoder that is known by name only: its features come from other tools."""
NAME = "[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
StainMethod = Literal["macenko", "reinhard"]
"""Methods of stain normalisation. What a method computes never changes; a changed one gets a new name."""
INPUT = "tiles"
OUTPUT = "embedding"
TOKENS = "tokens"
"""Name of the input of the text graph."""

# Parameters of a Triton model that identify the encoder of each model version: "<name>.<version>".
# Export writes them and serving reads them. Plain "encoder_sha256" belongs to the latest version.
TRITON_MANIFEST = "histoseek_manifest"
TRITON_SHA256 = "encoder_sha256"
TRITON_PRECISION = "precision"
TRITON_PROBE = "probe_embedding"


def above_threshold(vectors: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return which embeddings (N, dim) of an encoder with a tissue gate are out of distribution, (N,)."""
    above: NDArray[np.bool_] = vectors[:, -1] > OOD_THRESHOLD
    return above


class TextPart(BaseModel):
    """The text network of an encoder: its embeddings can be compared with those of images.

    The graph takes ``tokens``, int64 (N, context), and returns ``embedding``, float32 (N, dim) of length 1.

    Attributes:
        sha256: of ``text.onnx``.
        tokenizer_sha256: of ``tokenizer.json``.
        context: number of tokens that the graph takes.
        pad: number of the token that fills up a text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    tokenizer_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    context: int = Field(ge=2, le=4096)
    pad: int = Field(ge=0)


class Manifest(BaseModel):
    """An encoder's identity and contract.

    The graph takes ``tiles``, uint8 (N, size_px, size_px, 3), and returns ``embedding``, float32
    (N, dim). N is the only dynamic axis. The graph does all scaling and normalisation of values.

    Attributes:
        format: version of the manifest format.
        name: short name of the encoder.
        sha256: of ``encoder.onnx``; encoders with different values are different encoders. A graph of
            more than 512 MB states the sha256 of its weights in ``encoder.onnx.data``.
        arch: registered name of the architecture.
        size_px: side of a tile in pixels.
        mpp: micrometres per pixel at which slides are read; None if the encoder sets none.
        dim: length of an embedding.
        metric: how two embeddings are compared.
        normalised: whether embeddings have length 1.
        views: number of rotated and mirrored views that the graph averages; 1 means the tile alone.
        tissue_gate: whether the encoder has a tissue gate (key ``gate`` of the file). Then the last
            component says how far an image is out of distribution: it is the sine of an angle from 0 to
            :data:`OOD_ANGLE`, and all other components are scaled by the cosine of that angle.
        training: origin of the weights.
        licence: of the weights.
        opset: ONNX operator set of the graph.
        versions: of the software that made the bundle.
        text: the text network, if the encoder has one.
        stain_normalise: method by which tiles are brought to the colours of a reference before they go into
            the graph; None if they go in as they are.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", serialize_by_alias=True)

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
    tissue_gate: bool = Field(default=False, alias="gate")
    training: dict[str, Any]
    licence: str
    opset: int
    versions: dict[str, str]
    text: TextPart | None = None
    stain_normalise: StainMethod | None = None

    @model_serializer(mode="wrap")
    def _without_empty_parts(self, handler: Any) -> dict[str, Any]:
        """Leave out the last fields if they are empty, so that older versions read the manifest."""
        document: dict[str, Any] = handler(self)
        for key in ("text", "stain_normalise"):
            if document.get(key) is None:
                document.pop(key, None)
        return document

    def out_of_distribution(self, vectors: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Return which embeddings (N, dim) are out of distribution, (N,); none without a tissue gate."""
        if not self.tissue_gate:
            return np.zeros(len(vectors), dtype=bool)
        return above_threshold(vectors)

    @property
    def external(self) -> bool:
        """Whether the encoder is known by name only, so that histoseek cannot run it."""
        return self.arch == EXTERNAL


def external_sha256(name: str, dim: int) -> str:
    """Return what identifies another tool's encoder instead of a graph's sha256."""
    return hashlib.sha256(f"{EXTERNAL}:{name}:{dim}".encode()).hexdigest()


def external_manifest(name: str, dim: int, metric: str, mpp: float | None) -> Manifest:
    """Return the manifest of another tool's encoder; its sha256 is computed from name and length.

    Raises:
        BadInput: the name or length is invalid.
    """
    try:
        return Manifest.model_validate(
            {
                "name": name,
                "sha256": external_sha256(name, dim),
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
        field, why = wrong["loc"][0], wrong["msg"]
        if field == "name":
            why = "expected at most 64 letters, digits, '.', '_' and '-', first a letter or digit"
        raise BadInput(
            f"an encoder {name!r} of {dim} dimensions with metric {metric!r} is not possible; its "
            f"{field}: {why}"
        ) from error


def read_manifest(bundle: Path, check_graph: bool = True) -> Manifest:
    """Read and check a bundle's manifest.

    Args:
        bundle: the folder.
        check_graph: also compare the graph's sha256 with the manifest's.

    Raises:
        BadInput: the folder is not a bundle, has a newer format, or refers to files outside it.
        Damaged: the manifest is invalid, or the graph does not match it.
    """
    path = bundle / MANIFEST
    if not path.is_file():
        raise BadInput(
            f"{bundle} is not an encoder bundle (no {MANIFEST}); expected 'default', or a folder made with "
            "`histoseek export`"
        )
    _check_links(bundle)
    document = read_json(path)
    version = document.get("format") if isinstance(document, dict) else None
    if isinstance(version, int) and version > FORMAT:
        raise BadInput(
            f"{path} has format {version}; this histoseek reads formats up to {FORMAT}: upgrade histoseek"
        )
    try:
        manifest = Manifest.model_validate(document)
    except ValidationError as error:
        raise Damaged(f"{path} is not a valid manifest: {error}") from error
    if check_graph:
        check_bundle_graph(bundle, manifest)
    return manifest


def _check_links(bundle: Path) -> None:
    """Refuse a bundle with links out of its folder: copying or displaying it would follow them."""
    root = bundle.resolve()
    for top, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(top) / name
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise BadInput(
                    f"{bundle / path.relative_to(root)} is a link to {path.resolve()}, which is outside "
                    "the bundle; expected the files themselves: copy the bundle with `cp -rL`"
                )


def check_bundle_graph(bundle: Path, manifest: Manifest, whole: bool = False) -> None:
    """Compare the graph with the manifest.

    Args:
        bundle: the folder.
        manifest: of the bundle.
        whole: also hash a file of weights above 1 GiB, of which otherwise only the size is compared, and
            the files of the text network, which are otherwise compared when a text is embedded.

    Raises:
        BadInput: the encoder has no graph, or parts of the graph are in other files.
        Damaged: the graph is missing or does not match the manifest.
    """
    if manifest.external:
        raise BadInput(
            f"encoder {manifest.name!r} is known by name only: another tool made its features, and "
            "histoseek cannot embed images with it; search with tiles of the atlas, use "
            "`similar --features`, or give it a bundle of the encoder by `histoseek index bind`"
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
    check_graph_whole(graph, whole)
    if whole:
        check_text_files(bundle, manifest)


def check_text_files(bundle: Path, manifest: Manifest) -> None:
    """Compare the files of an encoder's text network with the manifest.

    Raises:
        Damaged: a file is missing or does not match the manifest.
    """
    if manifest.text is None:
        return
    wanted = {
        TEXT_GRAPH: manifest.text.sha256,
        TOKENIZER: manifest.text.tokenizer_sha256,
    }
    for name, sha256 in wanted.items():
        path = bundle / name
        if not path.is_file() or sha256_file(path) != sha256:
            raise Damaged(
                f"{path} is missing or is not the file that the manifest states; copy the whole bundle "
                "again"
            )
    check_graph_whole(bundle / TEXT_GRAPH)


def read_projection(bundle: Path, manifest: Manifest) -> NDArray[np.float32]:
    """Return the last map (F, D) of the head of a bundle's encoder.

    Raises:
        BadInput: the encoder has none.
        Damaged: the file is missing or does not match the manifest.
    """
    wanted = manifest.training.get(PROJECTION_SHA256)
    path = bundle / PROJECTION
    if wanted is None:
        raise BadInput(
            f"the encoder {manifest.name!r} has no {PROJECTION}; only an encoder such as conch, exported "
            "with --pool head, projects features that other tools store before its last map"
        )
    if not path.is_file() or sha256_file(path) != wanted:
        raise Damaged(
            f"{path} is missing or is not the file that the manifest states; copy the bundle again"
        )
    return np.asarray(np.load(path, allow_pickle=False), np.float32)


def probe_tile(size_px: int) -> NDArray[np.uint8]:
    """Return the test image (size_px, size_px, 3) whose embedding identifies a server's encoder.

    It is a smooth colour pattern, computed with integers, so it is the same on every machine.
    """
    y, x = np.indices((size_px, size_px), dtype=np.int64)
    channels = [x * 255 // size_px, y * 255 // size_px, (x * y // size_px + 40) % 256]
    return np.stack(channels, axis=-1).astype(np.uint8)
