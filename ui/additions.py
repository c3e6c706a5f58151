"""Adding slides while people search: a bounded queue, one slide at a time embedded in the background.

A slide that was uploaded is kept in the atlas's folder ``uploads/``, with what was said of it beside it;
one that a kill left there before it was added is taken up again at the next start.
"""

from __future__ import annotations

import queue
import re
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

from ..errors import (
    BadInput,
    Busy,
    HistoseekError,
    NotFound,
    StorageFailed,
    TooLarge,
    Unsupported,
)
from ..files import read_json, write_json
from ..images import SUFFIXES
from ..serving.encoder import open_encoder
from ..serving.engines import cores
from ..serving.jobs import Job
from ..serving.pipeline import embed_jobs
from ..serving.results import EmbedOptions
from ..serving.slide_sources import SLIDE_SUFFIXES
from .answers import now
from .handlers import Session

UPLOADS = "uploads"
MAX_WAITING = 32
JOBS_KEPT = 200
COPY_BYTES = 2**20
FIELD_LIMIT = 200
State = Literal["waiting", "embedding", "adding", "done", "failed"]


@dataclass(frozen=True)
class Addition:
    """A slide on its way into the atlas.

    Attributes:
        id: of the job.
        slide: its name in the atlas.
        state: waiting, embedding, adding, done or failed.
        done: tiles embedded.
        total: tiles known to be wanted; 0 before the slide is open.
        message: why it failed, or what came of it.
        at: when it was asked for, UTC.
        path: of the file; not shown to anyone.
        row: label, patient and mpp, as given.
        replace: whether it takes the place of a slide of that name.
    """

    id: str
    slide: str
    state: State
    done: int
    total: int
    message: str
    at: str
    path: Path
    row: dict[str, str]
    replace: bool = False

    @property
    def over(self) -> bool:
        """Whether nothing more happens."""
        return self.state in {"done", "failed"}

    def public(self) -> dict[str, Any]:
        """Return what may be shown."""
        shown = ("id", "slide", "state", "done", "total", "message", "at")
        return {key: getattr(self, key) for key in shown}


