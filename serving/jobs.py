"""What to embed: inputs on the command line become jobs, one per slide or tile set."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ..errors import BadInput
from ..images import SUFFIXES
from ..tables import read_csv
from ..tilesets import MANIFEST
from .slide_sources import is_slide

Kind = Literal["auto", "slides", "tiles"]
EDGE_BYTES = 2**20


@dataclass(frozen=True)
class Job:
    """One slide or tile set to embed.

    Attributes:
        name: of the feature file; unique within a run.
        source: the file or folder.
        kind: ``slide`` or ``tiles``.
        row: what the manifest says of a slide (mpp, label, patient, …).
    """

    name: str
    source: Path
    kind: Literal["slide", "tiles"]
    row: dict[str, str] = field(default_factory=dict)

    @property
    def stem(self) -> str:
        """The name before any suffix that tells it from others."""
        return self.source.name.split(".")[0] if self.kind == "tiles" else self.source.stem


def find_jobs(
    inputs: Sequence[Path], kind: Kind = "auto", manifest: Path | None = None
) -> list[Job]:
    """Expand inputs: a slide is a job, a folder of slides many, a folder or pack of tiles one.

    Args:
        inputs: slides, pictures, folders, tar, npz or CSV.
        kind: what a folder of pictures holds; ``auto`` takes slides if it finds any slide file,
            else tiles.
        manifest: CSV with a column ``file`` (or ``slide``), for slides with any of mpp, label and
            patient.

    Raises:
        BadInput: an input that does not exist, holds nothing, or holds slides and pictures mixed.
    """
    found: list[Job] = []
    for source in inputs:
        if not source.exists():
            found.append(Job(source.stem, source, "slide"))  # refused when its turn comes, by name
        elif source.is_dir():
            found += _folder_jobs(source, kind)
        elif source.suffix.lower() in {".csv", ".npz", ".tgz"} or ".tar" in source.suffixes:
            found.append(Job(source.name.split(".")[0], source, "tiles"))
        else:
            found.append(Job(source.stem, source, "slide"))
    rows = _rows(manifest) if manifest else {}
    jobs = [replace(job, row=_row_of(job, rows)) for job in found]
    if manifest and rows and not any(job.row or job.kind == "tiles" for job in jobs):
        raise BadInput(f"{manifest} names none of the inputs; its column 'file' holds {_few(rows)}")
    return _unique(jobs)


def _few(rows: dict[str, dict[str, str]]) -> str:
    return ", ".join(sorted(rows)[:3]) + (" …" if len(rows) > 3 else "")


def _rows(manifest: Path) -> dict[str, dict[str, str]]:
    try:
        rows = read_csv(manifest, "file")
    except BadInput as error:
        if "expected a column" not in str(error):
            raise
        rows = [{**row, "file": row["slide"]} for row in read_csv(manifest, "slide")]
    return {row["file"]: row for row in rows}


def _row_of(job: Job, rows: dict[str, dict[str, str]]) -> dict[str, str]:
    for key in (str(job.source), job.source.name, job.source.stem):
        if key in rows:
            return rows[key]
    return {}


def _folder_jobs(folder: Path, kind: Kind) -> list[Job]:
    if kind == "tiles":
        return [Job(folder.resolve().name, folder, "tiles")]
    files = sorted(
        Path(top) / name
        for top, _, names in os.walk(folder, onerror=_unreadable_folder)
        for name in names
        if not name.startswith(".")
    )
    pictures = [f for f in files if f.suffix.lower() in SUFFIXES]
    slides = [f for f in files if is_slide(f)]
    plain = [f for f in pictures if f not in set(slides)]
    if kind == "slides":
        chosen = sorted({*slides, *plain})
    elif slides and plain and not (folder / MANIFEST).is_file():
        raise BadInput(
            f"{folder} holds {len(slides)} slides and {len(plain)} pictures; say what the pictures "
            "are: --as slides (large pictures to be tiled) or --as tiles (one picture, one tile)"
        )
    else:
        chosen = [] if plain and (folder / MANIFEST).is_file() else slides
    if chosen:
        return [Job(f.stem, f, "slide") for f in _one_per_series(chosen)]
    if not plain:
        raise BadInput(f"{folder} holds neither slides nor pictures; check the path")
    return [Job(folder.resolve().name, folder, "tiles")]


def _unreadable_folder(error: OSError) -> None:
    raise BadInput(
        f"{error.filename} cannot be read ({error.strerror}); check its permissions, or name the slides"
    ) from error


def _one_per_series(slides: list[Path]) -> list[Path]:
    """Keep one file of each DICOM series: OpenSlide joins the others of the folder by itself."""
    import openslide

    seen: set[str] = set()
    kept: list[Path] = []
    for slide in slides:
        if slide.suffix.lower() == ".dcm":
            try:
                with openslide.OpenSlide(str(slide)) as opened:
                    mark = opened.properties.get("openslide.quickhash-1", str(slide))
            except openslide.OpenSlideError:
                mark = str(slide)
            mark = f"{slide.parent}|{mark}"  # it joins the files of one folder only
            if mark in seen:
                continue
            seen.add(mark)
        kept.append(slide)
    return kept


def _unique(jobs: list[Job]) -> list[Job]:
    """Give jobs of the same name a suffix from their path, so that none overwrites another."""
    once = list({job.source.resolve(): job for job in jobs}.values())
    counts = Counter(job.name for job in once)
    return [replace(job, name=distinct_name(job)) if counts[job.name] > 1 else job for job in once]


def distinct_name(job: Job) -> str:
    """Return the job's name with eight digits of the hash of its path."""
    return f"{job.name}-{hashlib.sha256(os.fsencode(job.source.resolve())).hexdigest()[:8]}"


def content_mark(path: Path) -> str:
    """Return a quick mark of a file's content: sha256 of its size, first and last mebibyte."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as stream:
        digest.update(stream.read(EDGE_BYTES))
        stream.seek(max(0, size - EDGE_BYTES))
        digest.update(stream.read(EDGE_BYTES))
    return digest.hexdigest()
