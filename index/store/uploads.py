"""Slides that were uploaded to a server: each has a folder of its own in the atlas's ``uploads/``.

While a slide is not in the atlas yet, its folder has a file :data:`PENDING`. The file of a slide that was
removed or replaced is deleted by the next write to the atlas, whichever program writes.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from ...artifacts.files import TEMP

UPLOADS = "uploads"
PENDING = "pending.json"
"""File next to an upload that is not in the atlas yet."""
_FOLDER = re.compile(r"[0-9a-f]{16}")


def folder_of(source: str) -> str | None:
    """Return the name of the folder of an uploaded slide, given its path; None for other slides."""
    folder = Path(source).parent
    return folder.name if folder.parent.name == UPLOADS and _FOLDER.fullmatch(folder.name) else None


def file_in(source: str) -> str | None:
    """Return where in an atlas the file of an uploaded slide is, given its path; None for other slides."""
    folder = folder_of(source)
    return None if folder is None else f"{UPLOADS}/{folder}/{Path(source).name}"


def source_now(atlas: Path, source: str) -> str:
    """Return the path of a slide; that of an upload is in the atlas, also if the atlas was moved."""
    file = file_in(source)
    here = atlas / (file or "")
    return str(here.absolute()) if file is not None and here.is_file() else source


def remove_orphans(atlas: Path, sources: Iterable[str]) -> None:
    """Delete the uploads that are of no slide.

    Args:
        atlas: its folder.
        sources: paths of all its slides.
    """
    used = {folder_of(source) for source in sources}
    for folder in (atlas / UPLOADS).glob("*"):
        if folder.name in used or not _FOLDER.fullmatch(folder.name) or folder.is_symlink():
            continue
        # an upload begins with the file PENDING, so a folder without files is about to get it
        files = {path.name for path in folder.glob("*") if not path.name.endswith(TEMP)}
        if files and PENDING not in files:
            shutil.rmtree(folder, ignore_errors=True)
