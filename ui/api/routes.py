"""The API's routes: searching, tiles, slides and clusters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi import Path as Parameter
from fastapi import Query as InUrl
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from ...errors import BadInput, NotFound
from ...index.search.query import Query
from ..access.service import Server
from ..session import report
from ..session.answers import SearchAnswer
from . import models
from .bodies import body_of, images_of, read_body

PAGE = 200
Number = Annotated[int, Parameter(ge=0, le=models.MAX_TILE)]
Name = Annotated[str | None, InUrl(max_length=200)]
MAP: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {}}},
    202: {"model": models.Pending, "description": "it is being made; ask again"},
}
JPEG: dict[int | str, dict[str, Any]] = {
    200: {"content": {"image/jpeg": {"schema": {"type": "string", "format": "binary"}}}}
}


def add_queries(app: FastAPI, server: Server) -> None:
    """Add embeddings and search."""
    session = server.session

    @app.post(
        "/v1/embeddings",
        tags=["search"],
        response_model=models.Embeddings,
        openapi_extra=body_of(models.EmbeddingsRequest, {"images": "pictures"}),
    )
    async def embeddings(request: Request) -> Any:
        """Embed images with the atlas's encoder."""
        async with read_body(request, models.EmbeddingsRequest, ("images",)) as body:

            def work() -> Any:
                tiles = [session.read(blob, name) for name, blob in images_of(body, "images")]
                vectors = session.embed(tiles)
                manifest = session.atlas.manifest
                server.note(request, "embed", images=len(tiles))
                encoder = {"name": manifest.name, "sha256": manifest.sha256, "dim": manifest.dim}
                return {"encoder": encoder, "embeddings": vectors.tolist()}

            return await run_in_threadpool(work)

    @app.post(
        "/v1/search",
        tags=["search"],
        response_model=models.SearchAnswer,
        openapi_extra=body_of(
            models.SearchRequest, {"images": "to be like", "unlike_images": "not to be like"}
        ),
    )
    async def search(request: Request) -> Any:
        """Find the tiles most similar to images or tiles of the atlas, and dissimilar to others."""
        async with read_body(request, models.SearchRequest, ("images", "unlike_images")) as body:

            def work() -> Any:
                asked = body.fields
                crop = tuple(asked.crop) if asked.crop else None
                images = [
                    session.read(blob, name, crop if n == 0 else None)
                    for n, (name, blob) in enumerate(images_of(body, "images"))
                ]
                others = [
                    session.read(blob, name) for name, blob in images_of(body, "unlike_images")
                ]
                query = Query(
                    images=tuple(images), unlike_images=tuple(others), tiles=tuple(asked.like),
                    unlike_tiles=tuple(asked.unlike), k=asked.k, where=asked.where, least=asked.least,
                    per_slide=asked.per_slide, leave_out=asked.leave_out or "tile",
                )  # fmt: skip
                found = session.search(query, asked.clustering)
                server.note_search(request, found)
                return report.as_json(session, found)

            return await run_in_threadpool(work)


def add_answers(app: FastAPI, server: Server) -> None:
    """Add assign, and earlier answers as files."""
    session = server.session

    @app.post(
        "/v1/assign",
        tags=["search"],
        response_model=models.AssignAnswer,
        openapi_extra=body_of(models.AssignRequest, {"images": "pictures"}),
    )
    async def assign(request: Request) -> Any:
        """Assign images to the clusters of the atlas."""
        async with read_body(request, models.AssignRequest, ("images",)) as body:

            def work() -> Any:
                placed = session.cluster(images_of(body, "images"), body.fields.clustering)
                server.note_assign(request, placed)
                return report.as_json(session, placed)

            return await run_in_threadpool(work)

    @app.get(
        "/v1/results/{result}/{kind}",
        tags=["search"],
        responses={200: {"content": {mime: {} for mime in report.KINDS.values()}}},
    )
    def result(
        result: Annotated[str, Parameter(max_length=64)], kind: Literal["csv", "json", "html"]
    ) -> Response:
        """Return an earlier answer as a file; the server keeps the last few hundred answers."""
        blob = report.write(session, session.results.get(result), kind)
        name = f'attachment; filename="histoseek-{result}.{kind}"'
        mime = report.KINDS[kind] + ("" if kind == "json" else "; charset=utf-8")
        return Response(blob, media_type=mime, headers={"Content-Disposition": name})


