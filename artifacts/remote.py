"""Files behind a URL, through fsspec (``s3://``, ``gs://``, ``az://`` …); a failed call is repeated.

Credentials and addresses come from the store's own settings, such as ``AWS_PROFILE`` and
``AWS_ENDPOINT_URL``; histoseek reads and stores none.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from .. import stopping
from ..errors import BadInput, HistoseekError, MissingPart, StorageFailed, need
from .files import mark_of, storage_failed

T = TypeVar("T")
WAITS_S = (0.5, 2.0, 8.0)
"""Seconds before each repetition of a call that failed."""
_IN_PLACE = frozenset({"file", "local", "sftp", "ssh", "ftp", "smb"})
"""Stores in which a file is seen before it is complete; in the others an object appears complete."""
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


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


def below(url: str, folder: str) -> PurePosixPath:
    """Return the path of a file relative to the URL of a folder above it.

    Raises:
        BadInput: the file is not below the folder, or its name contains "..".
    """
    root = folder.rstrip("/") + "/"
    path = PurePosixPath(url.removeprefix(root).lstrip("/"))
    if not url.startswith(root) or ".." in path.parts or not path.parts:
        raise BadInput(f"{url} cannot be copied: its name leads out of {folder}; rename it")
    return path


class Remote:
    """The store behind one URL."""

    def __init__(self, url: str) -> None:
        """Open the store of a URL.

        Raises:
            MissingPart: fsspec or the store's package is not installed.
            BadInput: the URL's scheme is unknown, or the store does not answer.
        """
        self.url = url
        fsspec = need("fsspec", "s3")
        if "::" in url:
            raise BadInput(f"{url}: '::' in a name cannot be read through a URL; rename it")
        try:
            self._system, self._root = fsspec.core.url_to_fs(url)
        except ImportError as error:  # fsspec names the package
            extra = "; run: pip install 'histoseek[s3]'" if url.startswith("s3:") else ""
            raise MissingPart(f"{url}: {error}{extra}") from error
        except Exception as error:  # every store has its own errors
            raise BadInput(f"{url}: {error}") from error

    def files(self, may_lack: bool = False) -> list[RemoteFile]:
        """Return the file, or all files below the folder, sorted.

        Args:
            may_lack: return an empty list instead of raising if there is none.

        Raises:
            BadInput: there is none, or it cannot be read.
        """
        self._system.invalidate_cache()
        found = self._again(lambda: self._system.find(self._root, detail=True))
        root = self._root.rstrip("/")
        files = [
            RemoteFile(self.url.rstrip("/") + name.removeprefix(root), int(about["size"]))
            for name, about in sorted(found.items())
            if about["type"] == "file" and not name.endswith("/")
        ]
        if not files and not may_lack:
            raise BadInput(f"{self.url} does not exist or is empty; check the URL")
        return files

    def is_file(self) -> bool:
        """Whether the URL names a file."""
        self._system.invalidate_cache()
        return bool(self._again(lambda: self._system.isfile(self._root)))

    def size(self) -> int:
        """Return the file's size in bytes."""
        return int(self._again(lambda: self._system.info(self._root))["size"])

    def content_mark(self) -> str:
        """Return the mark of :func:`~histoseek.artifacts.files.content_mark` from two parts of the file."""

        def read(start: int, end: int) -> bytes:
            part: bytes = self._again(
                partial(self._system.cat_file, self._root, start=start, end=end)
            )
            return part

        return mark_of(self.size(), read)

    def fetch(self, to: Path, halted: Callable[[], bool] = stopping.requested) -> None:
        """Copy the file to a local path, where it appears complete.

        Args:
            to: the path.
            halted: asked between parts of the file; the copy then ends.

        Raises:
            BadInput: it cannot be read, or what came is shorter than the file.
            StorageFailed: the local disk is full.
            Stopped: ``halted`` returned True.
        """
        size = self.size()
        to.parent.mkdir(parents=True, exist_ok=True)
        part = to.with_name(f"{to.name}.part")

        def copy() -> None:
            self._system.get_file(self._root, str(part), callback=_watch(halted))
            if part.stat().st_size != size:
                raise OSError(f"{part.stat().st_size} of {size} bytes came")
            part.replace(to)

        self._receive(copy, part)

    def store(self, path: Path) -> None:
        """Copy a local file to the URL; nobody sees it before it is complete.

        Raises:
            StorageFailed: it cannot be written.
        """

        def copy() -> None:
            if not _IN_PLACE & set(_protocols(self._system)):
                self._system.put_file(str(path), self._root)
                return
            self._system.makedirs(self._system._parent(self._root), exist_ok=True)
            part = f"{self._root}.{os.uname().nodename}-{os.getpid()}.part"
            self._system.put_file(str(path), part)
            self._system.mv(part, self._root)

        self._again(copy, writing=True)

    def remove(self) -> None:
        """Remove the file; where that is not permitted, it stays."""
        with suppress(Exception):  # every store has its own errors
            self._system.rm_file(self._root)

    def _receive(self, copy: Callable[[], None], part: Path) -> None:
        """Call ``copy``, which writes to ``part``, until it succeeds; delete the part if it does not."""
        try:
            self._again(copy)
        except Halted:
            raise stopping.Stopped(stopping.exit_code() - 128) from None
        finally:
            part.unlink(missing_ok=True)

    def _again(self, call: Callable[[], T], writing: bool = False) -> T:
        """Return the call's result; a failed call is repeated, but not if the answer will be the same."""
        for wait in (*WAITS_S, None):
            try:
                return call()
            except (HistoseekError, Halted):
                raise
            except FileNotFoundError as error:
                if writing:
                    raise self._failed(error, writing, 1) from error
                raise BadInput(f"{self.url} does not exist; check the URL") from error
            except Exception as error:  # every store has its own errors
                if isinstance(error, OSError) and error.errno in _FULL and not writing:
                    raise storage_failed(Path(str(error.filename or self.url)), error) from error
                if wait is None or isinstance(error, PermissionError):
                    tries = 1 if isinstance(error, PermissionError) else len(WAITS_S) + 1
                    raise self._failed(error, writing, tries) from error
            _sleep(wait)
        raise AssertionError("unreachable")

    def _failed(self, error: Exception, writing: bool, tries: int) -> HistoseekError:
        often = f" after {tries} attempts" if tries > 1 else ""
        what = f"({type(error).__name__}: {error})"
        advice = "check the URL, your permissions and the network, then run the same command again"
        if writing:
            return StorageFailed(f"{self.url} cannot be written{often} {what}; {advice}")
        return BadInput(f"{self.url} cannot be read{often} {what}; {advice}")


class Halted(Exception):
    """Ends a copy from inside the store's thread, where :class:`stopping.Stopped` must not be raised."""


def _watch(halted: Callable[[], bool]) -> Any:
    """Return a callback of fsspec that ends the copy when asked to."""

    class Watch(need("fsspec.callbacks", "s3").Callback):  # type: ignore[misc]
        def relative_update(self, inc: int = 1) -> None:
            if halted():
                raise Halted
            super().relative_update(inc)

    return Watch()


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
