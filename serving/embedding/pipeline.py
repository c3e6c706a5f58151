"""Embedding: every job becomes one feature file; a failed job is recorded and does not stop the others.

Separate threads open slides a few ahead, a pool of workers reads and encodes their tiles in pieces, and
this thread writes the results in order. So the encoder has work while slides are opened and written, and
memory is bounded for slides of any size. The files are byte-identical for any number of workers, because
the pieces of a slide depend only on the slide.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ... import stopping
from ...artifacts.feature_files import QUALITY, STAIN
from ...artifacts.feature_writer import FeatureWriter
from ...artifacts.files import read_json, remove_leftovers, write_json
from ...artifacts.manifest import Manifest
from ...console import Progress
from ...errors import BadInput, Busy, HistoseekError, Mismatch, StorageFailed, Unavailable
from ..encoders.engines import cores
from ..encoders.protocol import Encoder
from ..encoders.stain_normalisation import embed_normalised, graph_of
from ..slides.quality import Measures, measure
from ..slides.stain import Counts, tally
from .job import Job
from .measured import Measured
from .meter import Meter
from .regions import with_regions
from .remote_out import RemoteOut
from .results import EmbedOptions, Result, State
from .staging import Staging
from .tissue_network import open_network
from .work import Work, done_before, failed, folders_for, prepare, printable, refuse_if_broken

PIECE = 64
"""Minimum number of tiles read together; neighbouring tiles share decoded segments."""

OPENERS = 2
OPEN_AHEAD = 3
PIECES_AHEAD = 2
FATAL = (StorageFailed, Busy, Unavailable)
"""Errors that end a run, because every further slide would fail the same way."""


@dataclass
class _Embedded:
    """Result of one piece.

    Attributes:
        features: (M, D) embeddings of the tiles without a fault.
        numbers: (R,) numbers of the tiles that were read; ``quality`` (R, Q) and ``faults`` (R,) of these.
        unreadable: errors of the other tiles.
        colours: (4,) counts of the colours of the tiles without a fault; None without such tiles.
    """

    features: NDArray[np.float32]
    numbers: list[int]
    quality: Measures
    faults: NDArray[np.int8]
    unreadable: list[str]
    colours: Counts | None = None


class _Slide:
    """A slide or tile set that the workers are processing."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.started: float | None = None  # when a worker began to read it
        self.writer: FeatureWriter | None = None
        self.measured = Measured(work.count)
        self.embedded = 0  # tiles
        self.unreadable: list[str] = []
        self.error: Exception | None = None

    def close(self) -> None:
        if self.writer is not None:
            self.writer.discard()
        self.work.close()


def check_options(options: EmbedOptions, encoder: Encoder) -> None:
    """Check what can be wrong for all jobs, so that it is reported once and before they are counted.

    Raises:
        BadInput: the overlap is not less than a tile's side, or the tissue network cannot be used.
    """
    if options.overlap_px >= encoder.manifest.size_px:
        raise BadInput(
            f"--overlap is {options.overlap_px}; expected less than the tile's "
            f"{encoder.manifest.size_px} pixels"
        )
    open_network(options.tissue_model)


def embed_jobs(
    jobs: Sequence[Job],
    encoder: Encoder,
    out: Path,
    options: EmbedOptions,
    progress: Progress,
    meter: Meter | None = None,
    results: list[Result] | None = None,
    remote: RemoteOut | None = None,
) -> list[Result]:
    """Embed every job and write its features under ``out``.

    Feature files appear complete or not at all, so repeating a killed run finishes it: finished jobs
    are skipped. The state of every job is in ``out/status/<name>.json``.

    Args:
        jobs: from :func:`find_jobs`.
        encoder: any encoder; it is closed if the run ends early.
        out: the folder for features.
        options: how to cut tiles.
        progress: called with tiles done, tiles expected, and a line about the run.
        meter: counts tiles and seconds; a new one when None.
        results: the result of each job is appended as the job ends, also if the run ends early.
        remote: the folder behind a URL for which ``out`` stands.

    Returns:
        The result of every job, in the order of the jobs.

    Raises:
        StorageFailed: the disk is full or ``out`` is not writable; earlier results are kept.
        Unavailable: a server did not answer until its deadline; earlier results are kept.
    """
    check_options(options, encoder)
    remove_leftovers(folders_of(out))
    jobs = with_regions(jobs, options.regions)
    ended = [] if results is None else results
    return _Run(jobs, encoder, out, options, progress, meter or Meter(), ended, remote).run()


