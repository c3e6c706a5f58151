"""The hash chain of the audit log: appending lines to it, and checking them.

Every line ends with its number and a SHA-256 over the hash of the previous chained line, anything written
between the two, and the line itself. So changing, removing or inserting a line breaks the chain there.
The next chained line covers lines written before the log had a chain, and lines cut off by a crash. The
head file ``<log>.head`` also holds number and hash of the last line, to detect lines missing at the end.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

FILE = "audit.jsonl"
HEAD = ".head"
START = "0" * 64
"""Used as the previous hash of the first line."""
TAIL_BYTES = 2**20
PIECE_BYTES = 2**20
LINE = re.compile(rb'(\{.*, "n": ([0-9]{1,18})), "chain": "([0-9a-f]{64})"\}\n')
HEAD_LINE = re.compile(rb"([0-9]{1,18}) ([0-9a-f]{64})\n *\n?")
HEAD_BYTES = 96
REMEDY = "keep the files as they are, find out who wrote to them, and restore the log from a copy"


@dataclass(frozen=True)
class Link:
    """Number and hash of a line in the chain."""

    number: int = 0
    sha256: str = START


def _hash(before: str, *parts: bytes) -> str:
    return hashlib.sha256(before.encode() + b"".join(parts)).hexdigest()


def _link(line: re.Match[bytes]) -> Link:
    return Link(int(line[2]), line[3].decode())


def head_path(log: Path) -> Path:
    """Return the path of a log's head file."""
    return log.with_name(log.name + HEAD)


def read_head(log: Path) -> Link | None:
    """Return the last line as named in a log's head file; None if there is no head file, or an empty one.

    Raises:
        OSError: the head file cannot be read.
        ValueError: the head file is damaged.
    """
    try:
        blob = head_path(log).read_bytes()
    except FileNotFoundError:
        return None
    head = _parse_head(blob)
    if head is None and blob.strip():
        raise ValueError(f"{head_path(log)} is damaged; expected a number and a SHA-256")
    return head


def _parse_head(blob: bytes) -> Link | None:
    found = HEAD_LINE.fullmatch(blob)
    return Link(int(found[1]), found[2].decode()) if found else None


# -- writing ----------------------------------------------------------------------------------------


