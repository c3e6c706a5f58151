"""The command group ``histoseek index``: the atlas from the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import console
from .console import Json
from .errors import BadInput, HistoseekError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .index.atlas import Atlas

index_app = typer.Typer(
    help="Keep embeddings in an atlas: search it, cluster it, check it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
AtlasPath = Annotated[Path, typer.Argument(help="Folder of the atlas.")]
Images = Annotated[list[Path], typer.Argument(help="Pictures to ask about.")]


@index_app.command()
def create(
    atlas: AtlasPath,
    encoder: Annotated[str, typer.Option(help="Encoder bundle, or 'default'.")] = "default",
    json: Json = False,
) -> None:
    """Make an empty atlas bound to an encoder; it keeps a copy of the bundle."""
    from .index.atlas import Atlas
    from .serving.encoder import bundle_path

    made = Atlas.create(atlas, bundle_path(encoder))
    document = {"atlas": str(atlas), "encoder": made.manifest.name, "sha256": made.manifest.sha256}
    console.emit(document, lambda: console.say(f"{atlas}: empty, encoder {made.manifest.name}"))


@index_app.command()
def add(
    atlas: AtlasPath,
    features: Annotated[list[Path], typer.Argument(help="Feature files, or folders of them.")],
    metadata: Annotated[Path | None, typer.Option(help="CSV with slide, label, patient.")] = None,
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Put new features of a known slide in place of the old."),
    ] = False,
    json: Json = False,
) -> None:
    """Add features; each file whole or not at all, and none twice."""
    from .index.atlas import Atlas

    files = find_features(features)
    table = _metadata(metadata)
    with console.progress("adding") as progress:
        results = Atlas(atlas).add(files, table, replace, progress)
    failed = [r for r in results if r.state == "failed"]
    names = {r.slide for r in results}
    unused = sorted(key for key in table if not {key, Path(key).stem} & names)
    document = {
        "ok": not failed,
        "added": [asdict(r) for r in results],
        "metadata_of_other_slides": unused,
    }

    def human() -> None:
        rows = [(r.slide, r.state, r.tiles, r.reason) for r in results]
        console.table("", ("slide", "state", "tiles", "reason"), rows)
        if unused:
            console.say(f"metadata of slides that were not added now: {', '.join(unused[:10])}")

    console.emit(document, human)
    if failed:
        raise typer.Exit(console.EXIT_FAILED)


def find_features(inputs: list[Path]) -> list[Path]:
    """Expand folders to the feature files in them.

    Raises:
        BadInput: a path that does not exist, or a folder without feature files.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*.h5") if not p.name.startswith("."))
            if not inside:
                raise BadInput(f"{path} holds no feature files (.h5); run `histoseek embed` first")
            files += inside
        elif path.exists():
            files.append(path)
        else:
            raise BadInput(f"{path} does not exist; check the path")
    return files


def _metadata(path: Path | None) -> dict[str, dict[str, str]]:
    if path is None:
        return {}
    from .tables import read_csv

    return {row["slide"]: row for row in read_csv(path, "slide")}


