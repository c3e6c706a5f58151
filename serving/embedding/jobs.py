"""Turns the inputs on the command line into jobs, one per slide or tile set."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ...artifacts.images import SUFFIXES
from ...artifacts.remote import is_url
from ...artifacts.slide_names import match
from ...artifacts.tables import read_csv, same_text
from ...artifacts.tilesets import MANIFEST
from ...artifacts.unread import belongs_to, is_dicom, parts_of, why_unread
from ...artifacts.walking import LeftOut, once, summarised, walk
from ...console import counted
from ...errors import BadInput
from ..slides.sources import is_slide
from ..slides.zarr_source import is_ome_zarr, reads_zarr
from .job import Job, Kind, distinct_name, name_of
from .remote_jobs import remote_jobs

WITHOUT_ZARR = "OME-Zarr: run pip install 'histoseek[zarr]' to read it"


@dataclass(frozen=True)
class Inputs:
    """The inputs of an embedding run.

    Attributes:
        jobs: what to embed.
        left_out: files and folders that were found but not used, each with the reason.
        rows_unused: rows of the manifest that match no input.
        slides_without_row: slides that no row of the manifest matches.
        notes: other decisions made during the search.
    """

    jobs: list[Job]
    left_out: tuple[LeftOut, ...] = ()
    rows_unused: tuple[str, ...] = ()
    slides_without_row: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return everything but the jobs, JSON-ready."""
        return {
            "left_out": [left._asdict() for left in self.left_out],
            "rows_unused": list(self.rows_unused),
            "slides_without_row": list(self.slides_without_row),
            "notes": list(self.notes),
        }


def find_jobs(
    inputs: Sequence[Path | str], kind: Kind = "auto", manifest: Path | None = None
) -> list[Job]:
    """Return only the jobs of :func:`find_inputs`."""
    return find_inputs(inputs, kind, manifest).jobs


def find_inputs(
    inputs: Sequence[Path | str], kind: Kind = "auto", manifest: Path | None = None
) -> Inputs:
    """Expand inputs: one job per slide; a folder or pack of tiles is one job.

    Args:
        inputs: slides, images, folders, tar, npz or CSV; also URLs of slides, packs or folders of slides.
        kind: what a folder holds; ``auto`` means slides if there is any slide file, else tiles.
        manifest: CSV with a column ``file`` (or ``slide``), for slides with any of mpp, series, label
            and patient. :mod:`histoseek.artifacts.slide_names` defines which slide a row matches.

    Raises:
        BadInput: a folder is empty, or mixes slides and images; a row matches two slides, or two rows
            match one; the manifest matches no input, or its rows could be both slides and tiles.
    """
    jobs: list[Job] = []
    left_out: list[LeftOut] = []
    for given in inputs:
        if is_url(given):
            found, others = remote_jobs(str(given), kind)
            jobs += found
            left_out += others
            continue
        source = Path(given)
        if source.is_dir() and is_ome_zarr(source):
            jobs.append(Job(name_of(source, "slide"), source, "slide"))
        elif source.is_dir():
            folder_jobs, others = _folder_jobs(source, kind)
            jobs += folder_jobs
            left_out += others
        else:  # a missing file is reported when its job runs
            pack = source.suffix.lower() in {".csv", ".npz", ".tgz"} or ".tar" in source.suffixes
            job_kind: Literal["slide", "tiles"] = "tiles" if pack else "slide"
            jobs.append(Job(name_of(source, job_kind), source, job_kind))
    jobs = _unique(_each_once(jobs, left_out))
    if manifest is None:
        return Inputs(jobs, tuple(left_out))
    manifest_path = os.path.abspath(manifest)
    left_out = [left for left in left_out if os.path.abspath(left.path) != manifest_path]
    return _with_rows(jobs, manifest, tuple(left_out))


def _with_rows(jobs: list[Job], manifest: Path, left_out: tuple[LeftOut, ...]) -> Inputs:
    """Attach to each slide its row of the manifest."""
    slides = [number for number, job in enumerate(jobs) if job.kind == "slide"]
    sets = len(jobs) - len(slides)
    if sets > 1 or (sets and slides):
        raise BadInput(
            f"--manifest {manifest}: its rows name either slides or the tiles of one set; the inputs are "
            f"{len(slides)} slide(s) and {sets} tile set(s): embed them in separate runs"
        )
    if sets:
        return Inputs(jobs, left_out)  # the tile set reads the manifest itself
    table = read_csv(manifest, "file", "slide", also=("series",))
    rows = {row[table.key]: row for row in table.rows}
    matched = match(rows, [jobs[n].names() for n in slides], str(manifest), "row")
    if rows and slides and not matched.by_slide:
        few = ", ".join(sorted(rows)[:3]) + (" …" if len(rows) > 3 else "")
        raise BadInput(
            f"no row of {manifest} matches an input; its column {table.key!r} contains "
            + "; ".join([few, *summarised(left_out)])
        )
    for index, name in matched.by_slide.items():
        number = slides[index]
        jobs[number] = replace(jobs[number], row={**rows[name], "file": name})
    without = tuple(jobs[slides[index]].name for index in matched.without)
    return Inputs(jobs, left_out, tuple(matched.unused), without, table.notes)


