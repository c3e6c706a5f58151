"""The audit log: one JSON line per action with user, atlas and encoder; it holds no images.

Every line contains the hash of the line before; ``histoseek index verify`` checks this chain.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from ...artifacts.audit_chain import FILE, ChainedLog
from ...console import say
from ...errors import StorageFailed
from ..session.answers import now
from ..session.session import Session

__all__ = ["FILE", "Audit"]


class Audit:
    """Appends lines to a file that only its owner can read."""

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
            self._log: ChainedLog | None = ChainedLog(path)
        except OSError as error:
            raise StorageFailed(
                f"the audit log {path} cannot be written ({error.strerror}); choose another file with "
                "--audit-log"
            ) from error
        self._tell_notes()
        self._tell_head("begins")

    def write(self, action: str, who: dict[str, str], **facts: Any) -> None:
        """Append a line.

        Args:
            action: search, assign, embed, add, remove, rename.
            who: user, address and request id.
            facts: details of the action, JSON-ready, such as generation, filter, number of hits.

        Raises:
            StorageFailed: the disk is full; the caller must then not perform the action.
        """
        line = {"at": now(), "action": action, **who, **self._about, **facts}
        with self._lock:
            if self._log is None:
                raise StorageFailed(f"the audit log {self._path} is closed: the server is stopping")
            try:
                self._log.append(line)
            except OSError as error:
                raise StorageFailed(
                    f"the audit log {self._path} cannot be written ({error.strerror}); free space"
                ) from error
            self._tell_notes()

    def close(self) -> None:
        """Close the file; later writes fail."""
        with self._lock:
            if self._log is not None:
                self._tell_head("ends")
                self._log.close()
            self._log = None

    def _tell_notes(self) -> None:
        """Print the notes about problems found in the log, once each."""
        if self._log is not None:
            for note in self._log.notes:
                say(f"audit log: {note}")
            self._log.notes.clear()

    def _tell_head(self, when: str) -> None:
        """Print the last line's number and hash, so that the server's output keeps a copy of them."""
        if self._log is not None and self._log.last.number:
            last = self._log.last
            say(f"audit log: {when} at line {last.number}, sha256 {last.sha256}")


def open_audit(
    atlas: Path, audit_log: Path | None, session: Session, needed: bool = False
) -> Audit | None:
    """Open the audit log of an atlas; None, with a note, if the atlas can only be read.

    Args:
        atlas: its folder.
        audit_log: another file than the one in this folder.
        session: the open atlas.
        needed: whether there must be a log.

    Raises:
        StorageFailed: the log cannot be written, and it is needed or ``audit_log`` was given.
    """
    try:
        return Audit(audit_log or atlas / FILE, session)
    except StorageFailed as error:
        if audit_log is not None or needed:
            raise
        say(f"there is no audit log: {error}")
        return None
