"""Local copies of slides behind URLs: made before a slide is opened, deleted when it is closed.

A slide is copied whole: finding tissue and reading tiles of a slide take most of its bytes, and OpenSlide
reads local files only.
"""

from __future__ import annotations

import os
import tempfile
import threading
from dataclasses import replace
from pathlib import Path, PurePosixPath
from shutil import rmtree

from ... import stopping
from ...artifacts.remote import Remote, require_room
from .jobs import Job
from .meter import Meter


class Staging:
    """Keeps the copies of one run within a limit; jobs get their room in the order of the run."""

    def __init__(self, limit_gb: float, meter: Meter) -> None:
        """Make a folder in ``$HISTOSEEK_STAGING``, else in the system's folder for temporary files."""
        place = os.environ.get("HISTOSEEK_STAGING") or tempfile.gettempdir()
        Path(place).mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix="histoseek-slides-", dir=place))
        stopping.mark(self.folder)
        self._limit, self._meter = limit_gb * 1e9, meter
        self._room = threading.Condition()
        self._used = 0
        self._turn = 0
        self._passed: set[int] = set()
        self._closed = False

    def copy(self, job: Job, number: int) -> Job:
        """Wait for room, then copy a job's files; ``number`` counts the run's jobs.

        Returns:
            The job with its local source; call :meth:`free` when it is closed.

        Raises:
            BadInput: a file cannot be read.
            StorageFailed: the disk is full.
        """
        size = sum(part.size for part in job.parts)
        self._wait(number, size)
        self.skip(number)
        folder = self.folder / str(number)
        with self._meter.fetching(size):
            require_room(self.folder, size, job.url)
            above = PurePosixPath(job.url).parent
            for part in job.parts:
                Remote(part.url).fetch(folder / PurePosixPath(part.url).relative_to(above))
        return replace(job, source=folder / job.source.name)

    def _wait(self, number: int, size: int) -> None:
        """Wait until it is this job's turn and its copy fits, or no other is there."""
        with self._room:
            while self._turn != number or (self._used and self._used + size > self._limit):
                if self._closed:
                    raise stopping.Stopped(stopping.exit_code() - 128)
                stopping.check()
                self._room.wait(stopping.POLL_S)
            self._used += size

    def skip(self, number: int) -> None:
        """Let the next job have its turn: this one has its room, or needs none."""
        with self._room:
            self._passed.add(number)
            while self._turn in self._passed:
                self._passed.remove(self._turn)
                self._turn += 1
            self._room.notify_all()

    def free(self, job: Job, number: int) -> None:
        """Delete the copy of a job."""
        rmtree(self.folder / str(number), ignore_errors=True)
        with self._room:
            self._used -= sum(part.size for part in job.parts)
            self._room.notify_all()

    def named(self, text: str, job: Job, number: int) -> str:
        """Return a text about a job with URLs in the place of local copies."""
        return text.replace(str(self.folder / str(number)), str(job.url).rpartition("/")[0])

    def close(self) -> None:
        """Delete all copies."""
        with self._room:
            self._closed = True
            self._room.notify_all()
        rmtree(self.folder, ignore_errors=True)
        stopping.unmark(self.folder)
