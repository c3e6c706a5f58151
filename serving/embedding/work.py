"""A job prepared for embedding: opened, its tiles found, its feature file named; read piece by piece."""

from __future__ import annotations

import glob
import itertools
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...artifacts.feature_files import STAIN, Features, magnification, read_about, read_places
from ...artifacts.feature_writer import amend
from ...artifacts.files import content_mark, sha256_file
from ...artifacts.geojson import moved
from ...artifacts.manifest import Manifest
from ...artifacts.remote import Remote, is_url
from ...artifacts.tileset_files import open_tiles
from ...errors import BadInput, Damaged, HistoseekError, Mismatch
from ..slides.geojson import read_annotations
from ..slides.quality import FAULTS, Limits
from ..slides.scale import PRINT_MPP
from ..slides.slide import Slide, open_slide
from ..slides.tissue import METHOD
from .job import Job, distinct_name
from .measured import Measured
from .results import EmbedOptions, Result
from .slide_work import (
    Drawing,
    SlideWork,
    StatedScale,
    drawing_of,
    overlay_files,
    stated_scale,
)
from .tiles_work import TilesWork
from .tissue_network import open_network

LIMITS = "quality"
"""Key under which features state their limits of quality, and how tissue was found."""
MAX_UNREADABLE = 0.1
"""Maximum share of unreadable tiles; a slide or tile set with more is failed, not partial."""