def add_pictures(app: FastAPI, server: Server) -> None:
    """Add tiles and pictures of tiles and slides."""
    session = server.session
    pictures = session.pictures

    def jpeg(blob: bytes, seconds: int = 3600) -> Response:
        headers = {"Cache-Control": f"private, max-age={seconds}" if seconds else "no-store"}
        return Response(blob, media_type="image/jpeg", headers=headers)

    @app.get("/v1/tiles/{tile}.jpg", tags=["tiles"], responses=JPEG, response_class=Response)
    def tile_picture(tile: Number) -> Response:
        """Return a tile as an image, as the encoder sees it."""
        return jpeg(pictures.tile(tile))

    @app.get("/v1/tiles/{tile}/field.jpg", tags=["tiles"], responses=JPEG, response_class=Response)
    def field_picture(tile: Number) -> Response:
        """Return an image of a tile and its neighbours, with a box around the tile."""
        return jpeg(pictures.field(tile))

    @app.get("/v1/tiles/{tile}/place.jpg", tags=["tiles"], responses=JPEG, response_class=Response)
    def place_picture(tile: Number) -> Response:
        """Return an image of the whole slide, with a box around the tile."""
        return jpeg(pictures.place(tile))

    @app.get("/v1/tiles/{tile}", tags=["tiles"], response_model=models.Tile)
    def tile(tile: Number) -> Any:
        """Return a tile's metadata."""
        return session.atlas.tiles([tile])[tile]

    @app.get("/v1/slides/{slide}/thumbnail.jpg", tags=["slides"], responses=JPEG,
             response_class=Response)  # fmt: skip
    def thumbnail(slide: str, longest: Annotated[int, InUrl(ge=32, le=1024)] = 320) -> Response:
        """Return a thumbnail of a slide, or some tiles of a tile set."""
        return jpeg(pictures.thumbnail(slide, longest), 60)

    @app.get("/v1/slides/{slide}/clusters.jpg", tags=["slides"], responses=JPEG,
             response_class=Response)  # fmt: skip
    def overlay(
        slide: str, clustering: Annotated[str | None, InUrl(max_length=200)] = None
    ) -> Response:
        """Return a slide with its tiles coloured by cluster."""
        return jpeg(pictures.clusters(slide, clustering), 0)

    @app.get("/v1/slides/{slide}/heat.jpg", tags=["slides"], responses=JPEG,
             response_class=Response)  # fmt: skip
    def heat(
        slide: str, result: Annotated[str, InUrl(max_length=64)], request: Request
    ) -> Response:
        """Return a slide with its tiles coloured by their similarity to an earlier search."""
        found = session.results.get(result)
        server.note(request, "heat", slide=slide, result=result)
        if not isinstance(found, SearchAnswer):
            raise BadInput("that result is no search; give the id of one")
        return jpeg(pictures.heat(slide, found.vector)[0], 0)


def add_map(app: FastAPI, server: Server) -> None:
    """Add the map."""
    session = server.session

    @app.get("/v1/map", tags=["tiles"], response_class=Response, responses=MAP)
    def points(by: Annotated[str, InUrl(max_length=200)] = "cluster") -> Response:
        """Return the tiles on the map: a JSON header and three arrays, little-endian.

        Four bytes give the header's length (uint32), the header is padded with spaces to a multiple of
        eight bytes; then tile ids (float64, M), coordinates (float32, M x 2) and colour numbers (int32, M).
        """
        found = session.map.points()
        if found is None:
            return JSONResponse({"status": "being made"}, 202, {"Retry-After": "2"})
        names, codes = session.map.colours(found, by)
        header = {
            "shown": len(found.ids),
            "total": found.total,
            "method": found.layout.method,
            "landmarks": len(found.layout.points),
            "trust": found.layout.trust,
            "names": names,
            "by": by,
        }
        text = json.dumps(header).encode()
        text += b" " * (-(len(text) + 4) % 8)
        parts = [
            np.uint32(len(text)).astype("<u4").tobytes(),
            text,
            found.ids.astype("<f8").tobytes(),
            found.places.astype("<f4").tobytes(),
            codes.astype("<i4").tobytes(),
        ]
        return Response(b"".join(parts), media_type="application/octet-stream")


