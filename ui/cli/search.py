"""Commands that query an atlas: ``index search``, ``assign`` and ``similar``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ... import console
from ...errors import BadInput, Mismatch
from .queries import (
    check_images,
    cut_images,
    embed_text_with,
    embed_with,
    mean_vectors,
    read_images,
)

if TYPE_CHECKING:
    from ...index.atlas import Atlas
    from ...index.exchange.milvus import MilvusAtlas
    from ...index.search.cases import Similar
    from ...index.search.query import Query
    from ...index.store.rows import Hit
    from ...index.view import View

COLUMNS = ("rank", "score", "tile", "slide", "position", "label", "patient", "cluster")


def search(
    atlas: Path,
    images: Annotated[list[Path] | None, typer.Argument()] = None,
    k: Annotated[int, typer.Option("-k")] = 10,
    where: str | None = None,
    tile: list[int] | None = None,
    leave_out: Annotated[str, typer.Option("--leave-out", "--without")] = "tile",
    together: bool = False,
    unlike: list[str] | None = None,
    text: list[str] | None = None,
    unlike_text: list[str] | None = None,
    least: float | None = None,
    per_slide: bool = False,
    exact: bool = False,
    mpp: float | None = None,
    engine: str | None = None,
) -> None:
    """Find the tiles that look most similar to each image.

    With an encoder that has a text network, also searches by words. JSON: a list with one list of hits
    per image, text and tile, in the given order; for an image that cannot be read, {"query", "error"}.

    Options:
        images: Query images.
        k: Number of hits per query.
        tile: Id of a tile of the atlas to use as query. Repeatable.
        leave_out: With --tile: tile leaves out the query tile itself, slide leaves out all tiles of its
            slide, patient all tiles of its patient.
        text: Words that the hits should show, such as "lymphocytes around a nerve". Repeatable.
        unlike_text: Words that the hits should not show. Implies --together. Repeatable.
        together: Combine all images, texts and tiles into one query.
        unlike: Image, or tile id, that the hits should not resemble. Implies --together. Repeatable.
        least: Minimum score of a hit.
        per_slide: Return at most one hit per slide.
        exact: Compare with every tile, without the index.
        mpp: Scale of the query images in µm per pixel. Each image is cut into tiles of the atlas's scale,
            and their mean is searched. Without it, the middle square of an image is taken as one tile.
    """
    from ...index.atlas import Atlas
    from ...index.search.query import Query

    opened, paths, tiles, texts = Atlas(atlas), images or [], tile or [], text or []
    if not paths and not tiles and not texts:
        raise BadInput(
            "no query was given; name an image, --tile with the id of a tile, or --text with words"
        )
    if engine and (tiles or together or unlike or unlike_text):
        raise BadInput(
            "--engine searches with images and texts only; leave out --tile, --together, --unlike and "
            "--unlike-text"
        )
    unlike_paths = [Path(name) for name in unlike or [] if not name.isdigit()]
    unlike_tiles = tuple(int(name) for name in unlike or [] if name.isdigit())
    if paths or unlike_paths:
        check_images(opened)
    if mpp is None:
        read, failed = read_images(paths, opened.manifest.size_px)
    else:
        read, failed = cut_images(opened, paths, mpp)
    unlike_read, unlike_failed = read_images(unlike_paths, opened.manifest.size_px)
    query = Query(
        images=() if mpp else tuple(read.values()), vectors=mean_vectors(opened, read) if mpp else None,
        tiles=tuple(tiles), unlike_images=tuple(unlike_read.values()),
        unlike_tiles=unlike_tiles, together=together, k=k, where=where, least=least,
        per_slide=per_slide, exact=exact, leave_out=leave_out,  # type: ignore[arg-type]
        texts=tuple(texts), unlike_texts=tuple(unlike_text or ()),
    )  # fmt: skip
    for item in (*unlike_failed.values(), *(failed.values() if query.combines else ())):
        raise BadInput(item["error"]["message"])
    _answer_search(opened, query, paths, read, _ask(opened, query, engine), failed)


def _answer_search(
    atlas: Atlas,
    query: Query,
    paths: list[Path],
    read: Iterable[Path],
    hits: list[list[Hit]],
    failed: dict[Path, dict[str, Any]],
) -> None:
    """Print the hits of each readable image and tile, or of the one combined query."""
    others = [*(f"{text!r}" for text in query.texts), *(f"tile {n}" for n in query.tiles)]
    names: list[str | Path] = ["all together"] if query.combines else [*paths, *others]
    searched: list[str | Path] = names if query.combines else [*read, *others]
    hits_of = dict(zip(searched, hits, strict=True))
    document = [
        [hit._asdict() for hit in hits_of[name]] if name in hits_of else failed[Path(name)]
        for name in names
    ]

    def human() -> None:
        _print_hits(atlas, hits_of, query.where)
        if query.by_text:
            from ..session.words import TEXT_NOTICE

            console.say(TEXT_NOTICE)

    answer(document, human, failed)


def _print_hits(atlas: Atlas, hits_of: dict[str | Path, list[Hit]], where: str | None) -> None:
    """Print a table per query; with the scale of each tile if the atlas has tiles of several scales."""
    for name, hits in hits_of.items():
        rows = [
            (
                h.rank,
                h.score,
                h.tile,
                h.slide,
                h.file or f"{h.x}, {h.y}",
                h.label,
                h.patient,
                h.cluster,
            )
            for h in hits
        ]
        if atlas.mixed_scales:
            scaled = [(*row, hit.target_mpp) for row, hit in zip(rows, hits, strict=True)]
            console.table(str(name), (*COLUMNS, "µm per pixel"), scaled)
        else:
            console.table(str(name), COLUMNS, rows)
        if not hits:
            option = "--where" if where else "--least"
            console.say(f"no tile passes {option}; loosen it to get hits")


def _ask(atlas: Atlas, query: Query, engine: str | None) -> list[list[Hit]]:
    """Return a list of hits per readable image, text and tile, or one list if the query combines them."""
    if not query.examples:
        return []
    embedded = query.embedded(embed_with(atlas), embed_text_with(atlas))
    if engine is None:
        from ...index.view import View

        return atlas.ask(View.search, embedded)
    with _milvus(atlas, engine) as milvus:
        return milvus.search(embedded)


@contextmanager
def _milvus(atlas: Atlas, engine: str) -> Iterator[MilvusAtlas]:
    """Open the Milvus collection to which an atlas was pushed.

    Raises:
        Mismatch: the collection holds embeddings of another encoder.
    """
    from ...index.exchange.milvus import MilvusAtlas

    with closing(MilvusAtlas(engine)) as milvus:
        about = milvus.about
        if about is not None and about.sha256 != atlas.manifest.sha256:
            raise Mismatch(
                f"{engine} contains embeddings of the encoder {about.encoder!r}, but {atlas.path} belongs "
                f"to {atlas.manifest.name!r}; push the atlas to another collection"
            )
        revision = atlas.catalog.revision()
        if about is not None and about.revision != revision:
            console.say(
                f"{engine} contains revision {about.revision}, but the atlas is at revision {revision}; "
                "run `index push` again"
            )
        yield milvus


def assign(
    atlas: Path, images: list[Path], clusters: str | None = None, engine: str | None = None
) -> None:
    """Assign images to the atlas's clusters.

    JSON: a list with one object per image, in the given order; for an image that cannot be read,
    {"query", "error"}.

    Options:
        images: Query images.
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
            with _milvus(opened, engine) as milvus:
                assigned = milvus.assign(vectors, clusters)
    by_image = dict(zip(read, assigned, strict=True))
    document = [
        {"query": str(image), **by_image[image]} if image in by_image else failed[image]
        for image in images
    ]

    def human() -> None:
        columns = ("cluster", "name", "distance", "strength")
        rows = [
            (image.name, *(a[key] for key in columns), "unknown" if a["unknown"] else "")
            for image, a in by_image.items()
        ]
        console.table("", ("image", *columns, ""), rows)

    answer(document, human, failed)