@index_app.command()
def fit(
    atlas: AtlasPath,
    method: Annotated[
        str, typer.Option(help="kmeans, hdbscan, or encoder: those it was trained with.")
    ] = "kmeans",
    k: Annotated[str, typer.Option(help="Clusters of k-means: auto or a number.")] = "auto",
    name: Annotated[str | None, typer.Option(help="Name of the clustering.")] = None,
    min_cluster_size: Annotated[int | None, typer.Option(help="Of HDBSCAN.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    json: Json = False,
) -> None:
    """Fit clusters on the whole atlas; new images are assigned to them."""
    from .index.atlas import Atlas

    if k != "auto" and not (k.isascii() and k.isdigit() and int(k) >= 1):
        raise BadInput(f"--k is {k!r}; expected auto or a number of at least 1")
    count = None if k == "auto" else int(k)
    with console.working(f"fitting {method}"):
        result = Atlas(atlas).fit(method, count, name, min_cluster_size, seed)

    def human() -> None:
        rows = [("noise" if c < 0 else c, n) for c, n in result["sizes"].items()]
        title = f"{result['name']}: {result['clusters']} clusters of {sum(result['sizes'].values())} tiles"
        console.table(title, ("cluster", "tiles"), rows)
        if "silhouette_by_k" in result:
            curve = ", ".join(
                f"{k}: {v:.3f}" for k, v in result["silhouette_by_k"].items() if v is not None
            )
            console.say(f"silhouette by K: {curve}")

    console.emit(result, human)


@index_app.command()
def search(
    atlas: AtlasPath,
    images: Images,
    k: Annotated[int, typer.Option("-k", help="Hits per picture.")] = 10,
    json: Json = False,
) -> None:
    """Find the tiles of the atlas that look most like each picture.

    JSON: one list of hits per picture, in the order given; {"query", "error"} for one that failed.
    """
    opened, vectors, asked, failed = _ask(atlas, images)
    hits = opened.search(vectors, k) if asked else []
    answers = {
        image: [hit._asdict() for hit in found] for image, found in zip(asked, hits, strict=True)
    }
    document = [answers.get(image, failed.get(image)) for image in images]

    def human() -> None:
        for image, found in zip(asked, hits, strict=True):
            rows = [
                (h.rank, h.score, h.slide, h.file or f"{h.x}, {h.y}", h.label, h.patient, h.cluster)
                for h in found
            ]
            columns = ("rank", "score", "slide", "place", "label", "patient", "cluster")
            console.table(str(image), columns, rows)

    _answer(document, human, failed)


@index_app.command()
def assign(
    atlas: AtlasPath,
    images: Images,
    clusters: Annotated[
        str | None, typer.Option(help="Name of the clustering; the newest if left out.")
    ] = None,
    json: Json = False,
) -> None:
    """Place pictures in the atlas's clusters.

    JSON: one object per picture, in the order given; {"query", "error"} for one that failed.
    """
    opened, vectors, asked, failed = _ask(atlas, images)
    placed = opened.assign(vectors, clusters) if asked else []
    answers = {i: {"query": str(i), **p} for i, p in zip(asked, placed, strict=True)}
    document = [answers.get(image, failed.get(image)) for image in images]

    def human() -> None:
        rows = [
            (
                image.name,
                p["cluster"],
                p["distance"],
                p["strength"],
                "unknown" if p["unknown"] else "",
            )
            for image, p in zip(asked, placed, strict=True)
        ]
        console.table("", ("picture", "cluster", "distance", "strength", ""), rows)

    _answer(document, human, failed)


def _ask(
    atlas: Path, images: list[Path]
) -> tuple[Atlas, NDArray[np.float32], list[Path], dict[Path, dict[str, Any]]]:
    """Open an atlas and embed pictures by its own encoder; one bad picture stops no other."""
    import numpy as np

    from .images import decode, square
    from .index.atlas import Atlas
    from .serving.encoder import open_encoder

    opened = Atlas(atlas)
    encoder = open_encoder(str(opened.encoder_bundle), expect=opened.manifest)
    size = opened.manifest.size_px
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
    return opened, encoder.embed(stacked), asked, failed


def _answer(document: Any, human: Callable[[], None], failed: dict[Path, dict[str, Any]]) -> None:
    def tell() -> None:
        human()
        for item in failed.values():
            console.say(f"{item['query']}: {item['error']['message']}")

    console.emit(document, tell)
    if failed:
        raise typer.Exit(console.EXIT_FAILED)


@index_app.command()
def stats(atlas: AtlasPath, json: Json = False) -> None:
    """Count slides, tiles, labels and clusters."""
    from .index.atlas import Atlas

    facts = Atlas(atlas).stats()

    def human() -> None:
        encoder = facts["encoder"]
        rows = [
            ("slides and tile sets", facts["slides"]),
            ("of them without tiles", facts["slides_without_tiles"]),
            ("tiles", facts["tiles"]),
            ("encoder", f"{encoder['name']} ({encoder['sha256'][:12]}…), {encoder['dim']}-d"),
            *((f"label {label}", count) for label, count in facts["labels"].items()),
            *((f"clusters {c['name']}", c["clusters"]) for c in facts["clusterings"]),
        ]
        console.table(facts["atlas"], ("what", "how many"), rows)

    console.emit(facts, human)


@index_app.command()
def verify(atlas: AtlasPath, json: Json = False) -> None:
    """Check every file and count of an atlas; exit code 1 if anything is wrong."""
    from .index.atlas import Atlas

    with console.working("checking every file"):
        found = Atlas(atlas).verify()

    def human() -> None:
        for line in found:
            console.say(line)
        console.say(f"{atlas}: {len(found)} problem(s)" if found else f"{atlas}: all is well")

    console.emit({"ok": not found, "problems": found}, human)
    if found:
        raise typer.Exit(console.EXIT_FAILED)
