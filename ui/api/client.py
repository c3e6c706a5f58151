"""A small client of the HTTP API.

::

    from histoseek.ui.api.client import Client

    atlas = Client("http://127.0.0.1:7860")
    for hit in atlas.search(["region.png"], k=5, where="organ = 'colon'")["hits"]:
        print(hit["slide"], hit["score"])
"""

from __future__ import annotations

import json
import os
import ssl
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ...errors import (
    BadInput,
    Busy,
    HistoseekError,
    Mismatch,
    MissingPart,
    NotFound,
    Unavailable,
    need,
)

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

        Raises:
            MissingPart: httpx is not installed, or lacks SOCKS for the proxy that the environment names.
        """
        httpx = need("httpx", "ui")
        self._address = address.rstrip("/")
        token = os.environ.get("HISTOSEEK_UI_TOKEN", "") if token is None else token
        self._no_answer = httpx.TransportError
        try:
            self._http = httpx.Client(
                auth=(user, password) if user else None,
                headers={"authorization": f"Bearer {token}"} if token and not user else None,
                timeout=timeout_s,
                follow_redirects=True,
                verify=ssl.create_default_context(),  # the system's certificates, not only certifi's
                limits=httpx.Limits(
                    max_keepalive_connections=0
                ),  # so that nothing needs to be closed
            )
        except ImportError as error:
            raise MissingPart(
                "ALL_PROXY or another variable of the environment names a SOCKS proxy: pip install "
                "'httpx[socks]', or unset the variable"
            ) from error

    def info(self) -> dict[str, Any]:
        """Return versions, encoder, counts, index, clusterings and limits."""
        return self._json("GET", "/info")

    def embed(self, images: Image | Sequence[Image]) -> list[list[float]]:
        """Return one embedding per image."""
        embeddings: list[list[float]] = self._post("/v1/embeddings", {}, images)["embeddings"]
        return embeddings

    def search(
        self,
        images: Image | Sequence[Image] = (),
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
        fields = {"like": [int(n) for n in like], "unlike": [int(n) for n in unlike], **options}
        return self._post("/v1/search", fields, images)

    def assign(
        self, images: Image | Sequence[Image], clustering: str | None = None
    ) -> dict[str, Any]:
        """Return the cluster of each image in a clustering."""
        return self._post("/v1/assign", {"clustering": clustering}, images)

    def slides(self, contains: str = "", offset: int = 0, limit: int = 200) -> dict[str, Any]:
        """Return slides by name."""
        query = {"contains": contains, "offset": offset, "limit": limit}
        return self._json("GET", "/v1/slides", params=query)

    def add(
        self,
        path: str,
        label: str = "",
        patient: str = "",
        mpp: str = "",
        replace: bool = False,
        **tiles: Any,
    ) -> dict[str, Any]:
        """Let the server add a slide from one of its folders; return the job.

        ``tiles``: ``tissue_model``, ``min_sharpness`` and ``max_pen``, as for ``embed``.
        """
        row = {"path": path, "label": label, "patient": patient, "mpp": mpp, "replace": replace}
        return self._post("/v1/slides", row | tiles)

    def upload(
        self, file: Image, label: str = "", patient: str = "", mpp: str = "", **tiles: Any
    ) -> dict[str, Any]:
        """Upload a slide to add it to the atlas; return the job. ``tiles``: as for :meth:`add`."""
        row = {"label": label, "patient": patient, "mpp": mpp, **tiles}
        return self._post("/v1/slides", row, [file], field="file")

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
        raise Unavailable(
            f"{job['slide']} was not added within {timeout_s:.0f} s; the server continues to add it"
        )

    def remove(self, slide: str) -> dict[str, Any]:
        """Remove a slide from the atlas."""
        return self._json("DELETE", f"/v1/slides/{quote(slide, safe='')}")

    def clusters(self, clustering: str | None = None) -> dict[str, Any]:
        """Return the clusters of a clustering."""
        return self._json("GET", "/v1/clusters", params=_given({"clustering": clustering}))

    def tile(self, tile: int) -> bytes:
        """Return a tile as JPEG."""
        return self._send("GET", f"/v1/tiles/{tile}.jpg")

    # -- requests -------------------------------------------------------------------------------

    def _json(self, method: str, path: str, **content: Any) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._send(method, path, **content))
        return answer

    def _post(
        self,
        path: str,
        fields: dict[str, Any],
        images: Image | Sequence[Image] = (),
        field: str = "images",
    ) -> dict[str, Any]:
        """Send fields as JSON; with images, as a form."""
        one = (
            isinstance(images, Image) or not isinstance(images, Iterable) or hasattr(images, "read")
        )
        several: list[Any] = [images] if one else list(images)  # type: ignore[arg-type]
        if not several:
            return self._json("POST", path, json=_given(fields))
        files = [(field, _named(image, number)) for number, image in enumerate(several)]
        return self._json("POST", path, data=_given(fields), files=files)

    def _send(self, method: str, path: str, **content: Any) -> bytes:
        """Send a request; retry if the server is busy or the answer is not ready."""
        for left in reversed(range(TRIES)):
            try:
                answer = self._http.request(method, self._address + path, **content)
            except self._no_answer as error:
                raise Unavailable(
                    f"{self._address} does not answer ({error}); check that `histoseek ui` runs there"
                ) from error
            if answer.status_code not in {429, 503} or not left:
                break
            wait = answer.headers.get("retry-after", "1")
            time.sleep(min(5.0, float(wait) if wait.isdigit() else 1.0))
        if not answer.is_success:
            raise _raised(answer.status_code, answer.content)
        blob: bytes = answer.content
        return blob


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that are set, with Python's numbers in the place of numpy's."""
    plain = {
        key: value.item() if hasattr(value, "item") else value for key, value in fields.items()
    }
    return {key: value for key, value in plain.items() if value not in (None, [], "")}


def _named(image: Image, number: int) -> tuple[str, bytes]:
    """Return an image's file name and bytes."""
    if isinstance(image, bytes):
        return f"image-{number}", image
    if not isinstance(image, str | Path):
        raise BadInput(
            f"an image is of type {type(image).__name__}; expected a path or the bytes of an image file"
        )
    path = Path(image)
    try:
        return path.name, path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}); check the path") from error


def _raised(status: int, body: bytes) -> HistoseekError:
    """Return the HistoseekError that matches an error response."""
    try:
        text = str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        text = f"the server answered with status {status} and no error message"
    return ERRORS.get(status, BadInput)(text)
