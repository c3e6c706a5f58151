"""A small client of the HTTP API, on the standard library alone.

::

    from histoseek.ui.api.client import Client

    atlas = Client("http://127.0.0.1:7860")
    for hit in atlas.search(["region.png"], k=5, where="organ = 'colon'")["hits"]:
        print(hit["slide"], hit["score"])
"""

from __future__ import annotations

import base64
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import BadInput, Busy, HistoseekError, Mismatch, NotFound, Unavailable

Image = Path | str | bytes
TIMEOUT_S = 60.0
TRIES = 4
ERRORS: dict[int, type[HistoseekError]] = {
    404: NotFound,
    409: Mismatch,
    429: Busy,
    503: Unavailable,
}


class Client:
    """Sends requests to a histoseek server; its errors are raised as :class:`HistoseekError`."""

    def __init__(
        self,
        address: str = "http://127.0.0.1:7860",
        token: str | None = None,
        user: str = "",
        password: str = "",
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """Store the address and credentials; no request is sent yet.

        Args:
            address: the server's address.
            token: access token; ``HISTOSEEK_UI_TOKEN`` of the environment when None.
            user: user name, instead of a token.
            password: the user's password.
            timeout_s: timeout of a request in seconds.
        """
        self._address = address.rstrip("/")
        self._timeout = timeout_s
        token = os.environ.get("HISTOSEEK_UI_TOKEN", "") if token is None else token
        self._headers = {}
        if user:
            pair = base64.b64encode(f"{user}:{password}".encode()).decode()
            self._headers["authorization"] = f"Basic {pair}"
        elif token:
            self._headers["authorization"] = f"Bearer {token}"

    def info(self) -> dict[str, Any]:
        """Return versions, encoder, counts, index, clusterings and limits."""
        return self._json("GET", "/info")

    def embed(self, images: Sequence[Image]) -> list[list[float]]:
        """Return one embedding per image."""
        answer = self._form("/v1/embeddings", {}, [("images", image) for image in images])
        found: list[list[float]] = answer["embeddings"]
        return found

    def search(
        self,
        images: Sequence[Image] = (),
        like: Sequence[int] = (),
        unlike: Sequence[int] = (),
        **options: Any,
    ) -> dict[str, Any]:
        """Return similar tiles: ``hits``, ``verdict`` and ``provenance``.

        Args:
            images: images that hits should resemble.
            like: ids of tiles that hits should resemble.
            unlike: ids of tiles that hits should not resemble.
            options: k, where, least, per_slide, leave_out, clustering; see ``/docs``.
        """
        fields = {"like": list(like), "unlike": list(unlike), **options}
        if not images:
            return self._json("POST", "/v1/search", fields)
        return self._form("/v1/search", fields, [("images", image) for image in images])

    def assign(self, images: Sequence[Image], clustering: str | None = None) -> dict[str, Any]:
        """Return the cluster of each image in a clustering."""
        files = [("images", image) for image in images]
        return self._form("/v1/assign", {"clustering": clustering}, files)

    def slides(self, contains: str = "", offset: int = 0, limit: int = 200) -> dict[str, Any]:
        """Return slides by name."""
        asked = urllib.parse.urlencode({"contains": contains, "offset": offset, "limit": limit})
        return self._json("GET", f"/v1/slides?{asked}")

    def add(
        self, path: str, label: str = "", patient: str = "", mpp: str = "", replace: bool = False
    ) -> dict[str, Any]:
        """Let the server add a slide from one of its folders; return the job."""
        row = {"path": path, "label": label, "patient": patient, "mpp": mpp, "replace": replace}
        return self._json("POST", "/v1/slides", row)

    def upload(
        self, file: Image, label: str = "", patient: str = "", mpp: str = ""
    ) -> dict[str, Any]:
        """Upload a slide to add it to the atlas; return the job."""
        row = {"label": label, "patient": patient, "mpp": mpp}
        return self._form("/v1/slides", row, [("file", file)])

    def wait(self, job: dict[str, Any], timeout_s: float = 3600) -> dict[str, Any]:
        """Wait until a slide is in the atlas; return its job.

        Raises:
            BadInput: the slide could not be added.
            Unavailable: it takes longer than ``timeout_s``.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            job = self._json("GET", f"/v1/jobs/{job['id']}")
            if job["state"] == "failed":
                raise BadInput(f"{job['slide']}: {job['message']}")
            if job["state"] == "done":
                return job
            time.sleep(0.3)
        raise Unavailable(f"{job['slide']} is not added after {timeout_s:.0f} s; it goes on")

    def remove(self, slide: str) -> dict[str, Any]:
        """Remove a slide from the atlas."""
        return self._json("DELETE", f"/v1/slides/{urllib.parse.quote(slide, safe='')}")

    def clusters(self, clustering: str | None = None) -> dict[str, Any]:
        """Return the clusters of a clustering."""
        asked = f"?clustering={urllib.parse.quote(clustering)}" if clustering else ""
        return self._json("GET", f"/v1/clusters{asked}")

    def tile(self, tile: int) -> bytes:
        """Return a tile as JPEG."""
        return self._ask("GET", f"/v1/tiles/{tile}.jpg")

    # -- asking ---------------------------------------------------------------------------------

    def _json(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        blob = None if body is None else json.dumps(_given(body)).encode()
        kind = {} if body is None else {"content-type": "application/json"}
        found: dict[str, Any] = json.loads(self._ask(method, path, blob, kind))
        return found

    def _form(
        self, path: str, fields: dict[str, Any], files: Sequence[tuple[str, Image]]
    ) -> dict[str, Any]:
        mark = uuid.uuid4().hex
        parts: list[bytes] = []
        for name, value in _given(fields).items():
            for one in value if isinstance(value, list) else [value]:
                text = json.dumps(one) if isinstance(one, bool) else str(one)
                head = f'--{mark}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'
                parts += [head.encode(), text.encode(), b"\r\n"]
        for number, (name, image) in enumerate(files):
            blob, title = (image, f"image-{number}") if isinstance(image, bytes) else _read(image)
            title = title.replace('"', "_").replace("\r", "_").replace("\n", "_")
            head = (
                f'--{mark}\r\nContent-Disposition: form-data; name="{name}"; filename="{title}"\r\n'
            )
            parts += [
                head.encode(),
                b"Content-Type: application/octet-stream\r\n\r\n",
                blob,
                b"\r\n",
            ]
        parts.append(f"--{mark}--\r\n".encode())
        kind = {"content-type": f"multipart/form-data; boundary={mark}"}
        found: dict[str, Any] = json.loads(self._ask("POST", path, b"".join(parts), kind))
        return found

    def _ask(
        self, method: str, path: str, body: bytes | None = None, kind: dict[str, str] | None = None
    ) -> bytes:
        """Send a request; retry if the server is busy or the answer is not ready."""
        headers = {**self._headers, **(kind or {})}
        for left in reversed(range(TRIES)):
            request = urllib.request.Request(
                self._address + path, data=body, headers=headers, method=method
            )
            try:
                with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                    blob: bytes = answer.read()
                    return blob
            except urllib.error.HTTPError as error:
                if error.code in {429, 503} and left:
                    wait = error.headers.get("retry-after", "1")
                    time.sleep(min(5.0, float(wait) if wait.isdigit() else 1.0))
                    continue
                raise _raised(error) from error
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                reason = getattr(error, "reason", error)
                raise Unavailable(
                    f"{self._address} does not answer ({reason}); is `histoseek ui` running there?"
                ) from error
        raise AssertionError("unreachable")


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that are set."""
    return {key: value for key, value in fields.items() if value not in (None, [], "")}


def _read(image: Path | str) -> tuple[bytes, str]:
    path = Path(image)
    try:
        return path.read_bytes(), path.name
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}); check the path") from error


def _raised(error: urllib.error.HTTPError) -> HistoseekError:
    """Return the HistoseekError that matches an error response."""
    try:
        text = str(json.loads(error.read())["error"]["message"])
    except (ValueError, KeyError, TypeError):
        text = f"the server answered {error.code}"
    return ERRORS.get(error.code, BadInput)(text)
