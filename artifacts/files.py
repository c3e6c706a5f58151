"""Publishes files so that readers see a complete file or none: temp, fsync, rename, fsync folder."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .. import stopping
from ..errors import BadInput, Busy, Damaged, HistoseekError, StorageFailed

TEMP = ".histoseek-tmp"
WAIT = "HISTOSEEK_WAIT_S"
"""Environment variable: time in s to wait for another process that writes."""
LONGEST_WAIT_S = 86_400
EDGE_BYTES = 2**20
_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def cache_folder() -> Path:
    """Return the cache folder: ``$HISTOSEEK_CACHE``, else a folder in the user's cache."""
    if os.environ.get("HISTOSEEK_CACHE"):
        return Path(os.environ["HISTOSEEK_CACHE"])
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "histoseek"


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal text."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def content_mark(path: Path) -> str:
    """Return a quick mark of a file's content: SHA-256 of its size, first and last mebibyte.

    Of a folder (OME-Zarr) it is that of its metadata, and of the names and sizes of its smallest level.
    """
    if path.is_dir():
        return _folder_mark(path)
    with open(path, "rb") as stream:

        def read(start: int, end: int) -> bytes:
            stream.seek(start)
            return stream.read(end - start)

        return mark_of(path.stat().st_size, read)


def _folder_mark(path: Path) -> str:
    metadata = sorted(
        file
        for pattern in ("zarr.json", ".z*", "*/zarr.json", "*/.z*", "*/*/.z*", "*/*/zarr.json")
        for file in path.glob(pattern)
        if file.is_file()
    )
    digest = hashlib.sha256()
    for file in metadata:
        digest.update(f"{file.relative_to(path)}\0".encode() + file.read_bytes())
    last = next((file.parent for file in reversed(metadata) if file.parent != path), path)
    for file in sorted(last.rglob("*")):
        if file.is_file():
            digest.update(f"{file.relative_to(path)} {file.stat().st_size}\0".encode())
    return digest.hexdigest()


def mark_of(size: int, read: Callable[[int, int], bytes]) -> str:
    """Return the mark of :func:`content_mark`; ``read`` returns the bytes from a start to an end."""
    digest = hashlib.sha256(str(size).encode())
    for start in (0, max(0, size - EDGE_BYTES)):
        digest.update(read(start, min(size, start + EDGE_BYTES)))
    return digest.hexdigest()


def storage_failed(path: Path, error: OSError) -> HistoseekError:
    """Translate an ``OSError`` raised while writing ``path`` into an error that names the remedy.

    An invalid file name gives BadInput, so that only this input fails.
    """
    if error.errno in {errno.ENAMETOOLONG, errno.EINVAL}:
        return BadInput(
            f"a file cannot be named {path.name!r} ({error.strerror}); rename the input"
        )
    if error.errno in _SPACE:
        reason = f"no space left for {path} ({error.strerror})"
        remedy = "free space or choose another folder"
    else:
        reason = f"cannot write {path} ({error.strerror or error})"
        remedy = "check the folder's permissions"
    return StorageFailed(
        f"{reason}; nothing already stored was changed; {remedy}, then run the same command again"
    )


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace the content of ``path`` by ``data`` in one step, safe against a crash or a full disk.

    Raises:
        StorageFailed: the disk is full or the folder cannot be written; ``path`` is unchanged.
    """
    with replacing(path) as temp:
        temp.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file that replaces ``path`` in one step if the block raises nothing.

    Raises:
        StorageFailed: the disk is full or the folder cannot be written; ``path`` is unchanged.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temp = temporary(path)
        try:
            yield temp
            publish_file(temp, path)
        finally:
            discard(temp)
    except OSError as error:
        raise storage_failed(path, error) from error


def _temp_prefix(path: Path) -> str:
    """Return a prefix that names the writing process, so that files of a live process are not deleted."""
    name = os.fsencode(path.name)[:60].decode(errors="ignore")  # a name has at most 255 bytes
    return f".{name}.{os.uname().nodename}~{os.getpid()}~"


def _writer_is_gone(temp: Path) -> bool:
    host, _, rest = temp.name.rpartition(".")[0].partition("~")
    pid = rest.partition("~")[0]
    if not host.endswith(f".{os.uname().nodename}") or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it runs as another user
        pass
    return False


def umask() -> int:
    """Return the process's umask; on Linux without changing it for other threads."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def temporary(path: Path) -> Path:
    """Return an unused name beside ``path`` for a file that :func:`publish_file` will rename.

    Raises:
        StorageFailed: the folder cannot be written.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=_temp_prefix(path), suffix=TEMP)
    except OSError as error:
        raise storage_failed(path, error) from error
    os.close(handle)
    stopping.mark(Path(name))
    return Path(name)


def discard(temp: Path) -> None:
    """Delete a file of :func:`temporary` if it was not published."""
    temp.unlink(missing_ok=True)
    stopping.unmark(temp)


def publish_file(temp: Path, path: Path) -> None:
    """Rename a finished temporary file to ``path``, safe against a crash.

    Raises:
        StorageFailed: the folder cannot be written; ``path`` is unchanged.
    """
    try:
        _sync(temp)
        os.chmod(temp, 0o666 & ~umask())
        os.replace(temp, path)
        stopping.unmark(temp)
        _sync(path.parent)
    except OSError as error:
        raise storage_failed(path, error) from error


def write_json(path: Path, document: Any) -> None:
    """Write a JSON document atomically, indented and with a final newline."""
    write_atomic(path, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_text(path: Path) -> str:
    """Read a UTF-8 text file.

    Raises:
        BadInput: the file does not exist or is not text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read as text ({error}); check the path") from error


