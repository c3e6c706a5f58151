"""How several processes share the trainings of a protocol: by a lock on each training.

A process holds the lock of a file while it trains. The lock ends with the process, also if that is killed.
The files stay until the report is written; those that other processes hold stay longer.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ... import stopping
from ...artifacts.files import storage_failed, umask
from ...errors import StorageFailed

ENDING = ".lock"
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
"""Errors of file systems without locks."""


class AllAsked(Exception):
    """With ``train_only``: the protocol has asked for all its trainings; the rest is the report."""


class Elsewhere(dict[str, Any]):
    """Stands for the record of a training that another process runs; it is empty."""


@contextmanager
def locked(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[bool]:
    """Hold the lock of the file ``path``; yields whether it is held.

    Args:
        path: the file, which is created.
        waiting: called before a wait for another process; None does not wait.

    Raises:
        StorageFailed: the file cannot be created; or the file system has no locks, and ``waiting`` is None.
            With ``waiting``, nothing is locked there.
        Stopped: the command was asked to stop during the wait.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, mode=0o666 & ~umask())
        if not _take(lock) and waiting is not None:
            waiting()
            while not _take(lock):
                stopping.check()
                time.sleep(stopping.POLL_S)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise storage_failed(path, error) from error
        if waiting is None:
            raise StorageFailed(
                f"{path} cannot be locked ({error.strerror}), so processes cannot share the trainings on "
                "this file system; run without --train-only, or give an --out elsewhere"
            ) from error
        yield True
        return
    try:
        yield lock.is_locked
    finally:
        lock.release()


def wait_for_any(paths: Sequence[Path]) -> None:
    """Wait until no process holds the lock of one of the files.

    Raises:
        Stopped: the command was asked to stop.
    """
    while True:
        for path in paths:
            with locked(path) as free:
                if free:
                    return
        stopping.check()
        time.sleep(stopping.POLL_S)


def remove_locks(folder: Path) -> None:
    """Delete the files of locks below a folder that no process holds; it may train for a larger table."""
    for path in list(folder.rglob(f"*{ENDING}")):
        try:
            with locked(path) as free:
                if free:
                    path.unlink(missing_ok=True)
        except StorageFailed as error:
            if getattr(error.__cause__, "errno", None) in NO_LOCKS:
                path.unlink(missing_ok=True)


def _take(lock: FileLock) -> bool:
    """Take the lock if no other process holds it; return whether this process holds it now."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    except OSError as error:
        if error.errno != errno.ESTALE:  # another host removed the file just now
            raise
        return False
    return True
