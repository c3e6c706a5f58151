"""An encoder on a Triton server, over gRPC, behind the same protocol as the one in this process."""

from __future__ import annotations

import atexit
import base64
import ipaddress
import json
import os
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Literal, TypeVar
from urllib.parse import parse_qsl, urlsplit

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from .. import console
from ..errors import BadInput, HistoseekError, Mismatch, MissingPart, Unavailable
from ..manifest import (
    INPUT,
    OUTPUT,
    TRITON_MANIFEST,
    TRITON_PRECISION,
    TRITON_PROBE,
    TRITON_SHA256,
    Manifest,
    probe_tile,
)
from .encoder import check_identity, in_batches
from .triton_slots import GrpcSlot, SharedSlot, Slot

TOKEN = "HISTOSEEK_TRITON_TOKEN"
CERTIFICATES = "HISTOSEEK_TRITON_CA"
IN_FLIGHT = 4
MAX_PROBE_COSINE = 1e-3
CHECK_EVERY_S = 2.0
IDLE_S = 0.25
"""A server that comes back within this time is taken for one that never was away."""

FIRST_WAIT_S, LONGEST_WAIT_S, TELL_AFTER_S = 0.1, 5.0, 1.5
CLOSING_S = 2.0
UNSETTLED = -1
"""Epoch of a slot whose last request has not come back well: the server may still be reading it."""