def folders_of(out: Path) -> list[Path]:
    """Return every folder that holds files of a run."""
    beside = (out / name for name in ("status", "overlays", "geojson"))
    return [out, *beside, *out.glob("*/features_*")]


class _Run:
    """One call of :func:`embed_jobs`: its pools, its queue, and its results."""

    def __init__(
        self,
        jobs: Sequence[Job],
        encoder: Encoder,
        out: Path,
        options: EmbedOptions,
        progress: Progress,
        meter: Meter,
        ended: list[Result],
        remote: RemoteOut | None,
    ) -> None:
        self._ended, self._remote = ended, remote
        self._jobs, self._encoder, self._out, self._options = jobs, encoder, out, options
        self._progress, self._meter = progress, meter
        meter.jobs = len(jobs)
        workers = options.jobs or cores()
        if encoder.offloads:  # workers that wait for the encoder use no core
            workers += encoder.parallel
        self._graph = graph_of(encoder)
        self._piece = -(-PIECE // encoder.batch) * encoder.batch
        self._window = PIECES_AHEAD * workers
        self._openers = ThreadPoolExecutor(OPENERS, thread_name_prefix="open")
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix="embed")
        self._in_flight: deque[tuple[_Slide, Future[_Embedded] | None]] = deque()
        self._results: dict[int, Result] = {}
        self._numbers = {id(job): number for number, job in enumerate(jobs)}
        self._staging: Staging | None = None
        if any(job.url for job in jobs):
            self._staging = Staging(options.staging_gb, meter)
        self._per_thread = threading.local()
        self._stopping = False

    def run(self) -> list[Result]:
        """Run all jobs; on a fatal error or a stop request, end soon and leave no unfinished files."""
        opening: deque[tuple[Job, float, Future[Work | Result]]] = deque()
        waiting = deque(self._jobs)
        try:
            while waiting or opening:
                while waiting and len(opening) < OPEN_AHEAD:
                    job = waiting.popleft()
                    opening.append((job, time.monotonic(), self._openers.submit(self._open, job)))
                job, started, future = opening[0]
                while not future.done() and self._in_flight:
                    self._finish_oldest()
                work = self._opened(future)
                opening.popleft()
                if isinstance(work, Result):
                    self._record(job, work, started, opened=False)
                else:
                    self._submit(_Slide(work))
            while self._in_flight:
                self._finish_oldest()
        except BaseException:
            self._stopping = True
            self._encoder.close()  # ends all waiting for a server
            if self._staging is not None:
                self._staging.halt()
            raise
        finally:
            self._openers.shutdown(cancel_futures=True)
            self._workers.shutdown(cancel_futures=True)
            self._close([future for _, _, future in opening])
            if self._staging is not None:
                self._staging.close()
        return [self._results[number] for number in sorted(self._results)]

    def _opened(self, future: Future[Work | Result]) -> Work | Result:
        """Return the outcome of opening a job; before a fatal error is raised, earlier slides finish."""
        try:
            return stopping.result(future)
        except FATAL:
            while self._in_flight:
                self._finish_oldest()
            raise

    def _close(self, opening: Sequence[Future[Work | Result]]) -> None:
        """Close the slides of a run that ended early."""
        for slide in {id(slide): slide for slide, _ in self._in_flight}.values():
            slide.close()
        for future in opening:
            if future.done() and not future.cancelled() and future.exception() is None:
                work = future.result()
                if not isinstance(work, Result):
                    work.close()
        remove_leftovers(folders_of(self._out), own=self._stopping)

    def _open(self, job: Job) -> Work | Result:
        precision = str(self._encoder.describe().get("precision", "f32"))
        given = self._encoder.manifest, precision, self._out, self._options
        number = self._numbers[id(job)]
        try:
            if job.problem:
                return failed(job, BadInput(job.problem))
            if self._remote is not None:
                self._remote.fetch(job, folders_for(self._encoder.manifest, self._options))
            if job.url and self._staging is not None:
                return self._open_remote(job, number, self._staging, given)
            with self._meter.stage("open", 1):
                return prepare(job, *given, remote_out=self._remote is not None)
        except FATAL:
            raise
        except Exception as error:  # one bad file must not stop the others
            return failed(job, error)
        finally:
            if self._staging is not None:
                self._staging.skip(number)

    def _open_remote(
        self,
        job: Job,
        number: int,
        staging: Staging,
        given: tuple[Manifest, str, Path, EmbedOptions],
    ) -> Work | Result:
        """Copy a slide from its URL and open it, unless its features are complete."""
        done = done_before(job, *given, remote_out=self._remote is not None)
        if done is not None:
            return done
        work: Work | Result | None = None
        copied = staging.copy(job, number)
        try:
            with self._meter.stage("open", 1):
                work = prepare(copied, *given, remote_out=self._remote is not None)
        except FATAL:
            raise
        except Exception as error:
            return failed(copied, error)
        finally:
            if work is None or isinstance(work, Result):
                staging.free(job, number)
        if not isinstance(work, Result):
            self._numbers[id(copied)] = number
            work.closing.callback(staging.free, job, number)
        return work

    def _submit(self, slide: _Slide) -> None:
        """Send a slide's pieces to the workers; at most a window of pieces is in flight."""
        count = slide.work.count
        self._meter.slide_opened(count)
        for start in range(0, count, self._piece):
            while len(self._in_flight) >= self._window:
                self._finish_oldest()
            stop = min(count, start + self._piece)
            future = self._workers.submit(self._embed, slide, start, stop)
            self._in_flight.append((slide, future))
        self._in_flight.append((slide, None))  # marks the slide's end

    def _embed(self, slide: _Slide, start: int, stop: int) -> _Embedded:
        """Read and encode one piece; runs on a worker."""
        if self._stopping or slide.error is not None:
            return self._nothing([])
        slide.started = slide.started or time.monotonic()
        tiles = self._buffer()[: stop - start]
        with self._meter.stage("read", stop - start):
            errors = slide.work.read(start, tiles)
        numbers = [start + n for n in range(len(tiles)) if n not in errors]
        reasons = [str(error) for _, error in sorted(errors.items())]
        if not numbers:
            return self._nothing(reasons)
        if errors:
            tiles = np.delete(tiles, list(errors), axis=0)
        quality = measure(tiles)
        faults = slide.work.limits.faults(quality)
        piece = replace(self._nothing(reasons), numbers=numbers, quality=quality, faults=faults)
        if faults.any():
            tiles = tiles[faults == 0]
        if not len(tiles):
            return piece
        piece = replace(piece, colours=tally(tiles))
        with self._meter.stage("encode", len(tiles)):
            embedded = np.flatnonzero(faults == 0).tolist()
            changed = slide.work.normalised([numbers[n] for n in embedded], tiles)
            run, manifest = self._graph.embed, self._graph.manifest
            return replace(piece, features=embed_normalised(run, manifest, changed, tiles))

    def _nothing(self, unreadable: list[str]) -> _Embedded:
        """Return the result of a piece of which no tile was read."""
        dim = self._encoder.manifest.dim
        return _Embedded(
            np.zeros((0, dim), dtype=np.float32),
            [],
            np.zeros((0, len(QUALITY)), np.float32),
            np.zeros(0, np.int8),
            unreadable,
        )

    def _buffer(self) -> NDArray[np.uint8]:
        """Return this worker's buffer for one piece; a new one each time would cost as much as reading."""
        if not hasattr(self._per_thread, "buffer"):
            size = self._encoder.manifest.size_px
            self._per_thread.buffer = np.empty((self._piece, size, size, 3), dtype=np.uint8)
        buffer: NDArray[np.uint8] = self._per_thread.buffer
        return buffer

    def _finish_oldest(self) -> None:
        """Wait for the oldest piece and write it; at a slide's end mark, finish the slide."""
        slide, future = self._in_flight[0]
        try:
            if future is None:
                result = self._write(slide)
            else:
                self._append(slide, stopping.result(future))
        except (*FATAL, Mismatch):  # a changed encoder concerns every slide
            raise
        except Exception as error:  # a failed piece fails only its slide
            slide.error = slide.error or error
            result = failed(slide.work.job, slide.error)
        self._in_flight.popleft()
        if future is None:
            slide.close()
            result = replace(result, name=slide.work.name, tissue=slide.work.tissue)
            started = slide.started or time.monotonic()
            self._record(slide.work.job, result, started - slide.work.seconds, opened=True)

    def _append(self, slide: _Slide, piece: _Embedded) -> None:
        unreadable = len(piece.unreadable)
        self._meter.tiles_ended(len(piece.numbers) + unreadable, unreadable)
        slide.measured.add(piece.numbers, piece.quality, piece.faults, piece.colours)
        slide.embedded += len(piece.features)
        slide.unreadable += map(slide.work.job.named, piece.unreadable)
        self._writer(slide).append(piece.features)
        self._meter.report(self._progress, slide.work.name)

    def _writer(self, slide: _Slide) -> FeatureWriter:
        if slide.writer is None:
            dim = self._encoder.manifest.dim
            slide.writer = FeatureWriter(slide.work.path, dim, slide.work.count)
        return slide.writer

    def _write(self, slide: _Slide) -> Result:
        work = slide.work
        if slide.error is not None:
            return failed(work.job, slide.error)
        refuse_if_broken(work, slide.unreadable)
        features = work.describe(slide.measured, slide.unreadable)
        work.draw(slide.measured.drawn())  # before the features, whose file says that all is done
        self._writer(slide).publish(features)
        state: State = "done" if slide.embedded else "empty"
        reason = features.about["reason"]
        if slide.unreadable:
            state, reason = "partial", f"{len(slide.unreadable)} tiles are unreadable"
        return Result(
            work.name,
            work.job.shown,
            state,
            reason,
            slide.embedded,
            slide.unreadable,
            features=str(work.path),
            notes=list(map(work.job.named, work.notes)),
            left_out=[
                {key: work.job.named(text) for key, text in one.items()} for one in work.left_out
            ],
            left_out_tiles=slide.measured.counts,
            stain=features.about.get(STAIN),
            icc_profile=features.about.get("icc_profile"),
            icc_applied=features.about.get("icc_applied", False),
        )

    def _record(self, job: Job, result: Result, started: float, opened: bool) -> None:
        features, number = result.features, self._numbers[id(job)]
        if self._remote is not None and features is not None:
            features = self._remote.url_of(Path(features))
        result = replace(
            result,
            name=printable(result.name),
            source=printable(result.source),
            reason=printable(result.reason),
            seconds=round(time.monotonic() - started, 3),
            features=features,
        )
        status = self._out / "status" / f"{result.name}.json"
        if result.state != "skipped" or not (self._remote or _is_success(status)):
            with suppress(BadInput):  # the name is too long for a file; run.json holds the result
                write_json(status, asdict(result))
        if self._remote is not None:
            self._remote.publish(result)
        self._results[number] = result
        self._ended.append(result)
        self._meter.slide_ended(result.state, opened)
        self._meter.report(self._progress, result.name)


def _is_success(status: Path) -> bool:
    """Whether a status file exists and records success; a killed run may have left it behind."""
    try:
        return read_json(status)["state"] in {"done", "empty", "skipped"}
    except (HistoseekError, KeyError, TypeError):
        return False