class Additions:
    """Takes slides by upload or from folders that are allowed, and adds them one after another."""

    def __init__(self, session: Session, folders: Sequence[Path] = ()) -> None:
        """Start the worker, and take up what was left behind.

        Args:
            session: the open atlas.
            folders: from which slides may be added by their path.
        """
        self._session = session
        self._folders = [folder.resolve() for folder in folders]
        self._uploads = session.atlas.path / UPLOADS
        self._jobs: OrderedDict[str, Addition] = OrderedDict()
        self._lock = threading.Lock()
        self._queue: queue.Queue[str | None] = queue.Queue(MAX_WAITING)
        self._number = 0
        self._closing = False
        self._worker = threading.Thread(target=self._work, name="additions", daemon=True)
        self._worker.start()
        self._take_up()

    @property
    def takes_paths(self) -> bool:
        """Whether there are folders from which slides may be added."""
        return bool(self._folders)

    # -- asking ---------------------------------------------------------------------------------

    def upload(self, stream: BinaryIO, name: str, row: dict[str, str], replace: bool) -> Addition:
        """Keep an uploaded slide and line it up.

        Args:
            stream: of its bytes.
            name: of its file; only the last part counts.
            row: label, patient and mpp.
            replace: put it in the place of a slide of that name.

        Raises:
            BadInput: no name, a kind of file that is no slide, or a slide of that name is there.
            Busy: too many wait.
            StorageFailed: no space.
        """
        self._ready()
        file = plain(Path(name.replace("\\", "/")).name)
        self._check(Path(file), row, replace)
        target = self._uploads / file
        if target.exists() and not replace:
            raise BadInput(
                f"an upload of the name {file} is there already; rename it, or replace it"
            )
        part = target.with_name(f".{file}.part")
        try:
            self._uploads.mkdir(mode=0o700, exist_ok=True)
            with part.open("wb") as out:
                shutil.copyfileobj(stream, out, COPY_BYTES)
            write_json(_sidecar(target), {"row": row, "replace": replace})
            part.replace(target)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise StorageFailed(
                f"{file} cannot be kept ({error.strerror}); free space on the atlas's disk"
            ) from error
        return self._line_up(target, row, replace)

    def path(self, path: Path, row: dict[str, str], replace: bool) -> Addition:
        """Line up a slide that lies in an allowed folder.

        Raises:
            NotFound: it does not exist, or lies elsewhere: which of both is not told.
            BadInput: it is no slide, or a slide of that name is there.
            Busy: too many wait.
        """
        self._ready()
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
        self._check(real, row, replace)
        return self._line_up(real, row, replace)

    def all(self) -> list[Addition]:
        """Return the jobs, newest first."""
        with self._lock:
            return list(reversed(self._jobs.values()))

    def get(self, number: str) -> Addition:
        """Return a job by id.

        Raises:
            NotFound: no such job (any more).
        """
        with self._lock:
            if number not in self._jobs:
                raise NotFound(f"there is no job {number!r} (any more)")
            return self._jobs[number]

    def remove(self, slide: str) -> int:
        """Take a slide out of the atlas, and delete its file if it was uploaded here.

        Returns:
            How many tiles went.

        Raises:
            NotFound: no such slide.
            Busy: another process is writing.
        """
        source = next(
            (s["source"] for s in self._session.atlas.slides() if s["name"] == slide), None
        )
        if source is None:
            raise NotFound(f"the atlas holds no slide {slide!r}")
        tiles = self._session.atlas.remove([slide])
        path = Path(source)
        if path.parent == self._uploads.resolve() or path.parent == self._uploads:
            path.unlink(missing_ok=True)
            _sidecar(path).unlink(missing_ok=True)
        return tiles

    def close(self) -> None:
        """Let the slide under way be; it is taken up again at the next start if it was uploaded."""
        self._closing = True
        with suppress(queue.Full):
            self._queue.put_nowait(None)
        self._worker.join(5)

    # -- doing ----------------------------------------------------------------------------------

    def _ready(self) -> None:
        if self._session.encoder is None:
            raise BadInput(
                "this atlas has no encoder here, so slides cannot be embedded; embed them with the tool "
                "that made its features, and use `histoseek index import`"
            )
        if self._queue.full():
            raise Busy(f"{MAX_WAITING} slides wait already; ask again when some are through")

    def _check(self, path: Path, row: dict[str, str], replace: bool) -> None:
        for key, value in row.items():
            if len(value) > FIELD_LIMIT or not value.isprintable():
                raise TooLarge(f"{key} is longer than {FIELD_LIMIT} characters, or not plain text")
        if path.suffix.lower() not in SLIDE_SUFFIXES | SUFFIXES:
            raise Unsupported(
                f"{path.name}: expected a slide (.svs, .ndpi, .mrxs as one file, .scn, .bif, .tif, .tiff, "
                ".dcm …) or a picture"
            )
        there = {slide["name"] for slide in self._session.atlas.slides()}
        waiting = {job.slide for job in self.all() if not job.over}
        if path.stem in waiting:
            raise BadInput(f"slide {path.stem!r} is on its way already")
        if path.stem in there and not replace:
            raise BadInput(f"slide {path.stem!r} is in the atlas already; rename it, or replace it")

    def _line_up(self, path: Path, row: dict[str, str], replace: bool) -> Addition:
        with self._lock:
            self._number += 1
            job = Addition(
                f"{self._number}", path.stem, "waiting", 0, 0, "", now(), path, row, replace
            )
            self._jobs[job.id] = job
            while len(self._jobs) > JOBS_KEPT:
                self._jobs.popitem(last=False)
        try:
            self._queue.put_nowait(job.id)
        except queue.Full:
            with self._lock:
                del self._jobs[job.id]
            raise Busy(
                f"{MAX_WAITING} slides wait already; ask again when some are through"
            ) from None
        return job

    def _take_up(self) -> None:
        """Line up uploads that are not in the atlas; drop parts of broken ones."""
        if not self._uploads.is_dir() or self._session.encoder is None:
            return
        there = {Path(slide["source"]).name for slide in self._session.atlas.slides()}
        for file in sorted(self._uploads.iterdir()):
            if file.name.endswith(".part"):
                file.unlink(missing_ok=True)
            elif file.suffix != ".json" and file.name not in there and _sidecar(file).is_file():
                with suppress(HistoseekError, KeyError, TypeError):
                    about = read_json(_sidecar(file))
                    self._line_up(file, dict(about["row"]), bool(about["replace"]))

    def _work(self) -> None:
        while (number := self._queue.get()) is not None and not self._closing:
            try:
                self._add(number)
            except Exception as error:  # one bad slide must not stop the next
                text = str(error) or type(error).__name__
                path = self._jobs[number].path
                self._set(number, state="failed", message=text.replace(str(path), path.name))
                self._drop_upload(path)

    def _add(self, number: str) -> None:
        job = self.get(number)
        self._set(number, state="embedding")

        def progress(done: int, total: int, text: str) -> None:
            self._set(number, done=done, total=total)
            if self._closing:
                raise KeyboardInterrupt

        atlas = self._session.atlas
        # An encoder of its own: a run that fails closes it, and people go on searching.
        encoder = open_encoder(self._session.spec, expect=atlas.manifest)
        options = EmbedOptions(overlays=False, jobs=max(1, cores() - 1))
        row = {key: value for key, value in job.row.items() if value}
        try:
            with tempfile.TemporaryDirectory(prefix="histoseek-add-") as folder:
                work = Job(job.slide, job.path, "slide", row)
                (result,) = embed_jobs([work], encoder, Path(folder), options, progress)
                if result.features is None:
                    raise BadInput(result.reason)
                self._set(number, state="adding", done=result.tiles, total=result.tiles)
                metadata = {job.slide: {k: v for k, v in row.items() if k != "mpp"}}
                (added,) = self._session.atlas.add([Path(result.features)], metadata, job.replace)
        except KeyboardInterrupt:
            return  # closing: the upload stays, and is taken up again
        finally:
            encoder.close()
        if added.state == "failed":
            raise BadInput(added.reason)
        text = f"{added.tiles:,} tiles" if added.tiles else f"no tiles: {added.reason}"
        self._set(number, state="done", message=text)

    def _drop_upload(self, path: Path) -> None:
        if path.parent == self._uploads and self._jobs:
            there = {Path(slide["source"]).name for slide in self._session.atlas.slides()}
            if path.name not in there:
                path.unlink(missing_ok=True)
                _sidecar(path).unlink(missing_ok=True)

    def _set(self, number: str, **changes: Any) -> None:
        with self._lock:
            if number in self._jobs:
                self._jobs[number] = replace(self._jobs[number], **changes)


def plain(name: str) -> str:
    """Return a file name without anything that a file name should not have.

    Raises:
        BadInput: nothing is left.
    """
    found = re.sub(r"[^\w.\- ]", "_", name).strip(" .")[-120:]
    if not found or not Path(found).stem.strip("._ "):
        raise BadInput(f"{name!r} is no name for a slide; expected one such as case-1.svs")
    return found


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")