MAX_MESSAGE = 2**31 - 1
_TRANSIENT = {"UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "CANCELLED", "ABORTED"}
_MODEL = r"[A-Za-z0-9][A-Za-z0-9._-]*"
T = TypeVar("T")


@dataclass(frozen=True)
class TritonAddress:
    """What ``triton://HOST:PORT/MODEL[@VERSION][?option=value&…]`` says.

    Attributes:
        host: with its port.
        model: its name.
        version: or "" for the latest that is loaded.
        tls: ``tritons://``.
        shm: pass tiles through shared memory: ``system`` (``?shm=1``), ``cuda`` or "" for no.
        timeout_s: of one request.
        deadline_s: how long a request is tried again before the run is given up.
        in_flight: requests side by side.
    """

    host: str
    model: str
    version: str = ""
    tls: bool = False
    shm: Literal["", "system", "cuda"] = ""
    timeout_s: float = 30.0
    deadline_s: float = 120.0
    in_flight: int = IN_FLIGHT

    @property
    def is_loopback(self) -> bool:
        """Whether the server is on this machine."""
        name = self.host.rsplit(":", 1)[0].strip("[]")
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return name == "localhost"


def parse_address(spec: str) -> TritonAddress:
    """Read a server's address.

    Raises:
        BadInput: says what was expected.
    """
    expected = "expected triton://HOST:PORT/MODEL[@VERSION][?shm=1&timeout=30&deadline=120]"
    parts = urlsplit(spec)
    if parts.scheme not in {"triton", "tritons"}:
        raise BadInput(f"encoder {spec!r}: unknown scheme {parts.scheme!r}; {expected}")
    found = re.fullmatch(rf"/({_MODEL})(?:@([0-9]+))?/?", parts.path)
    try:
        port = parts.port
    except ValueError:
        port = None
    if not found or not parts.hostname or port is None or parts.username or parts.fragment:
        raise BadInput(f"encoder {spec!r}: {expected}")
    known: dict[str, Any] = {}
    for key, value in parse_qsl(parts.query, keep_blank_values=True):
        if key == "shm" and value in {"0", "1", "cuda"}:
            known["shm"] = {"0": "", "1": "system", "cuda": "cuda"}[value]
        elif key in {"timeout", "deadline"} and re.fullmatch(r"\d{1,6}(\.\d+)?", value):
            known[f"{key}_s"] = max(0.01, float(value))
        elif key == "in_flight" and re.fullmatch(r"[1-9]\d?", value):
            known[key] = int(value)
        else:
            raise BadInput(
                f"encoder {spec!r}: option {key}={value} is not known; expected shm=0|1|cuda, "
                "timeout=SECONDS, deadline=SECONDS or in_flight=1..99"
            )
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    model, version = found.groups(default="")
    return TritonAddress(f"{host}:{port}", model, version, parts.scheme == "tritons", **known)


class _NotReady(BadInput):
    """The server is there, the model is not."""


class TritonEncoder:
    """An encoder served by Triton; see :class:`~histoseek.serving.encoder.Encoder`.

    At the start, and after every time the server was away, it asks the server for names, types, shapes
    and the encoder's sha256, and sends a known picture, so that embeddings of another encoder are never
    taken for its own. Only what may pass is tried again: no answer, no room, time run out.
    """

    offloads = True

    def __init__(self, spec: str, expect: Manifest | None = None, batch: int | None = None) -> None:
        """Connect and check.

        Args:
            spec: the address, see :func:`parse_address`.
            expect: the encoder that it must be.
            batch: tiles per request; the server's limit when left out.

        Raises:
            BadInput: an address, token or model that cannot be used.
            Mismatch: another encoder, or a model that does not keep the contract.
            MissingPart: tritonclient is not installed.
            Unavailable: no server answers there.
        """
        self.address = parse_address(spec)
        self._expect = expect
        self._closed = threading.Event()
        self._checking = threading.Lock()
        self._epoch = 0
        self._known = False
        self._told = threading.Event()
        self._slots: SimpleQueue[Slot] = SimpleQueue()
        self._made = 0
        self.version = ""
        self._checked = self._answered = 0.0
        self.notes: list[str] = []
        self._grpc = _grpc()
        self._headers = _token(self.address)
        self._client = self._connect()
        atexit.register(self.close)  # shared memory must be given back
        try:
            self._manifest, limit, self._precision = self._retry(self._identify)
            self._known = True
            self._checked = self._answered = time.monotonic()
            if batch is not None and batch > limit:
                raise BadInput(
                    f"--batch is {batch}; {self.address.model} takes at most {limit} tiles at once"
                )
            self._batch = batch or limit
            for slot in self._make_slots():
                self._slots.put(slot)
                self._made += 1
            self._retry(self._prove)
        except BaseException:
            self.close()
            raise

    @property
    def manifest(self) -> Manifest:
        """The encoder's identity and contract."""
        return self._manifest

    @property
    def batch(self) -> int:
        """Tiles per request."""
        return self._batch

    @property
    def parallel(self) -> int:
        """Requests in flight."""
        return self.address.in_flight

    def describe(self) -> dict[str, Any]:
        """Return the server, the model, and how tiles get there."""
        return {
            "engine": "triton",
            "server": self.address.host,
            "model": self.address.model,
            "version": self.version,
            "precision": self._precision,
            "batch": self._batch,
            "in_flight": self.parallel,
            "transport": f"{self.address.shm} shared memory" if self._shared else "grpc",
            "notes": self.notes,
        }

    def embed(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 (N, S, S, 3) -> float32 (N, D).

        Raises:
            BadInput: tiles of another shape or type, or ones that the server refuses.
            Damaged: the server gave a value that is not finite.
            Mismatch: the server came back with another encoder.
            Unavailable: no answer until the deadline.
        """
        return in_batches(tiles, self._manifest, self._batch, self.parallel, self._send)

    def close(self) -> None:
        """Stop waiting, and give shared memory back; requests under way are cut off after a while."""
        if self._closed.is_set():
            return
        self._closed.set()
        atexit.unregister(self.close)
        end = time.monotonic() + CLOSING_S
        for _ in range(self._made):
            try:
                self._slots.get(timeout=max(0.0, end - time.monotonic())).close(self._client)
            except Empty:  # its thread gives it back when its request is cut off
                continue
        self._client.close()

    # -- requests -------------------------------------------------------------------------------

    def _send(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
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
        raise Unavailable(f"{self._where()} the connection was closed")

    def _infer(self, slot: Slot, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        self._check_now_and_then()
        epoch = self._epoch
        if slot.epoch != epoch:  # the server has forgotten its shared memory, or may still read it
            slot.renew(self._client, self._asking)
        slot.epoch = UNSETTLED
        found = self._ask(slot, tiles)
        slot.epoch = epoch
        self._answered = time.monotonic()
        expected = (len(tiles), self._manifest.dim)
        if found.shape != expected or found.dtype != np.float32:
            raise Mismatch(
                f"{self._where()} answered {found.dtype} {found.shape}; expected float32 {expected}"
            )
        return found

    def _ask(self, slot: Slot, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        return slot.infer(
            self._client,
            tiles,
            model_name=self.address.model,
            model_version=self.version,
            **self._asking,
        )

    @property
    def _asking(self) -> dict[str, Any]:
        return {"headers": self._headers, "client_timeout": self.address.timeout_s}

    def _retry(self, call: Callable[[], T]) -> T:
        """Call until it works, an error says that it never will, or the deadline is over."""
        end = time.monotonic() + self.address.deadline_s
        wait, away = FIRST_WAIT_S, False
        while True:
            try:
                if away:
                    self._check_again()
                return call()
            except _NotReady as error:
                if not self._known:
                    raise BadInput(str(error)) from error
                away, reason = True, str(error)  # it is still loading, or loaded anew
            except ValueError as error:  # gRPC's way to say that the channel was closed
                if not self._closed.is_set():
                    raise
                reason = str(error)
            except self._grpc.InferenceServerException as error:
                code, text = _status(error), str(error.message())
                forgotten = self._shared and "shared memory" in text.lower()
                if not (_is_transient(code, text) or (forgotten and not away)):
                    raise self._refusal(code, text) from error
                away = self._known and (away or forgotten or not _is_overload(text))
                reason = f"{code}: {text}"
            if self._closed.is_set() or time.monotonic() + wait > end:
                raise Unavailable(
                    f"{self._where()} did not answer for {self.address.deadline_s:g} s ({reason}); see "
                    "to the server, then run the same command again: what is done is kept"
                )
            if wait >= TELL_AFTER_S and not self._told.is_set():
                self._told.set()
                console.say(
                    f"{self._where()} waiting for it, up to {self.address.deadline_s:g} s ({reason})"
                )
            self._closed.wait(wait * random.uniform(0.5, 1.0))  # jitter: clients come back apart
            wait = min(LONGEST_WAIT_S, wait * 2)

    def _refusal(self, code: str, text: str) -> HistoseekError:
        if code in {"NOT_FOUND", "UNIMPLEMENTED"} or "unknown model" in text:
            return Unavailable(
                f"{self._where()} has no such model ready ({text}); it offers: "
                f"{', '.join(self._models()) or 'none'}"
            )
        if code in {"UNAUTHENTICATED", "PERMISSION_DENIED"}:
            return BadInput(f"{self._where()} refuses the token in {TOKEN} ({text})")
        return BadInput(f"{self._where()} refused the tiles ({code}: {text})")

    # -- who the server is ----------------------------------------------------------------------

    def _connect(self) -> Any:
        roots = os.environ.get(CERTIFICATES)
        if roots and not Path(roots).is_file():
            raise BadInput(f"{CERTIFICATES} is {roots!r}, which is no file")
        channel = [
            ("grpc.max_send_message_length", MAX_MESSAGE),
            ("grpc.max_receive_message_length", MAX_MESSAGE),
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2_000),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", 0),
        ]
        return self._grpc.InferenceServerClient(
            self.address.host,
            ssl=self.address.tls,
            root_certificates=roots if self.address.tls else None,
            channel_args=channel,
        )

    def _identify(self) -> tuple[Manifest, int, str]:
        """Ask the server what the model is, and compare it with what is expected."""
        ask, model = self._asking, self.address.model
        wanted = self.address.version or self.version
        if not self._client.is_model_ready(model, wanted, **ask):
            raise _NotReady(
                f"{self._where()} has no such model ready; it offers: "
                f"{', '.join(self._models()) or 'none'}"
            )
        about = self._client.get_model_metadata(model, wanted, **ask)
        version = wanted or max(about.versions, key=int)
        config = self._client.get_model_config(model, version, **ask).config
        stated = {key: value.string_value for key, value in config.parameters.items()}
        text = stated.get(f"{TRITON_MANIFEST}.{version}")
        if text is None:
            raise Mismatch(
                f"{self._where()} does not say which encoder it is; write its repository with "
                "`histoseek triton repository`"
            )
        try:
            manifest = Manifest.model_validate(json.loads(text))
        except (ValidationError, json.JSONDecodeError) as error:
            raise Mismatch(f"{self._where()} describes its encoder wrongly ({error})") from error
        if stated.get(f"{TRITON_SHA256}.{version}") != manifest.sha256:
            raise Mismatch(f"{self._where()} names two encoders; write its repository again")
        check_identity(manifest, self._expect)
        self._check_contract(about, manifest)
        self._probe = stated.get(f"{TRITON_PROBE}.{version}", "")
        self.version = version
        precision = stated.get(f"{TRITON_PRECISION}.{version}", "fp32")
        return manifest, max(1, int(config.max_batch_size)), precision

    def _check_contract(self, about: Any, manifest: Manifest) -> None:
        size = manifest.size_px
        found = [
            [(t.name, t.datatype, list(t.shape)) for t in side]
            for side in (about.inputs, about.outputs)
        ]
        wanted = [
            [(INPUT, "UINT8", [-1, size, size, 3])],
            [(OUTPUT, "FP32", [-1, manifest.dim])],
        ]
        if found != wanted:
            raise Mismatch(f"{self._where()} takes and gives {found}; its encoder has {wanted}")

    def _prove(self) -> None:
        """Send the known picture, and compare what comes with what the bundle makes of it."""
        try:
            wanted = np.frombuffer(base64.b64decode(self._probe, validate=True), "<f4")
        except ValueError:
            wanted = np.zeros(0, np.float32)
        found = self._ask(GrpcSlot(), probe_tile(self._manifest.size_px)[None])[0]
        if wanted.shape != found.shape:
            raise Mismatch(f"{self._where()} has no known picture; write its repository again")
        lengths = float(np.linalg.norm(wanted) * np.linalg.norm(found))
        error = 1 - float(wanted @ found) / max(lengths, 1e-12)
        if not error <= MAX_PROBE_COSINE:
            raise Mismatch(
                f"{self._where()} says that it is encoder {self._manifest.name}, but embeds a known "
                f"picture otherwise (1 - cosine {error:.3f}); its model.onnx was exchanged: write the "
                "repository again"
            )

    def _check_now_and_then(self) -> None:
        """Ask again who the server is, if it could have been exchanged unseen."""
        with self._checking:
            now = time.monotonic()
            if now - self._checked > CHECK_EVERY_S or now - self._answered > IDLE_S:
                self._check_identity()
                self._checked = self._answered = time.monotonic()

    def _check_again(self) -> None:
        """After the server was away: it must be the same encoder, and knows no shared memory."""
        with self._checking:
            self._check_identity()
            self._prove()
            self._checked = self._answered = time.monotonic()
            self._epoch += 1
            self._told.clear()

    def _check_identity(self) -> None:
        manifest, limit, _ = self._identify()
        if manifest.sha256 != self._manifest.sha256:
            raise Mismatch(
                f"{self._where()} came back as encoder {manifest.name} ({manifest.sha256[:12]}…); this "
                f"run began with {self._manifest.name} ({self._manifest.sha256[:12]}…)"
            )
        if limit < self._batch:
            raise Mismatch(
                f"{self._where()} came back with batches of at most {limit} tiles; this run began "
                f"with {self._batch}: run the same command again"
            )

    def _models(self) -> list[str]:
        try:
            index = self._client.get_model_repository_index(
                headers=self._headers, client_timeout=self.address.timeout_s
            )
            return sorted({m.name for m in index.models if m.state == "READY"})
        except Exception:  # it only makes a message more helpful
            return []

    def _where(self) -> str:
        version = f"@{self.address.version}" if self.address.version else ""
        return f"Triton at {self.address.host}, model {self.address.model}{version}:"

    # -- how tiles get there ---------------------------------------------------------------------

    @property
    def _shared(self) -> bool:
        return bool(self.address.shm) and not self.notes

    def _make_slots(self) -> list[Slot]:
        count = self.parallel
        if self.address.shm:
            made: list[Slot] = []
            try:
                for number in range(count):
                    made.append(
                        SharedSlot(number, self._batch, self._manifest, self.address.shm == "cuda")
                    )
                    made[-1].renew(self._client, self._asking)
                return made
            except MissingPart:
                raise
            except Exception as error:  # no room here, or the server sees another /dev/shm
                for slot in made:
                    slot.close(self._client)
                reason = str(error) or type(error).__name__
                self.notes.append(
                    f"shared memory cannot be used ({reason}); tiles go through gRPC. The server needs "
                    "the same /dev/shm (ipc: host, or one pod), and room in it"
                )
        return [GrpcSlot() for _ in range(count)]


def _grpc() -> Any:
    try:
        import tritonclient.grpc
    except ImportError as error:
        raise MissingPart(
            "an encoder on Triton needs tritonclient: pip install 'histoseek[triton]'"
        ) from error
    return tritonclient.grpc


def _token(address: TritonAddress) -> dict[str, str]:
    token = os.environ.get(TOKEN, "")
    if not token:
        return {}
    if not address.tls and not address.is_loopback:
        raise BadInput(
            f"{TOKEN} is set, but triton:// to {address.host} is not encrypted; use tritons://"
        )
    return {"authorization": f"Bearer {token}"}


def _status(error: Any) -> str:
    """Return gRPC's status name of an error, such as UNAVAILABLE."""
    return str(error.status() or "").rpartition(".")[2]


def _is_transient(code: str, text: str) -> bool:
    return code in _TRANSIENT and "larger than max" not in text


def _is_overload(text: str) -> bool:
    """Whether UNAVAILABLE means a full queue or a request that waited too long in it."""
    return "queue" in text.lower() or "timeout" in text.lower()
