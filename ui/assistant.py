"""An atlas for a language model's assistant on the same machine, over the Model Context Protocol (MCP).

The tools only read the atlas. They answer with the same functions as the page and the HTTP API, and every
search is recorded in the same audit log.
"""

from __future__ import annotations

import functools
import getpass
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from mcp.server.mcpserver import Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import ToolAnnotations
from pydantic import BaseModel

from .. import __version__, stopping
from ..errors import BadInput, HistoseekError
from ..index.exchange.annotations import document_of
from ..index.search.query import Query
from .access.audit import open_audit
from .session import report
from .session.regions import Region
from .session.session import Session
from .session.words import NOTICE_TEXT

Tool = TypeVar("Tool", bound=Callable[..., Any])
MAX_SLIDES = 500


class Box(BaseModel):
    """A rectangle on a slide of the atlas, in pixels of level 0."""

    slide: str
    x: float
    y: float
    width: float
    height: float


def serve(atlas: Path, encoder: str | None = None, audit_log: Path | None = None) -> None:
    """Serve the tools on standard input and output until the client closes them or the command is stopped.

    Args:
        atlas: folder of the atlas.
        encoder: where its encoder runs, such as ``triton://…``; in this process when None.
        audit_log: file of the audit log; in the atlas's folder when None.

    Raises:
        HistoseekError: the atlas, the encoder or the audit log cannot be opened.
        Stopped: a signal came.
    """
    session = Session(atlas, encoder)
    audit = open_audit(atlas, audit_log, session)
    try:

        def note(action: str, **facts: Any) -> None:
            if audit is not None:
                audit.write(action, _who(), **facts)

        server = make_server(session, note)
        session.warm()
        stopping.aside(lambda: server.run("stdio"))
    finally:
        if audit is not None:
            audit.close()
        session.close()


