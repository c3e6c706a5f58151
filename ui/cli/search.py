"""Commands that query an atlas: ``index search``, ``assign`` and ``similar``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ... import console
from ...console import Json
from ...errors import BadInput, HistoseekError, Mismatch
from .arguments import ENGINE_HELP, AtlasPath, Where
from .study import duplicates, evaluate, leakage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ...index.atlas import Atlas
    from ...index.exchange.milvus import MilvusAtlas
    from ...index.search.cases import Similar
    from ...index.search.query import Query
    from ...index.store.rows import Hit
    from ...index.view import View

COLUMNS = ("rank", "score", "tile", "slide", "place", "label", "patient", "cluster")


def search(
    atlas: AtlasPath,
    images: Annotated[list[Path] | None, typer.Argument(help="Query images.")] = None,
    k: Annotated[int, typer.Option("-k", help="Hits per query.")] = 10,
    where: Where = None,
    tile: Annotated[list[int] | None, typer.Option(help="Id of a tile to use as query.")] = None,
    leave_out: Annotated[
        str,
        typer.Option(
            "--leave-out",
            "--without",
            help="With --tile: leave out that tile, its slide or its patient.",
        ),
    ] = "tile",
    together: Annotated[
        bool, typer.Option("--together", help="Combine all images and tiles into one query.")
    ] = False,
    unlike: Annotated[
        list[str] | None,
        typer.Option(help="Image or tile id that hits should not resemble; implies --together."),
    ] = None,
    least: Annotated[float | None, typer.Option(help="Minimum score of a hit.")] = None,
    per_slide: Annotated[
        bool, typer.Option("--per-slide", help="At most one hit per slide.")
    ] = False,
    exact: Annotated[
        bool, typer.Option("--exact", help="Compare with every tile instead of using the index.")
    ] = False,
    engine: Annotated[str | None, typer.Option(help=ENGINE_HELP)] = None,
    json: Json = False,
) -> None:
    """Find the tiles of the atlas that look most similar to each image.

    JSON: one list of hits per image, in the order given; {"query", "error"} for an image that failed.
    """
    from ...index.atlas import Atlas
    from ...index.search.query import Query

    opened, pictures, tiles = Atlas(atlas), images or [], tile or []
    if not pictures and not tiles:
        raise BadInput("nothing to look for: give pictures, or --tile with the id of a tile")
    others, unlike_tiles = _images_and_tiles(unlike or [])
    if engine and (tiles or together or unlike):
        raise BadInput("--engine goes with pictures, not with --tile, --together or --unlike")
    if pictures or others:
        check_images(opened)
    read, failed = read_images(pictures, opened.manifest.size_px)
    unlike_read, refused = read_images(others, opened.manifest.size_px)
    query = Query(
        images=tuple(read.values()), tiles=tuple(tiles), unlike_images=tuple(unlike_read.values()),
        unlike_tiles=unlike_tiles, together=together, k=k, where=where, least=least,
        per_slide=per_slide, exact=exact, leave_out=leave_out,  # type: ignore[arg-type]
    )  # fmt: skip
    if bad := [*refused.values(), *(failed.values() if query.combines else ())]:
        raise BadInput(bad[0]["error"]["message"])
    hits = _ask(opened, query, engine)
    of_tiles = [f"tile {number}" for number in tiles]
    names: list[str | Path] = ["all together"] if query.combines else [*read, *of_tiles]
    keys: list[str | Path] = names if query.combines else [*pictures, *of_tiles]
    answers = {n: [hit._asdict() for hit in found] for n, found in zip(names, hits, strict=True)}
    document = [answers.get(key, failed.get(Path(key))) for key in keys]
    answer(document, lambda: _show(opened, names, hits, where), failed)


def _show(
    atlas: Atlas, names: Sequence[str | Path], hits: list[list[Hit]], where: str | None
) -> None:
    """Print a table per question."""
    several = atlas.mixed_scales
    for name, found in zip(names, hits, strict=True):
        _table(str(name), found, several)
        if not found:
            console.say("no tile passes; loosen the filter" if where else "no tile is that near")


def _images_and_tiles(names: Sequence[str]) -> tuple[list[Path], tuple[int, ...]]:
    """Part what is named on the command line into pictures and ids of tiles."""
    tiles = tuple(int(name) for name in names if name.isdigit())
    return [Path(name) for name in names if not name.isdigit()], tiles


def _ask(atlas: Atlas, query: Query, engine: str | None) -> list[list[Hit]]:
    """Return a list of hits per readable image and tile, or one list if the query combines them."""
    if not query.images and not query.tiles:
        return []
    embedded = query.embedded(embed_with(atlas))
    if engine is None:
        from ...index.view import View

        return atlas.ask(View.search, embedded)
    with _milvus(atlas, engine) as there:
        return there.search(embedded)


def _table(title: str, found: Sequence[Hit], several: bool) -> None:
    """Print hits; with each tile's scale if the atlas holds several scales."""
    more = ("µm per pixel",) if several else ()
    rows = [(*_row(h), *([h.target_mpp] if several else ())) for h in found]
    console.table(title, (*COLUMNS, *more), rows)


