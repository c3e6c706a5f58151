"""The API's routes for looking at slides: pieces of a slide, layers over it, and annotations."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi import Path as Parameter
from fastapi import Query as InUrl

from ...errors import BadInput, NotFound
from ...index.exchange.annotations import annotations_of, document_of
from ...index.exchange.qupath import origin
from ..access.service import Server, who
from ..session.answers import SearchAnswer
from . import geojson, models

Frame = Annotated[
    Literal["level0", "qupath"],
    InUrl(description="coordinates: pixels of level 0, or from the corner of the scanned area"),
]
Zoom = Annotated[int, Parameter(ge=0, le=32)]
PieceNumber = Annotated[int, Parameter(ge=0, le=2**24)]
ResultId = Annotated[str, InUrl(max_length=64)]
Clustering = Annotated[str | None, InUrl(max_length=200)]
BINARY: dict[int | str, dict[str, Any]] = {200: {"content": {"application/octet-stream": {}}}}
JPEG: dict[int | str, dict[str, Any]] = {
    200: {"content": {"image/jpeg": {"schema": {"type": "string", "format": "binary"}}}}
}


def jpeg(blob: bytes, seconds: int = 3600) -> Response:
    """Return an image that a browser may keep for some seconds."""
    headers = {"Cache-Control": f"private, max-age={seconds}" if seconds else "no-store"}
    return Response(blob, media_type="image/jpeg", headers=headers)


def asked(server: Server, request: Request, slide: str, result: str) -> SearchAnswer:
    """Return an earlier search whose scores are shown on a slide, and record that in the audit log.

    Raises:
        BadInput: the result is not of a search.
        NotFound: there is no such result.
    """
    answer = server.session.result(result)
    server.note(request, "heat", slide=slide, result=result)
    if not isinstance(answer, SearchAnswer):
        raise BadInput(f"result {result!r} is not a search; expected the id of a search")
    return answer


def add_viewer(app: FastAPI, server: Server) -> None:
    """Add what a viewer shows: pieces of slides, and layers over them."""
    session = server.session
    pictures = session.pictures

    @app.get("/v1/slides/{slide}/pyramid", tags=["slides"], response_model=models.Pyramid)
    def pyramid(slide: str) -> Any:
        """Describe a slide for a viewer: size, µm per pixel and zooms."""
        return session.viewer.pyramid(slide)._asdict()

    @app.get(
        "/v1/slides/{slide}/tiles/{z}/{x}/{y}.jpg", tags=["slides"], responses=JPEG,
        response_class=Response,
    )  # fmt: skip
    def piece(slide: str, z: Zoom, x: PieceNumber, y: PieceNumber) -> Response:
        """Return a square piece of a slide at a zoom; see the slide's pyramid."""
        return jpeg(session.viewer.piece(slide, z, x, y))

    @app.get("/v1/slides/{slide}/grid", tags=["slides"], response_class=Response, responses=BINARY)
    def grid(
        slide: str,
        request: Request,
        by: Literal["cluster", "label", "score", "grid", "tissue"] = "grid",
        clustering: Clustering = None,
        result: ResultId = "",
    ) -> Response:
        """Return the places of a slide's tiles and a colour of each, for a layer over the slide.

        Four bytes give the length of a JSON header (uint32), which is padded with spaces to a multiple of
        eight bytes; then places (int32, N x 2, level-0 pixels) and colours (uint8, N x 4). With
        ``by=score``, ``result`` is the id of an earlier search. ``by=tissue`` gives cells of what is taken
        for tissue with the default settings, found now, instead of tiles.
        """
        query, by_text = None, False
        if by == "score":
            answer = asked(server, request, slide, result)
            query, by_text = answer.vector, answer.query.by_text
        if by == "tissue":
            blob = session.viewer.tissue(slide)
        else:
            blob = session.viewer.layer(slide, by, clustering, query, by_text)
        return Response(
            blob, media_type="application/octet-stream", headers={"Cache-Control": "no-store"}
        )

    @app.get(
        "/v1/slides/{slide}/heat.jpg", tags=["slides"], responses=JPEG, response_class=Response
    )
    def heat(slide: str, result: ResultId, request: Request) -> Response:
        """Return a slide with its tiles coloured by their similarity to an earlier search.

        The colours span 0 to 1; for a search by text, the slide's lowest to its highest score.
        """
        answer = asked(server, request, slide, result)
        return jpeg(pictures.heat(slide, answer.vector, answer.query.by_text)[0], 0)


def add_annotations(app: FastAPI, server: Server) -> None:
    """Add annotations of slides as GeoJSON."""
    session = server.session
    atlas = session.atlas

    def corner_of(slide: str, frame: str) -> tuple[int, int] | None:
        """Return the level-0 pixel that is (0, 0) in a frame; None if it is unknown."""
        if frame == "level0":
            return 0, 0
        known = origin(atlas.view(), slide)
        if known is not None:
            return known
        try:
            about = session.viewer.pyramid(slide)
        except NotFound:
            return None
        return about.left, about.top

    @app.get(
        "/v1/slides/{slide}/annotations", tags=["slides"], response_model=geojson.AnnotationsOfSlide
    )
    def annotations(slide: str, frame: Frame = "level0") -> Any:
        """Return a slide's annotations as GeoJSON, which QuPath reads (``frame=qupath``)."""
        found, corner = atlas.annotations(slide), corner_of(slide, frame)
        return {**document_of(found, corner or (0, 0)), "frame_unknown": corner is None}

    @app.post(
        "/v1/slides/{slide}/annotations", tags=["slides"], response_model=geojson.StoredAnnotations
    )
    def annotate(
        slide: str, body: geojson.Annotations, request: Request, frame: Frame = "level0"
    ) -> Any:
        """Store annotations of a slide; one whose id the atlas has already is changed."""
        user, corner = who(request)["user"], corner_of(slide, frame)
        features = [feature.model_dump(exclude_none=True) for feature in body.features]
        taken, skipped = annotations_of(
            features, slide, "the body", corner or (0, 0), "" if user == "-" else user
        )
        labels = sorted({item.label for item in taken})[:20]
        facts = {"slide": slide, "annotations": len(taken), "labels": labels}
        with server.change(request, "annotate", **facts):
            stored = atlas.annotate(taken)
        return {**vars(stored), "skipped": skipped, "frame_unknown": corner is None}

    @app.delete(
        "/v1/annotations/{annotation}", tags=["slides"], response_model=geojson.RemovedAnnotation
    )
    def remove(annotation: Annotated[str, Parameter(max_length=64)], request: Request) -> Any:
        """Remove an annotation."""
        with server.change(request, "remove_annotation", annotation=annotation):
            atlas.remove_annotations([annotation])
        return {"annotation": annotation}
