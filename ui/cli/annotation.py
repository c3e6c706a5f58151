"""Commands for annotations: ``index annotate`` and ``index annotations``."""

from __future__ import annotations

import getpass
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import console
from ...artifacts.walking import summarised
from ...console import counted
from ...errors import BadInput

if TYPE_CHECKING:
    from ...index.store.annotation import Annotation

NOTE_SHOWN = 40
ID_SHOWN = 8


def annotate(atlas: Path, files: list[Path], slide: str | None = None) -> None:
    """Store annotations from QuPath in the atlas: regions of slides with a label and a note.

    They can be searched (`--where "annotation.label = 'tumour'"`) and are shown on the page. An annotation
    that the atlas has already is changed, not added again.

    Options:
        files: GeoJSON files that QuPath exported, named after their slides, or folders of such files.
        slide: The slide of a single file that has another name.
    """
    from ...index.atlas import Atlas
    from ...index.exchange.annotations import import_files

    done = import_files(Atlas(atlas), files, _user(), slide)
    stored = {key: len(ids) for key, ids in asdict(done.stored).items()}
    document = {
        **stored,
        "slides": done.slides,
        "skipped": done.skipped,
        "unused_files": done.unused,
        "frame_unknown": done.frame_unknown,
        "left_out": [left._asdict() for left in done.left_out],
    }

    def human() -> None:
        counts = ", ".join(f"{count} {what}" for what, count in stored.items())
        console.say(f"{atlas}: annotations of {counted(len(done.slides), 'slide')}: {counts}")
        for reason, count in done.skipped.items():
            console.say(f"not taken: {count} x {reason}")
        console.say_names("files that match no slide", done.unused)
        for line in summarised(done.left_out):
            console.say(line)
        _say_frames(done.frame_unknown)

    console.emit(document, human)


def annotations_(
    atlas: Path, slide: str | None = None, out: Path | None = None, remove: list[str] | None = None
) -> None:
    """List the annotations of an atlas, write them for QuPath, or remove some.

    Options:
        slide: Only those of this slide.
        out: New folder. Gets a GeoJSON file for each slide that has annotations.
        remove: Id of an annotation to remove, or its first characters. Repeatable.
    """
    from ...index.atlas import Atlas
    from ...index.exchange.annotations import export_files

    opened = Atlas(atlas)
    if out is not None and (slide or remove):
        raise BadInput("--out writes the annotations of all slides; leave out --slide and --remove")
    if remove:
        ids = [_the_id(start, opened.annotations()) for start in dict.fromkeys(remove)]
        opened.remove_annotations(ids)
        console.emit(
            {"removed": ids},
            lambda: console.say(f"{atlas}: removed {counted(len(ids), 'annotation')}"),
        )
    elif out is not None:
        counts, unknown = export_files(opened, out)
        document = {"out": str(out), "slides": counts, "frame_unknown": unknown}

        def written() -> None:
            marked = counted(sum(counts.values()), "annotation")
            console.say(f"{out}: {marked} of {counted(len(counts), 'slide')}")
            _say_frames(unknown)

        console.emit(document, written)
    else:
        found = opened.annotations(slide)
        console.emit({"annotations": [_facts(item) for item in found]}, lambda: _show(found))


def _the_id(start: str, known: list[Annotation]) -> str:
    """Return the id that begins with a text."""
    found = [item.id for item in known if item.id.startswith(start.lower())]
    if len(found) != 1:
        raise BadInput(
            f"--remove {start!r} fits {len(found)} annotations; expected the id of one, or its first "
            "characters, as `index annotations` lists them"
        )
    return found[0]


def _facts(item: Annotation) -> dict[str, Any]:
    facts = {k: v for k, v in vars(item).items() if k != "polygons"}
    return {**facts, "area_px": round(item.area)}


def _show(found: list[Annotation]) -> None:
    rows = [
        (
            a.slide,
            a.label or "-",
            a.note[:NOTE_SHOWN],
            a.author or "-",
            a.changed_at,
            a.id[:ID_SHOWN],
        )
        for a in found
    ]
    if rows:
        console.table("", ("slide", "label", "note", "by", "changed", "id"), rows)
    console.say(counted(len(found), "annotation"))


def _say_frames(slides: list[str]) -> None:
    console.say_names(
        "slides whose scanned area is unknown; their coordinates are level-0 pixels. QuPath has another "
        "origin for .mrxs, .scn and .bif; embed such slides again",
        slides,
    )


def _user() -> str:
    """Return the name of the user of this computer; "" if it is unknown."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return ""
