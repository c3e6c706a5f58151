"""Transport of tiles and embeddings to and from a Triton server: gRPC messages or shared memory."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ... import stopping
from ...artifacts.manifest import INPUT, OUTPUT, Manifest
from ...errors import MissingPart
from .triton_address import load_grpc

SHM = Path("/dev/shm")


class Slot(ABC):
    """Carries one request at a time.

    Attributes:
        epoch: how often the server had been away when this slot last succeeded.
    """

    epoch = 0

    def renew(self, client: Any, call_options: dict[str, Any]) -> None:  # noqa: B027  # optional
        """Allocate new shared memory and register it with the server, if the slot uses any.

        Memory of an abandoned request is never reused: the server may still read it.
        """

    @abstractmethod
    def infer(self, client: Any, tiles: NDArray[np.uint8], **request: Any) -> NDArray[np.float32]:
        """Send tiles (N, S, S, 3), return embeddings (N, D)."""

    def close(self, client: Any) -> None:  # noqa: B027  # optional
        """Release shared memory, if the slot uses any."""


class GrpcSlot(Slot):
    """Sends tiles in gRPC messages."""

    def infer(self, client: Any, tiles: NDArray[np.uint8], **request: Any) -> NDArray[np.float32]:
        """See :class:`Slot`."""
        grpc = load_grpc()
        given = grpc.InferInput(INPUT, list(tiles.shape), "UINT8")
        given.set_data_from_numpy(np.ascontiguousarray(tiles))
        outputs = [grpc.InferRequestedOutput(OUTPUT)]
        answer = client.infer(inputs=[given], outputs=outputs, **request)
        return np.asarray(answer.as_numpy(OUTPUT))


class SharedSlot(Slot):
    """Passes tiles and embeddings in memory shared with the server, of the host or a GPU."""

    def __init__(self, number: int, batch: int, manifest: Manifest, cuda: bool) -> None:
        """Prepare for one batch; :meth:`renew` allocates the memory."""
        self._cuda = cuda
        self._dim = manifest.dim
        self._sizes = batch * manifest.size_px**2 * 3, batch * manifest.dim * 4
        self._memory = _module(cuda)
        self._number = number
        self._regions: list[tuple[str, Any]] = []

    def renew(self, client: Any, call_options: dict[str, Any]) -> None:
        """See :class:`Slot`; any error means no space, or that the server cannot access the memory."""
        self.close(client)
        stem = f"histoseek-{os.getpid()}-{os.urandom(4).hex()}-{self._number}"
        for kind, size in zip(("tiles", "embedding"), self._sizes, strict=True):
            name = f"{stem}-{kind}"
            if self._cuda:
                handle = self._memory.create_shared_memory_region(name, size, 0)
                self._regions.append((name, handle))
                raw = self._memory.get_raw_handle(handle)
                client.register_cuda_shared_memory(name, raw, 0, size, **call_options)
            else:
                handle = self._memory.create_shared_memory_region(name, f"/{name}", size, True)
                self._regions.append((name, handle))
                stopping.mark(SHM / name)
                _fill(name, size)
                client.register_system_shared_memory(name, f"/{name}", size, **call_options)

    def infer(self, client: Any, tiles: NDArray[np.uint8], **request: Any) -> NDArray[np.float32]:
        """See :class:`Slot`."""
        grpc = load_grpc()
        (source_name, source), (target_name, target) = self._regions
        self._memory.set_shared_memory_region(source, [np.ascontiguousarray(tiles)])
        given = grpc.InferInput(INPUT, list(tiles.shape), "UINT8")
        given.set_shared_memory(source_name, tiles.nbytes)
        output = grpc.InferRequestedOutput(OUTPUT)
        shape = (len(tiles), self._dim)
        output.set_shared_memory(target_name, shape[0] * shape[1] * 4)
        client.infer(inputs=[given], outputs=[output], **request)
        return np.array(self._memory.get_contents_as_numpy(target, np.float32, shape))

    def close(self, client: Any) -> None:
        """See :class:`Slot`; a server that is gone needs no unregistering."""
        for name, handle in self._regions:
            with suppress(Exception):  # the server is gone
                if self._cuda:
                    client.unregister_cuda_shared_memory(name, client_timeout=2)
                else:
                    client.unregister_system_shared_memory(name, client_timeout=2)
            self._memory.destroy_shared_memory_region(handle)
            stopping.unmark(SHM / name)
        self._regions = []


def _module(cuda: bool) -> Any:
    if not cuda:
        import tritonclient.utils.shared_memory as system_shared_memory

        return system_shared_memory
    try:
        import tritonclient.utils.cuda_shared_memory as cuda_shared_memory
    except ImportError as error:
        raise MissingPart(
            f"?shm=cuda needs a GPU on this machine and cuda-python ({error}): pip install "
            "'tritonclient[cuda]'; or use ?shm=1"
        ) from error
    return cuda_shared_memory


def _fill(name: str, size: int) -> None:
    """Allocate the region's pages now: a full /dev/shm is an error here, but kills the process later."""
    handle = os.open(SHM / name, os.O_RDWR)
    try:
        os.posix_fallocate(handle, 0, size)
    finally:
        os.close(handle)