def answer(document: Any, human: Callable[[], None], failed: dict[Path, dict[str, Any]]) -> None:
    """Print answers and errors; exit code 1 if an image failed."""

    def human_and_errors() -> None:
        human()
        for item in failed.values():
            console.say(f"{item['query']}: {item['error']['message']}")

    console.emit(document, human_and_errors)
    if failed:
        raise typer.Exit(console.EXIT_FAILED)


def similar(
    atlas: Path,
    name: Annotated[str | None, typer.Argument()] = None,
    k: Annotated[int, typer.Option("-k")] = 10,
    by: str = "slide",
    how: str = "median",
    where: str | None = None,
    features: Path | None = None,
) -> None:
    """Find the slides or cases most similar to a slide or case.

    Shows their most similar regions. Other slides of the same patient are left out.

    Options:
        name: Name of a slide; with --by patient, of a patient.
        k: Number of slides or cases to return.
        by: What to compare: slide, or patient (all slides of a patient together).
        how: How to score: median (of the distances from each representative tile of the query to the
            nearest tile of the other, as in Yottixel) or votes (of the nearest tiles in the whole atlas).
        features: Feature file of a new slide, which is the query instead of a named one.
    """
    from ...index.atlas import Atlas
    from ...index.exchange.imports import read_query

    if (name is None) == (features is None):
        raise BadInput(
            "give either the name of a slide or patient of the atlas, or --features of a new slide"
        )
    opened = Atlas(atlas)
    query = name if features is None else read_query(features, opened.manifest)
    assert query is not None

    def ask(view: View) -> tuple[list[Similar], list[dict[str, Any]]]:
        cases = view.similar(query, k, by, how, where)  # type: ignore[arg-type]
        return cases, [_case(view, *ranked) for ranked in enumerate(cases, start=1)]

    cases, document = opened.ask(ask)

    def human() -> None:
        rows = []
        for case, row in zip(cases, document, strict=True):
            best = row["evidence"][0]["match"] or {}
            position = best["file"] or f"{best['x']}, {best['y']}"
            rows.append(
                (row["rank"], case.name, case.score, case.label, position, case.pairs[0].score)
            )
        columns = ("rank", by, "score", "label", "most similar tile at", "its score")
        console.table(f"{name or features}, by {how}", columns, rows)

    console.emit(document, human)


def _case(view: View, rank: int, case: Similar) -> dict[str, Any]:
    """Return a similar slide or case as JSON, with its pairs of similar tiles."""

    def tile(number: int | None) -> dict[str, Any] | None:
        return None if number is None else view.tiles([number])[number]

    pairs = [{"score": p.score, "query": tile(p.query), "match": tile(p.match)} for p in case.pairs]
    return {
        "rank": rank,
        "name": case.name,
        "score": round(case.score, 6),
        "label": case.label,
        "evidence": pairs,
    }
