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
from starlette.routing import Match, Route

from ... import __version__
from ...errors import (
    BadInput,
    Busy,
    Damaged,
    HistoseekError,
    Mismatch,
    MissingPart,
    NotFound,
    StorageFailed,
    TooLarge,
    Unavailable,
    Unsupported,
)
from ..access.policy import REQUEST_ID, ROLE, error_body
from ..access.service import Server, who
from ..access.traffic import Collector
from ..session import answers
from . import models, routes
from .bodies import said

ALL_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "QUERY"]
THREADS = 64
"""Maximum number of requests processed at the same time; more are queued."""
TITLE = "histoseek"
ABOUT = (
    "Search an atlas of embedded slides for similar tiles, place images in its clusters, add slides. "
    "Research use only: similarity is no diagnosis."
)
log = logging.getLogger("histoseek.api")


STATUS: list[tuple[type[HistoseekError], int, str]] = [
    (NotFound, 404, "not_found"),
    (TooLarge, 413, "too_large"),
    (Unsupported, 415, "unsupported"),
    (BadInput, 422, "bad_input"),
    (Mismatch, 409, "mismatch"),
    (Busy, 429, "busy"),
    (Unavailable, 503, "unavailable"),
    (StorageFailed, 503, "storage_failed"),
    (MissingPart, 503, "missing_part"),
    (Damaged, 503, "damaged"),
]
"""Status and code of an error; the first matching class counts."""
REFUSALS: dict[int | str, dict[str, Any]] = {
    number: {"model": models.Error, "description": text}
    for number, text in {
        401: "who asks is not known",
        403: "a page of another site asks, or only an editor may",
        404: "not there (any more)",
        408: "the body did not come in time",
        409: "another encoder",
        413: "too many bytes, pixels or items",
        415: "a format that is not read",
        421: "another host is meant",
        422: "what was sent is wrong; the message says what was expected",
        429: "too much at once; see Retry-After",
        503: "not able to answer now",
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

    _rest(app)
    return app


def _rest(app: FastAPI) -> None:
    """Answer 404 or 405 for other requests to the API, which the page would otherwise answer."""

    async def nothing(request: Request) -> Response:
        allowed: set[str] = set()
        for route in app.router.routes:
            match, _ = route.matches(request.scope)
            if match is Match.PARTIAL and isinstance(route, Route):
                allowed |= route.methods or set()
        if allowed:
            listed = ", ".join(sorted(allowed))
            raise HTTPException(405, f"expected {listed}", {"Allow": listed})
        raise NotFound(f"there is no {request.url.path[:200]}; see /docs")

    for path in ("/v1/{rest:path}", "/health", "/ready", "/info", "/metrics"):
        app.add_route(path, nothing, ALL_METHODS, include_in_schema=False)


# -- errors -----------------------------------------------------------------------------------------


def status_of(error: HistoseekError) -> tuple[int, str]:
    """Return the HTTP status and the code of an error."""
    return next((number, code) for kind, number, code in STATUS if isinstance(error, kind))


def _errors(app: FastAPI, server: Server) -> None:
    def answer(request: Request, status: int, code: str, text: str) -> JSONResponse:
        body = error_body(code, text, request.headers.get(REQUEST_ID, "-"))
        headers = {"Retry-After": "2"} if status in {429, 503} else None
        return JSONResponse(body, status, headers)

    @app.exception_handler(HistoseekError)
    async def ours(request: Request, error: HistoseekError) -> JSONResponse:
        status, code = status_of(error)
        if isinstance(error, Damaged):
            log.error("%s", error)
        return answer(request, status, code, server.session.hide(str(error)))

    @app.exception_handler(RequestValidationError)
    async def wrong(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(request, 422, "bad_input", said(error.errors()))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        known = {400: "bad_input", 404: "not_found", 405: "method_not_allowed"}
        status = 422 if error.status_code == 400 else error.status_code
        code = known.get(error.status_code, "refused")
        answered = answer(request, status, code, str(error.detail))
        answered.headers.update(error.headers or {})
        return answered

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> JSONResponse:
        log.exception("fault of the server, request %s", request.headers.get(REQUEST_ID, "-"))
        return answer(request, 500, "fault", "a fault of the server; its log has more")


# -- the service itself -----------------------------------------------------------------------------


def _service(app: FastAPI, server: Server) -> None:
    session = server.session

    @app.get("/health", tags=["service"], response_model=models.Health)
    async def health() -> Any:
        """Return 200 while the process is running. Needs no credentials."""
        return {"status": "ok"}

    @app.get("/ready", tags=["service"], response_model=models.Ready)
    def ready() -> Any:
        """Check whether the encoder answers and the atlas can be read."""
        why = session.ready()
        if why:
            raise Unavailable(why)
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
        try:
            from prometheus_client import CollectorRegistry, generate_latest
        except ImportError as error:
            raise MissingPart("/metrics needs prometheus-client: pip install it") from error
        registry = CollectorRegistry()
        registry.register(Collector(session, server.traffic, server.additions.all))
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4")

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        from .docs import page

        return HTMLResponse(page(app.openapi(), str(request.base_url).rstrip("/")))
