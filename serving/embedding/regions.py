"""Matches annotations to slides: one GeoJSON file for one slide, or a folder of files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ...artifacts.slide_names import match
from ...artifacts.walking import walk
from ...errors import BadInput
from .job import Job

ENDING = ".geojson"


def with_regions(jobs: Sequence[Job], regions: Path | None) -> list[Job]:
    """Attach to each slide that has none the GeoJSON file of its annotations.

    ``regions`` is a file for a single slide, or a folder with files named after the slides (see
    ``slide_names``), such as ``case-1.geojson`` or ``patientA/case-1.svs.geojson``.

    Raises:
        BadInput: there is one file for several slides, or a file name matches two slides.
    """
    slides = [n for n, job in enumerate(jobs) if job.kind == "slide" and job.regions is None]
    if regions is None or not slides:
        return list(jobs)
    jobs = list(jobs)
    if regions.is_file():
        count = sum(job.kind == "slide" for job in jobs)
        if count > 1:
            raise BadInput(
                f"--regions {regions} is one file and there are {count} slides: the annotations of one "
                "slide would be used for all; pass a folder with a <slide>.geojson for each, or embed "
                "this slide alone"
            )
        jobs[slides[0]] = replace(jobs[slides[0]], regions=regions)
        return jobs
    files = {
        path.relative_to(regions).as_posix()[: -len(ENDING)]: path
        for path in walk(regions).files
        if path.name.lower().endswith(ENDING)
    }
    matched = match(files, [jobs[n].names() for n in slides], f"--regions {regions}", "file")
    for index, name in matched.by_slide.items():
        jobs[slides[index]] = replace(jobs[slides[index]], regions=files[name])
    return jobs


def unused_regions(jobs: Sequence[Job], regions: Path | None) -> list[str]:
    """Return the GeoJSON files of a folder that match no slide, sorted."""
    if regions is None or not regions.is_dir():
        return []
    used = {job.regions for job in jobs}
    files = (path for path in walk(regions).files if path.name.lower().endswith(ENDING))
    return sorted(str(path) for path in files if path not in used)
