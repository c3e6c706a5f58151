"""Asking an atlas: ``index search``, ``similar``, ``evaluate``, ``duplicates`` and ``leakage``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
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
    from ...index.search.cases import Similar
    from ...index.store.rows import Hit
    from ...index.vectors.generations import View

COLUMNS = ("rank", "score", "tile", "slide", "place", "label", "patient", "cluster")


def search(
    atlas: AtlasPath,
    images: Annotated[list[Path] | None, typer.Argument(help="Pictures to ask about.")] = None,
    k: Annotated[int, typer.Option("-k", help="Hits per picture.")] = 10,
    where: Where = None,
    tile: Annotated[
        list[int] | None, typer.Option(help="Ask with a tile of the atlas, by id.")
    ] = None,
    without: Annotated[
        str, typer.Option(help="With --tile: leave out its own tile, slide or patient.")
    ] = "tile",
    together: Annotated[
        bool, typer.Option("--together", help="One answer: like all of the pictures and tiles.")
    ] = False,
    unlike: Annotated[
        list[str] | None,
        typer.Option(help="And unlike this picture or tile id; implies --together."),
    ] = None,
    least: Annotated[float | None, typer.Option(help="Lowest score of a hit.")] = None,
    per_slide: Annotated[
        bool, typer.Option("--per-slide", help="At most one hit per slide.")
    ] = False,
    exact: Annotated[
        bool, typer.Option("--exact", help="Compare with every tile, whatever the index.")
    ] = False,
    engine: Annotated[str | None, typer.Option(help=ENGINE_HELP)] = None,
    json: Json = False,
) -> None:
    """Find the tiles of the atlas that look most like each picture.

    JSON: one list of hits per picture, in the order given; {"query", "error"} for one that failed.
    """
    from ...index.atlas import Atlas

    opened = Atlas(atlas)
    pictures, tiles = images or [], tile or []
    if not pictures and not tiles:
        raise BadInput("nothing to look for: give pictures, or --tile with the id of a tile")
    vectors, asked, failed = embed(opened, pictures)
    joined = together or bool(unlike)
    if joined and (engine or least is not None or exact or without != "tile"):
        raise BadInput(
            "--together and --unlike do not go with --engine, --least, --exact and --without"
        )
    if tiles and not joined and (engine or least is not None):
        raise BadInput("--tile does not go with --engine or --least; ask with pictures")

    def ask(view: View) -> list[list[Hit]]:
        if joined:
            wanted = k, where, per_slide
            return _together(opened, vectors, tiles, unlike or [], failed, wanted, view)
        hits = []
        if asked:
            hits += opened.search(vectors, k, where, least, per_slide, exact, view)
        if tiles:
            hits += opened.search_like(tiles, k, where, without, per_slide, exact, view)  # type: ignore[arg-type]
        return hits

    if engine:
        arguments = vectors, k, where, least, per_slide, exact
        hits = _there(opened, engine, "search")(*arguments) if asked else []
    else:
        hits = opened.ask(ask)
    names: list[str | Path] = ["all together"]
    if not joined:
        names = [*asked, *(f"tile {number}" for number in tiles)]
    answers = {n: [hit._asdict() for hit in found] for n, found in zip(names, hits, strict=True)}
    keys = names if joined else [*pictures, *names[len(asked) :]]
    document = [answers.get(key, failed.get(key)) for key in keys]  # type: ignore[arg-type]
    several = opened.mixed_scales

    def human() -> None:
        for name, found in zip(names, hits, strict=True):
            _table(str(name), found, several)
            if not found:
                console.say(
                    "no tile passes; loosen the filter" if where else "no tile is that near"
                )

    answer(document, human, failed)


def _table(title: str, found: Sequence[Hit], several: bool) -> None:
    """Show hits; with the scale of each tile where the atlas holds several."""
    more = ("µm per pixel",) if several else ()
    rows = [(*_row(h), *([h.target_mpp] if several else ())) for h in found]
    console.table(title, (*COLUMNS, *more), rows)


def _row(h: Hit) -> tuple[Any, ...]:
    place = h.file or f"{h.x}, {h.y}"
    return (h.rank, h.score, h.tile, h.slide, place, h.label, h.patient, h.cluster)


def _there(atlas: Atlas, engine: str | None, method: str) -> Callable[..., Any]:
    """Return a method of the atlas, or of the Milvus that it was pushed to."""
    if engine is None:
        return getattr(atlas, method)  # type: ignore[no-any-return]
    from ...index.exchange.milvus import MilvusAtlas

    there = MilvusAtlas(engine)
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

    def run(*arguments: Any) -> Any:
        with closing(there):
            return getattr(there, method)(*arguments)

    return run


def _together(
    atlas: Atlas,
    vectors: NDArray[np.float32],
    tiles: list[int],
    unlike: list[str],
    failed: dict[Path, dict[str, Any]],
    wanted: tuple[int, str | None, bool],
    view: View,
) -> list[list[Hit]]:
    import numpy as np

    numbers = [int(name) for name in unlike if name.isdigit()]
    others, _, refused = embed(atlas, [Path(name) for name in unlike if not name.isdigit()])
    failed.update(refused)
    if failed:
        raise BadInput(next(iter(failed.values()))["error"]["message"])
    positive = [vectors, *([atlas.vectors_of(tiles, view)] if tiles else [])]
    negative = [others, *([atlas.vectors_of(numbers, view)] if numbers else [])]
    k, where, per_slide = wanted
    found = atlas.search_combined(
        np.concatenate(positive), np.concatenate(negative), k, where, per_slide, view
    )
    return [found]


def assign(
    atlas: AtlasPath,
    images: Annotated[list[Path], typer.Argument(help="Pictures to ask about.")],
    clusters: Annotated[
        str | None, typer.Option(help="Name of the clustering; the newest if left out.")
    ] = None,
    engine: Annotated[str | None, typer.Option(help=ENGINE_HELP)] = None,
    json: Json = False,
) -> None:
    """Place pictures in the atlas's clusters.

    JSON: one object per picture, in the order given; {"query", "error"} for one that failed.
    """
    from ...index.atlas import Atlas

    opened = Atlas(atlas)
    vectors, asked, failed = embed(opened, images)
    placed = _there(opened, engine, "assign")(vectors, clusters) if asked else []
    answers = {i: {"query": str(i), **p} for i, p in zip(asked, placed, strict=True)}
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
            for image, p in zip(asked, placed, strict=True)
        ]
        console.table("", ("picture", "cluster", "name", "distance", "strength", ""), rows)

    answer(document, human, failed)


def embed(
    atlas: Atlas, images: list[Path]
) -> tuple[NDArray[np.float32], list[Path], dict[Path, dict[str, Any]]]:
    """Embed pictures by the atlas's own encoder; one bad picture stops no other.

    Returns:
        Vectors (A, D), the pictures they are of, and an error for each of the others.
    """
    import numpy as np

    from ...artifacts.images import decode, square
    from ...serving.encoders.open import open_encoder

    if not images:
        return np.zeros((0, atlas.manifest.dim), dtype=np.float32), [], {}
    encoder = open_encoder(str(atlas.encoder_bundle), expect=atlas.manifest)
    size = atlas.manifest.size_px
    tiles: list[NDArray[np.uint8]] = []
    asked: list[Path] = []
    failed: dict[Path, dict[str, Any]] = {}
    for image in images:
        try:
            tiles.append(square(decode(image), size))
            asked.append(image)
        except HistoseekError as error:
            reason = {"type": type(error).__name__, "message": str(error)}
            failed[image] = {"query": str(image), "error": reason}
    stacked = np.stack(tiles) if tiles else np.zeros((0, size, size, 3), dtype=np.uint8)
    return encoder.embed(stacked), asked, failed


def answer(document: Any, human: Callable[[], None], failed: dict[Path, dict[str, Any]]) -> None:
    """Print answers, and what failed; exit code 1 if anything did."""

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
        typer.Option(help="Ask with this feature file instead of a slide of the atlas."),
    ] = None,
    json: Json = False,
) -> None:
    """Find slides or cases like one of the atlas, or a new one, with the regions that look alike.

    Nothing of the query's own patient is returned.
    """
    from ...index.atlas import Atlas
    from ...index.exchange.imports import read_query

    if (name is None) == (features is None):
        raise BadInput("give the name of a slide of the atlas, or --features of a new one")
    opened = Atlas(atlas)
    query = name if features is None else read_query(features, opened.manifest)
    assert query is not None

    def ask(view: View) -> tuple[list[Similar], list[dict[str, Any]]]:
        found = opened.similar_slides(query, k, by, how, where, view)  # type: ignore[arg-type]
        return found, [_case(opened, view, *ranked) for ranked in enumerate(found, start=1)]

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


def _case(atlas: Atlas, view: View, rank: int, s: Similar) -> dict[str, Any]:
    """Return a similar slide or case, and the pairs of tiles that speak for it."""

    def tile(number: int | None) -> dict[str, Any] | None:
        return None if number is None else atlas.tiles([number], view)[number]

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
