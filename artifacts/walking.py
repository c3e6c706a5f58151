"""Walks folders: lists every file below a folder once, and what is left out with the reason.

Links to folders are followed, without loops. A file that is found twice is listed under its real name.
Folders that file managers, servers and notebooks create for internal use are left out and reported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from ..errors import BadInput

SYSTEM_FOLDERS = frozenset({
    "@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "$recycle.bin", "__macosx",
    "lost+found", "system volume information",
})  # fmt: skip
"""Names (lower case) of folders in which servers and file managers keep copies and trash."""
SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini"})
SHOWN = 3


class LeftOut(NamedTuple):
    """A file or folder that was left out.

    Attributes:
        path: of the file or folder.
        reason: why, in a few words; the same text for all of one kind.
    """

    path: str
    reason: str


@dataclass(frozen=True)
class Walk:
    """The files of a folder.

    Attributes:
        files: every file once, sorted.
        left_out: hidden and system folders and files, broken links, and links to a file that is listed
            under another name.
        aliases: by file, its other paths.
    """

    files: tuple[Path, ...]
    left_out: tuple[LeftOut, ...]
    aliases: dict[Path, tuple[Path, ...]] = field(default_factory=dict)


def is_hidden(name: str) -> bool:
    """Whether a folder or file of this name is left out because it is hidden or for internal use."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS | SYSTEM_FILES


Prune = Callable[[Path, Sequence[str], Sequence[str]], dict[str, str | None]]
"""Takes a folder and the names of its sub-folders and files. Returns the sub-folders not to walk, by
name, each with the reason to report, or None if it belongs to a file of the folder."""


def walk(folder: Path, prune: Prune | None = None) -> Walk:
    """Find every file below a folder.

    Args:
        folder: where to start; its name may be a hidden one.
        prune: selects sub-folders not to walk, such as the data folder of an ``.mrxs`` file.

    Raises:
        BadInput: a folder cannot be read.
    """
    walked = _Walking(folder, prune)
    walked.go(folder)
    while walked.links:  # after all real folders, so that files get their real name if possible
        link = walked.links.pop(0)
        real = os.path.realpath(link)
        if real in walked.visited:
            walked.leave_out(link, "link to a folder that is searched already")
        elif walked.root == real or walked.root.startswith(real.rstrip(os.sep) + os.sep):
            walked.leave_out(link, "link to a folder that contains the searched one")
        else:
            walked.go(link)
    found = once(walked.found)
    return replace(found, left_out=tuple(sorted([*walked.left_out, *found.left_out])))


class _Walking:
    """State of one call of :func:`walk`: the files found, and links to folders still to follow."""

    def __init__(self, folder: Path, prune: Prune | None) -> None:
        self.root, self._prune = os.path.realpath(folder), prune
        self.visited: set[str] = set()
        self.found: list[Path] = []
        self.links: list[Path] = []
        self.left_out: list[LeftOut] = []

    def leave_out(self, path: Path, reason: str) -> None:
        self.left_out.append(LeftOut(str(path), reason))

    def go(self, folder: Path) -> None:
        """Walk real folders; store links to folders for later."""
        for top, folders, names in os.walk(folder, onerror=_unreadable):
            here = Path(top)
            self.visited.add(os.path.realpath(here))
            skipped = {} if self._prune is None else self._prune(here, folders, names)
            kept = []
            for name in sorted(folders):
                if is_hidden(name):
                    self.leave_out(here / name, "hidden or system folder")
                elif name in skipped:
                    if (reason := skipped[name]) is not None:
                        self.leave_out(here / name, reason)
                elif (here / name).is_symlink():
                    self.links.append(here / name)
                elif os.path.realpath(here / name) not in self.visited:
                    kept.append(name)
            folders[:] = kept
            for name in sorted(names):
                if is_hidden(name):
                    self.leave_out(here / name, "hidden or system file")
                elif not (here / name).exists():
                    self.leave_out(here / name, "broken link")
                else:
                    self.found.append(here / name)


def once(found: Sequence[Path]) -> Walk:
    """Keep each file once: under its real name if that is among the paths, else under the first one."""
    by_real: dict[str, list[Path]] = {}
    for path in sorted(found):
        by_real.setdefault(os.path.realpath(path), []).append(path)
    others: dict[Path, tuple[Path, ...]] = {}
    for paths in by_real.values():
        chosen = next((path for path in paths if not path.is_symlink()), paths[0])
        others[chosen] = tuple(path for path in paths if path != chosen)
    left_out = [
        LeftOut(str(alias), f"the same file as {chosen}")
        for chosen, aliases in others.items()
        for alias in aliases
    ]
    return Walk(tuple(sorted(others)), tuple(left_out), {k: v for k, v in others.items() if v})


def _unreadable(error: OSError) -> None:
    raise BadInput(
        f"{error.filename} cannot be read ({error.strerror}); check its permissions, or pass its files"
    ) from error


def summarised(left_out: Sequence[LeftOut]) -> list[str]:
    """Return one line per reason: how many were left out, and the first few of them."""
    by_reason: dict[str, list[str]] = {}
    for path, reason in left_out:
        kind = "the same file under another name" if reason.startswith("the same file") else reason
        by_reason.setdefault(kind, []).append(path)
    lines = []
    for reason, paths in sorted(by_reason.items()):
        few = ", ".join(paths[:SHOWN]) + (" …" if len(paths) > SHOWN else "")
        lines.append(f"left out, {reason}: {len(paths)} ({few})")
    return lines
