"""Runs the page and the API in one process on uvicorn; opens everything at start and closes it at stop."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BadInput, Busy, need
from .access.audit import Audit, open_audit
from .access.guard import Guard
from .access.policy import Access, is_local
from .access.traffic import Traffic
from .session.additions import Additions
from .session.session import Session

GRACE_S = 5
CONNECTIONS = 1024


@dataclass(frozen=True)
class ServeOptions:
    """How the page and the API are served.

    Attributes:
        host: address to listen on.
        port: port to listen on.
        access: users, token and limits.
        encoder: where the atlas's encoder runs, such as ``triton://…``; in this process when None.
        slides: folders from which slides may be added by their path.
        audit_log: file of the audit log; in the atlas's folder when None.
        page: whether to serve the page in addition to the API.
        others: further atlases to search: folders, or addresses of Milvus.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    access: Access = Access()
    encoder: str | None = None
    slides: Sequence[Path] = ()
    audit_log: Path | None = None
    page: bool = True
    others: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Check the values."""
        if not 1 <= self.port <= 65535:
            raise BadInput(f"--port is {self.port}; expected 1 to 65535")
        if not is_local(self.host) and not self.access.guarded:
            raise BadInput(
                f"host {self.host} lets other machines use the page; set users or a token in access"
            )
        for folder in self.slides:
            if not folder.is_dir():
                raise BadInput(f"--slides {folder} is not a folder; check the path")


class Running:
    """A running server; :meth:`close` stops it."""

    def __init__(self, atlas: Path, options: ServeOptions) -> None:
        """Open everything and listen; the server answers when this returns.

        Raises:
            Busy: the port is in use.
            MissingPart: FastAPI, uvicorn or Gradio is not installed.
            HistoseekError: the atlas, the encoder or the audit log cannot be opened.
        """
        listening = _listen(options.host, options.port)
        self._closing: list[Any] = [listening.close]
        try:
            self._start(atlas, options, listening)
        except BaseException:
            self.close()
            raise

    def _start(self, atlas: Path, options: ServeOptions, listening: socket.socket) -> None:
        uvicorn = need("uvicorn", "ui")
        from .access.connections import PatientConnection

        self.session = Session(atlas, options.encoder, options.others)
        self._closing.append(self.session.close)
        audit = open_audit(atlas, options.audit_log, self.session, options.access.guarded)
        if audit is not None:
            self._closing.append(audit.close)
        additions = Additions(self.session, options.slides)
        self._closing.append(additions.close)
        # Uploads to the page are private: they go to a separate folder, deleted with the server.
        private = tempfile.mkdtemp(prefix="histoseek-ui-")
        self._closing.append(lambda: shutil.rmtree(private, ignore_errors=True))
        os.environ["GRADIO_TEMP_DIR"] = private
        app = make_app(self.session, additions, audit, options.access, options.page)
        self._guard = app
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, proxy_headers=False,
            timeout_graceful_shutdown=GRACE_S, ws="none", limit_concurrency=CONNECTIONS,
            http=PatientConnection,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, args=([listening],), name="server", daemon=True
        )
        self._thread.start()
        self._closing.append(self._stop)
        while not self._server.started:
            if not self._thread.is_alive():
                raise Busy(
                    f"the server did not start on {options.host}:{options.port}; the lines above say why"
                )
            self._thread.join(0.01)
        name = f"[{options.host}]" if ":" in options.host else options.host
        self.address = f"http://{name}:{options.port}/"
        self.notes = [*options.access.notes, *_atlases_away(self.session)]
        self.session.warm()

    def _stop(self) -> None:
        self._guard.close()
        self._server.should_exit = True
        self._thread.join(GRACE_S + 5)

    def close(self) -> None:
        """Finish running requests, then close everything."""
        while self._closing:
            self._closing.pop()()


def make_app(
    session: Session,
    additions: Additions,
    audit: Audit | None,
    access: Access,
    with_page: bool = True,
) -> Guard:
    """Return the whole ASGI app: the API, the page, and the guard around both."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    need("fastapi", "ui")
    from .access.service import Server
    from .api.app import make_api

    traffic = Traffic()
    server = Server(session, additions, audit, traffic)
    additions.watch = server.note_addition
    app = make_api(server)
    if with_page:
        need("gradio", "ui")
        from .page.app import mount

        app = mount(app, server)
    return Guard(app, access, traffic)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        other = "--port" if error.errno in {errno.EADDRINUSE, errno.EACCES} else "--host"
        raise Busy(
            f"port {port} on {host} cannot be used ({error}); choose another {other}"
        ) from error
    return listening


def _atlases_away(session: Session) -> list[str]:
    """Return a note for each atlas that cannot be searched now."""
    if session.elsewhere is None:
        return []
    shards = session.elsewhere.federation.status().shards
    return [
        f"atlas {shard.atlas} ({shard.address}) cannot be searched now: {shard.away}"
        for shard in shards
        if shard.away
    ]