def _folder_jobs(folder: Path, kind: Kind) -> tuple[list[Job], list[LeftOut]]:
    if kind == "tiles":
        return [Job(folder.resolve().name, folder, "tiles")], []
    walked = walk(folder, belongs_to)
    parts = parts_of(walked.files)
    files = [file for file in walked.files if file not in parts]
    slides = [file for file in files if is_slide(file)]
    zarrs = {Path(left.path) for left in walked.left_out if is_ome_zarr(Path(left.path))}
    not_read = set() if reads_zarr() else zarrs
    used = set(slides)
    slides = sorted([*slides, *(zarrs - not_read)])
    images = [file for file in files if file not in used and file.suffix.lower() in SUFFIXES]
    used.update(images)
    left_out = [
        *(left for left in walked.left_out if Path(left.path) not in zarrs),
        *(LeftOut(str(path), WITHOUT_ZARR) for path in sorted(not_read)),
        *(LeftOut(str(file), why_unread(file)) for file in files if file not in used),
    ]
    has_manifest = (folder / MANIFEST).is_file()
    if kind == "auto" and slides and images and not has_manifest:
        raise BadInput(
            f"{folder} contains {counted(len(slides), 'slide')} and {counted(len(images), 'image')}; "
            "choose what to embed: --as slides (the slides; the images are left out) or --as tiles (each "
            "image is one tile)"
        )
    if kind == "auto" and images and (has_manifest or not slides):
        return [Job(folder.resolve().name, folder, "tiles")], []
    if slides and images:
        left_out += [LeftOut(str(file), "image beside slides (--as slides)") for file in images]
    chosen = slides or images
    if not chosen:
        raise BadInput(f"{folder} contains neither slides nor images{_contents(left_out)}")
    jobs = [
        Job(name_of(file, "slide"), file, "slide", aliases=walked.aliases.get(file, ()))
        for file in _one_per_series(chosen)
    ]
    return jobs, left_out


def _contents(left_out: Sequence[LeftOut]) -> str:
    if not left_out:
        return "; check the path"
    left_out = sorted(left_out, key=lambda left: left.reason.startswith("hidden"))
    few = "; ".join(f"{Path(left.path).name} ({left.reason})" for left in left_out[:5])
    more = f" and {len(left_out) - 5} more" if len(left_out) > 5 else ""
    return f"; it contains {few}{more}"


def _one_per_series(slides: list[Path]) -> list[Path]:
    """Keep one file of each DICOM series: OpenSlide finds the other files in the folder."""
    import openslide

    seen: set[str] = set()
    first_files: list[Path] = []
    for slide in slides:
        if is_dicom(slide):
            try:
                with openslide.OpenSlide(str(slide)) as opened:
                    mark = opened.properties.get("openslide.quickhash-1", str(slide))
            except openslide.OpenSlideError:
                mark = str(slide)
            mark = f"{slide.parent}|{mark}"  # OpenSlide joins files of one folder only
            if mark in seen:
                continue
            seen.add(mark)
        first_files.append(slide)
    return first_files


def _each_once(jobs: Sequence[Job], left_out: list[LeftOut]) -> list[Job]:
    """Keep one job per source file; prefer the real path over links to it."""
    remote = {job.url: job for job in jobs if job.url}.values()
    jobs = [job for job in jobs if not job.url]
    by_source = {job.source: job for job in reversed(jobs)}
    walked = once(list(by_source))
    left_out += walked.left_out
    files = set(walked.files)
    each_once = []
    for source in dict.fromkeys(job.source for job in jobs):
        if source in files:
            job = by_source[source]
            aliases = dict.fromkeys([*job.aliases, *walked.aliases.get(source, ())])
            each_once.append(replace(job, aliases=tuple(aliases)))
    return [*each_once, *remote]


def _unique(jobs: list[Job]) -> list[Job]:
    """Add a suffix from the path to jobs with equal names, so that no job overwrites another."""
    counts = Counter(same_text(job.name) for job in jobs)
    return [
        replace(job, name=distinct_name(job)) if counts[same_text(job.name)] > 1 else job
        for job in jobs
    ]