class Work(Protocol):
    """An open slide or tile set; ``read`` may be called from several threads.

    Attributes:
        job: the job.
        name: name of the feature file.
        path: the feature file.
        count: number of tiles.
        tissue: share of the slide that is tissue, or None.
        notes: values that were guessed, overridden or updated.
        left_out: files of a tile set that were not used, each with the reason.
        limits: which tiles are left out for their quality.
        seconds: time to open it and find its tiles.
        closing: what is done when it is closed.
    """

    job: Job
    name: str
    path: Path
    count: int
    tissue: float | None
    notes: list[str]
    left_out: Sequence[dict[str, str]]
    limits: Limits
    seconds: float
    closing: ExitStack

    def read(self, start: int, out: NDArray[np.uint8]) -> dict[int, BadInput]:
        """Read tiles ``start``, ``start + 1``, … into ``out``, uint8 (N, S, S, 3).

        Returns:
            The error of each unreadable tile, by its index in ``out``; empty if all were read.
        """
        ...

    def normalised(self, numbers: Sequence[int], tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return tiles (N, S, S, 3), by their numbers (N,), as the encoder's graph takes them."""
        ...

    def draw(self, faults: NDArray[np.int8]) -> None:
        """Write the overlay files.

        ``faults`` (N,): why each tile was not embedded, as indices into ``FAULTS``; 0 if it was.
        """
        ...

    def describe(self, measured: Measured, unreadable: list[str]) -> Features:
        """Return everything in the feature file but the embeddings.

        Args:
            measured: which tiles were embedded or left out, and their measures.
            unreadable: reasons why the other tiles could not be read.
        """
        ...

    def close(self) -> None:
        """Close the file."""
        ...


def prepare(
    job: Job,
    manifest: Manifest,
    precision: str,
    out: Path,
    options: EmbedOptions,
    look_only: bool = False,
    remote_out: bool = False,
) -> Work | Result:
    """Open a job and find its tiles; return a result instead if nothing is left to do.

    Features that were computed with another encoder, precision or option are computed again. With
    ``look_only`` nothing is written, also not the new path of a slide that was moved. With ``remote_out``
    the features are uploaded, and overlays of a slide that is done are not made again.

    Raises:
        HistoseekError: the job cannot be done; the message gives the reason.
    """
    started = time.monotonic()
    if printable(job.shown) != job.shown:
        raise BadInput(f"{printable(job.shown)}: the name is not valid UTF-8; rename it")
    settings = {} if precision in {"f32", "fp32"} else {"precision": precision}
    preparation = _Preparation(job, manifest, settings, out, options, look_only, remote_out)
    work = preparation.tiles() if job.kind == "tiles" else preparation.slide()
    if not isinstance(work, Result):
        work.seconds = time.monotonic() - started
    return work


def done_before(
    job: Job, manifest: Manifest, precision: str, out: Path, options: EmbedOptions, remote_out: bool
) -> Result | None:
    """Return the result of a slide behind a URL that is done, as :func:`prepare`, without copying it."""
    settings = {} if precision in {"f32", "fp32"} else {"precision": precision}
    return _Preparation(job, manifest, settings, out, options, False, remote_out).done_before()


def folders_for(manifest: Manifest, options: EmbedOptions) -> list[str]:
    """Return the folders, below that of the run, for features of slides and of tile sets."""
    mpp = options.mpp or manifest.mpp
    folders = [_folder_of_tiles(manifest)]
    folders += [] if mpp is None else [_folder_of_slides(manifest, options, mpp)]
    return [f"{folder}/features_{manifest.name}" for folder in folders]


def _folder_of_slides(manifest: Manifest, options: EmbedOptions, mpp: float) -> str:
    return f"{magnification(mpp)}x_{manifest.size_px}px_{options.overlap_px}px_overlap"


def _folder_of_tiles(manifest: Manifest) -> str:
    return f"tiles_{manifest.size_px}px"


def printable(text: str) -> str:
    """Return text that can be written as UTF-8; other characters become escape sequences."""
    return text.encode(errors="backslashreplace").decode()


def refuse_if_broken(work: Work, unreadable: list[str]) -> None:
    """Raise Damaged if too many tiles of a slide or tile set are unreadable."""
    if work.count and len(unreadable) > MAX_UNREADABLE * work.count:
        raise Damaged(
            f"{work.job.shown}: {len(unreadable)} of {work.count} tiles are unreadable, first: "
            f"{unreadable[0]}"
        )


@dataclass(frozen=True)
class _Preparation:
    """One job with what :func:`prepare` was given; ``settings`` belong into every feature file's key."""

    job: Job
    manifest: Manifest
    settings: dict[str, Any]
    out: Path
    options: EmbedOptions
    look_only: bool
    remote_out: bool

    def tiles(self) -> Work | Result:
        tileset = open_tiles(self.job.source, self.options.manifest)
        key = {"content": tileset.fingerprint, "encoder": self.manifest.sha256, **self.settings}
        path, name, complete = self._feature_file(_folder_of_tiles(self.manifest), key)
        if complete:
            return self._done_before(name, path)
        return TilesWork(self.job, tileset, self.manifest, name, path, key)

    def slide(self) -> Work | Result:
        mpp = self.options.mpp or self.manifest.mpp
        if mpp is None:
            raise Mismatch(
                f"encoder {self.manifest.name} does not state the µm per pixel of its tiles; pass --mpp or "
                "--magnification"
            )
        stated = stated_scale(self.job, self.options)
        slide = open_slide(self.job.source, self.options.assume_mpp, stated.mpp, stated.series)
        try:
            work = self._slide_work(slide, stated, mpp)
        except BaseException:
            slide.close()
            raise
        if isinstance(work, Result):
            slide.close()
        return work

    def _slide_work(self, slide: Slide, stated: StatedScale, target_mpp: float) -> Work | Result:
        job, manifest, out, options = self.job, self.manifest, self.out, self.options
        if job.regions is None and options.regions is not None:
            raise BadInput(
                f"--regions {options.regions} has no regions for {job.source.name}; expected a file such "
                f"as {job.stem}.geojson or {job.source.name}.geojson"
            )
        key = self._slide_key(
            job.mark or content_mark(job.source),
            slide.require_mpp(),
            slide.bounds is not None,
            stated,
            target_mpp,
        )
        folder = self._folder(target_mpp)
        path, name, complete = self._feature_file(folder, key)
        if complete and slide.bounds is not None:
            # features from before bounds were recorded are computed again
            complete = "bounds" in (read_about(path) or {})
        files = overlay_files(name, out, options)
        if complete and (self.remote_out or all(file.is_file() for file in files)):
            return self._done_before(name, path)
        regions = None
        if job.regions is not None:
            left, top = slide.bounds[:2] if slide.bounds is not None else (0, 0)
            regions = moved(read_annotations(job.regions, options.region_classes), left, top)
        network = open_network(options.tissue_model)
        grid = slide.grid(
            manifest.size_px, target_mpp, options.overlap_px, options.min_tissue, regions,
            None if network is None else network.mask,
        )  # fmt: skip
        drawing = drawing_of(grid, name, out, options)
        if complete:
            if drawing is not None:
                _draw_again(path, drawing)
            return self._done_before(name, path)
        limits = Limits(options.min_sharpness, options.max_pen)
        work = SlideWork(job, slide, grid, manifest, name, path, key, stated, limits, drawing)
        if not self.look_only:
            work.fit_stain()
        if key["content"] == (read_about(path) or {}).get("key", {}).get("content"):
            work.notes += _moved_from(path, job)
        return work

    def done_before(self) -> Result | None:
        """Return the result of a slide behind a URL whose features are complete; the slide is not read."""
        mpp = self.options.mpp or self.manifest.mpp
        without_regions = self.options.regions is not None and self.job.regions is None
        if mpp is None or self.job.kind != "slide" or without_regions:
            return None
        content = ""  # read only if there are features to compare
        stated, parent = stated_scale(self.job, self.options), self.out / self._folder(mpp)
        for name in (self.job.name, self.job.stem, distinct_name(self.job)):
            about = read_about(parent / f"features_{self.manifest.name}" / f"{name}.h5") or {}
            if "key" not in about or "bounds" not in about:
                continue
            content = content or self.job.mark or Remote(self.job.url).content_mark()
            if about["key"].get("content") != content:
                continue
            scale = stated.mpp or self._known_scale(about)
            if scale is None:
                continue
            key = self._slide_key(content, scale, about["bounds"] is not None, stated, mpp)
            path, found, complete = self._feature_file(self._folder(mpp), key)
            files = overlay_files(found, self.out, self.options)
            if complete and (self.remote_out or all(file.is_file() for file in files)):
                return self._done_before(found, path)
        return None

    def _known_scale(self, about: dict[str, Any]) -> float | None:
        """Return the µm per pixel of features, or None if other options may change it."""
        scale, by = about["key"].get("mpp"), about.get("mpp_from")
        if by in {"override", "manifest"}:
            return None
        if scale is None or (by == "assumed" and scale != self.options.assume_mpp):
            return None
        if scale > PRINT_MPP and self.options.assume_mpp is not None:
            return None  # the file's value may describe a print
        return float(scale)

    def _folder(self, target_mpp: float) -> str:
        return _folder_of_slides(self.manifest, self.options, target_mpp)

    def _slide_key(
        self, content: str, mpp: float, framed: bool, stated: StatedScale, target_mpp: float
    ) -> dict[str, Any]:
        """Return the settings that features of a slide depend on; features with other ones are replaced.

        ``framed``: the slide states bounds, within which QuPath counts coordinates.
        """
        job, options = self.job, self.options
        network = open_network(options.tissue_model)
        key: dict[str, Any] = {
            "content": content,
            "encoder": self.manifest.sha256,
            "mpp": mpp,
            "target_mpp": target_mpp,
            "min_tissue": options.min_tissue,
            LIMITS: [
                options.min_sharpness,
                options.max_pen,
                METHOD if network is None else network.method,
            ],
            "row": {k: v for k, v in job.row.items() if k != "file"},
            **self.settings,
        }
        if stated.series is not None:
            key["series"] = stated.series
        if job.regions is not None:
            key["regions"] = [sha256_file(job.regions), *options.region_classes]
            if framed:
                key["regions"].append("QuPath's frame")
        return key

    def _feature_file(self, folder: str, key: dict[str, Any]) -> tuple[Path, str, bool]:
        """Return the feature file, its name, and whether it is complete with the same settings."""
        job = self.job
        parent = self.out / folder / f"features_{self.manifest.name}"
        names = dict.fromkeys((job.name, distinct_name(job)))
        for plain in (job.source.stem, job.stem):
            about = read_about(parent / f"{plain}.h5")
            if about is not None and _is_here(about, job):
                names = {
                    plain: None,
                    **names,
                }  # embedded before another slide with this name was added
        if left_behind := _left_behind(parent, job, key["content"]):
            names = {left_behind: None, **names}
        for name in names:
            path = parent / f"{name}.h5"
            about = read_about(path)
            if about is None:
                return path, name, False
            if _same_settings(about.get("key"), key):
                return path, name, not about.get("unreadable")
            if about.get("key", {}).get("content") == key["content"] or _is_here(about, job):
                return path, name, False
        return path, name, False

    def _done_before(self, name: str, path: Path) -> Result:
        """Return the result of a job that was done before; store a new path of its slide."""
        job, about = self.job, read_about(path) or {}
        notes = [*map(str, about.get("notes", [])), *_moved_from(path, job)]
        if job.kind != "tiles" and LIMITS not in about.get("key", {}):
            notes.append(
                "the features are of an earlier version, which found less pale tissue and left out no "
                "tiles for pen or blur; to change that, delete the feature file and embed the slide again"
            )
        if not self.look_only and (not _is_here(about, job) or "bounds" not in about):
            amend(path, job.location, {"bounds": about.get("bounds")})
        return Result(
            name,
            job.shown,
            "skipped",
            about.get("reason") or "done before",
            about.get("tiles", 0),
            features=str(path),
            tissue=about.get("tissue_share"),
            left_out_tiles=about.get("left_out_tiles", {}),
            stain=about.get(STAIN),
            notes=notes,
            icc_profile=about.get("icc_profile"),
            icc_applied=about.get("icc_applied", False),
        )


def _same_settings(stored: Any, key: dict[str, Any]) -> bool:
    """Whether features have these settings; those of an earlier version state no limits of quality."""
    if isinstance(stored, dict) and LIMITS not in stored:
        key = {name: value for name, value in key.items() if name != LIMITS}
    return bool(stored == key)


def _draw_again(path: Path, drawing: Drawing) -> None:
    """Write the overlay files of a slide that is done, with the tiles that its features state."""
    coords, left_out = read_places(path)
    faults = [""] * len(coords)
    if left_out is not None:  # drawn in the order of the grid, as before
        coords = np.concatenate([coords, left_out.coords])
        faults += left_out.reasons
        rank = {corner: n for n, corner in enumerate(map(tuple, drawing.coords.tolist()))}
        order = sorted(
            range(len(coords)), key=lambda n: rank.get((int(coords[n, 0]), int(coords[n, 1])), n)
        )
        coords, faults = coords[order], [faults[n] for n in order]
    codes = [FAULTS.index(fault) if fault in FAULTS else 0 for fault in faults]
    replace(drawing, coords=coords).write(np.array(codes, dtype=np.int8))


def _is_here(about: dict[str, Any], job: Job) -> bool:
    """Whether features were computed from the job's file, also when it is reached through links."""
    return about.get("source") in {job.location, job.real}


def _left_behind(parent: Path, job: Job, content: str) -> str | None:
    """Return the name of features of the same file from a path that no longer exists.

    Of several (copies of one slide), return the one whose path shares the longest end with the job's path.
    """
    if (parent / f"{job.name}.h5").exists() or not parent.is_dir():
        return None
    shared_parts: dict[str, int] = {}
    for path in sorted(parent.glob(f"{glob.escape(job.stem)}-????????.h5")):
        about = read_about(path)
        if about is None or about.get("key", {}).get("content") != content:
            continue
        source = Path(str(about.get("source")))
        if not is_url(about.get("source")) and not source.exists():  # a URL is not looked at
            shared_parts[path.stem] = _same_end(source, Path(job.location))
    best = [name for name, n in shared_parts.items() if n == max(shared_parts.values())]
    return best[0] if len(best) == 1 else None


def _same_end(one: Path, other: Path) -> int:
    """Return how many trailing parts two paths share."""
    pairs = zip(reversed(one.parts), reversed(other.parts), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _moved_from(path: Path, job: Job) -> list[str]:
    """Return a note if the features at ``path`` record another path of the job's file."""
    about = read_about(path)
    if about is None or _is_here(about, job):
        return []
    return [f"the slide was at {about.get('source')} when it was embedded; the new path was stored"]


def failed(job: Job, error: Exception) -> Result:
    """Return the result of a failed job."""
    reason = job.named(str(error))
    if not isinstance(error, HistoseekError):
        reason = f"{job.shown}: unexpected error {type(error).__name__}: {reason}"
    return Result(job.name, job.shown, "failed", reason)
