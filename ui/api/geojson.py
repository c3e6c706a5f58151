"""Bodies of the routes for annotations: GeoJSON."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StrictInt

MAX_ANNOTATIONS = 10_000


class Feature(BaseModel):
    """An annotation as a GeoJSON Feature, as QuPath writes it; coordinates are pixels.

    ``properties`` has ``classification.name`` (the label), ``metadata.ANNOTATION_DESCRIPTION`` (the note),
    and in answers ``author``, ``created_at`` and ``changed_at``.
    """

    type: Literal["Feature"] = "Feature"
    id: Annotated[str, Field(max_length=200)] | StrictInt | None = None
    geometry: dict[str, Any] | None = None
    properties: dict[str, Any] | None = None


class Annotations(BaseModel):
    """Annotations of a slide as a GeoJSON FeatureCollection."""

    type: Literal["FeatureCollection"] = "FeatureCollection"
    features: list[Feature] = Field(max_length=MAX_ANNOTATIONS)


class AnnotationsOfSlide(Annotations):
    """Annotations of a slide; with ``frame_unknown`` in level-0 pixels, as QuPath's origin is unknown."""

    frame_unknown: bool


class StoredAnnotations(BaseModel):
    """Ids of annotations that were added, changed or stored already; by reason, objects not taken."""

    added: list[str]
    changed: list[str]
    unchanged: list[str]
    skipped: dict[str, int]
    frame_unknown: bool


class RemovedAnnotation(BaseModel):
    """The annotation that was removed."""

    annotation: str
