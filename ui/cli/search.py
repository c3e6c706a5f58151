"""Commands that query an atlas: ``index search``, ``assign`` and ``similar``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ... import console
from ...errors import BadInput, Mismatch
from .federated import (
    atlases_and_images,
    example,
    is_example,
    is_number,
    named_case,
    no_query,
    say_what_was_searched,
    searched_of,
    tile_number,
)
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
    from ...index.federation.answers import Answer, Found, SimilarCases
    from ...index.federation.federation import Federation
    from ...index.search.cases import Similar
    from ...index.search.query import Query
    from ...index.store.rows import Hit
    from ...index.view import View

COLUMNS = ("rank", "score", "tile", "slide", "position", "label", "patient", "cluster")


def search(
    atlas: Annotated[str, typer.Argument()],
    images: Annotated[list[str] | None, typer.Argument()] = None,
    k: Annotated[int, typer.Option("-k")] = 10,
    where: str | None = None,
    tile: list[str] | None = None,
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
    timeout: float = 10.0,
) -> None:
    """Find the tiles that look most similar to each image.

    With an encoder that has a text network, also searches by words. Several atlases of the same encoder
    are searched as one: index search ATLAS ATLAS … IMAGE … An atlas can also be a Milvus collection.

    JSON: {"answers", "notes"}. "answers" has one list of hits per image, text and tile, in the given order;
    for an image that cannot be read, {"query", "error"}. Of several atlases also "atlases" and
    "shared_slides", and each hit names its atlas. The exit code is 1 if an image or atlas cannot be read.

    Options:
        images: Query images. A folder and a Milvus address are further atlases; so is a name without
            suffix that is not a file.
        k: Number of hits per query.
        tile: Id of a tile of the atlas to use as query; ATLAS:ID with several atlases. Repeatable.
        leave_out: With --tile: tile leaves out the query tile itself, slide leaves out all tiles of its
            slide, patient all tiles of its patient.
        text: Words that the hits should show, such as "lymphocytes around a nerve". Repeatable.
        unlike_text: Words that the hits should not show. Implies --together. Repeatable.
        together: Combine all images, texts and tiles into one query.
        unlike: Image, or tile as for --tile, that the hits should not resemble. Implies --together.
            Repeatable.
        least: Minimum score of a hit.
        per_slide: Return at most one hit per slide.
        exact: Compare with every tile, without the index.
        mpp: Scale of the query images in µm per pixel. Each image is cut into tiles of the atlas's scale,
            and their mean is searched. Without it, the middle square of an image is taken as one tile.
        timeout: With several atlases: time in s to wait for the answer of each to a question.
    """
    from ...index.atlas import Atlas
    from ...index.federation.federation import Federation
    from ...index.federation.shards import is_milvus
    from ...index.search.query import Query

    addresses, paths = atlases_and_images([atlas, *(images or [])])
    tiles, texts = tile or [], text or []
    if leave_out != "tile" and not tiles:
        raise BadInput(
            f"--leave-out {leave_out} is for --tile only: the slide and patient of an image are not known; "
            "use --where, such as \"patient != 'P7'\""
        )
    if not paths and not tiles and not texts:
        raise no_query(addresses)
    if engine and (tiles or together or unlike or unlike_text or len(addresses) > 1):
        raise BadInput(
            "--engine searches one atlas with images and texts only; leave out --tile, --together, "
            "--unlike and --unlike-text, or give the collections as further atlases instead"
        )
    federation = None
    if len(addresses) > 1 or is_milvus(addresses[0]):
        federation = Federation(addresses, timeout)
    opened = Atlas(addresses[0]) if federation is None else federation.an_atlas()
    is_tile = is_number if federation is None else is_example
    unlike_paths = [Path(name) for name in unlike or [] if not is_tile(name)]
    unlike_tiles = [name for name in unlike or [] if is_tile(name)]
    if paths or unlike_paths:
        check_images(opened)
    notes: list[str] = []
    if mpp is None:
        read, failed = read_images(
            paths, opened.manifest.size_px, notes, "; pass --mpp to search all of it"
        )
    else:
        read, failed = cut_images(opened, paths, mpp, notes)
    unlike_read, unlike_failed = read_images(unlike_paths, opened.manifest.size_px, notes)
    query = Query(
        images=() if mpp else tuple(read.values()),
        vectors=mean_vectors(opened, read, notes) if mpp else None,
        unlike_images=tuple(unlike_read.values()), together=together or bool(unlike_tiles), k=k,
        where=where, least=least, per_slide=per_slide, exact=exact,
        leave_out=leave_out,  # type: ignore[arg-type]
        texts=tuple(texts), unlike_texts=tuple(unlike_text or ()),
    )  # fmt: skip
    for item in (*unlike_failed.values(), *(failed.values() if query.combines else ())):
        raise BadInput(item["error"]["message"])
    others = [*(f"{text!r}" for text in texts), *(f"tile {n}" for n in tiles)]
    names: list[str | Path] = ["all together"] if query.combines else [*paths, *others]
    searched: list[str | Path] = names if query.combines else [*read, *others]
    shown = [str(path) for path in (*(() if mpp else read), *unlike_read)]
    if federation is None:
        query = replace(
            query, tiles=tuple(map(tile_number, tiles)),
            unlike_tiles=tuple(map(tile_number, unlike_tiles)),
        )  # fmt: skip
        hits = dict(zip(searched, _ask(opened, query, shown, engine, notes), strict=True))
        _answer_search(names, hits, failed, query, opened.mixed_scales, notes)
        return
    with closing(federation):
        tiles_asked = tiles, unlike_tiles
        _search_several(
            federation, opened, query, shown, tiles_asked, names, searched, failed, notes
        )


def _search_several(
    federation: Federation,
    opened: Atlas,
    query: Query,
    images: Sequence[str],
    tiles: tuple[list[str], list[str]],
    names: list[str | Path],
    searched: list[str | Path],
    failed: dict[Path, dict[str, Any]],
    notes: list[str],
) -> None:
    """Search several atlases and print the answer; exit code 1 if one was away.

    Args:
        federation: the atlases.
        opened: one of them, with the encoder.
        query: with images and texts.
        images: names of the query's images.
        tiles: ids to be like, and to be unlike.
        names: of all queries, in the order of the answers.
        searched: of those that could be read.
        failed: why the others could not.
        notes: on the images.
    """
    like, unlike = ([example(text) for text in part] for part in tiles)
    if query.examples or like:
        embedded = query.embedded(embed_with(opened, images, notes), embed_text_with(opened))
        found = federation.search(embedded, like, unlike)
    else:
        found = federation.status()
    hits = dict(zip(searched, found.hits, strict=True))
    scales = len({one.hit.target_mpp for part in found.hits for one in part}) > 1
    _answer_search(names, hits, failed, query, scales, [*notes, *found.notes], found)
    if found.away:
        raise typer.Exit(console.EXIT_FAILED)


def _answer_search(
    names: list[str | Path],
    hits_of: Mapping[str | Path, Sequence[Hit | Found]],
    failed: dict[Path, dict[str, Any]],
    query: Query,
    scales: bool,
    notes: list[str],
    several: Answer | None = None,
) -> None:
    """Print the hits of each readable image, text and tile, or of the one combined query.

    Args:
        names: of all queries, in the order of the answers.
        hits_of: the hits, by query that could be read.
        failed: why the others could not.
        query: that was asked.
        scales: show the scale of each tile.
        notes: on the images and the filter.
        several: the answer of several atlases.
    """
    from ...index.store.rows import Hit
    from ..session.words import TEXT_NOTICE

    notes = [*notes, *[TEXT_NOTICE] * query.by_text]
    answers = [
        [hit._asdict() if isinstance(hit, Hit) else hit.as_dict() for hit in hits_of[name]]
        if name in hits_of else failed[Path(name)]
        for name in names
    ]  # fmt: skip
    searched = {} if several is None else searched_of(several)

    def human() -> None:
        for name, hits in hits_of.items():
            _print_hits(str(name), hits, query, scales, several is not None)
        if several is not None:
            say_what_was_searched(several)

    answer({**searched, "answers": answers, "notes": notes}, human, failed)


def _print_hits(
    name: str, hits: Sequence[Hit | Found], query: Query, scales: bool, several: bool
) -> None:
    """Print a table of hits; with their scales, and their atlases, if there are several."""
    from ...index.store.rows import Hit

    rows: list[list[Any]] = []
    columns = [*COLUMNS, *(["µm per pixel"] if scales else [])]
    if several:
        columns.insert(2, "atlas")
    for one in hits:
        hit = one if isinstance(one, Hit) else one.hit
        row = [
            hit.rank, hit.score, hit.tile, hit.slide, hit.file or f"{hit.x}, {hit.y}", hit.label,
            hit.patient, hit.cluster, *([hit.target_mpp] if scales else []),
        ]  # fmt: skip
        rows.append(row if isinstance(one, Hit) else [*row[:2], one.atlas, *row[2:]])
    console.table(name, columns, rows)
    if not hits:
        option = "--where" if query.where else "--least" if query.least is not None else ""
        console.say(
            f"no tile passes {option}; loosen it to get hits" if option else "no tile was found"
        )


def _ask(
    atlas: Atlas, query: Query, images: Sequence[str], engine: str | None, notes: list[str]
) -> list[list[Hit]]:
    """Return a list of hits per readable image, text and tile, or one list if the query combines them.

    ``images``: names of the query's images; ``notes``: notes are added here.
    """
    if not query.examples:
        return []
    embedded = query.embedded(embed_with(atlas, images, notes), embed_text_with(atlas))
    if engine is None:
        from ...index.view import View

        hits = atlas.ask(View.search, embedded)
        notes += atlas.ask(View.notes, query.where, query.leave_out == "patient")
        return hits
    with _milvus(atlas, engine, notes) as milvus:
        hits = milvus.search(embedded)
        notes += milvus.filter_notes(query.where)
        return hits


@contextmanager
def _milvus(atlas: Atlas, engine: str, notes: list[str]) -> Iterator[MilvusAtlas]:
    """Open the Milvus collection to which an atlas was pushed; notes if it is not up to date.

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
            notes.append(
                f"{engine} contains revision {about.revision}, but the atlas is at revision {revision}; "
                "run `index push` again"
            )
        yield milvus


