"""Finds slides that were moved and updates their paths in the atlas if the content is unchanged."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ...artifacts.feature_files import Features, read_features
from ...artifacts.files import content_mark
from ...artifacts.tileset_files import open_tiles
from ...artifacts.unread import INDEXES, belongs_to
from ...artifacts.walking import walk
from ...errors import BadInput
from .catalog import Catalog, update
from .uploads import place

MarkOf = Callable[[Path], str]
"""Returns the content mark of a file; each is computed once."""


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
    """Update the paths of moved slides; see :meth:`Atlas.relocate <histoseek.index.atlas.Atlas.relocate>`.

    The caller must hold the atlas's lock.
    """
    for folder in (*folders, *([new] if new is not None else [])):
        if not folder.is_dir():
            raise BadInput(f"{folder} is not a folder; check the path")
    slides = [dict(row) for row in catalog.rows("SELECT * FROM slides ORDER BY name")]
    mark_of = cache(_mark)
    files = None
    if old is not None and new is not None:
        below = [slide for slide in slides if _below(slide["source"], old) is not None]
        if not below:
            parents = sorted({os.path.dirname(slide["source"]) for slide in slides})[:5]
            raise BadInput(
                f"no slide of the atlas is below {old!r}; its slides are in {', '.join(parents)}"
            )
        candidates = {slide["id"]: [new / (_below(slide["source"], old) or "")] for slide in below}
        slides = below
    else:
        files = _Files(folders, mark_of)
        candidates = {slide["id"]: files.named(slide) for slide in slides}
    results = []
    for slide in slides:
        here = place(atlas, slide["source"])
        if here is not None:  # an upload stays in the atlas
            results.append(Relocated(slide["name"], "there", str(here.absolute())))
            continue
        features = read_features(atlas / slide["features_file"])
        result = _relocated(slide, features, candidates[slide["id"]], mark_of)
        if result.state in {"not found", "other content"} and files is not None:
            result = _anywhere(slide, features, files) or result
        if result.state == "moved":
            with catalog.write() as db:
                update(db, "slides", {"id": slide["id"]}, {"source": result.source})
        results.append(result)
    return results


class _Files:
    """The files and folders to search."""

    def __init__(self, folders: Sequence[Path], mark_of: MarkOf) -> None:
        self._files = [file for folder in folders for file in walk(folder, belongs_to).files]
        self._mark_of = mark_of
        self._named: dict[str, list[Path]] = {}
        above = {parent for file in self._files for parent in file.parents}
        inside = [p for p in above if any(p == f or p.is_relative_to(f) for f in folders)]
        for path in sorted([*self._files, *inside]):
            self._named.setdefault(path.name, []).append(path)

    def named(self, slide: Mapping[str, Any]) -> list[Path]:
        """Return the files and folders with the file name of a slide or tile set."""
        return self._named.get(Path(slide["source"]).name, [])

    @cached_property
    def by_mark(self) -> dict[str, Path]:
        """The first file with each content mark; the first access reads the marks of all files."""
        return {self._mark_of(file): file for file in reversed(self._files)}


def _mark(path: Path) -> str:
    try:
        return content_mark(path)
    except OSError as error:
        return f"unreadable: {error}"


def _below(source: str, folder: str) -> str | None:
    """Return ``source`` relative to ``folder``; None if it is not below that folder."""
    for above in dict.fromkeys([os.path.abspath(folder), os.path.realpath(folder)]):
        inside = os.path.relpath(source, above) if source else ".."
        if inside.split(os.sep)[0] != "..":
            return inside
    return None


def _relocated(
    slide: Mapping[str, Any], features: Features, candidates: Sequence[Path], mark_of: MarkOf
) -> Relocated:
    """Compare the content of the candidate paths with the slide's stored content mark."""
    name, source = str(slide["name"]), str(slide["source"])
    mark = features.about.get("key", {}).get("content")
    if mark is None:
        reason = (
            "its feature file has no content mark (files of other tools have none), so its path was not "
            "changed"
        )
        return Relocated(name, "unchecked", source, reason)
    existing = [path for path in candidates if path.exists()]
    for path in existing:
        same, reason = _is_same(slide, features, mark, path, mark_of)
        if same:
            target = os.path.abspath(path)
            return Relocated(name, "there" if target == source else "moved", target, reason)
    if source and _is_same(slide, features, mark, Path(source), mark_of)[0]:
        return Relocated(name, "there", source)
    if existing:
        reason = f"{existing[0]} has other content; embed it as a new slide, or give another folder"
        return Relocated(name, "other content", source, reason)
    return Relocated(name, "not found", source, "no file in this folder has its content")


def _anywhere(slide: Mapping[str, Any], features: Features, files: _Files) -> Relocated | None:
    """Search for a slide under another file name, by its content.

    A slide's index file (``.mrxs``, ``.vms``) is small and may equal those of other slides, so it is found
    only under its own name.
    """
    mark = features.about.get("key", {}).get("content")
    is_index = Path(slide["source"]).suffix.lower() in {".mrxs", *INDEXES}
    if mark is None or slide["kind"] != "slide" or is_index:
        return None
    path = files.by_mark.get(mark)
    return None if path is None else Relocated(slide["name"], "moved", os.path.abspath(path))


def _is_same(
    slide: Mapping[str, Any], features: Features, mark: str, path: Path, mark_of: MarkOf
) -> tuple[bool, str]:
    """Return whether ``path`` is this slide or tile set, and what could not be checked."""
    if slide["kind"] == "slide":
        complete = path.suffix.lower() != ".mrxs" or path.with_suffix("").is_dir()
        return complete and path.is_file() and mark_of(path) == mark, ""
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
    return same, "its tiles were compared by name, not by content" if same else ""
