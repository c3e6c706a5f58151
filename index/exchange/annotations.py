"""Annotations from and to QuPath: one GeoJSON file per slide."""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...artifacts.files import publish_folder, write_atomic
from ...artifacts.geojson import (
    class_of,
    collection,
    moved,
    polygons_of,
    properties_of,
    read_features,
)
from ...artifacts.walking import LeftOut, walk
from ...errors import BadInput
from ..atlas import Atlas
from ..store.annotation import Annotated, Annotation
from ..store.metadata import matches_of
from .qupath import COLOURS, file_names, origins

ENDINGS = (".geojson", ".json")
DESCRIPTION = "ANNOTATION_DESCRIPTION"
"""QuPath's name, among an object's metadata, of what its user wrote about an annotation."""
Corner = tuple[int, int]


@dataclass(frozen=True)
class Imported:
    """What became of the files.

    Attributes:
        stored: ids that were added, changed or stored already.
        slides: number of annotations by slide.
        skipped: number of objects that were not taken, by reason.
        unused: files that match no slide.
        left_out: other entries of the folders.
        frame_unknown: slides whose scanned area is unknown; their coordinates were taken as level-0 pixels.
    """

    stored: Annotated
    slides: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    frame_unknown: list[str] = field(default_factory=list)


def annotations_of(
    features: Sequence[dict[str, Any]], slide: str, source: str, corner: Corner, author: str
) -> tuple[list[Annotation], Counter[str]]:
    """Return the annotations among the Features of a file, and the number of others by reason.

    A label is the class in QuPath, or else the name. A note is the description, or else the name.

    Args:
        features: Features; detections, cells, and objects without area are not taken.
        slide: its name in the atlas.
        source: name of the file, for messages.
        corner: level-0 pixel that is (0, 0) in the file.
        author: who brings them.

    Raises:
        BadInput: a polygon cannot be read.
    """
    taken, skipped = [], Counter[str]()
    for feature in features:
        properties = properties_of(feature)
        kind = _kind_of(feature)
        if kind not in {"annotation", "roi"}:
            skipped[f"{kind}, not an annotation"] += 1
            continue
        polygons = polygons_of(feature, source)
        if not polygons:
            geometry = feature.get("geometry") or {}
            skipped[f"{geometry.get('type', 'nothing')}, which has no area"] += 1
            continue
        name, metadata = str(properties.get("name") or ""), properties.get("metadata")
        described = metadata.get(DESCRIPTION) if isinstance(metadata, dict) else ""
        label = class_of(feature) or name
        note = str(described or properties.get("note") or (name if name != label else ""))
        given = feature.get("id", properties.get("id"))
        here = moved(polygons, *corner)
        number = _uuid("" if given is None else str(given), slide, [label, note, here])
        taken.append(Annotation(slide, here, label, note, author, number).checked())
    return taken, skipped


def _kind_of(feature: dict[str, Any]) -> str:
    """Return what an object is in QuPath; former versions state it in its id only."""
    kind, number = properties_of(feature).get("objectType"), str(feature.get("id", ""))
    if kind is None and number.startswith("Path") and number.endswith("Object"):
        return number[4:-6].lower()
    return "annotation" if kind is None else str(kind)


def _uuid(number: str, slide: str, content: list[Any]) -> str:
    """Return a UUID for an object: always the same one, so that a file can be read again.

    Args:
        number: its id. Other tools number the objects of a slide; former versions of QuPath write the class
            of the object, which identifies nothing, and some tools write none: then its content counts.
        slide: its slide.
        content: its label, note and shape.
    """
    if not number or number.startswith("Path"):
        number = json.dumps(content, default=lambda ring: ring.tolist())
    try:
        return str(uuid.UUID(number))
    except ValueError:
        return str(uuid.uuid5(uuid.NAMESPACE_OID, ascii(f"{slide}\0{number}")))


def document_of(annotations: Sequence[Annotation], corner: Corner = (0, 0)) -> dict[str, Any]:
    """Return annotations as a FeatureCollection that QuPath reads; ``corner`` becomes (0, 0)."""
    left, top = corner
    return collection([_feature(item, -left, -top) for item in annotations])


def _feature(item: Annotation, x: float, y: float) -> dict[str, Any]:
    parts = [
        [
            [*ring.tolist(), *([] if (ring[0] == ring[-1]).all() else ring[:1].tolist())]
            for ring in rings
        ]
        for rings in moved(item.polygons, x, y)
    ]  # GeoJSON repeats the first corner at the end
    one = len(parts) == 1
    geometry = {
        "type": "Polygon" if one else "MultiPolygon",
        "coordinates": parts[0] if one else parts,
    }
    properties: dict[str, Any] = {"objectType": "annotation"}
    if item.label:
        colour = COLOURS[sum(item.label.encode()) % len(COLOURS)]
        rgb = [colour >> 16, colour >> 8 & 0xFF, colour & 0xFF]
        properties["classification"] = {"name": item.label, "color": rgb}
    if item.note:
        properties["metadata"] = {DESCRIPTION: item.note}
    properties |= {
        "author": item.author, "created_at": item.created_at, "changed_at": item.changed_at,
    }  # fmt: skip
    return {"type": "Feature", "id": item.id, "geometry": geometry, "properties": properties}