def assign(
    atlas: Path, images: list[Path], clusters: str | None = None, engine: str | None = None
) -> None:
    """Assign images to the atlas's clusters.

    JSON: {"answers", "notes"}. "answers" has one object per image, in the given order; "foreign" means out
    of distribution. For an image that cannot be read: {"query", "error"}.

    Options:
        images: Query images.
    """
    import numpy as np

    from ...index.atlas import Atlas

    opened = Atlas(atlas)
    check_images(opened)
    notes: list[str] = []
    read, failed = read_images(images, opened.manifest.size_px, notes)
    assigned: list[dict[str, Any]] = []
    if read:
        vectors = embed_with(opened, list(map(str, read)), notes)(np.stack(list(read.values())))
        foreign = opened.manifest.out_of_distribution(vectors).tolist()
        if engine is None:
            assigned = opened.assign(vectors, clusters)
        else:
            with _milvus(opened, engine, notes) as milvus:
                assigned = milvus.assign(vectors, clusters)
        assigned = [
            {**one, "foreign": one["unknown"] and out}
            for one, out in zip(assigned, foreign, strict=True)
        ]
    by_image = dict(zip(read, assigned, strict=True))
    answers = [
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

    answer({"answers": answers, "notes": notes}, human, failed)


def answer(
    document: dict[str, Any], human: Callable[[], None], failed: dict[Path, dict[str, Any]]
) -> None:
    """Print answers, notes and errors; exit code 1 if an image failed."""

    def human_notes_and_errors() -> None:
        human()
        for note in document["notes"]:
            console.say(note)
        for item in failed.values():
            console.say(f"{item['query']}: {item['error']['message']}")

    console.emit(document, human_notes_and_errors)
    if failed:
        raise typer.Exit(console.EXIT_FAILED)


def similar(
    atlas: Annotated[str, typer.Argument()],
    name: Annotated[list[str] | None, typer.Argument()] = None,
    k: Annotated[int, typer.Option("-k")] = 10,
    by: str = "slide",
    how: str = "median",
    where: str | None = None,
    features: Path | None = None,
    timeout: float = 600.0,
) -> None:
    """Find the slides or cases most similar to a slide or case.

    Shows their most similar regions. Other slides of the same patient are left out. Several atlases of the
    same encoder are searched as one: index similar ATLAS ATLAS … NAME.

    JSON: {"query", "answers", "notes"}. "answers" is a list of slides or cases. Of several atlases also
    "atlases" and "shared_slides", and each slide, case and tile names its atlas. The exit code is 1 if an
    atlas was not compared, such as a Milvus collection, which has no mosaics.

    Options:
        name: Further atlases, and last the name of a slide; with --by patient, of a patient. ATLAS:NAME
            if several atlases have it.
        k: Number of slides or cases to return.
        by: What to compare: slide, or patient (all slides of a patient together).
        how: How to score: median (of the distances from each representative tile of the query to the
            nearest tile of the other, as in Yottixel) or votes (of the nearest tiles in the whole atlas).
        features: Feature file of a new slide, which is the query instead of a named one.
        timeout: With several atlases: time in s to wait for each.
    """
    from ...index.atlas import Atlas
    from ...index.exchange.imports import read_query
    from ...index.federation.federation import Federation
    from ...index.federation.shards import is_milvus
    from ...index.search.cases import check_by, check_how

    words = [atlas, *(name or [])]
    addresses = words if features is not None else words[:-1]
    stray = [word for word in words[1:] if not (is_milvus(word) or Path(word).is_dir())]
    if not addresses or (features is not None and stray):
        raise BadInput(
            "give either the name of a slide or patient of the atlas, or --features of a new slide"
        )
    check_by(by)
    check_how(how)
    if len(addresses) > 1 or is_milvus(addresses[0]):
        if how != "median":
            raise BadInput(
                f"--how {how} compares the slides of one atlas; leave it out, or give one atlas"
            )
        with closing(Federation(addresses)) as several:
            home: str | None = None
            asked: Any = words[-1]
            if features is None:
                home, asked = named_case(words[-1], [shard.name for shard in several.shards])
            else:
                asked = read_query(features, several.an_atlas().manifest)
            found = several.similar(asked, k, by, where, home, timeout_s=timeout)  # type: ignore[arg-type]
        _answer_several(found, str(asked if features is None else features), by)
        return
    opened = Atlas(atlas)
    query = words[-1] if features is None else read_query(features, opened.manifest)

    from ...index.view import View

    def ask(view: View) -> list[dict[str, Any]]:
        cases = view.similar(query, k, by, how, where)  # type: ignore[arg-type]
        ids = {n for c in cases for p in c.pairs for n in (p.query, p.match) if n is not None}
        tiles = view.tiles(sorted(ids))
        return [_case(rank, case, tiles, tiles) for rank, case in enumerate(cases, start=1)]

    answers = opened.ask(ask)
    title = f"{features or words[-1]}, by {how}"
    document = {
        "query": {
            "atlas": None if features else opened.path.name,
            "name": str(features or words[-1]),
        },
        "answers": answers,
        "notes": opened.ask(View.notes, where, features is None),
    }
    answer(document, lambda: _print_cases(title, by, answers), {})


def _answer_several(found: SimilarCases, query: str, by: str) -> None:
    """Print the slides or cases of several atlases that are similar to one; exit code 1 if one was away."""
    rows = []
    for rank, one in enumerate(found.cases, start=1):
        query_tiles = {n: {"atlas": found.atlas, **tile} for n, tile in one.query_tiles.items()}
        tiles = {n: {"atlas": one.atlas, **tile} for n, tile in one.tiles.items()}
        rows.append({"atlas": one.atlas, **_case(rank, one.case, query_tiles, tiles)})
    document = {
        "query": {"atlas": found.atlas, "name": query},
        **searched_of(found.searched),
        "answers": rows,
        "notes": found.searched.notes,
    }
    of = f" of {found.atlas}" if found.atlas else ""

    def human() -> None:
        _print_cases(f"{query}{of}, by median", by, rows)
        say_what_was_searched(found.searched, "each copy is ranked on its own")

    answer(document, human, {})
    if found.searched.away:
        raise typer.Exit(console.EXIT_FAILED)


def _print_cases(title: str, by: str, document: list[dict[str, Any]]) -> None:
    """Print a table of similar slides or cases; with their atlases, if there are several."""
    several = any("atlas" in row for row in document)
    rows = []
    for row in document:
        best = row["evidence"][0]
        match = best["match"]
        position = match["file"] or f"{match['x']}, {match['y']}"
        start = [row["rank"], *([row["atlas"]] if several else [])]
        rows.append([*start, row["name"], row["score"], row["label"], position, best["score"]])
    columns = ["rank", by, "score", "label", "most similar tile at", "its score"]
    if several:
        columns.insert(1, "atlas")
    console.table(title, columns, rows)


def _case(
    rank: int,
    case: Similar,
    query_tiles: dict[int, dict[str, Any]],
    tiles: dict[int, dict[str, Any]],
) -> dict[str, Any]:
    """Return a similar slide or case as JSON, with its pairs of similar tiles."""
    pairs = [
        {
            "score": p.score,
            "query": None if p.query is None else query_tiles[p.query],
            "match": tiles[p.match],
        }
        for p in case.pairs
    ]
    return {
        "rank": rank,
        "name": case.name,
        "score": round(case.score, 6),
        "label": case.label,
        "evidence": pairs,
    }
