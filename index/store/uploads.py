"""Slides that were uploaded to a server: each has a folder of its own in the atlas's ``uploads/``.

While a slide is not in the atlas yet, its folder has a file :data:`PENDING`. The folder of a slide that is
removed or replaced is deleted, whichever program does that. Other slides' files are never touched.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

UPLOADS = "uploads"
PENDING = "pending.json"
"""File next to an upload that is not in the atlas yet."""
_FOLDER = re.compile(r"[0-9a-f]{16}")


def file_in(source: str) -> str | None:
    """Return where in an atlas the file of an uploaded slide is, given its path; None for other slides."""
    if UPLOADS not in source:
        return None
    path = Path(source)
    folder = path.parent
    if folder.parent.name != UPLOADS or not _FOLDER.fullmatch(folder.name):
        return None
    return f"{UPLOADS}/{folder.name}/{path.name}"


def place(atlas: Path, source: str) -> Path | None:
    """Return the file of an uploaded slide in this atlas; None if it was not uploaded, or is gone."""
    file = file_in(source)
    try:
        return atlas / file if file is not None and (atlas / file).is_file() else None
    except OSError:  # another account's folder
        return None


def source_now(atlas: Path, source: str) -> str:
    """Return the path of a slide; that of an upload is in the atlas, also if the atlas was moved."""
    here = place(atlas, source)
    return source if here is None else str(here.absolute())


def _folder_in(atlas: Path, source: str) -> Path | None:
    """Return the folder of an uploaded slide in this atlas, also if the path leads there by a link."""
    file = file_in(source)
    if file is not None:
        return (atlas / file).parent
    uploads = atlas / UPLOADS
    if not source or not uploads.is_dir():
        return None
    folder = Path(source).resolve().parent
    inside = folder.parent == uploads.resolve() and _FOLDER.fullmatch(folder.name)
    return uploads / folder.name if inside else None


def delete(atlas: Path, sources: Iterable[str], kept: Iterable[str]) -> list[Path]:
    """Delete the uploads of slides that are gone.

    Args:
        atlas: its folder.
        sources: paths of the slides that are gone.
        kept: paths of the slides that are in the atlas.

    Returns:
        The folders that could not be deleted.
    """
    gone = {folder for source in sources if (folder := _folder_in(atlas, source)) is not None}
    if gone:
        gone -= {folder for source in kept if (folder := _folder_in(atlas, source)) is not None}
    for folder in gone:
        shutil.rmtree(folder, ignore_errors=True)
    return sorted(folder for folder in gone if folder.exists())