def import_files(
    atlas: Atlas, paths: Sequence[Path], author: str, slide: str | None = None
) -> Imported:
    """Store the annotations of GeoJSON files in an atlas; all or none.

    Args:
        atlas: the atlas.
        paths: files, or folders with files named after the slides (``case-1.geojson``,
            ``patientA/case-1.svs.geojson``; see ``slide_names``).
        author: who brings them.
        slide: the slide of a single file, whatever its name.

    Raises:
        BadInput: a file cannot be read, or none has an annotation; ``slide`` is given for several files; or
            a file's name matches two slides.
        NotFound: the atlas has no such slide.
    """
    files, left_out = _files_in(paths)
    slides = [row for row in atlas.slides() if row["kind"] == "slide"]
    if slide is not None:
        if sum(map(len, files.values())) != 1:
            raise BadInput(f"--slide is for one file; there are {sum(map(len, files.values()))}")
        of_file: dict[str, str] = {next(iter(files)): slide}
        unused: list[str] = []
    else:
        of_file, unused = matches_of(files, slides, "the annotations", "file")
    if unused and not of_file:
        raise BadInput(
            f"no file matches a slide of the atlas ({', '.join(unused[:5])}); name each file after its "
            "slide, or give --slide"
        )
    corners = origins(atlas.view())
    report = Imported(
        Annotated(), {}, {}, [str(path) for name in unused for path in files[name]], left_out
    )
    found: list[Annotation] = []
    skipped = Counter[str]()
    for name, called in of_file.items():
        corner = corners.get(called)
        for path in files[name]:
            features = read_features(path)
            taken, others = annotations_of(features, called, str(path), corner or (0, 0), author)
            found += taken
            skipped += others
            report.slides[called] = report.slides.get(called, 0) + len(taken)
        if corner is None and report.slides[called]:
            report.frame_unknown.append(called)
    report.skipped.update(skipped)
    if not found:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in skipped.items())
        raise BadInput(f"the files have no annotation with an area ({reasons or 'they are empty'})")
    stored = atlas.annotate(found)
    for key in ("added", "changed", "unchanged"):
        getattr(report.stored, key).extend(getattr(stored, key))
    return report


def _files_in(paths: Sequence[Path]) -> tuple[dict[str, list[Path]], list[LeftOut]]:
    """Return files by the name that is compared with the slides', and what a folder has besides."""
    files: dict[str, list[Path]] = {}
    left_out: list[LeftOut] = []
    for path in paths:
        if path.is_dir():
            walked = walk(path)
            left_out += walked.left_out
            for file in walked.files:
                if file.name.lower().endswith(ENDINGS):
                    name = file.relative_to(path).as_posix().rsplit(".", 1)[0]
                    files.setdefault(name, []).append(file)
                else:
                    left_out.append(LeftOut(str(file), "no .geojson"))
        elif path.is_file():
            known = path.name.lower().endswith(ENDINGS)
            name = path.name.rsplit(".", 1)[0] if known else path.name
            files.setdefault(name, []).append(path)
        else:
            raise BadInput(f"{path} does not exist; check the path")
    return files, left_out


def export_files(atlas: Atlas, out: Path) -> tuple[dict[str, int], list[str]]:
    """Write a folder with ``<slide>.geojson`` for each slide that has annotations.

    Coordinates are QuPath's: (0, 0) is the top-left corner of the scanned area.

    Returns:
        The number of annotations by slide, and the slides whose scanned area is unknown; coordinates of
        these are level-0 pixels.

    Raises:
        BadInput: the atlas has no annotation, or ``out`` exists.
    """
    by_slide: dict[str, list[Annotation]] = {}
    for item in atlas.annotations():
        by_slide.setdefault(item.slide, []).append(item)
    if not by_slide:
        raise BadInput(f"{atlas.path} has no annotations; draw some on the page, or import them")
    corners = origins(atlas.view())
    with publish_folder(out) as folder:
        for slide, name in file_names(by_slide).items():
            document = document_of(by_slide[slide], corners.get(slide) or (0, 0))
            write_atomic(folder / f"{name}.geojson", json.dumps(document, ensure_ascii=False))
    unknown = sorted(slide for slide in by_slide if corners.get(slide) is None)
    return {slide: len(items) for slide, items in by_slide.items()}, unknown
