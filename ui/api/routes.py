"""The API's routes: searching, tiles, slides and clusters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi import Path as Parameter
from fastapi import Query as InUrl
from fastapi.responses import JSONResponse

from ...errors import BadInput, NotFound, TooLarge
from ...index.federation.answers import Example
from ...index.federation.federation import Federation
from ...index.search.query import Query
from ..access.service import Server, who
from ..session import report
from ..session.addition import Addition
from ..session.answers import Among
from ..session.regions import Region
from . import models, openai
from .bodies import Body, body_of, content_type, images_of, with_body
from .viewer_routes import JPEG, Clustering, add_annotations, add_viewer, jpeg

PAGE = 200
BOX = r"^(\d{1,5},){3}\d{1,5}$|^$"
F = TypeVar("F", bound=Callable[..., Response])
AtlasNumber = Annotated[int, Parameter(ge=0, lt=models.MAX_ATLASES)]
TileNumber = Annotated[int, Parameter(ge=0, le=models.MAX_TILE)]
MAP: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {}}},
    202: {"model": models.Pending, "description": "the map is being computed; try again later"},
}


def add_queries(app: FastAPI, server: Server) -> None:
    """Add embeddings and search."""
    session = server.session

    @app.post(
        "/v1/embeddings", tags=["search"], response_model=models.Embeddings | openai.OpenAiEmbeddings,
        openapi_extra=body_of(models.EmbeddingsRequest, {"images": "images to embed"}),
    )  # fmt: skip
    async def embeddings(request: Request) -> Any:
        """Embed images with the atlas's encoder; with ``input``, as OpenAI's API does, also texts."""

        def work(body: Body) -> Any:
            fields, images = body.fields, images_of(body, "images")
            if bool(images) == (fields.input is not None):
                raise BadInput("expected either images or input")
            if fields.input is not None:
                openai.check_model(session, fields.model, fields.dimensions)
                found, notes = openai.embed(session, fields.input)
                server.note(request, "embed", inputs=len(found))
                return openai.answer(session, found, fields.encoding_format, notes)
            tiles = [session.read(blob, name) for name, blob in images]
            notes = []
            vectors = session.embed(tiles, notes, [name for name, _ in images])
            server.note(request, "embed", images=len(tiles))
            return {
                "encoder": session.atlas.manifest, "embeddings": vectors.tolist(), "notes": notes,
            }  # fmt: skip

        return await with_body(request, models.EmbeddingsRequest, ("images",), work)

    @app.post(
        "/v1/search", tags=["search"], response_model=models.SearchAnswer,
        openapi_extra=body_of(
            models.SearchRequest,
            {"images": "images that hits resemble", "unlike_images": "images that hits do not resemble"},
        ),
    )  # fmt: skip
    async def search(request: Request) -> Any:
        """Find the tiles most similar to images, tiles of the atlas or texts, and dissimilar to others."""

        def work(body: Body) -> Any:
            fields = body.fields
            crop = tuple(fields.crop) if fields.crop else None
            given = [
                (blob, name, crop if n == 0 else None)
                for n, (name, blob) in enumerate(images_of(body, "images"))
            ]
            if fields.mpp and len(given) > models.MAX_REGIONS:
                raise TooLarge(
                    f"{len(given)} images have a scale; a search cuts at most {models.MAX_REGIONS}"
                )
            scaled = [
                session.cut(blob, name, fields.mpp, part)
                for blob, name, part in given
                if fields.mpp
            ]
            images = [] if scaled else [session.read(*image) for image in given]
            unlike = [session.read(blob, name) for name, blob in images_of(body, "unlike_images")]
            query = Query(
                images=tuple(images), unlike_images=tuple(unlike), tiles=tuple(fields.like),
                unlike_tiles=tuple(fields.unlike), k=fields.k, where=fields.where, least=fields.least,
                per_slide=fields.per_slide, leave_out=fields.leave_out or "tile",
                texts=tuple(fields.texts), unlike_texts=tuple(fields.unlike_texts),
            )  # fmt: skip
            regions = [
                Region(part.slide, tuple((x, y) for x, y in part.ring)) for part in fields.regions
            ]
            among = Among(
                tuple(fields.atlases),
                tuple(Example(one.atlas, one.tile) for one in fields.like_elsewhere),
                tuple(Example(one.atlas, one.tile) for one in fields.unlike_elsewhere),
            )
            if fields.leave_out and not (query.tiles or among.like):
                raise BadInput(
                    f"leave_out {fields.leave_out!r} is for tiles in like, and none is given; use where, "
                    "such as \"patient != 'P7'\""
                )
            answer = session.search(query, fields.clustering, regions, scaled, among)
            server.note_search(request, answer)
            return report.as_json(session, answer)

        return await with_body(request, models.SearchRequest, ("images", "unlike_images"), work)


def add_answers(app: FastAPI, server: Server) -> None:
    """Add assign, and earlier answers as files."""
    session = server.session

    @app.post(
        "/v1/assign", tags=["search"], response_model=models.AssignAnswer,
        openapi_extra=body_of(models.AssignRequest, {"images": "images to assign"}),
    )  # fmt: skip
    async def assign(request: Request) -> Any:
        """Assign images to the clusters of the atlas."""

        def work(body: Body) -> Any:
            answer = session.cluster(images_of(body, "images"), body.fields.clustering)
            server.note_assign(request, answer)
            return report.as_json(session, answer)

        return await with_body(request, models.AssignRequest, ("images",), work)

    @app.get(
        "/v1/results/{result}/{kind}", tags=["search"],
        responses={200: {"content": {mime: {} for mime in report.KINDS.values()}}},
    )  # fmt: skip
    def result(
        result: Annotated[str, Parameter(max_length=64)], kind: Literal["csv", "json", "html"]
    ) -> Response:
        """Return an earlier answer as a file; the server keeps the last few hundred answers."""
        blob = report.write(session, session.result(result), kind)
        name = f'attachment; filename="histoseek-{result}.{kind}"'
        mime = report.KINDS[kind] + ("" if kind == "json" else "; charset=utf-8")
        return Response(blob, media_type=mime, headers={"Content-Disposition": name})


def add_pictures(app: FastAPI, server: Server) -> None:
    """Add tiles and images of tiles and slides."""
    session = server.session
    pictures = session.pictures

    def image(path: str, tag: str) -> Callable[[F], F]:
        return app.get(path, tags=[tag], responses=JPEG, response_class=Response)

    @image("/v1/tiles/{tile}.jpg", "tiles")
    def tile_picture(tile: TileNumber) -> Response:
        """Return a tile as an image, as the encoder sees it."""
        return jpeg(pictures.tile(tile))

    @image("/v1/tiles/{tile}/field.jpg", "tiles")
    def field_picture(tile: TileNumber) -> Response:
        """Return an image of a tile and its neighbours, with a box around the tile."""
        return jpeg(pictures.field(tile))

    @image("/v1/tiles/{tile}/place.jpg", "tiles")
    def place_picture(tile: TileNumber) -> Response:
        """Return an image of the whole slide, with a box around the tile."""
        return jpeg(pictures.place(tile))

    @app.get("/v1/tiles/{tile}", tags=["tiles"], response_model=models.Tile)
    def tile(tile: TileNumber) -> Any:
        """Return a tile's metadata."""
        return session.atlas.tiles([tile])[tile]

    @image("/v1/slides/{slide}/thumbnail.jpg", "slides")
    def thumbnail(slide: str, longest: Annotated[int, InUrl(ge=32, le=1024)] = 320) -> Response:
        """Return a thumbnail of a slide, or some tiles of a tile set."""
        return jpeg(pictures.thumbnail(slide, longest), 60)

    @image("/v1/slides/{slide}/clusters.jpg", "slides")
    def overlay(slide: str, clustering: Clustering = None) -> Response:
        """Return a slide with its tiles coloured by cluster."""
        return jpeg(pictures.clusters(slide, clustering), 0)


