"""The interface of encoders, and the checks that all of them share."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...artifacts.manifest import Manifest
from ...errors import BadInput, Damaged, Mismatch

FAN_OUT = 128
"""Minimum number of tiles in one call for which an encoder runs several batches in parallel."""


class Encoder(Protocol):
    """Turns tiles into embeddings; safe to call from several threads.

    Attributes:
        manifest: the encoder's identity and contract.
        batch: tiles per run of the graph.
        parallel: number of parallel calls that give the best throughput.
        offloads: whether a call mostly waits for a server or a GPU instead of using this CPU.
    """

    manifest: Manifest
    batch: int
    parallel: int
    offloads: bool

    def describe(self) -> dict[str, Any]:
        """Return where and how the encoder runs, JSON-ready."""
        ...

    def embed(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embed uint8 (N, S, S, 3) -> float32 (N, D), finite."""
        ...

    def close(self) -> None:
        """Free the encoder's resources; running calls end soon."""
        ...


def in_batches(
    tiles: NDArray[np.uint8],
    manifest: Manifest,
    batch: int,
    parallel: int,
    run: Callable[[NDArray[np.uint8]], NDArray[np.float32]],
) -> NDArray[np.float32]:
    """Run tiles (N, S, S, 3) in batches, many tiles in parallel; check tiles and embeddings.

    Raises:
        BadInput: the tiles do not have the manifest's shape and type.
        Damaged: an embedding has a value that is not finite.
    """
    check_tiles(tiles, manifest)
    parts = [tiles[start : start + batch] for start in range(0, len(tiles), batch)]
    if len(tiles) >= FAN_OUT and parallel > 1 and len(parts) > 1:
        with ThreadPoolExecutor(parallel, thread_name_prefix="embed") as pool:
            embeddings = list(pool.map(run, parts))
    else:
        embeddings = [run(part) for part in parts]
    result = np.concatenate([np.zeros((0, manifest.dim), dtype=np.float32), *embeddings])
    if not np.isfinite(result).all():
        raise Damaged(
            f"encoder {manifest.name} returned embeddings with values that are not finite"
        )
    return result


def check_tiles(tiles: NDArray[np.uint8], manifest: Manifest) -> None:
    """Raise BadInput if tiles do not have the shape (N, S, S, 3) and type of a manifest."""
    size = manifest.size_px
    if tiles.dtype != np.uint8 or tiles.shape[1:] != (size, size, 3):
        raise BadInput(
            f"tiles are {tiles.dtype} {tiles.shape}; expected uint8 (N, {size}, {size}, 3)"
        )


def check_identity(manifest: Manifest, expect: Manifest | None) -> None:
    """Raise Mismatch, with both names, if an encoder is not the expected one; any is accepted when None."""
    if expect is not None and expect.sha256 != manifest.sha256:
        raise Mismatch(
            f"encoder {manifest.name} ({manifest.sha256[:12]}…) is not {expect.name} "
            f"({expect.sha256[:12]}…); use the encoder that made the features"
        )
