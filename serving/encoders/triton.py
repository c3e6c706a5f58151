"""An encoder on a Triton server, over gRPC, with the same interface as the in-process encoder."""

from __future__ import annotations

import atexit
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ... import console, stopping
from ...artifacts.manifest import Manifest, probe_tile
from ...errors import BadInput, HistoseekError, Mismatch, MissingPart, Unavailable
from .protocol import check_identity, in_batches
from .triton_address import TOKEN, connect, load_grpc, parse_address, token_headers
from .triton_identity import NotReady, Served, check_probe, read_identity, ready_models
from .triton_slots import GrpcSlot, SharedSlot, Slot

CHECK_EVERY_S = 2.0
IDLE_S = 0.25
"""Seconds without an answer after which the server's identity is checked again before a request."""

FIRST_WAIT_S, LONGEST_WAIT_S, ANNOUNCE_AFTER_S = 0.1, 5.0, 1.5
CLOSING_S = 2.0
UNSETTLED = -1
"""Marks a slot whose last request did not succeed; its shared memory must not be reused."""

_TRANSIENT = {"UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "CANCELLED", "ABORTED"}
T = TypeVar("T")


class TritonEncoder:
    """An encoder served by Triton; see :class:`~histoseek.serving.encoders.protocol.Encoder`.

    At the start, and whenever the server was unavailable, it checks the server's names, types, shapes
    and the encoder's sha256, and sends a reference image, so that embeddings of another encoder are
    never used. Only temporary errors are retried: no answer, overload, timeout.
    """

    offloads = True

    def __init__(self, spec: str, expect: Manifest | None = None, batch: int | None = None) -> None:
        """Connect and check.

        Args:
            spec: the address, see :func:`parse_address`.
            expect: manifest of the expected encoder; any encoder is accepted when None.
            batch: tiles per request; the server's limit when None.

        Raises:
            BadInput: the address, token or model cannot be used.
            Mismatch: it is another encoder, or the model does not match the contract.
            MissingPart: tritonclient is not installed.
            Unavailable: no server answers at the address.
        """
        self.address = parse_address(spec)
        self.parallel = self.address.in_flight
        self._expect = expect
        self._closed = threading.Event()
        self._checking = threading.Lock()
        self._epoch = 0
        self._identified = False
        self._announced = threading.Event()
        self._slots: SimpleQueue[Slot] = SimpleQueue()
        self._calls = 0
        self._idle = threading.Condition()
        self.version = ""
        self._checked = self._answered = 0.0
        self.notes: list[str] = []
        self._grpc = load_grpc()
        self._headers = token_headers(self.address)
        self._client = connect(self.address)
        atexit.register(self.close)  # if the caller forgets: shared memory must be released
        try:
            stopping.aside(lambda: self._begin(batch))
        except BaseException:
            self.close()
            raise

    def _begin(self, batch: int | None) -> None:
        """Check the server's identity, allocate slots, and send the reference image."""
        self._served = self._retry(self._identify)
        self.manifest = self._served.manifest
        self.version, limit = self._served.version, self._served.max_batch
        self._identified = True
        self._checked = self._answered = time.monotonic()
        if batch is not None and batch > limit:
            raise BadInput(
                f"--batch is {batch}; {self.address.model} accepts at most {limit} tiles per request"
            )
        self.batch = batch or limit
        with self._running_call():
            for slot in self._make_slots():
                self._slots.put(slot)
        self._retry(self._prove)

    def describe(self) -> dict[str, Any]:
        """Return the server, the model, and how tiles are sent."""
        return {
            "engine": "triton",
            "server": self.address.host,
            "model": self.address.model,
            "version": self.version,
            "precision": self._served.precision,
            "batch": self.batch,
            "in_flight": self.parallel,
            "transport": f"{self.address.shm} shared memory" if self._shared else "grpc",
            "notes": self.notes,
        }

    def embed(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See :class:`.protocol.Encoder`; errors as in :func:`.protocol.in_batches`, and of the server.

        Raises:
            BadInput: the server refuses the tiles.
            Mismatch: the server now has another encoder.
            Unavailable: the server did not answer until the deadline.
        """
        return in_batches(tiles, self.manifest, self.batch, self.parallel, self._send)

    def close(self) -> None:
        """Stop waiting, release shared memory, and close the channel, in this order.

        Running calls get some time to end; then they are cancelled. Memory that a call still uses is not
        freed.
        """
        with self._idle:
            if self._closed.is_set():
                return
            self._closed.set()
        atexit.unregister(self.close)
        client = self._client
        if not self._calls_ended():
            client.close()  # cancels the calls; they fail with an error
            self._calls_ended()
            client = connect(self.address)  # to unregister the shared memory
        with suppress(Empty):
            while True:
                self._slots.get_nowait().close(client)
        client.close()

    def _calls_ended(self) -> bool:
        """Wait a while for running calls; return whether all have ended."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._calls, timeout=CLOSING_S)

    @contextmanager
    def _running_call(self) -> Iterator[None]:
        """Register a running call, so that :meth:`close` waits for it."""
        with self._idle:
            if self._closed.is_set():
                raise Unavailable(f"{self.address.where} the connection was closed")
            self._calls += 1
        try:
            yield
        finally:
            with self._idle:
                self._calls -= 1
                self._idle.notify_all()

    def _send(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        with self._running_call():
            slot = self._take_slot()
            try:
                return self._retry(lambda: self._infer(slot, tiles))
            finally:
                self._slots.put(slot)

    def _take_slot(self) -> Slot:
        while not self._closed.is_set():
            try:
                return self._slots.get(timeout=0.2)
            except Empty:
                continue
        raise Unavailable(f"{self.address.where} the connection was closed")

    def _infer(self, slot: Slot, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        self._check_now_and_then()
        epoch = self._epoch
        if slot.epoch != epoch:  # the server lost its shared memory, or may still read it
            slot.renew(self._client, self._call_options)
        slot.epoch = UNSETTLED
        embeddings = self._ask(slot, tiles)
        slot.epoch = epoch
        self._answered = time.monotonic()
        expected = (len(tiles), self.manifest.dim)
        if embeddings.shape != expected or embeddings.dtype != np.float32:
            raise Mismatch(
                f"{self.address.where} returned {embeddings.dtype} {embeddings.shape}; expected float32 "
                f"{expected}"
            )
        return embeddings

    def _ask(self, slot: Slot, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        return slot.infer(
            self._client,
            tiles,
            model_name=self.address.model,
            model_version=self.version,
            **self._call_options,
        )

    @property
    def _call_options(self) -> dict[str, Any]:
        return {"headers": self._headers, "client_timeout": self.address.timeout_s}

    def _retry(self, call: Callable[[], T]) -> T:
        """Call until it succeeds, fails permanently, or reaches the deadline."""
        with self._running_call():
            return self._try(call)

    def _try(self, call: Callable[[], T]) -> T:
        end = time.monotonic() + self.address.deadline_s
        wait, away = FIRST_WAIT_S, False
        while True:
            stopping.check()
            try:
                if away:
                    self._check_again()
                return call()
            except NotReady as error:
                if not self._identified:
                    raise BadInput(str(error)) from error
                away, reason = True, str(error)  # the model is still loading, or is being reloaded
            except ValueError as error:  # gRPC raises this if the channel was closed
                if not self._closed.is_set():
                    raise
                reason = str(error)
            except self._grpc.InferenceServerException as error:
                code, text = _status(error), str(error.message())
                transient = code in _TRANSIENT and "larger than max" not in text
                forgotten = self._shared and "shared memory" in text.lower()
                if not (transient or (forgotten and not away)):
                    raise self._refusal(code, text) from error
                away = self._identified and (away or forgotten or not _is_overload(text))
                reason = f"{code}: {text}"
            if self._closed.is_set() or time.monotonic() + wait > end:
                raise Unavailable(
                    f"{self.address.where} did not answer for {self.address.deadline_s:g} s ({reason}); "
                    "check the server, then run the same command again: finished slides are kept"
                )
            if wait >= ANNOUNCE_AFTER_S and not self._announced.is_set():
                self._announced.set()
                console.say(
                    f"{self.address.where} no answer; waiting up to {self.address.deadline_s:g} s "
                    f"({reason})"
                )
            self._closed.wait(wait * random.uniform(0.5, 1.0))  # jitter: clients retry apart
            wait = min(LONGEST_WAIT_S, wait * 2)

    def _refusal(self, code: str, text: str) -> HistoseekError:
        if code in {"NOT_FOUND", "UNIMPLEMENTED"} or "unknown model" in text:
            return Unavailable(
                f"{self.address.where} this model is not ready ({text}); models that are ready: "
                f"{ready_models(self._client, self._call_options)}"
            )
        if code in {"UNAUTHENTICATED", "PERMISSION_DENIED"}:
            return BadInput(f"{self.address.where} refused the token in {TOKEN} ({text})")
        return BadInput(f"{self.address.where} refused the tiles ({code}: {text})")

    def _identify(self) -> Served:
        served = read_identity(
            self._client, self.address, self.address.version or self.version, self._call_options
        )
        check_identity(served.manifest, self._expect)
        return served

    def _prove(self) -> None:
        """Send the reference image, and compare its embedding with the bundle's."""
        embedding = self._ask(GrpcSlot(), probe_tile(self.manifest.size_px)[None])[0]
        check_probe(self._served, embedding, self.address.where)

    def _check_now_and_then(self) -> None:
        """Check the server's identity again if the server could have been replaced unnoticed."""
        with self._checking:
            now = time.monotonic()
            if now - self._checked > CHECK_EVERY_S or now - self._answered > IDLE_S:
                self._check_identity()
                self._checked = self._answered = time.monotonic()

    def _check_again(self) -> None:
        """Check the encoder after the server was away; slots then renew their shared memory."""
        with self._checking:
            self._check_identity()
            self._prove()
            self._checked = self._answered = time.monotonic()
            self._epoch += 1
            self._announced.clear()

    def _check_identity(self) -> None:
        now, first = self._identify(), self._served
        if now.manifest.sha256 != first.manifest.sha256:
            raise Mismatch(
                f"{self.address.where} now serves encoder {now.manifest.name} "
                f"({now.manifest.sha256[:12]}…); this run started with {first.manifest.name} "
                f"({first.manifest.sha256[:12]}…)"
            )
        if now.max_batch < self.batch:
            raise Mismatch(
                f"{self.address.where} now accepts batches of at most {now.max_batch} tiles; this "
                f"run started with {self.batch}: run the same command again"
            )

    @property
    def _shared(self) -> bool:
        return bool(self.address.shm) and not self.notes

    def _make_slots(self) -> list[Slot]:
        if self.address.shm:
            slots: list[Slot] = []
            try:
                for number in range(self.parallel):
                    slots.append(
                        SharedSlot(number, self.batch, self.manifest, self.address.shm == "cuda")
                    )
                    slots[-1].renew(self._client, self._call_options)
                return slots
            except MissingPart:
                raise
            except Exception as error:  # no space here, or the server has another /dev/shm
                for slot in slots:
                    slot.close(self._client)
                reason = str(error) or type(error).__name__
                self.notes.append(
                    f"shared memory cannot be used ({reason}); tiles go through gRPC. The server needs "
                    "the same /dev/shm (ipc: host, or one pod), with enough free space"
                )
        return [GrpcSlot() for _ in range(self.parallel)]


def _status(error: Any) -> str:
    """Return the gRPC status name of an error, such as UNAVAILABLE."""
    return str(error.status() or "").rpartition(".")[2]


def _is_overload(text: str) -> bool:
    """Whether UNAVAILABLE means a full queue, or a request that timed out in the queue."""
    return "queue" in text.lower() or "timeout" in text.lower()
