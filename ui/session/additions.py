"""Adds slides in the background: a bounded queue, and one slide is embedded at a time.

Each uploaded slide has its folder in the atlas's ``uploads/``, with its metadata in a file until it is in
the atlas. If the process is killed before that, the slide is queued again at the next start.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from ...artifacts.files import TEMP, read_json, write_json
from ...artifacts.images import SUFFIXES
from ...artifacts.slide_names import SLIDE_SUFFIXES, without_last_ending
from ...errors import (
    BadInput,
    Busy,
    HistoseekError,
    NotFound,
    StorageFailed,
    Unavailable,
    Unsupported,
)
from ...index.store.uploads import PENDING, UPLOADS
from ...serving.embedding.job import Job
from ...serving.embedding.pipeline import embed_jobs
from ...serving.embedding.results import EmbedOptions
from ...serving.encoders.engines import cores
from ...serving.encoders.open import open_encoder
from ...serving.slides.quality import listed
from .addition import PLAIN, Addition, TileChoice, plain
from .answers import now
from .session import Session

TRIES = 3
CUT_OFF_S = 3600
"""Seconds without a write after which an incomplete upload is abandoned and deleted."""
WAITS_S = (1, 2, 5, 15, 30)
PASSING = (Busy, Unavailable, StorageFailed)
INDEXES = frozenset({".mrxs", ".vms", ".vmu"})
MAX_WAITING = 32
JOBS_KEPT = 200
COPY_BYTES = 2**20
FIELD_LIMIT = 200
UNKNOWN: Mapping[str, str] = MappingProxyType({})
"""Who asked for a slide that a former process was asked to add."""
log = logging.getLogger("histoseek.additions")


class Additions:
    """Accepts slides by upload or from allowed folders, and adds them one after another.

    Attributes:
        watch: called with a slide before it is queued, and when it was added or has failed.
    """

    def __init__(self, session: Session, folders: Sequence[Path] = ()) -> None:
        """Start the worker, and queue unfinished uploads again.

        Args:
            session: the open atlas.
            folders: folders from which slides may be added by their path.
        """
        self._session = session
        self._folders = [folder.resolve() for folder in folders]
        self._uploads = session.atlas.path.resolve() / UPLOADS
        self._jobs: OrderedDict[str, Addition] = OrderedDict()
        self._lock = threading.Lock()
        self._queue: queue.Queue[str | None] = queue.Queue()  # unbounded: jobs are limited
        self._stop = threading.Event()
        self._number = 0
        self.watch: Callable[[Addition], None] = lambda job: None
        self._worker = threading.Thread(target=self._work, name="additions", daemon=True)
        self._worker.start()
        self._take_up()

    @property
    def takes_paths(self) -> bool:
        """Whether slides may be added from folders."""
        return bool(self._folders)

    # -- requests -------------------------------------------------------------------------------

    def upload(
        self,
        stream: BinaryIO,
        name: str,
        row: dict[str, str],
        replace: bool,
        tiles: TileChoice = PLAIN,
        by: Mapping[str, str] = UNKNOWN,
    ) -> Addition:
        """Save an uploaded slide in a separate folder, and queue it.

        Args:
            stream: the file's bytes.
            name: the file's name; only its last part is used.
            row: label, patient and mpp.
            replace: replace a slide with the same name, which stays until the new one is in the atlas.
            tiles: which tiles are embedded.
            by: user, address and request id, for the audit log.

        Raises:
            BadInput: the name is empty, the file is not a slide, or a slide with this name exists.
            Busy: too many slides are waiting.
            StorageFailed: there is no disk space.
        """
        file = plain(Path(name.replace("\\", "/")).name)
        if Path(file).suffix.lower() in INDEXES:
            raise Unsupported(
                f"{file} refers to other files, which an upload cannot include; put the slide with its "
                "files in a folder that the server was started with (--slides), and give its path"
            )
        folder = self._uploads / secrets.token_hex(8)
        job = self._reserve(folder / file, row, replace, tiles, by)
        try:
            folder.mkdir(mode=0o700, parents=True)
            with (folder / file).open("xb") as out:
                shutil.copyfileobj(stream, out, COPY_BYTES)
                out.flush()
                os.fsync(out.fileno())
            self.watch(job)
            about = {"row": row, "replace": replace, "tiles": asdict(tiles), "tries": 0}
            write_json(folder / PENDING, {**about, "by": dict(by)})
        except BaseException as error:
            with self._lock:
                self._jobs.pop(job.id, None)
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, (OSError, StorageFailed)):
                raise StorageFailed(
                    f"{file} cannot be stored ({error}); free space on the atlas's disk"
                ) from error
            raise
        self._queue.put(job.id)
        return job

    def path(
        self,
        path: Path,
        row: dict[str, str],
        replace: bool,
        tiles: TileChoice = PLAIN,
        by: Mapping[str, str] = UNKNOWN,
    ) -> Addition:
        """Queue a slide in an allowed folder; ``by`` as for :meth:`upload`.

        Raises:
            NotFound: the file does not exist, or is outside the allowed folders; the message does not
                reveal which.
            BadInput: the file is not a slide, or a slide with this name exists.
            Busy: too many slides are waiting.
        """
        try:
            real = path.resolve(strict=True)
        except (OSError, RuntimeError, ValueError):
            real = None
        inside = real is not None and any(real.is_relative_to(f) for f in self._folders)
        if real is None or not inside or not real.is_file():
            raise NotFound(
                f"{path.name} is not in a folder from which slides may be added; start the server "
                "with --slides FOLDER, or upload the slide"
            )
        job = self._reserve(real, row, replace, tiles, by)
        try:
            self.watch(job)
        except StorageFailed:
            with self._lock:
                self._jobs.pop(job.id, None)
            raise
        self._queue.put(job.id)
        return job

    def all(self) -> list[Addition]:
        """Return the jobs, newest first."""
        with self._lock:
            return list(reversed(self._jobs.values()))

    def get(self, number: str) -> Addition:
        """Return a job by id.

        Raises:
            NotFound: there is no such job (any more).
        """
        with self._lock:
            if number not in self._jobs:
                raise NotFound(
                    f"there is no job {number!r}; the server lists its last {JOBS_KEPT} at /v1/jobs"
                )
            return self._jobs[number]

    def remove(self, slide: str) -> int:
        """Remove a slide from the atlas, which also deletes its file if it was uploaded.

        Returns:
            The number of tiles removed.

        Raises:
            NotFound: there is no such slide.
            Busy: another process is writing.
        """
        if all(row["name"] != slide for row in self._session.atlas.slides()):
            raise NotFound(f"the atlas has no slide {slide!r}")
        return self._session.atlas.remove([slide])

    def close(self) -> None:
        """Stop the current slide; if it was uploaded, it is queued again at the next start."""
        self._stop.set()
        self._queue.put(None)
        self._worker.join(5)

    # -- worker ---------------------------------------------------------------------------------

    def _reserve(
        self,
        path: Path,
        row: dict[str, str],
        replace: bool,
        tiles: TileChoice,
        by: Mapping[str, str] = UNKNOWN,
    ) -> Addition:
        """Reserve a place in the queue for a slide, or raise if it cannot be added."""
        if self._session.encoder is None:
            raise BadInput(
                "the encoder of this atlas is not installed here, so slides cannot be embedded; embed "
                "them with the tool that made the atlas's features, and use `histoseek index import`"
            )
        for key, value in row.items():
            if len(value) > FIELD_LIMIT or not value.isprintable():
                raise BadInput(
                    f"{key} has {len(value)} characters; expected at most {FIELD_LIMIT}, all printable"
                )
        if path.suffix.lower() not in SLIDE_SUFFIXES | SUFFIXES:
            raise Unsupported(
                f"{path.name}: expected a slide (.svs, .ndpi, .mrxs, .scn, .bif, .tif, .tiff, .dcm …) or "
                "an image"
            )
        name = without_last_ending(path.name)
        existing = {slide["name"] for slide in self._session.atlas.slides()}
        with self._lock:
            under_way = [job for job in self._jobs.values() if not job.over]
            if len(under_way) >= MAX_WAITING:
                raise Busy(
                    f"{MAX_WAITING} slides are waiting already; try again when some are added"
                )
            if name in {job.slide for job in under_way}:
                raise BadInput(f"slide {name!r} is being added already; wait until it is done")
            if name in existing and not replace:
                raise BadInput(f"slide {name!r} is in the atlas already; rename it, or replace it")
            self._number += 1
            number = str(self._number)
            job = Addition(
                number, name, "waiting", 0, 0, "", now(), path, row, tiles, replace, dict(by)
            )
            self._jobs[number] = job
            while len(self._jobs) > JOBS_KEPT:
                self._jobs.popitem(last=False)
        return job

    def _take_up(self) -> None:
        """Queue uploads that a killed process left behind; skip those with too many attempts."""
        if not self._uploads.is_dir() or self._session.encoder is None:
            return
        known = {Path(row["source"]).parent.name for row in self._session.atlas.slides()}
        for folder in sorted(self._uploads.iterdir()):
            files = [f for f in folder.glob("*") if f.name != PENDING and not f.name.endswith(TEMP)]
            pending = (folder / PENDING).is_file()
            if pending and folder.name in known:  # killed right after the slide was added
                (folder / PENDING).unlink(missing_ok=True)
                continue
            if len(files) != 1 or not pending:
                self._clear(folder, files)
                continue
            try:
                about = read_json(folder / PENDING)
                tries = int(about["tries"])
                if tries >= TRIES:
                    log.error("%s was tried %d times; it is not tried again", files[0], tries)
                    continue
                row, replaces = dict(about["row"]), bool(about["replace"])
                tiles = TileChoice(**about.get("tiles", {}))  # former versions store none
                write_json(folder / PENDING, {**about, "tries": tries + 1})
                by = dict(about.get("by", {}))
                self._queue.put(self._reserve(files[0], row, replaces, tiles, by).id)
            except (HistoseekError, KeyError, TypeError, ValueError) as error:
                log.error("%s cannot be queued again: %s", files[0], error)

    def _clear(self, folder: Path, files: list[Path]) -> None:
        """Delete an incomplete upload: no slide uses it, it is not queued, and nothing writes to it."""
        if not folder.is_dir() or (folder / PENDING).exists():
            return
        # Compare names, not paths: the atlas may have moved, and a slide's file must not be deleted.
        if any(Path(s["source"]).parent.name == folder.name for s in self._session.atlas.slides()):
            return
        newest = max((file.stat().st_mtime for file in [folder, *files]), default=0.0)
        if time.time() - newest > CUT_OFF_S:
            shutil.rmtree(folder, ignore_errors=True)

    def _work(self) -> None:
        while (number := self._queue.get()) is not None and not self._stop.is_set():
            try:
                self._try(number)
            except KeyboardInterrupt:
                # The server is closing, or the command was stopped: the upload is queued at the next start.
                self._set(number, state="waiting", message="the server is stopping")
                return
            except Exception:  # continue with the next slide
                log.exception("job %s", number)
                self._set(number, state="failed", message="an error in the server; see its log")

    def _try(self, number: str) -> None:
        """Add one slide; keep the upload and retry after temporary errors, such as another writer."""
        path = self.get(number).path
        for wait in (*WAITS_S, None):
            try:
                self._add(number)
                return
            except PASSING as error:
                text = self._session.hide(str(error))
                if wait is None or self._stop.is_set():
                    text += (
                        "; the upload is stored, and tried again at the next start of the server"
                    )
                    self._set(number, state="failed", message=text)
                    return
                self._set(number, state="waiting", message=f"{text}; trying again")
                self._stop.wait(wait)
            except HistoseekError as error:
                text = self._session.hide(str(error).replace(str(path), path.name))
                self._delete_upload(path)  # first: when users see the failure, the file is gone
                self._set(number, state="failed", message=text)
                return

    def _delete_upload(self, path: Path) -> None:
        """Delete an uploaded slide and its folder; other files are never deleted."""
        if path.resolve().parent.parent == self._uploads:
            shutil.rmtree(path.parent, ignore_errors=True)

    def _add(self, number: str) -> None:
        job = self.get(number)
        self._set(number, state="embedding")

        def progress(done: int, total: int, text: str) -> None:
            self._set(number, done=done, total=total)
            if self._stop.is_set():
                raise KeyboardInterrupt  # ends embedding; other exceptions would count as a bad slide

        atlas = self._session.atlas
        # A separate encoder: a failed run closes it, but searches must continue.
        encoder = open_encoder(self._session.spec, expect=atlas.manifest)
        options = EmbedOptions(overlays=False, jobs=max(1, cores() - 1), **asdict(job.tiles))
        row = {key: value for key, value in job.row.items() if value}
        try:
            with tempfile.TemporaryDirectory(prefix="histoseek-add-") as folder:
                work = Job(job.slide, job.path, "slide", row)
                (result,) = embed_jobs([work], encoder, Path(folder), options, progress)
                if result.features is None:
                    raise BadInput(result.reason)
                self._set(number, state="adding", done=result.tiles, total=result.tiles)
                metadata = {work.location: {k: v for k, v in row.items() if k != "mpp"}}
                (added,) = atlas.add([Path(result.features)], metadata, job.replace)
        finally:
            encoder.close()
        if added.state == "failed":
            raise BadInput(added.reason)
        (job.path.parent / PENDING).unlink(missing_ok=True)
        text = f"{added.tiles:,} tiles" if added.tiles else f"no tiles: {added.reason}"
        if added.tiles and result.left_out_tiles:
            text += f"; left out: {listed(result.left_out_tiles)}"
        text = "; ".join([text, *map(self._session.hide, result.notes)])
        self._set(number, state="done", message=text)

    def _set(self, number: str, **changes: Any) -> None:
        with self._lock:
            if number not in self._jobs:
                return
            job = self._jobs[number] = replace(self._jobs[number], **changes)
        if not job.over:
            return
        if job.state == "failed":
            log.warning("adding %s failed (job %s): %s", job.slide, job.id, job.message)
        try:
            self.watch(job)
        except StorageFailed as error:
            log.error("%s", error)