def add_slides(app: FastAPI, server: Server) -> None:
    """Add slides: list, show, delete, find similar ones."""
    session, additions = server.session, server.additions

    @app.get("/v1/slides", tags=["slides"], response_model=models.Slides)
    def slides(
        offset: Annotated[int, InUrl(ge=0, le=10**9)] = 0,
        limit: Annotated[int, InUrl(ge=1, le=1000)] = PAGE,
        contains: Annotated[str, InUrl(max_length=200)] = "",
    ) -> Any:
        """List slides and tile sets by name."""
        rows = [s for s in session.atlas.slides() if contains.lower() in s["name"].lower()]
        return {"slides": rows[offset : offset + limit], "total": len(rows)}

    @app.get("/v1/slides/{slide}", tags=["slides"], response_model=models.Slide)
    def slide(slide: str) -> Any:
        """Return what is known of a slide."""
        for row in session.atlas.slides():
            if row["name"] == slide:
                return row
        raise NotFound(f"the atlas holds no slide {slide!r}")

    @app.delete("/v1/slides/{slide}", tags=["slides"], response_model=models.Removed)
    def remove(slide: str, request: Request) -> Any:
        """Take a slide out of the atlas; a file that was uploaded goes too."""
        server.note(request, "remove", slide=slide)  # before: what is done is never unseen
        tiles = additions.remove(slide)
        return {"slide": slide, "tiles": tiles}

    @app.get("/v1/slides/{slide}/similar", tags=["slides"], response_model=models.SimilarSlides)
    def similar(
        slide: str,
        request: Request,
        k: Annotated[int, InUrl(ge=1, le=100)] = 6,
        by: Literal["slide", "patient"] = "slide",
        how: Literal["median", "votes"] = "median",
    ) -> Any:
        """Return the slides (or, by patient, the cases) most like one, with the regions that are alike."""
        found = session.similar_slides(slide, k, by, how)
        server.note(request, "similar", slide=slide, by=by, how=how, found=len(found))
        return {
            "slides": [
                {
                    "name": s.name,
                    "score": s.score,
                    "label": s.label,
                    "regions": [
                        {"score": p.score, "query": p.query, "match": p.match} for p in s.pairs
                    ],
                }
                for s in found
            ]
        }


def add_jobs(app: FastAPI, server: Server) -> None:
    """Add the adding of slides, and how far it is."""
    additions = server.additions

    @app.post(
        "/v1/slides",
        tags=["slides"],
        status_code=202,
        response_model=models.Job,
        openapi_extra=body_of(
            models.SlideRequest, {"file": "the slide, instead of path"}, ("path",)
        ),
    )
    async def add(request: Request) -> Any:
        """Add a slide by upload or from an allowed folder; it is embedded in the background."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        form = kind == "multipart/form-data"
        async with read_body(
            request, _SlideForm if form else models.SlideRequest, ("file",)
        ) as body:

            def work() -> Any:
                given = body.fields
                row = {"label": given.label, "patient": given.patient, "mpp": given.mpp}
                uploads = body.files.get("file", [])
                if len(uploads) + bool(given.path) != 1:
                    raise BadInput("expected either one file or a path")
                if uploads:
                    name, file = uploads[0]
                    job = additions.upload(file.file, name, row, given.replace)
                else:
                    job = additions.path(Path(given.path), row, given.replace)
                server.note(request, "add", slide=job.slide, job=job.id)
                return job.public()

            return await run_in_threadpool(work)

    @app.get("/v1/jobs", tags=["slides"], response_model=models.Jobs)
    def jobs() -> Any:
        """List the slides that are being added, newest first."""
        return {"jobs": [job.public() for job in additions.all()]}

    @app.get("/v1/jobs/{job}", tags=["slides"], response_model=models.Job)
    def job(job: str) -> Any:
        """Return the progress of a slide that is being added."""
        return additions.get(job).public()


class _SlideForm(models.SlideRequest):
    """The same as a form, in which a file may replace the path."""

    path: str = ""


def add_clusters(app: FastAPI, server: Server) -> None:
    """Add the routes for clusters and their names."""
    session = server.session

    @app.get("/v1/clusters", tags=["clusters"], response_model=models.Clusters)
    def clusters(clustering: Name = None, examples: Annotated[int, InUrl(ge=0, le=24)] = 6) -> Any:
        """Return the clusters of a clustering; of the newest one by default."""
        name, _ = session.atlas.clustering(clustering)
        return {"clustering": name, "clusters": session.atlas.clusters(name, examples)}

    @app.put("/v1/clusters/{cluster}", tags=["clusters"], response_model=models.Clusters)
    def rename(
        cluster: Annotated[int, Parameter(ge=-1, le=10**6)],
        body: models.ClusterRequest,
        request: Request,
    ) -> Any:
        """Set the name of a cluster."""
        name, _ = session.atlas.clustering(body.clustering)
        server.note(request, "rename", clustering=name, cluster=cluster, name=body.name)
        session.atlas.name_cluster(cluster, body.name, body.description, name)
        rows = [c for c in session.atlas.clusters(name, 6) if c["cluster"] == cluster]
        return {"clustering": name, "clusters": rows}


ALL = (add_queries, add_answers, add_pictures, add_map, add_slides, add_jobs, add_clusters)
"""What adds the routes of the API to an app."""