class ChainedLog:
    """A log to append lines to; several processes may share it.

    Attributes:
        last: number and hash of the last line.
        notes: for the operator, such as that the head file is damaged.
    """

    def __init__(self, path: Path) -> None:
        """Open the log for appending, readable by its owner only.

        Raises:
            OSError: the log or its head cannot be written.
        """
        self._path = path
        self.notes: list[str] = []
        self.last = Link()
        self._file = self._head = -1
        self._size = 0
        self._jump = False
        self._pending = hashlib.sha256()
        try:
            self._open()
            with self._locked():
                self._find_end()
        except BaseException:
            self.close()
            raise

    def append(self, line: dict[str, Any]) -> None:
        """Append a line with its number and hash, then write the head.

        Args:
            line: JSON-ready; the keys ``n``, ``chain`` and ``follows`` are reserved.

        Raises:
            OSError: nothing was appended.
        """
        self._follow_rename()
        with self._locked():
            if os.fstat(self._file).st_size != self._size:  # another process wrote or emptied it
                self._find_end()
            number = self.last.number + 1
            follows = {"follows": self.last.sha256} if self._jump else {}
            document = {**line, **follows, "n": number}
            content = json.dumps(document, ensure_ascii=False, default=str)[:-1].encode()
            digest = self._pending.copy()
            digest.update(content)
            self._write(content + b', "chain": "%s"}\n' % digest.hexdigest().encode())
            self._advance(Link(number, digest.hexdigest()))
            os.pwrite(self._head, _head_line(self.last), 0)

    def close(self) -> None:
        """Close the files; appending is no longer possible."""
        for handle in (self._file, self._head):
            if handle >= 0:
                os.close(handle)
        self._file = self._head = -1

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_CREAT
        self._file = os.open(self._path, flags | os.O_APPEND, 0o600)
        if self._head < 0:
            self._head = os.open(head_path(self._path), flags, 0o600)

    def _follow_rename(self) -> None:
        """Reopen the log if log rotation has renamed the open file."""
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self._path), os.fstat(self._file)):
                return
        os.close(self._file)
        self._file = self._size = -1
        self._open()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.flock(self._head, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._head, fcntl.LOCK_UN)

    def _write(self, blob: bytes) -> None:
        try:
            while blob:
                blob = blob[os.write(self._file, blob) :]
        except OSError:
            os.ftruncate(self._file, self._size)  # remove the partial line
            raise

    def _advance(self, last: Link) -> None:
        self.last = last
        self._jump = False
        self._pending = hashlib.sha256(last.sha256.encode())
        self._size = os.fstat(self._file).st_size

    def _find_end(self) -> None:
        """Find the last chained line, and anything written after it."""
        with open(self._path, "rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            end, last = _last_link(stream, size)
            stream.seek(max(0, size - 1))
            torn = size > 0 and stream.read(1) != b"\n"
            head = self._known_head(last)
            self._advance(head or last)
            self._jump = head is not None
            stream.seek(end)
            while piece := stream.read(PIECE_BYTES):
                self._pending.update(piece)
        if _parse_head(os.pread(self._head, HEAD_BYTES, 0)) is None:
            os.pwrite(self._head, _head_line(self.last), 0)
        if torn:
            os.write(self._file, b"\n")
            self._pending.update(b"\n")
            self._size += 1
            self.notes.append(
                f"the last line of {self._path} is cut off; the hash of the next line covers it"
            )
        if not end and size:
            self.notes.append(f"the lines in {self._path} have no hash chain; it begins now")

    def _known_head(self, last: Link) -> Link | None:
        """Return the head if it names a line that is no longer the last line of the log; else None."""
        blob = os.pread(self._head, HEAD_BYTES, 0)
        head = _parse_head(blob)
        if head is None:
            if blob.strip() or last.number:
                what = "damaged" if blob.strip() else "missing"
                self.notes.append(f"{head_path(self._path)} is {what}; it is written again")
            return None
        if head.number < last.number or head == last:
            return None
        self.notes.append(
            f"{self._path} does not end with line {head.number}, which its head file names (it was "
            f"rotated, emptied or cut); the next line states that it follows line {head.number}"
        )
        return head


def _head_line(last: Link) -> bytes:
    """Return a head of fixed length, so that one write replaces it."""
    return f"{last.number} {last.sha256}\n".encode().ljust(HEAD_BYTES - 1) + b"\n"


def _last_link(stream: IO[bytes], size: int) -> tuple[int, Link]:
    """Return the offset of the end of the last chained line (0 if none), and its number and hash."""
    for start in (max(0, size - TAIL_BYTES), 0):
        stream.seek(start)
        at = start + (len(stream.readline()) if start else 0)
        end, last = 0, Link()
        for line in stream:
            at += len(line)
            if found := LINE.fullmatch(line):
                end, last = at, _link(found)
        if end:
            return end, last
    return 0, Link()


# -- checking ---------------------------------------------------------------------------------------


def problems(log: Path) -> list[str]:
    """Return the problems of a log and its head: the first line that breaks the chain, and missing lines.

    A log that never had a chain is not checked.
    """
    return _problems(log) and _problems(log)  # check again: a server may have been writing


def _problems(log: Path) -> list[str]:
    try:
        head = read_head(log)
    except OSError as error:
        return [f"{head_path(log)} cannot be read ({error.strerror}); run this as its owner"]
    except ValueError as error:
        return [f"{error}; {REMEDY}"]
    try:
        with log.open("rb") as stream:
            found = _Check(log, head).run(stream)
    except FileNotFoundError:
        if head is None:
            return []
        return [f"{log} is missing, and {head.number} lines with it; {REMEDY}"]
    except OSError as error:
        return [f"{log} cannot be read ({error.strerror}); run this as its owner"]
    return [f"{text}; {REMEDY}" for text in found]


class _Check:
    """One check of a log from its first line to its last."""

    def __init__(self, log: Path, head: Link | None) -> None:
        self._log, self._head = log, head
        self._last = Link()
        self._begun = False
        self._gap: list[bytes] = []
        self._gap_at = 0
        self._matches_head = False

    def run(self, stream: IO[bytes]) -> list[str]:
        found: list[str] = []
        lines = enumerate(stream, 1)
        for at, line in lines:
            match = LINE.fullmatch(line)
            if match is None:
                self._gap_at = self._gap_at or at
                self._gap.append(line)
                continue
            link = _link(match)
            before, missing = self._before(at, match[1], link)
            if _hash(before, *self._gap, match[1]) != link.sha256:
                following = next(filter(None, (LINE.fullmatch(rest) for _, rest in lines)), None)
                return [*found, self._cause(at, match[1], link, following)]
            found += missing
            self._last, self._begun, self._gap, self._gap_at = link, True, [], 0
            self._matches_head = self._matches_head or link == self._head
        return [*found, *self._end()]

    def _before(self, at: int, content: bytes, link: Link) -> tuple[str, list[str]]:
        """Return the hash that a line builds on, and the problem if it is not that of the previous line."""
        follows = _follows(content)
        if follows is None or follows == self._last.sha256:
            return self._last.sha256, []
        missing = _numbers(self._last.number + 1, link.number - 1)
        if not self._begun and self._rotated(follows):
            return follows, []
        where = (
            "they were cut off" if self._begun else "no older log file in its folder ends with them"
        )
        return follows, [f"{self._log}: before line {at}, {missing} missing: {where}"]

    def _rotated(self, last: str) -> bool:
        """Whether a rotated file of the log, such as ``audit.jsonl.1`` or ``.1.gz``, ends with ``last``."""
        for path in sorted(self._log.parent.glob(self._log.name + "[.-]*")):
            if path == head_path(self._log) or not path.is_file():
                continue
            packed = path.suffix == ".gz"
            with (  # a damaged archive ends with nothing
                suppress(gzip.BadGzipFile, EOFError, zlib.error),
                gzip.open(path) if packed else path.open("rb") as stream,
            ):
                size = sum(map(len, stream)) if packed else path.stat().st_size
                if _last_link(cast(IO[bytes], stream), size)[1].sha256 == last:
                    return True
        return False

    def _cause(self, at: int, content: bytes, link: Link, following: re.Match[bytes] | None) -> str:
        """Describe what happened to the first line that breaks the chain."""
        last, number, title = self._last, link.number, f"{self._log}, line {at}"
        if self._gap and not self._begun:
            first = f"lines {self._gap_at} to {at}" if self._gap_at < at else f"line {at}"
            return f"{first} of {self._log}: one was changed, removed or inserted since the chain began"
        if self._gap and _hash(last.sha256, content) == link.sha256:
            return f"{self._log}, line {self._gap_at}: it was inserted"
        if self._gap:
            return f"{self._log}, line {self._gap_at}: it was changed or inserted"
        if following is not None and _hash(last.sha256, following[1]) == following[3].decode():
            return f"{title}: it was inserted (number {number})"
        if number > last.number + 1:
            return f"{title}: before it, {_numbers(last.number + 1, number - 1)} missing (removed)"
        if number <= last.number:
            return f"{title}: it was inserted or moved (number {number} after {last.number})"
        return f"{title}: it was changed (number {number})"

    def _end(self) -> list[str]:
        last, head, log = self._last, self._head, self._log
        found = []
        if self._gap and self._begun:
            text = "was cut off" if not self._gap[-1].endswith(b"\n") else "has no hash"
            found.append(f"{log}, line {self._gap_at}: it {text}, and no line after it covers it")
        if head is None:
            if self._begun:
                text = "is missing, so lines missing at the end of the log cannot be detected"
                found.append(f"{head_path(log)} {text}")
        elif head.number > last.number:
            found.append(f"{log}: {_numbers(last.number + 1, head.number)} missing at its end")
        elif not self._matches_head and (head.number or last.number > 1):  # it begins as 0
            found.append(f"{log}: it has no line {head.number} with the hash in its head file")
        return found


def _follows(content: bytes) -> str | None:
    """Return the hash in ``follows``, which a line has if it does not continue the previous line."""
    if b'"follows": "' not in content:
        return None
    try:
        follows = json.loads(content + b"}").get("follows")
    except (ValueError, AttributeError):
        return None
    return follows if isinstance(follows, str) else None


def _numbers(first: int, last: int) -> str:
    return f"number {first} is" if first >= last else f"numbers {first} to {last} are"