def _who() -> dict[str, str]:
    """Return who asks, for the audit log: the user of this computer, through an assistant."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):
        user = "-"
    return {"user": user, "address": f"mcp, process {os.getpid()}", "request_id": "-"}


def make_server(session: Session, note: Callable[..., Any]) -> MCPServer[Any]:
    """Return the server with its tools.

    Args:
        session: the open atlas.
        note: records an action and its details in the audit log.
    """
    atlas = session.atlas
    server = MCPServer(
        "histoseek",
        version=__version__,
        instructions=f"Similar-tissue search in the atlas {atlas.path.name!r}. Tiles are squares of "
        f"slides. Call `about` first: it lists the fields that filters may use. {NOTICE_TEXT}",
    )

    def tool(function: Tool) -> Tool:
        """Register a tool that only reads; our errors become its error messages."""

        @functools.wraps(function)
        def run(*args: Any, **given: Any) -> Any:
            try:
                return function(*args, **given)
            except HistoseekError as error:
                raise ToolError(session.hide(str(error))) from error

        server.tool(annotations=ToolAnnotations(read_only_hint=True))(run)
        return function

    @tool
    def about() -> dict[str, Any]:
        """Describe the atlas: encoder, number of tiles and slides, clusterings, and fields of filters."""
        stats = atlas.stats()
        keys = ("slides", "tiles", "labels", "clusterings", "fields")
        return {
            "atlas": atlas.path.name,
            "encoder": atlas.manifest.name,
            "searches_by_words": session.takes_text,
            **{key: stats[key] for key in keys if key in stats},
            "filters": "such as: organ = 'colon' and label != 'normal'; see the fields",
            "notice": NOTICE_TEXT,
        }

    @tool
    def slides(contains: str = "", limit: int = 50) -> dict[str, Any]:
        """List slides whose name contains a text, with label, patient and number of tiles."""
        rows = [row for row in atlas.slides() if contains.lower() in row["name"].lower()]
        keys = ("name", "kind", "label", "patient", "tiles", "metadata")
        shown = rows[: max(1, min(limit, MAX_SLIDES))]
        return {"total": len(rows), "slides": [{key: row[key] for key in keys} for row in shown]}

    @tool
    def search(
        images: list[str] | None = None,
        tiles: list[int] | None = None,
        words: list[str] | None = None,
        box: Box | None = None,
        unlike_tiles: list[int] | None = None,
        where: str | None = None,
        k: int = 10,
        per_slide: bool = False,
    ) -> dict[str, Any]:
        """Find the most similar tiles.

        Args:
            images: paths of image files on this machine; crops of tissue at the atlas's magnification.
            tiles: ids of tiles of the atlas.
            words: what the tiles show; only if `about` says that the encoder takes words.
            box: a rectangle on a slide of the atlas.
            unlike_tiles: ids of tiles that hits must not resemble.
            where: filter, such as: organ = 'colon' and patient != 'P7'.
            k: number of hits, at most 200.
            per_slide: at most one hit per slide.
        """
        paths = [Path(path).expanduser() for path in images or ()]
        for path in paths:
            if not path.is_file():
                raise BadInput(f"{path} is not a file; give the path of an image on this machine")
        query = Query(
            images=tuple(session.read(path, path.name) for path in paths), tiles=tuple(tiles or ()),
            texts=tuple(words or ()), unlike_tiles=tuple(unlike_tiles or ()), where=where, k=k,
            per_slide=per_slide,
        )  # fmt: skip
        answer = session.search(query, regions=[_region(box)] if box else ())
        note(
            "search", result=answer.id, k=k, where=where, hits=len(answer.hits), images=len(paths),
            like=list(query.tiles), unlike=list(query.unlike_tiles), texts=list(query.texts),
        )  # fmt: skip
        found = report.as_json(session, answer)
        return {
            "verdict": found["verdict"]["text"],
            "hits": found["hits"],
            "notes": found["notes"],
            "provenance": found["provenance"],
        }

    @tool
    def similar_slides(
        slide: str, k: int = 5, by: Literal["slide", "patient"] = "slide"
    ) -> dict[str, Any]:
        """Find the slides (or, by patient, the cases) most similar to a slide."""
        found = session.similar_slides(slide, k, by)
        note("similar", slide=slide, by=by, found=len(found.cases))
        slides = [{"name": s.name, "score": s.score, "label": s.label} for s in found.cases]
        return {"slides": slides, "notes": list(found.notes)}

    @tool
    def clusters(clustering: str | None = None) -> dict[str, Any]:
        """List the clusters of a clustering (default: the newest): names, sizes, labels, example tiles."""
        name, _ = atlas.clustering(clustering)
        rows = atlas.clusters(name, 3)
        return {
            "clustering": name,
            "clusters": [
                {**row, "examples": [tile["tile"] for tile in row["examples"]]} for row in rows
            ],
        }

    @tool
    def annotations(slide: str) -> dict[str, Any]:
        """Return the annotations of a slide as GeoJSON, in pixels of level 0."""
        return document_of(atlas.annotations(slide))

    @tool
    def tile(tile: int) -> dict[str, Any]:
        """Return a tile's slide, position, label, patient and cluster."""
        return atlas.tiles([tile])[tile]

    @tool
    def tile_image(
        tile: int,
        show: Annotated[
            Literal["tile", "surroundings", "slide"],
            "the tile, its surroundings, or the whole slide with a box around it",
        ] = "tile",
    ) -> Image:
        """Return an image of a tile."""
        pictures = session.pictures
        read = {"tile": pictures.tile, "surroundings": pictures.field, "slide": pictures.place}[
            show
        ]
        return Image(data=read(tile), format="jpeg")

    @tool
    def slide_image(slide: str) -> Image:
        """Return a thumbnail of a slide."""
        return Image(data=session.pictures.thumbnail(slide, 768), format="jpeg")

    return server


def _region(box: Box) -> Region:
    x, y, right, bottom = box.x, box.y, box.x + box.width, box.y + box.height
    return Region(box.slide, ((x, y), (right, y), (right, bottom), (x, bottom)))