def _row(h: Hit) -> tuple[Any, ...]:
    place = h.file or f"{h.x}, {h.y}"
    return (h.rank, h.score, h.tile, h.slide, place, h.label, h.patient, h.cluster)


@contextmanager
def _milvus(atlas: Atlas, engine: str) -> Iterator[MilvusAtlas]:
    """Open the Milvus collection to which an atlas was pushed.

    Raises:
        Mismatch: the collection holds embeddings of another encoder.
    """
    from ...index.exchange.milvus import MilvusAtlas

    with closing(MilvusAtlas(engine)) as there:
        about = there.about
        if about is not None and about.sha256 != atlas.manifest.sha256:
            raise Mismatch(
                f"{engine} holds embeddings of {about.encoder!r}, {atlas.path} is bound to "
                f"{atlas.manifest.name!r}"
            )
        revision = atlas.catalog.revision()
        if about is not None and about.revision != revision:
            console.say(
                f"{engine} holds revision {about.revision}, the atlas is at {revision}: push it again"
            )
        yield there


def assign(
    atlas: AtlasPath,
    images: Annotated[list[Path], typer.Argument(help="Query images.")],
    clusters: Annotated[
        str | None, typer.Option(help="Name of the clustering; the newest if left out.")
    ] = None,
    engine: Annotated[str | None, typer.Option(help=ENGINE_HELP)] = None,
    json: Json = False,
) -> None:
    """Assign images to the atlas's clusters.

    JSON: one object per image, in the order given; {"query", "error"} for an image that failed.
    """
    import numpy as np

    from ...index.atlas import Atlas

    opened = Atlas(atlas)
    check_images(opened)
    read, failed = read_images(images, opened.manifest.size_px)
    assigned: list[dict[str, Any]] = []
    if read:
        vectors = embed_with(opened)(np.stack(list(read.values())))
        if engine is None:
            assigned = opened.assign(vectors, clusters)
        else:
            with _milvus(opened, engine) as there:
                assigned = there.assign(vectors, clusters)
    answers = {i: {"query": str(i), **p} for i, p in zip(read, assigned, strict=True)}
    document = [answers.get(image, failed.get(image)) for image in images]

    def human() -> None:
        rows = [
            (
                image.name,
                p["cluster"],
                p["name"],
                p["distance"],
                p["strength"],
                "unknown" if p["unknown"] else "",
            )
            for image, p in zip(read, assigned, strict=True)
        ]
        console.table("", ("picture", "cluster", "name", "distance", "strength", ""), rows)

    answer(document, human, failed)


def read_images(
    paths: Sequence[Path], size_px: int
) -> tuple[dict[Path, NDArray[np.uint8]], dict[Path, dict[str, Any]]]:
    """Read images in the encoder's format, (S, S, 3); a bad image does not stop the others.

    Returns:
        The images by path, and an error for each unreadable one.
    """
    from ...artifacts.images import decode, square

    read: dict[Path, NDArray[np.uint8]] = {}
    failed: dict[Path, dict[str, Any]] = {}
    for path in paths:
        try:
            read[path] = square(decode(path), size_px)
        except HistoseekError as error:
            reason = {"type": type(error).__name__, "message": str(error)}
            failed[path] = {"query": str(path), "error": reason}
    return read, failed


