"""Encoders: what the pipeline asks of one, and the in-process one on ONNX Runtime."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import BadInput, Damaged, Mismatch, MissingPart
from ..manifest import GRAPH, INPUT, OUTPUT, Manifest, read_manifest

DEFAULT = "default"
DEFAULT_BUNDLE = Path(__file__).parent / "default_encoder"


class Encoder(Protocol):
    """Turns tiles into embeddings; safe to call from several threads."""

    @property
    def manifest(self) -> Manifest:
        """The encoder's identity and contract."""
        ...

    def embed(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 (N, S, S, 3) -> float32 (N, D), finite."""
        ...


class OnnxEncoder:
    """An encoder bundle in this process, on ONNX Runtime."""

    def __init__(self, bundle: Path, threads: int = 0, batch: int = 32) -> None:
        """Load a bundle.

        Args:
            bundle: the folder.
            threads: of ONNX Runtime; 0 leaves the choice to it.
            batch: tiles per run of the graph.

        Raises:
            BadInput: no bundle there.
            Damaged: the graph is not the manifest's, or does not keep the contract.
            MissingPart: ONNX Runtime is not installed.
        """
        self._manifest = read_manifest(bundle)
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before the import: its wheels may report home
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingPart(
                "embedding needs ONNX Runtime: pip install 'histoseek[cpu]' (or [gpu])"
            ) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
        usable = [p for p in wanted if p in onnxruntime.get_available_providers()]
        try:
            self._session = onnxruntime.InferenceSession(
                str(bundle / GRAPH), options, providers=usable
            )
        except Exception as error:
            raise Damaged(f"{bundle / GRAPH} cannot be loaded by ONNX Runtime: {error}") from error
        self._check_contract(bundle)
        self._batch = batch

    def _check_contract(self, bundle: Path) -> None:
        size = self._manifest.size_px
        inputs = {i.name: (i.type, i.shape[1:]) for i in self._session.get_inputs()}
        outputs = {o.name: (o.type, o.shape[1:]) for o in self._session.get_outputs()}
        if inputs != {INPUT: ("tensor(uint8)", [size, size, 3])} or outputs != {
            OUTPUT: ("tensor(float)", [self._manifest.dim])
        }:
            raise Damaged(
                f"{bundle / GRAPH} has {inputs} -> {outputs}; its manifest promises {INPUT} uint8 "
                f"[N, {size}, {size}, 3] -> {OUTPUT} float [N, {self._manifest.dim}]: export it again"
            )

    @property
    def manifest(self) -> Manifest:
        """The encoder's identity and contract."""
        return self._manifest

    @property
    def providers(self) -> list[str]:
        """ONNX Runtime's execution providers in use, such as CUDAExecutionProvider."""
        return list(self._session.get_providers())

    def embed(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 (N, S, S, 3) -> float32 (N, D).

        Raises:
            BadInput: tiles of another shape or type.
            Damaged: the graph gave a value that is not finite.
        """
        size = self._manifest.size_px
        if tiles.dtype != np.uint8 or tiles.shape[1:] != (size, size, 3):
            raise BadInput(
                f"tiles are {tiles.dtype} {tiles.shape}; expected uint8 (N, {size}, {size}, 3)"
            )
        parts = [np.zeros((0, self._manifest.dim), dtype=np.float32)]
        for start in range(0, len(tiles), self._batch):
            chunk = np.ascontiguousarray(tiles[start : start + self._batch])
            parts.append(np.asarray(self._session.run([OUTPUT], {INPUT: chunk})[0]))
        result = np.concatenate(parts)
        if not np.isfinite(result).all():
            raise Damaged(f"encoder {self._manifest.name} gave values that are not finite")
        return result


def bundle_path(spec: str) -> Path:
    """Return the bundle's folder for ``default`` or a path.

    Raises:
        BadInput: the scheme is not known here.
    """
    if spec == DEFAULT:
        return DEFAULT_BUNDLE
    if "://" in spec:
        raise BadInput(f"encoder {spec!r}: expected a bundle folder, or {DEFAULT!r}")
    return Path(spec)


def open_encoder(spec: str, expect: Manifest | None = None) -> OnnxEncoder:
    """Open an encoder by its bundle's folder or as ``default``.

    Args:
        spec: the folder, or ``default`` for the one that ships with histoseek.
        expect: the encoder that it must be.

    Raises:
        Mismatch: it is another encoder; names both.
    """
    encoder = OnnxEncoder(bundle_path(spec))
    found = encoder.manifest
    if expect is not None and expect.sha256 != found.sha256:
        raise Mismatch(
            f"encoder {found.name} ({found.sha256[:12]}…) is not {expect.name} "
            f"({expect.sha256[:12]}…); use the encoder that the features were made with"
        )
    return encoder