def add_atlases(app: FastAPI, server: Server) -> None:
    """Add the atlases of the server, and tiles of the further ones with their images."""
    session = server.session

    @app.get("/v1/atlases", tags=["tiles"], response_model=models.Atlases)
    def atlases() -> Any:
        """List the atlases that are searched; the first is the server's own."""
        if session.elsewhere is None:
            (shard,) = Federation([session.atlas]).status().shards
            return {"atlases": report.searched_rows(session, [shard]), "shared_slides": 0}
        status = session.elsewhere.federation.status()
        rows = report.searched_rows(session, status.shards)
        return {"atlases": rows, "shared_slides": len(status.shared_slides)}

    def of(number: int) -> str:
        """Return the name of an atlas of the server by its number, from 0."""
        if session.elsewhere is None:
            if number:
                raise NotFound(f"there is no atlas {number}; this server has one, number 0")
            return ""
        return session.elsewhere.name_of(number)

    def image(kind: str) -> Callable[[F], F]:
        path = f"/v1/atlases/{{atlas}}/tiles/{{tile}}{kind}.jpg"
        return app.get(path, tags=["tiles"], responses=JPEG, response_class=Response)

    @image("")
    def tile_picture(atlas: AtlasNumber, tile: TileNumber) -> Response:
        """Return a tile of an atlas of the server as an image."""
        return jpeg(session.pictures_of(of(atlas)).tile(tile))

    @image("/field")
    def field_picture(atlas: AtlasNumber, tile: TileNumber) -> Response:
        """Return an image of a tile of an atlas and its neighbours, with a box around the tile."""
        return jpeg(session.pictures_of(of(atlas)).field(tile))

    @image("/place")
    def place_picture(atlas: AtlasNumber, tile: TileNumber) -> Response:
        """Return an image of the whole slide of a tile of an atlas, with a box around the tile."""
        return jpeg(session.pictures_of(of(atlas)).place(tile))

    @app.get("/v1/atlases/{atlas}/tiles/{tile}", tags=["tiles"], response_model=models.Tile)
    def tile(atlas: AtlasNumber, tile: TileNumber) -> Any:
        """Return the metadata of a tile of an atlas of the server."""
        name, elsewhere = of(atlas), session.elsewhere
        found = session.atlas if elsewhere is None else elsewhere.federation.atlas(name)
        return found.tiles([tile])[tile]


