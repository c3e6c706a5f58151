"""Matches rows, files and annotations to slides: the only module that compares names.

A name matches a slide if it is

- the end of the slide's path, folder by folder: its file name, or its path relative to any folder above it
  (``patientA/slide.svs``); or its whole path;
- one of these without the *slide* ending (``.svs``, ``.ome.tif`` …; ``case.2`` has none);
- the slide's name in an atlas.

Names are compared in Unicode's composed form (NFC). A name that matches two slides is refused, and so are
two names that match one slide: a slide must never get another patient's row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NamedTuple

from ..errors import BadInput
from .images import SUFFIXES
from .tables import same_text

SLIDE_SUFFIXES = frozenset(
    {".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".dcm", ".qptiff"}
)
"""Suffixes that only slides have; files with another suffix are slides or images."""

TIFF_SUFFIXES = (".tif", ".tiff", ".qptiff", ".btf", ".tf2", ".tf8")
SLIDE_ENDINGS = (
    *(".ome.tif", ".ome.tiff", ".ome.btf", ".ome.zarr", ".zarr", ".czi"),
    *sorted({*SLIDE_SUFFIXES, *TIFF_SUFFIXES, *SUFFIXES}),
)
"""Endings of slide files that a name may omit; no other part of a name may be omitted."""

SHOWN = 5


@dataclass(frozen=True)
class SlideName:
    """The name and paths by which one slide can be matched.

    Attributes:
        name: in an atlas, or of its feature file.
        paths: of its file; empty if unknown (features of other tools).
    """

    name: str
    paths: tuple[str, ...] = ()


class Matched(NamedTuple):
    """Which name matches which slide.

    Attributes:
        by_slide: the matching name, by number of the slide.
        unused: names that match no slide, sorted.
        without: numbers of slides that no name matches.
    """

    by_slide: dict[int, str]
    unused: list[str]
    without: list[int]


def without_ending(name: str) -> str:
    """Return a file's name without its slide ending, if it has one."""
    lower = name.lower()
    for ending in SLIDE_ENDINGS:
        if lower.endswith(ending) and len(name) > len(ending):
            return name[: -len(ending)]
    return name


def without_last_ending(name: str) -> str:
    """Return a file's name without the last part of its slide ending: ``case.ome`` of ``case.ome.tif``."""
    stem, dot, ending = name.rpartition(".")
    return stem if stem and f"{dot}{ending}".lower() in SLIDE_ENDINGS else name


def match(names: Iterable[str], slides: Sequence[SlideName], origin: str, what: str) -> Matched:
    """Find the slide that each name matches.

    Args:
        names: as written in a table or folder.
        slides: the slides to match.
        origin: of the names, for messages.
        what: kind of thing that has the name, for messages: ``row`` or ``file``.

    Raises:
        BadInput: a name matches two slides, or two names match one slide; the message gives the remedy.
    """
    numbers_of = _numbers_by_key(slides)
    by_slide: dict[int, str] = {}
    unused = []
    for name in names:
        parts = _parts(name)
        numbers = sorted(numbers_of.get(parts, ()))
        pathless = (n for n in numbers_of.get(_bare(parts)[-1:], ()) if not slides[n].paths)
        numbers += sorted(n for n in pathless if n not in numbers)
        if not numbers:
            unused.append(name)
        elif len(numbers) > 1:
            raise BadInput(_ambiguous(name, [slides[n] for n in numbers], origin, what))
        elif numbers[0] in by_slide:
            slide = slides[numbers[0]]
            raise BadInput(
                f"{origin}: the {what}s {by_slide[numbers[0]]!r} and {name!r} both match slide "
                f"{slide.name!r}{_at(slide)}; keep one of them"
            )
        else:
            by_slide[numbers[0]] = name
    without = [n for n in range(len(slides)) if n not in by_slide]
    return Matched(by_slide, sorted(unused), without)


Key = tuple[str, ...]


def _parts(text: str) -> Key:
    plain = same_text(text).replace("\\", "/")
    return tuple(part for part in PurePosixPath(plain).parts if part != ".")


def _bare(parts: Key) -> Key:
    return (*parts[:-1], without_ending(parts[-1])) if parts else parts


def _numbers_by_key(slides: Sequence[SlideName]) -> dict[Key, set[int]]:
    """Return the slides that each key matches; keys are all ends of all paths, with and without ending."""
    numbers_of: dict[Key, set[int]] = {}
    for number, slide in enumerate(slides):
        keys: set[Key] = {_parts(slide.name), _bare(_parts(slide.name))}
        for path in slide.paths:
            parts = _parts(path)
            for start in range(len(parts)):
                end = parts[start:]
                keys.update({end, _bare(end), (*end[:-1], without_last_ending(end[-1]))})
        for key in keys:
            numbers_of.setdefault(key, set()).add(number)
    return numbers_of


def _at(slide: SlideName) -> str:
    return f" ({slide.paths[0]})" if slide.paths else ""


def _ambiguous(name: str, slides: Sequence[SlideName], origin: str, what: str) -> str:
    few = "; ".join(f"{slide.name!r}{_at(slide)}" for slide in slides[:SHOWN])
    more = f" and {len(slides) - SHOWN} more" if len(slides) > SHOWN else ""
    example = _shortest(slides[0], slides[1:])
    path = f", such as {example!r}" if example else ""
    return (
        f"{origin}: the {what} {name!r} matches {len(slides)} slides: {few}{more}; write a longer part of "
        f"the slide's path{path}, or its name in the atlas"
    )


def _shortest(slide: SlideName, others: Sequence[SlideName]) -> str:
    """Return the shortest end of a slide's path that is unique among the slides."""
    for path in slide.paths[:1]:
        parts = _parts(path)
        for start in range(len(parts) - 1, 0, -1):
            end = parts[start:]
            if not any(_parts(p)[-len(end) :] == end for other in others for p in other.paths):
                return "/".join(end)
    return ""