def check_images(atlas: Atlas) -> None:
    """Raise if images cannot be embedded because the atlas has no encoder.

    Raises:
        BadInput: the atlas holds features of another tool.
    """
    if atlas.manifest.external:
        from ...artifacts.manifest import check_bundle_graph

        check_bundle_graph(atlas.encoder_bundle, atlas.manifest)


def embed_with(atlas: Atlas) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
    """Return a function that embeds images (N, S, S, 3); it opens the atlas's encoder when called."""

    def embed(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        from ...serving.encoders.open import open_encoder

        with closing(open_encoder(str(atlas.encoder_bundle), expect=atlas.manifest)) as encoder:
            return encoder.embed(images)

    return embed


def answer(document: Any, human: Callable[[], None], failed: dict[Path, dict[str, Any]]) -> None:
    """Print answers and errors; exit code 1 if an image failed."""

    def tell() -> None:
        human()
        for item in failed.values():
            console.say(f"{item['query']}: {item['error']['message']}")

    console.emit(document, tell)
    if failed:
        raise typer.Exit(console.EXIT_FAILED)


def similar(
    atlas: AtlasPath,
    name: Annotated[
        str | None, typer.Argument(help="A slide, or a patient with --by patient.")
    ] = None,
    k: Annotated[int, typer.Option("-k", help="Slides or cases.")] = 10,
    by: Annotated[str, typer.Option(help="What is ranked: slide or patient.")] = "slide",
    how: Annotated[
        str, typer.Option(help="median of the minimum distances (Yottixel), or votes of tiles.")
    ] = "median",
    where: Where = None,
    features: Annotated[
        Path | None,
        typer.Option(help="Use this feature file as query instead of a slide of the atlas."),
    ] = None,
    json: Json = False,
) -> None:
    """Find slides or cases similar to one of the atlas, or to a new one, and show the similar regions.

    Slides of the query's patient are left out.
    """
    from ...index.atlas import Atlas
    from ...index.exchange.imports import read_query

    if (name is None) == (features is None):
        raise BadInput("give the name of a slide of the atlas, or --features of a new one")
    opened = Atlas(atlas)
    query = name if features is None else read_query(features, opened.manifest)
    assert query is not None

    def ask(view: View) -> tuple[list[Similar], list[dict[str, Any]]]:
        found = view.similar(query, k, by, how, where)  # type: ignore[arg-type]
        return found, [_case(view, *ranked) for ranked in enumerate(found, start=1)]

    found, document = opened.ask(ask)

    def human() -> None:
        rows = []
        for rank, s in enumerate(found, start=1):
            best = document[rank - 1]["evidence"][0]["match"] or {}
            place = best["file"] or f"{best['x']}, {best['y']}"
            rows.append((rank, s.name, s.score, s.label, place, s.pairs[0].score))
        columns = ("rank", by, "score", "label", "most alike at", "its score")
        console.table(f"{name or features}, by {how}", columns, rows)

    console.emit(document, human)


def _case(view: View, rank: int, s: Similar) -> dict[str, Any]:
    """Return a similar slide or case as JSON, with its pairs of similar tiles."""

    def tile(number: int | None) -> dict[str, Any] | None:
        return None if number is None else view.tiles([number])[number]

    pairs = [{"score": p.score, "query": tile(p.query), "match": tile(p.match)} for p in s.pairs]
    return {
        "rank": rank,
        "name": s.name,
        "score": round(s.score, 6),
        "label": s.label,
        "evidence": pairs,
    }


COMMANDS = {
    "search": search,
    "assign": assign,
    "similar": similar,
    "evaluate": evaluate,
    "duplicates": duplicates,
    "leakage": leakage,
}
