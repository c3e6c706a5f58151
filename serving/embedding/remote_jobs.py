"""Finds the slides behind a URL: a file, or every slide below a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Literal

from ...artifacts.dicomweb import Series, find_series, is_dicomweb
from ...artifacts.images import SUFFIXES
from ...artifacts.remote import Remote, RemoteFile
from ...artifacts.slide_names import SLIDE_SUFFIXES, TIFF_SUFFIXES
from ...artifacts.unread import INDEXES, why_unread
from ...artifacts.walking import LeftOut, is_hidden
from ...errors import BadInput
from ..slides.czi_source import SUFFIX as CZI
from .job import Job, Kind, name_of

PACKS = (".tar", ".tar.gz", ".tgz", ".npz")
IN_PARTS = {
    ".dcm": "a DICOM slide is a series of files",
    **dict.fromkeys(INDEXES, "its pixels are in other files"),
}
"""Formats of several files that cannot be told apart by their names."""


def remote_jobs(url: str, kind: Kind) -> tuple[list[Job], list[LeftOut]]:
    """Return one job per slide behind a URL, and what is left out; on a DICOMweb server, one per series.

    Slides in a folder are found by their suffix, since nothing is read. An MRXS slide is copied with its
    folder.

    Raises:
        BadInput: nothing is there, or nothing that can be read from a URL.
    """
    url = url.rstrip("/")
    if is_dicomweb(url):
        found = find_series(url)
        jobs = [*map(_series, found.slides), *map(_refused, found.refused)]
        return jobs, found.left_out
    remote = Remote(url)
    if remote.is_file():
        return [_one(url, remote.size())], []
    if kind == "tiles":
        raise BadInput(
            f"{url} is a folder; tiles behind a URL must be packed: expected a .tar or .npz"
        )
    files = remote.files()
    jobs, left_out = _sorted_out(files, url)
    if not jobs:
        reasons = "; ".join(dict.fromkeys(left.reason for left in left_out))
        raise BadInput(f"{url} contains no slides that can be read from there ({reasons})")
    return jobs, left_out


def _series(found: Series) -> Job:
    name = found.url.rpartition("/")[2]
    return Job(
        name, Path(f"{name}.dcm"), "slide", url=found.url, parts=found.instances, mark=found.mark
    )


def _refused(series: LeftOut) -> Job:
    name = series.path.rpartition("/")[2]
    return Job(name, Path(f"{name}.dcm"), "slide", url=series.path, problem=series.reason)


def _one(url: str, size: int) -> Job:
    path = Path(PurePosixPath(url).name)
    suffix = path.suffix.lower()
    if suffix in IN_PARTS:
        raise BadInput(
            f"{url}: {IN_PARTS[suffix]}; copy all of them to a local folder and embed that"
        )
    kind: Literal["slide", "tiles"] = "tiles" if path.name.lower().endswith(PACKS) else "slide"
    if suffix == ".mrxs":
        return _mrxs(url, size, Remote(url.removesuffix(path.suffix)).files())
    return Job(name_of(path, kind), path, kind, url=url, parts=(RemoteFile(url, size),))


def _mrxs(url: str, size: int, beside: Sequence[RemoteFile]) -> Job:
    path = Path(PurePosixPath(url).name)
    parts = (RemoteFile(url, size), *beside)
    return Job(name_of(path, "slide"), path, "slide", url=url, parts=parts)


def _sorted_out(files: Sequence[RemoteFile], root: str) -> tuple[list[Job], list[LeftOut]]:
    folders = {f.url[: -len(".mrxs")] + "/" for f in files if f.url.lower().endswith(".mrxs")}
    jobs: list[Job] = []
    left_out: list[LeftOut] = []
    for file in files:
        path = PurePosixPath(file.url.removeprefix(root).lstrip("/"))
        suffix = path.suffix.lower()
        if any(file.url.startswith(folder) for folder in folders):
            continue  # belongs to an MRXS slide
        if "::" in file.url:
            left_out.append(LeftOut(file.url, "'::' in a name cannot be read through a URL"))
        elif any(is_hidden(part) for part in path.parts):
            left_out.append(LeftOut(file.url, "hidden, or for internal use"))
        elif suffix == ".mrxs":
            folder = file.url[: -len(".mrxs")] + "/"
            jobs.append(_mrxs(file.url, file.size, [f for f in files if f.url.startswith(folder)]))
        elif suffix in IN_PARTS:
            left_out.append(LeftOut(file.url, f"{IN_PARTS[suffix]}: copy them to a local folder"))
        elif suffix in {*SLIDE_SUFFIXES, *TIFF_SUFFIXES, CZI}:
            jobs.append(_one(file.url, file.size))
        elif suffix in SUFFIXES:
            left_out.append(
                LeftOut(file.url, "image behind a URL: pass its own URL, or pack tiles as .tar")
            )
        else:
            left_out.append(LeftOut(file.url, why_unread(Path(path.name))))
    return jobs, left_out