def add_map(app: FastAPI, server: Server) -> None:
    """Add the map."""
    session = server.session

    @app.get("/v1/map", tags=["tiles"], response_class=Response, responses=MAP)
    def points(
        by: Annotated[str, InUrl(max_length=200)] = "cluster",
        box: Annotated[str, InUrl(max_length=60, pattern=BOX)] = "",
        places: bool = True,
    ) -> Response:
        """Return the tiles on the map: a JSON header and arrays, little-endian.

        Four bytes give the header's length (uint32), the header is padded with spaces to a multiple of
        eight bytes. Then follow ids (float64, M; only if the header has no ``runs`` of consecutive ids),
        places (uint16, M x 2, from 0 to 65535, y upwards; both only with ``places=true``) and codes
        (unsigned, ``code_bytes`` each, M): 0 for no value, else 1 more than the number of its name.
        ``box`` is left,bottom,right,top. At most 2,000,000 tiles are returned, of more a random sample.
        """
        within = tuple(map(int, box.split(","))) if box else None
        blob = session.map.document(by, within, places)  # type: ignore[arg-type]
        if blob is None:
            return JSONResponse({"status": "being made"}, 202, {"Retry-After": "2"})
        return Response(blob, media_type="application/octet-stream")


def add_slides(app: FastAPI, server: Server) -> None:
    """Add the routes that list, show, remove and compare slides."""
    session = server.session

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
        """Return a slide's metadata."""
        for row in session.atlas.slides():
            if row["name"] == slide:
                return row
        raise NotFound(f"the atlas has no slide {slide!r}")

    @app.delete("/v1/slides/{slide}", tags=["slides"], response_model=models.Removed)
    def remove(slide: str, request: Request) -> Any:
        """Remove a slide from the atlas with its annotations, and its file if it was uploaded."""
        with server.change(request, "remove", slide=slide):
            marked = sum(item.slide == slide for item in session.atlas.annotations())
            return {"slide": slide, "tiles": server.additions.remove(slide), "annotations": marked}

    @app.get("/v1/slides/{slide}/similar", tags=["slides"], response_model=models.SimilarSlides)
    def similar(
        slide: str,
        request: Request,
        k: Annotated[int, InUrl(ge=1, le=100)] = 6,
        by: Literal["slide", "patient"] = "slide",
        how: Literal["median", "votes"] = "median",
        atlases: Annotated[list[models.AtlasName], InUrl(max_length=100)] = [],  # noqa: B006
    ) -> Any:
        """Return the slides (or, by patient, the cases) most similar to one, with their similar regions.

        ``atlases`` names those to compare with; without it, only the server's own.
        """
        found = session.similar_slides(slide, k, by, how, atlases)
        server.note_similar(request, slide, by, how, found)
        return report.similar_rows(session, found)


