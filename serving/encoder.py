"""Encoders: what the pipeline asks of one, the in-process one, and how any is opened by name."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import BadInput, Damaged, Mismatch
from ..manifest import Manifest, read_manifest
from .engine_choice import open_engine

DEFAULT = "default"
DEFAULT_BUNDLE = Path(__file__).parent / "default_encoder"
FAN_OUT = 128
"""Tiles in one call from which on an encoder works on several batches side by side by itself."""


class Encoder(Protocol):
    """Turns tiles into embeddings; safe to call from several threads."""

    @property
    def manifest(self) -> Manifest:
        """The encoder's identity and contract."""
        ...

    @property
    def batch(self) -> int:
        """Tiles per run of the graph."""
        ...

    @property
    def parallel(self) -> int:
        """How many calls side by side make it work at its best."""
        ...

    @property
    def offloads(self) -> bool:
        """Whether a call mostly waits (for a server or a GPU) instead of using this CPU."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return where and how it runs, JSON-ready."""
        ...

    def embed(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 (N, S, S, 3) -> float32 (N, D), finite."""
        ...

    def close(self) -> None:
        """Free what it holds; calls under way end soon."""
        ...


class OnnxEncoder:
    """An encoder bundle in this process, on ONNX Runtime or OpenVINO."""

    def __init__(
        self,
        bundle: Path,
        engine: str = "onnxruntime",
        precision: str = "f32",
        batch: int | None = None,
        streams: int | None = None,
    ) -> None:
        """Load a bundle; for the options see :func:`~histoseek.serving.engine_choice.open_engine`.

        Raises:
            BadInput: no bundle there, or an option that does not fit.
            Damaged: the graph is not the manifest's, or does not keep the contract.
            MissingPart: the engine is not installed.
        """
        self._manifest = read_manifest(bundle)
        self._engine = open_engine(bundle, self._manifest, engine, precision, batch, streams)

    @property
    def manifest(self) -> Manifest:
        """The encoder's identity and contract."""
        return self._manifest

    @property
    def batch(self) -> int:
        """Tiles per run of the graph."""
        return self._engine.plan.batch

    @property
    def parallel(self) -> int:
        """Streams of the engine."""
        return self._engine.plan.streams

    @property
    def offloads(self) -> bool:
        """Whether a GPU does the work."""
        return self._engine.offloads

    def describe(self) -> dict[str, Any]:
        """Return the engine, its precision, and how it is run."""
        plan = self._engine.plan
        return {
            "engine": plan.engine,
            "precision": plan.precision,
            "batch": plan.batch,
            "streams": plan.streams,
            "device": "cuda" if self.offloads else "cpu",
        }

    def embed(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 (N, S, S, 3) -> float32 (N, D).

        Raises:
            BadInput: tiles of another shape or type.
            Damaged: the graph gave a value that is not finite.
        """
        return in_batches(tiles, self._manifest, self.batch, self.parallel, self._engine.run)

    def close(self) -> None:
        """Nothing to free before the process ends."""


def in_batches(
    tiles: NDArray[np.uint8],
    manifest: Manifest,
    batch: int,
    parallel: int,
    run: Callable[[NDArray[np.uint8]], NDArray[np.float32]],
) -> NDArray[np.float32]:
    """Run tiles (N, S, S, 3) in batches, several side by side if they are many; checks both ends.

    Raises:
        BadInput: tiles of another shape or type than the manifest's.
        Damaged: a value came out that is not finite.
    """
    size = manifest.size_px
    if tiles.dtype != np.uint8 or tiles.shape[1:] != (size, size, 3):
        raise BadInput(
            f"tiles are {tiles.dtype} {tiles.shape}; expected uint8 (N, {size}, {size}, 3)"
        )
    parts = [tiles[start : start + batch] for start in range(0, len(tiles), batch)]
    if len(tiles) >= FAN_OUT and parallel > 1 and len(parts) > 1:
        with ThreadPoolExecutor(parallel, thread_name_prefix="embed") as pool:
            found = list(pool.map(run, parts))
    else:
        found = [run(part) for part in parts]
    result = np.concatenate([np.zeros((0, manifest.dim), dtype=np.float32), *found])
    if not np.isfinite(result).all():
        raise Damaged(f"encoder {manifest.name} gave values that are not finite")
    return result


def bundle_path(spec: str) -> Path:
    """Return the bundle's folder for ``default`` or a path.

    Raises:
        BadInput: it names a server.
    """
    if spec == DEFAULT:
        return DEFAULT_BUNDLE
    if "://" in spec:
        raise BadInput(f"encoder {spec!r}: expected a bundle folder here, or {DEFAULT!r}")
    return Path(spec)


def open_encoder(
    spec: str,
    expect: Manifest | None = None,
    engine: str = "onnxruntime",
    precision: str = "f32",
    batch: int | None = None,
    streams: int | None = None,
) -> Encoder:
    """Open an encoder by its bundle's folder, as ``default``, or on a Triton server.

    Args:
        spec: the folder, ``default`` for the one that ships with histoseek, or
            ``triton://HOST:PORT/MODEL[@VERSION]`` (``tritons://`` for TLS).
        expect: the encoder that it must be.
        engine: in this process: ``onnxruntime``, ``openvino`` or ``auto``.
        precision: in this process: ``f32`` or ``bf16``.
        batch: tiles per run; measured or asked of the server when left out.
        streams: in this process: runs side by side; one per core when left out.

    Raises:
        Mismatch: it is another encoder; names both.
    """
    if "://" in spec:
        from .triton import TritonEncoder

        return TritonEncoder(spec, expect, batch)
    encoder = OnnxEncoder(bundle_path(spec), engine, precision, batch, streams)
    check_identity(encoder.manifest, expect)
    return encoder


def check_identity(found: Manifest, expect: Manifest | None) -> None:
    """Compare an encoder with the one that is expected.

    Raises:
        Mismatch: it is another; names both.
    """
    if expect is not None and expect.sha256 != found.sha256:
        raise Mismatch(
            f"encoder {found.name} ({found.sha256[:12]}…) is not {expect.name} "
            f"({expect.sha256[:12]}…); use the encoder that the features were made with"
        )
