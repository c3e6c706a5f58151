"""Finds slides that were moved and updates their paths in the atlas if the content is unchanged."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...artifacts.feature_files import Features, read_features
from ...artifacts.files import content_mark
from ...artifacts.tileset_files import open_tiles
from ...artifacts.unread import INDEXES, belongs_to
from ...artifacts.walking import walk
from ...errors import BadInput
from .catalog import Catalog, update


class Relocated(NamedTuple):
    """The result for one slide or tile set.

    Attributes:
        slide: its name.
        state: ``moved``, ``there`` (it is at the stored path), ``not found``, ``other content``, or
            ``unchecked`` (its content is not known, so nothing was changed).
        source: the path stored in the atlas afterwards.
        reason: why the path was not changed, or what could not be checked.
    """

    slide: str
    state: str
    source: str
    reason: str = ""


def relocate(
    atlas: Path, catalog: Catalog, old: str | None, new: Path | None, folders: Sequence[Path]
) -> list[Relocated]:
    """Find the slides of an atlas at their new paths and store these.

    A slide is recognised by the content mark in its feature file (size, first and last mebibyte). A tile
    set in a folder is recognised by the names of its tiles.

    Args:
        atlas: its folder.
        catalog: of the atlas; the caller holds the atlas's lock.
        old: former folder of the slides; only slides below it are checked.
        new: the folder that replaces ``old``.
        folders: instead of ``old`` and ``new``: folders to search by file name, then by content.

    Returns:
        One entry for each slide that was checked, sorted by name.

    Raises:
        BadInput: a folder does not exist, or no slide lies below ``old``.
    """
    for folder in (*folders, *([new] if new is not None else [])):
        if not folder.is_dir():
            raise BadInput(f"{folder} is not a folder; check the path")
    slides = [dict(row) for row in catalog.rows("SELECT * FROM slides ORDER BY name")]
    if old is not None and new is not None:
        below = [slide for slide in slides if _below(slide["source"], old) is not None]
        if not below:
            known = sorted({os.path.dirname(slide["source"]) for slide in slides})[:5]
            raise BadInput(
                f"no slide of the atlas lies below {old!r}; its slides lie in {', '.join(known)}"
            )
        files = None
        wanted = {slide["id"]: [new / (_below(slide["source"], old) or "")] for slide in below}
        slides = below
    else:
        files = _Files(folders)
        wanted = {slide["id"]: files.named(slide) for slide in slides}
    marks = _Marks()
    found = []
    for slide in slides:
        features = read_features(atlas / slide["features_file"])
        result = _relocated(slide, features, wanted[slide["id"]], marks)
        if result.state in {"not found", "other content"} and files is not None:
            result = _anywhere(slide, features, files, marks) or result
        if result.state == "moved":
            with catalog.write() as db:
                update(db, "slides", {"id": slide["id"]}, {"source": result.source})
        found.append(result)
    return found


class _Files:
    """The files and folders to search."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.every = [file for folder in folders for file in walk(folder, belongs_to).files]
        self._named: dict[str, list[Path]] = {}
        above = {parent for file in self.every for parent in file.parents}
        inside = [p for p in above if any(p == f or p.is_relative_to(f) for f in folders)]
        for path in sorted([*self.every, *inside]):
            self._named.setdefault(path.name, []).append(path)
        self._by_mark: dict[str, list[Path]] | None = None

    def named(self, slide: Mapping[str, Any]) -> list[Path]:
        """Return the files and folders with the file name of a slide or tile set."""
        return self._named.get(Path(slide["source"]).name, [])

    def with_mark(self, mark: str, marks: _Marks) -> list[Path]:
        """Return the files with a content mark; the first call reads the marks of all files."""
        if self._by_mark is None:
            self._by_mark = {}
            for file in self.every:
                self._by_mark.setdefault(marks.of(file), []).append(file)
        return self._by_mark.get(mark, [])


class _Marks:
    """Content marks of files, each computed once."""

    def __init__(self) -> None:
        self._known: dict[Path, str] = {}

    def of(self, path: Path) -> str:
        if path not in self._known:
            try:
                self._known[path] = content_mark(path)
            except OSError as error:
                self._known[path] = f"unreadable: {error}"
        return self._known[path]


def _below(source: str, folder: str) -> str | None:
    """Return ``source`` relative to ``folder``; None if it is not below that folder."""
    for above in dict.fromkeys([os.path.abspath(folder), os.path.realpath(folder)]):
        inside = os.path.relpath(source, above) if source else ".."
        if inside.split(os.sep)[0] != "..":
            return inside
    return None


def _relocated(
    slide: Mapping[str, Any], features: Features, candidates: Sequence[Path], marks: _Marks
) -> Relocated:
    """Compare the candidate paths of a slide with its known content."""
    name, source = str(slide["name"]), str(slide["source"])
    mark = features.about.get("key", {}).get("content")
    if mark is None:
        reason = (
            "its features hold no content mark, as those of other tools; its place was not changed"
        )
        return Relocated(name, "unchecked", source, reason)
    there = [path for path in candidates if path.exists()]
    for path in there:
        same, reason = _is_same(slide, features, mark, path, marks)
        if same:
            place = os.path.abspath(path)
            return Relocated(name, "there" if place == source else "moved", place, reason)
    if source and _is_same(slide, features, mark, Path(source), marks)[0]:
        return Relocated(name, "there", source)
    if there:
        reason = f"{there[0]} has other content; embed it as a new slide, or look elsewhere"
        return Relocated(name, "other content", source, reason)
    return Relocated(name, "not found", source, "no file there has its content")


def _anywhere(
    slide: Mapping[str, Any], features: Features, files: _Files, marks: _Marks
) -> Relocated | None:
    """Search for a slide under another file name, by its content.

    A slide's index file (``.mrxs``, ``.vms``) is small and may equal those of other slides, so it is found
    only under its own name.
    """
    mark = features.about.get("key", {}).get("content")
    if mark is None or slide["kind"] != "slide" or _is_index(Path(slide["source"])):
        return None
    for path in files.with_mark(mark, marks):
        return Relocated(str(slide["name"]), "moved", os.path.abspath(path))
    return None


def _is_index(path: Path) -> bool:
    return path.suffix.lower() in {".mrxs", *INDEXES}


def _is_same(
    slide: Mapping[str, Any], features: Features, mark: str, path: Path, marks: _Marks
) -> tuple[bool, str]:
    """Return whether ``path`` is this slide or tile set, and what could not be checked."""
    if slide["kind"] == "slide":
        whole = path.suffix.lower() != ".mrxs" or path.with_suffix("").is_dir()
        return whole and path.is_file() and marks.of(path) == mark, ""
    if path.name != Path(slide["source"]).name:
        return False, ""
    try:
        tiles = open_tiles(path)
    except BadInput:
        return False, ""
    if tiles.fingerprint == mark:
        return True, ""
    # A copied folder has new file times and so another fingerprint: compare the names of the tiles instead.
    names = set(features.files or ())
    same = path.is_dir() and bool(names) and names <= {tile.file for tile in tiles.tiles}
    return same, "its tiles were found by name; their content was not compared" if same else ""
