"""How several processes share the trainings of a protocol: by a lock on each training.

A process holds the lock of a file while it trains. The lock ends with the process, also if that is killed.
The files stay until the report is written.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ... import stopping
from ...artifacts.files import storage_failed
from ...errors import StorageFailed

ENDING = ".lock"
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
"""Errors of file systems without locks."""
REMOVED = {errno.ENOENT, errno.ESTALE}
"""Errors of a file that another process removed just now."""
HELD = {errno.EWOULDBLOCK, errno.EACCES}


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
        file = _take(path)
        if file is None and waiting is not None:
            waiting()
            while (file := _take(path)) is None:
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
        yield file is not None
    finally:
        if file is not None:
            os.close(file)


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
    """Delete the files of locks below a folder, when nothing is left to train."""
    for path in folder.rglob(f"*{ENDING}"):
        path.unlink(missing_ok=True)


def _take(path: Path) -> int | None:
    """Return the open file of the lock; None if another process holds it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.stat(path), os.fstat(file)):
            return file
    except OSError as error:
        os.close(file)
        if error.errno not in REMOVED | HELD:
            raise
        return None
    os.close(file)
    return None
