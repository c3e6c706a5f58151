"""The HTTP API as a FastAPI app: routes, errors as JSON, and stated limits."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Route

from ... import __version__, errors
from ...errors import HistoseekError, NotFound, Unavailable
from ..access.policy import REQUEST_ID, ROLE, error_body
from ..access.service import Server, who
from ..access.traffic import AtlasState, metrics_text
from ..session import answers
from . import models, routes
from .bodies import validation_text
from .docs import page as docs_page

ALL_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "QUERY"]
THREADS = 64
"""Maximum number of requests processed at the same time; more are queued."""
TITLE = "histoseek"
ABOUT = (
    "Search an atlas of embedded slides for similar tiles, assign images to its clusters, add slides. "
    "Research use only: similarity is no diagnosis."
)
CLIENT_GONE = 499
"""Status of a request whose client went away before its body was read, as nginx counts it."""
log = logging.getLogger("histoseek.api")


STATUS: list[tuple[type[HistoseekError], int, str]] = [
    (errors.NotFound, 404, "not_found"),
    (errors.TooLarge, 413, "too_large"),
    (errors.Unsupported, 415, "unsupported"),
    (errors.BadInput, 422, "bad_input"),
    (errors.Mismatch, 409, "mismatch"),
    (errors.Busy, 429, "busy"),
    (errors.Unavailable, 503, "unavailable"),
    (errors.StorageFailed, 503, "storage_failed"),
    (errors.MissingPart, 503, "missing_part"),
    (errors.Damaged, 503, "damaged"),
]
"""Status and code of an error; the first matching class counts."""
REFUSALS: dict[int | str, dict[str, Any]] = {
    number: {"model": models.Error, "description": text}
    for number, text in {
        401: "credentials are missing or wrong",
        403: "the request comes from another site, or the role does not allow it",
        404: "not found, or removed",
        408: "the body did not arrive in time",
        409: "the artifacts belong to different encoders",
        413: "too many bytes, pixels or items",
        415: "a format that cannot be read",
        421: "the host name is not served here",
        422: "a value is invalid; the message says what was expected",
        429: "too many requests at once; see Retry-After",
        503: "temporarily unavailable; see Retry-After",
    }.items()
}


def make_api(server: Server) -> FastAPI:
    """Return the API of an open atlas, without the guard around it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
        yield

    app = FastAPI(
        title=TITLE, version=__version__, description=ABOUT, lifespan=lifespan,
        responses=REFUSALS, docs_url=None, redoc_url=None,
    )  # fmt: skip
    _errors(app, server)
    _service(app, server)
    for add in routes.ALL:
        add(app, server)
    _other_paths(app)
    return app


def _other_paths(app: FastAPI) -> None:
    """Answer 404 or 405 for other requests to the API, which the page would otherwise answer."""

    async def nothing(request: Request) -> Response:
        allowed: set[str] = set()
        for route in app.router.routes:
            match, _ = route.matches(request.scope)
            if match is Match.PARTIAL and isinstance(route, Route):
                allowed |= route.methods or set()
        if allowed:
            listed = ", ".join(sorted(allowed))
            text = f"{request.method} is not allowed here; expected {listed}"
            raise HTTPException(405, text, {"Allow": listed})
        raise NotFound(f"there is no path {request.url.path[:200]}; /docs lists all paths")

    for path in ("/v1/{rest:path}", "/health", "/ready", "/info", "/metrics"):
        app.add_route(path, nothing, ALL_METHODS, include_in_schema=False)


# -- errors -----------------------------------------------------------------------------------------


def _errors(app: FastAPI, server: Server) -> None:
    def answer(request: Request, status: int, code: str, text: str) -> JSONResponse:
        body = error_body(code, text, request.headers.get(REQUEST_ID, "-"))
        headers = {"Retry-After": "2"} if status in {429, 503} else None
        return JSONResponse(body, status, headers)

    @app.exception_handler(HistoseekError)
    async def ours(request: Request, error: HistoseekError) -> JSONResponse:
        status, code = next((s, code) for kind, s, code in STATUS if isinstance(error, kind))
        if status == 503:
            log.error("request %s: %s", request.headers.get(REQUEST_ID, "-"), error)
        return answer(request, status, code, server.session.hide(str(error)))

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_GONE)  # for the log and the metrics; nobody reads it

    @app.exception_handler(RequestValidationError)
    async def wrong(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(request, 422, "bad_input", validation_text(error.errors()))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        codes = {400: "bad_input", 404: "not_found", 405: "method_not_allowed"}
        status = 422 if error.status_code == 400 else error.status_code
        response = answer(
            request, status, codes.get(error.status_code, "refused"), str(error.detail)
        )
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> JSONResponse:
        log.exception("error in the server, request %s", request.headers.get(REQUEST_ID, "-"))
        return answer(request, 500, "fault", "an error in the server; see its log")


# -- the service itself -----------------------------------------------------------------------------


def _service(app: FastAPI, server: Server) -> None:
    session = server.session

    @app.head("/health", include_in_schema=False)
    @app.get("/health", tags=["service"], response_model=models.Health)
    async def health() -> Any:
        """Return 200 while the process is running. Needs no credentials."""
        return {"status": "ok"}

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", tags=["service"], response_model=models.Ready)
    def ready() -> Any:
        """Check whether the encoder answers and the atlas can be read."""
        if problem := session.ready():
            raise Unavailable(problem)
        return {"status": "ready"}

    @app.get("/info", tags=["service"])
    def info() -> dict[str, Any]:
        """Return versions, the encoder, counts, the index, clusterings and limits."""
        stats = session.atlas.stats()
        stats["atlas"] = session.atlas.path.name
        limits = {
            "images": answers.MAX_IMAGES,
            "examples": answers.MAX_EXAMPLES,
            "k": answers.MAX_K,
            "pixels": answers.MAX_PIXELS,
        }
        return {"histoseek": __version__, **stats, "limits": limits}

    @app.get("/v1/me", tags=["service"], response_model=models.Me)
    def me(request: Request) -> Any:
        """Return your name and role: readers may search and view, editors may also change the atlas."""
        return {"user": who(request)["user"], "role": request.headers.get(ROLE, "reader")}

    @app.get("/metrics", tags=["service"], response_class=PlainTextResponse)
    def metrics() -> Response:
        """Return the server's metrics for Prometheus."""
        state = AtlasState(session, server.additions.all)
        text = metrics_text(server.traffic, state)
        return Response(text, media_type="text/plain; version=0.0.4")

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        return HTMLResponse(docs_page(app.openapi(), str(request.base_url).rstrip("/")))