class _SlideForm(models.SlideRequest):
    """The same as a form, in which a file may replace the path."""

    path: str = ""


def add_jobs(app: FastAPI, server: Server) -> None:
    """Add the routes that add slides and show the progress."""
    additions = server.additions

    @app.post(
        "/v1/slides", tags=["slides"], status_code=202, response_model=Addition,
        openapi_extra=body_of(models.SlideRequest, {"file": "the slide, instead of path"}, ("path",)),
    )  # fmt: skip
    async def add(request: Request) -> Any:
        """Add a slide by upload or from an allowed folder; it is embedded in the background."""

        def work(body: Body) -> Addition:
            fields = body.fields
            row = {"label": fields.label, "patient": fields.patient, "mpp": fields.mpp}
            uploads = body.files.get("file", [])
            if len(uploads) + bool(fields.path) != 1:
                raise BadInput("expected either one file or a path")
            if uploads:
                name, file = uploads[0]
                return additions.upload(
                    file.file, name, row, fields.replace, fields.tiles, who(request)
                )
            return additions.path(
                Path(fields.path), row, fields.replace, fields.tiles, who(request)
            )

        form = content_type(request) == "multipart/form-data"
        model = _SlideForm if form else models.SlideRequest
        return await with_body(request, model, ("file",), work)

    @app.get("/v1/jobs", tags=["slides"], response_model=models.Jobs)
    def jobs() -> Any:
        """List the slides that are being added, newest first."""
        return {"jobs": additions.all()}

    @app.get("/v1/jobs/{job}", tags=["slides"], response_model=Addition)
    def job(job: str) -> Any:
        """Return the progress of a slide that is being added."""
        return additions.get(job)


def add_clusters(app: FastAPI, server: Server) -> None:
    """Add the routes for clusters and their names."""
    session = server.session
    atlas = session.atlas

    @app.get("/v1/clusters", tags=["clusters"], response_model=models.Clusters)
    def clusters(
        clustering: Clustering = None, examples: Annotated[int, InUrl(ge=0, le=24)] = 6
    ) -> Any:
        """Return the clusters of a clustering; of the newest one by default."""
        name, _ = atlas.clustering(clustering)
        return {"clustering": name, "clusters": atlas.clusters(name, examples)}

    @app.post("/v1/cluster-names", tags=["clusters"], response_model=models.SuggestedNames)
    def suggest(body: models.SuggestRequest, request: Request) -> Any:
        """Propose names for clusters: the words that fit each best. No name is changed."""
        rows = session.suggest_names(body.words, body.clustering)
        server.note(request, "suggest", words=body.words, clustering=body.clustering)
        return {"clusters": rows}

    @app.put("/v1/clusters/{cluster}", tags=["clusters"], response_model=models.Clusters)
    def rename(
        cluster: Annotated[int, Parameter(ge=-1, le=10**6)],
        body: models.ClusterRequest,
        request: Request,
    ) -> Any:
        """Set the name of a cluster."""
        name, _ = atlas.clustering(body.clustering)
        with server.change(request, "rename", clustering=name, cluster=cluster, name=body.name):
            atlas.name_cluster(cluster, body.name, body.description, name)
        rows = [c for c in atlas.clusters(name, 6) if c["cluster"] == cluster]
        return {"clustering": name, "clusters": rows}


ALL = (
    add_queries, add_answers, add_pictures, add_atlases, add_viewer, add_annotations, add_map, add_slides,
    add_jobs, add_clusters,
)  # fmt: skip
"""What adds the routes of the API to an app."""
