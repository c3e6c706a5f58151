"""One slide or tile set to embed: its source, its name, and the names by which others refer to it."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

from ...artifacts.dicomweb import is_dicomweb
from ...artifacts.remote import RemoteFile, below
from ...artifacts.slide_names import SlideName, without_last_ending

Kind = Literal["auto", "slides", "tiles"]


@dataclass(frozen=True)
class Job:
    """One slide or tile set to embed.

    Attributes:
        name: name of the feature file; unique within a run.
        source: the file or folder.
        kind: ``slide`` or ``tiles``.
        row: the slide's row of the manifest (mpp, label, patient, …).
        aliases: other paths that lead to the same file.
        regions: GeoJSON file with the regions of the slide to embed, if one was given.
        url: where the file is, if not on this machine; ``source`` is then the name of a local copy.
        parts: with ``url``, all files that are copied; the first is the one to open.
        mark: of the content, if it is known without reading; see ``artifacts.files.content_mark``.
        problem: with ``url``, why the server refuses it; "" if it does not.
    """

    name: str
    source: Path
    kind: Literal["slide", "tiles"]
    row: dict[str, str] = field(default_factory=dict)
    aliases: tuple[Path, ...] = ()
    regions: Path | None = None
    url: str = ""
    parts: tuple[RemoteFile, ...] = ()
    mark: str = ""
    problem: str = ""

    @property
    def stem(self) -> str:
        """The name without the suffix that makes it unique."""
        return name_of(self.source, self.kind)

    @property
    def shown(self) -> str:
        """The path as it was given, or the URL."""
        return self.url or str(self.source)

    def named(self, text: str) -> str:
        """Return a text about the job with the URL in the place of its local copy."""
        return text.replace(str(self.source), self.url) if self.url else text

    @property
    def location(self) -> str:
        """The absolute path under which the source was found (links are not resolved), or the URL."""
        return self.url or os.path.abspath(self.source)

    @property
    def real(self) -> str:
        """The absolute path without symbolic links, or the URL."""
        return self.url or str(self.source.resolve())

    def copies(self) -> dict[str, PurePosixPath]:
        """Return where each of the ``parts`` is copied to, by its URL: a path below the job's folder.

        The first has the job's name. Instances of a DICOM series get the ending ``.dcm``.
        """
        if not is_dicomweb(self.url):
            above = self.url.rpartition("/")[0]
            return {part.url: below(part.url, above) for part in self.parts}
        names = [
            self.source.name,
            *(f"{part.url.rpartition('/')[2]}.dcm" for part in self.parts[1:]),
        ]
        return {part.url: PurePosixPath(name) for part, name in zip(self.parts, names, strict=True)}

    def names(self) -> SlideName:
        """Return the names by which a table or a file may refer to this slide."""
        if self.url:
            return SlideName(self.name, (self.url,))
        paths = [self.location, os.path.realpath(self.source), str(self.source)]
        paths += map(os.path.abspath, self.aliases)
        return SlideName(self.name, tuple(dict.fromkeys(paths)))


def name_of(source: Path, kind: str) -> str:
    """Return the name of a slide's or tile set's features, by the name of its file."""
    return source.name.split(".")[0] if kind == "tiles" else without_last_ending(source.name)


def distinct_name(job: Job) -> str:
    """Return the job's name plus eight digits of the hash of its path."""
    return f"{job.stem}-{hashlib.sha256(os.fsencode(job.real)).hexdigest()[:8]}"
