"""How several processes share the trainings of a protocol: by a lock on each training.

A lock is a file that exists while a process holds it. It ends with the process, also if that is killed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ... import stopping
from ...errors import StorageFailed

NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
"""Errors of file systems without locks."""


class AllAsked(Exception):
    """With ``train_only``: the protocol has asked for all its trainings; the rest is the report."""


class Elsewhere(dict[str, Any]):
    """Stands for the record of a training that another process runs; it is empty."""


@contextmanager
def locked(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[bool]:
    """Hold the lock ``path``; yields whether it is held.

    Args:
        path: of the lock's file.
        waiting: called before a wait for another process; None does not wait.

    Raises:
        StorageFailed: the file system has no locks, and ``waiting`` is None. Otherwise nothing is locked.
        Stopped: the command was asked to stop during the wait.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file, told = None, False
    try:
        while (file := _take(path)) is None and waiting is not None:
            if not told:
                waiting()
            told = True
            stopping.check()
            time.sleep(stopping.POLL_S)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
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
            path.unlink(missing_ok=True)
            os.close(file)


def _take(path: Path) -> int | None:
    """Return the open file of the lock; None if another process holds it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.stat(path), os.fstat(file)):
            return file
    except (BlockingIOError, FileNotFoundError):  # held, or removed by its holder just now
        pass
    except BaseException:
        os.close(file)
        raise
    os.close(file)
    return None
