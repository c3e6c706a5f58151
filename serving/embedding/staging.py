"""Local copies of slides behind URLs: made before a slide is opened, deleted when it is closed.

A slide is copied whole, since OpenSlide reads local files only.
"""

from __future__ import annotations

import shutil
import threading
from contextlib import ExitStack
from dataclasses import replace

from ... import stopping
from ...artifacts.dicomweb import DicomInstance, is_dicomweb
from ...artifacts.files import temporary_folder
from ...artifacts.remote import Remote, require_room
from .job import Job
from .meter import Meter


class Staging:
    """Keeps the copies of one run within a limit; jobs get their room in the order of the run."""

    def __init__(self, limit_gb: float, meter: Meter) -> None:
        """Make a folder in ``$HISTOSEEK_STAGING``, else in the system's folder for temporary files.

        Raises:
            StorageFailed: it cannot be made.
        """
        self._folder = ExitStack()
        self.folder = self._folder.enter_context(temporary_folder("slides"))
        self._limit, self._meter = limit_gb * 1e9, meter
        self._room = threading.Condition()
        self._used = 0
        self._turn = 0
        self._passed: set[int] = set()
        self._halted = False

    def copy(self, job: Job, number: int) -> Job:
        """Wait for room, then copy a job's files; ``number`` counts the run's jobs.

        Returns:
            The job with its local source; call :meth:`free` when it is closed.

        Raises:
            BadInput: a file cannot be read; its room is free again.
            StorageFailed: the disk is full.
        """
        size = sum(part.size for part in job.parts)
        self._wait(number, size)
        self.skip(number)
        folder = self.folder / str(number)
        try:
            with self._meter.fetching(size):
                require_room(self.folder, size, job.url)
                for url, path in job.copies().items():
                    remote = DicomInstance(url) if is_dicomweb(url) else Remote(url)
                    remote.fetch(folder / path, self._is_halted)
        except BaseException:
            self.free(job, number)
            raise
        return replace(job, source=folder / job.copies()[job.parts[0].url])

    def _is_halted(self) -> bool:
        return self._halted or stopping.requested()

    def _wait(self, number: int, size: int) -> None:
        """Wait until it is this job's turn and its copy fits, or no other is there."""
        with self._room:
            while self._turn != number or (self._used and not self._fits(size)):
                if self._halted:
                    raise stopping.Stopped(stopping.exit_code() - 128)
                stopping.check()
                self._room.wait(stopping.POLL_S)
            self._used += size

    def _fits(self, size: int) -> bool:
        return self._used + size <= self._limit and shutil.disk_usage(self.folder).free >= size

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
        shutil.rmtree(self.folder / str(number), ignore_errors=True)
        with self._room:
            self._used -= sum(part.size for part in job.parts)
            self._room.notify_all()

    def halt(self) -> None:
        """End all waiting and copying."""
        with self._room:
            self._halted = True
            self._room.notify_all()

    def close(self) -> None:
        """Delete all copies; nothing may be copied any more."""
        self._folder.close()