def read_json(path: Path) -> Any:
    """Read a JSON document.

    Raises:
        BadInput: the file does not exist.
        Damaged: the file is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInput(f"{path} does not exist; check the path") from error
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}); check the path") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise Damaged(f"{path} is not valid JSON ({error}); restore it from a copy") from error


@contextmanager
def publish_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``path`` that is renamed to ``path`` if the block raises nothing.

    Raises:
        BadInput: ``path`` exists already.
        StorageFailed: the folder cannot be written.
    """
    if path.exists():
        raise BadInput(f"{path} exists already; choose another name, or remove it first")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temp = Path(tempfile.mkdtemp(dir=path.parent, prefix=_temp_prefix(path), suffix=TEMP))
    except OSError as error:
        raise storage_failed(path, error) from error
    stopping.mark(temp)
    try:
        yield temp
        for child in temp.rglob("*"):
            if child.is_file():
                _sync(child)
        # keep the bit by which files of a shared folder belong to its group
        os.chmod(temp, (0o777 & ~umask()) | (temp.stat().st_mode & stat.S_ISGID))
        os.replace(temp, path)
        _sync(path.parent)
    except OSError as error:
        raise storage_failed(path, error) from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)
        stopping.unmark(temp)


@contextmanager
def temporary_folder(what: str) -> Iterator[Path]:
    """Yield a folder in ``$HISTOSEEK_STAGING``, or in the system's temporary folder.

    It is deleted at the end. Folders that killed processes of this machine left behind are deleted first.

    Args:
        what: the middle of its name, such as ``slides``.

    Raises:
        StorageFailed: it cannot be made.
    """
    place = Path(os.environ.get("HISTOSEEK_STAGING") or tempfile.gettempdir())
    start = f"histoseek-{what}-{os.uname().nodename}-"
    try:
        place.mkdir(parents=True, exist_ok=True)
        for left in place.glob(f"{glob.escape(start)}*"):
            process = left.name.removeprefix(start).split("-")[0]
            if process.isdigit() and not _runs(int(process)):
                shutil.rmtree(left, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{start}{os.getpid()}-", dir=place))
    except OSError as error:
        raise storage_failed(place, error) from error
    with removed_at_end(folder):
        yield folder


@contextmanager
def removed_at_end(folder: Path) -> Iterator[Path]:
    """Yield a folder, or the path of one to be made, and delete it at the end."""
    stopping.mark(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        stopping.unmark(folder)


def _runs(process: int) -> bool:
    """Whether a process of this number exists."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def remove_leftovers(folders: Iterable[Path], own: bool = False) -> int:
    """Delete temporary files and folders directly in ``folders`` whose writer, on this machine, has died.

    Args:
        folders: to search.
        own: also delete those of this process, which must have stopped writing.

    Returns:
        The number deleted.
    """
    mine = _temp_prefix(Path("")).lstrip(".")
    found = [temp for folder in folders for temp in folder.glob(f".*~*~*{TEMP}")]
    dead = [temp for temp in found if _writer_is_gone(temp) or (own and mine in temp.name)]
    for temp in dead:
        if temp.is_dir():
            shutil.rmtree(temp, ignore_errors=True)
        else:
            temp.unlink(missing_ok=True)
    return len(dead)


def _wait_s() -> float:
    """Return the time in s to wait for a lock: that in :data:`WAIT`, else 0."""
    text = os.environ.get(WAIT, "") or "0"
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= LONGEST_WAIT_S:
        raise BadInput(f"{WAIT} is {text!r}; expected seconds from 0 to {LONGEST_WAIT_S}")
    return seconds


@contextmanager
def exclusive(lock: Path, what: str) -> Iterator[None]:
    """Hold a lock file; the operating system releases it when the process dies.

    Raises:
        Busy: another process or thread holds it, also after the time in :data:`WAIT`.
        BadInput: its folder does not exist, or the time is no number.
        StorageFailed: the lock file cannot be created.
        Stopped: the command was asked to stop while it waited.
    """
    if not lock.parent.is_dir():  # FileLock would make it
        raise BadInput(f"{lock.parent} does not exist; check the path")
    holder = FileLock(lock, timeout=0, mode=0o666 & ~umask())
    until = time.monotonic() + _wait_s()
    try:
        while True:
            try:
                holder.acquire()
                break
            except Timeout as error:
                if time.monotonic() >= until:
                    raise Busy(
                        f"{what} is being written by another process or thread; try again when that ends, "
                        f"or set {WAIT} to the seconds to wait"
                    ) from error
            stopping.check()
            time.sleep(stopping.POLL_S)
    except OSError as error:
        raise storage_failed(lock, error) from error
    try:
        yield
    finally:
        holder.release()
