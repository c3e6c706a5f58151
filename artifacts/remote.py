"""Files behind a URL, through fsspec (``s3://``, ``gs://``, ``az://`` …); a failed call is repeated.

Credentials and addresses come from the store's own settings, such as ``AWS_PROFILE`` and
``AWS_ENDPOINT_URL``; histoseek reads and stores none.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from .. import stopping
from ..errors import BadInput, HistoseekError, StorageFailed, need
from .files import EDGE_BYTES

T = TypeVar("T")
WAITS_S = (0.5, 2.0, 8.0)
"""Seconds before each repetition of a call that failed."""
_IN_PLACE = frozenset({"file", "local", "sftp", "ssh", "ftp", "smb"})
"""Stores in which a file is seen before it is complete; in the others an object appears complete."""


class RemoteFile(NamedTuple):
    """A file behind a URL."""

    url: str
    size: int


def is_url(text: object) -> bool:
    """Whether a text names a file or folder by a URL."""
    return "://" in str(text)


def joined(url: str, *parts: str) -> str:
    """Return the URL of a file below a folder."""
    return "/".join([url.rstrip("/"), *parts])


class Remote:
    """The store behind one URL."""

    def __init__(self, url: str) -> None:
        """Open the store of a URL.

        Raises:
            MissingPart: fsspec is not installed.
            BadInput: the URL's scheme is unknown, or its package is missing.
        """
        self.url = url
        fsspec = need("fsspec", "s3")
        try:
            self._system, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise BadInput(f"{url}: {error}") from error
        self._prefix = url[: len(url) - len(url.split("://", 1)[1])]

    def files(self, may_lack: bool = False) -> list[RemoteFile]:
        """Return the file, or all files below the folder, sorted.

        Args:
            may_lack: return an empty list instead of raising if there is none.

        Raises:
            BadInput: there is none, or it cannot be read.
        """
        self._system.invalidate_cache()
        found = self._again(lambda: self._system.find(self._root, detail=True))
        files = [
            RemoteFile(self._url(name), int(about["size"]))
            for name, about in sorted(found.items())
            if about["type"] == "file" and not name.endswith("/")
        ]
        if not files and not may_lack:
            raise BadInput(f"{self.url} does not exist or is empty; check the URL")
        return files

    def is_file(self) -> bool:
        """Whether the URL names a file."""
        return bool(self._again(lambda: self._system.isfile(self._root)))

    def _url(self, name: str) -> str:
        """Return the URL of a name that the store listed."""
        return name if is_url(name) else self._prefix + name

    def size(self) -> int:
        """Return the file's size in bytes."""
        return int(self._again(lambda: self._system.info(self._root))["size"])

    def content_mark(self) -> str:
        """Return the mark of :func:`~histoseek.artifacts.files.content_mark` from two parts of the file."""
        size = self.size()
        digest = hashlib.sha256(str(size).encode())
        for start in (0, max(0, size - EDGE_BYTES)):
            end = min(size, start + EDGE_BYTES)
            part: bytes = self._again(
                partial(self._system.cat_file, self._root, start=start, end=end)
            )
            digest.update(part)
        return digest.hexdigest()

    def fetch(self, to: Path) -> None:
        """Copy the file to a local path.

        Raises:
            BadInput: it cannot be read, or what came is shorter than the file.
            StorageFailed: the local disk is full.
        """
        size = self.size()
        to.parent.mkdir(parents=True, exist_ok=True)

        def copy() -> None:
            self._system.get_file(self._root, str(to))
            if to.stat().st_size != size:
                raise OSError(f"{to.stat().st_size} of {size} bytes came")

        self._again(copy)

    def store(self, path: Path) -> None:
        """Copy a local file to the URL; nobody sees it before it is complete.

        Raises:
            StorageFailed: it cannot be written.
        """

        def copy() -> None:
            self._system.makedirs(self._system._parent(self._root), exist_ok=True)
            if not _IN_PLACE & set(_protocols(self._system)):
                self._system.put_file(str(path), self._root)
                return
            part = f"{self._root}.{os.uname().nodename}-{os.getpid()}.part"
            self._system.put_file(str(path), part)
            self._system.mv(part, self._root)

        self._again(copy, writing=True)

    def _again(self, call: Callable[[], T], writing: bool = False) -> T:
        """Return the call's result; a failed call is repeated, but not if the answer will be the same."""
        for wait in (*WAITS_S, None):
            try:
                return call()
            except HistoseekError:
                raise
            except FileNotFoundError as error:
                raise BadInput(f"{self.url} does not exist; check the URL") from error
            except Exception as error:  # every store has its own errors
                if wait is None or isinstance(error, PermissionError):
                    raise self._failed(error, writing) from error
            _sleep(wait)
        raise AssertionError("unreachable")

    def _failed(self, error: Exception, writing: bool) -> HistoseekError:
        what = f"({type(error).__name__}: {error})"
        tries = "" if isinstance(error, PermissionError) else f" after {len(WAITS_S) + 1} attempts"
        advice = "check the URL, your permissions and the network, then run the same command again"
        if writing:
            return StorageFailed(f"{self.url} cannot be written{tries} {what}; {advice}")
        return BadInput(f"{self.url} cannot be read{tries} {what}; {advice}")


def _protocols(system: Any) -> tuple[str, ...]:
    return (system.protocol,) if isinstance(system.protocol, str) else tuple(system.protocol)


def _sleep(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        stopping.check()
        time.sleep(min(stopping.POLL_S, seconds))


def require_room(folder: Path, size: int, url: str) -> None:
    """Check that a local copy fits on the disk.

    Raises:
        StorageFailed: it does not.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise StorageFailed(
            f"no space for a local copy of {url} ({size / 1e9:.2f} GB): {folder} has {free / 1e9:.2f} GB; "
            "free space, or set HISTOSEEK_STAGING to another folder"
        )
