"""The audit log: who asked what of which atlas with which encoder, a JSON line each, without any image."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

from ..errors import StorageFailed
from .answers import now
from .handlers import Session

FILE = "audit.jsonl"


class Audit:
    """Appends lines to a file that only its owner may read."""

    def __init__(self, path: Path, session: Session) -> None:
        """Open the log for appending.

        Raises:
            StorageFailed: the file cannot be written.
        """
        self._path = path
        self._lock = threading.Lock()
        manifest = session.atlas.manifest
        self._about = {
            "atlas": str(session.atlas.path),
            "encoder": manifest.name,
            "encoder_sha256": manifest.sha256,
        }
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        except OSError as error:
            raise StorageFailed(
                f"the audit log {path} cannot be written ({error.strerror}); name another by --audit-log"
            ) from error

    def write(self, action: str, who: dict[str, str], **facts: Any) -> None:
        """Append a line.

        Args:
            action: search, assign, embed, add, remove, rename.
            who: user, address and request id.
            facts: about it, JSON-ready, such as generation, filter, number of hits.

        Raises:
            StorageFailed: the disk is full; what was asked must not be done unseen.
        """
        line = {"at": now(), "action": action, **who, **self._about, **facts}
        blob = (json.dumps(line, ensure_ascii=False, default=str) + "\n").encode()
        with self._lock:
            try:
                while blob:
                    blob = blob[os.write(self._file, blob) :]
            except OSError as error:
                raise StorageFailed(
                    f"the audit log {self._path} cannot be written ({error.strerror}); free space"
                ) from error

    def close(self) -> None:
        """Close the file; what comes after is refused."""
        with self._lock:
            os.close(self._file)
            self._file = -1
