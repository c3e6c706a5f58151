"""Commands for clusters: ``index fit``, ``curve``, ``clusters``, ``name``, ``drift`` and the map."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ... import console
from ...console import counted
from ...errors import BadInput

if TYPE_CHECKING:
    from ...index.atlas import Atlas

BAR = 30
"""Width of a bar, in characters."""


def fit(
    atlas: Path,
    method: str = "kmeans",
    k: str = "auto",
    name: str | None = None,
    min_cluster_size: int | None = None,
    seed: int = 0,
) -> None:
    """Fit clusters to all tiles of the atlas. New images can then be assigned to them.

    Options:
        method: kmeans, hdbscan, or encoder (the clusters that the encoder learned in training).
        k: Number of k-means clusters, or auto (chosen by the silhouette).
        name: Name of the clustering; an earlier one with the same name is replaced. Default: the method.
        min_cluster_size: Minimum number of tiles in an HDBSCAN cluster. Default: one fortieth of the tiles,
            at least 15.
    """
    from ...index.atlas import Atlas

    if k != "auto" and not (k.isascii() and k.isdigit() and int(k) >= 1):
        raise BadInput(f"--k is {k!r}; expected auto or a number of at least 1")
    if k != "auto" and method != "kmeans":
        raise BadInput(
            f"--k is only for --method kmeans; {method} finds the number of clusters itself"
        )
    count = None if k == "auto" else int(k)
    with console.working(f"fitting {method}"):
        result = Atlas(atlas).fit(method, count, name, min_cluster_size, seed)

    def human() -> None:
        rows = [("noise" if c < 0 else c, n) for c, n in result["sizes"].items()]
        clusters, tiles = result["clusters"], sum(result["sizes"].values())
        title = f"{result['name']}: {counted(clusters, 'cluster')} of {counted(tiles, 'tile')}"
        console.table(title, ("cluster", "tiles"), rows)
        if result["names_dropped"]:
            names = counted(result["names_dropped"], "cluster name")
            console.say(f"removed {names}, because the clusters changed")
        foreign = result.get("foreign_tiles", 0)
        if foreign and result["gate_ignored"]:
            console.say(
                f"{foreign} tiles, more than half, do not look like stained tissue; all tiles were used"
            )
        elif foreign:
            console.say(
                f"not used, because unlike stained tissue: {counted(foreign, 'tile')}, counted as unknown"
            )
        if "silhouette_by_k" in result:
            curve = ", ".join(
                f"{k}: {v:.3f}" for k, v in result["silhouette_by_k"].items() if v is not None
            )
            console.say(f"silhouette by K: {curve}")

    console.emit(result, human)


def curve(atlas: Path, method: str = "kmeans", seed: int = 0) -> None:
    """Compare different numbers of clusters. Shows how separate and how stable they are; stores nothing.

    Options:
        method: kmeans or hdbscan.
    """
    from ...index.atlas import Atlas
    from ...index.clusters.curve import curve as measure
    from ...index.clusters.fit import to_fit
    from ...index.clusters.fitting import sample

    with console.working("fitting"):
        opened = Atlas(atlas)
        if seed < 0:
            raise BadInput(f"--seed is {seed}; expected 0 or more")
        vectors, _, _ = sample(opened.view().state, opened.store.tile_ranges(), seed)
        rows = measure(vectors[to_fit(vectors, opened.manifest.tissue_gate)], method, seed)

    def human() -> None:
        first = "k" if method == "kmeans" else "min_cluster_size"
        more = () if method == "kmeans" else ("clusters", "noise_share")
        names = (first, *more, "silhouette", "stability")
        sheet = [(*(row[n] for n in names), _bar(row["stability"])) for row in rows]
        console.table(f"{method} on {atlas}", (*names, ""), sheet)
        console.say(
            "silhouette 1: well separated; stability 1 (bar): any half of the tiles gives the same clusters"
        )

    console.emit({"method": method, "curve": rows}, human)


def _bar(share: float | None) -> str:
    return "█" * max(0, round(BAR * (share or 0)))


def clusters(atlas: Path, clusters: str | None = None, examples: int = 3) -> None:
    """List clusters with name, size, labels and example tiles.

    Options:
        examples: Number of example tiles per cluster.
    """
    from ...index.atlas import Atlas

    opened = Atlas(atlas)
    report = opened.clusters(clusters, examples)
    shown, _ = opened.clustering(clusters)

    columns = ("cluster", "name", "tiles", "slides", "unknown", "labels", "examples")

    def human() -> None:
        rows = [
            (
                "noise" if c["cluster"] < 0 else c["cluster"],
                *(c[column] for column in columns[1:5]),
                ", ".join(f"{k} {n}" for k, n in list(c["labels"].items())[:4]),
                ", ".join(f"{t['slide']} {t['file'] or (t['x'], t['y'])}" for t in c["examples"]),
            )
            for c in report
        ]
        console.table(f"clustering {shown}", columns, rows)

    console.emit(report, human)


def name(
    atlas: Path,
    cluster: Annotated[int | None, typer.Argument()] = None,
    text: Annotated[str | None, typer.Argument()] = None,
    description: str = "",
    clusters: str | None = None,
    suggest: Path | None = None,
) -> None:
    """Give a cluster a name, or propose names for all clusters.

    Options:
        cluster: Number of the cluster.
        text: New name; '' deletes the name.
        description: Description of the cluster.
        suggest: Text file with one word or phrase per line. For each cluster, those that fit best are
            proposed; needs an encoder with a text network. No name is changed.
    """
    from ...index.atlas import Atlas

    if suggest is not None:
        if cluster is not None or description:
            raise BadInput(
                "--suggest is for all clusters; leave out CLUSTER, TEXT and --description"
            )
        _suggest(Atlas(atlas), suggest, clusters)
        return
    if cluster is None or text is None:
        raise BadInput("expected `histoseek index name ATLAS CLUSTER TEXT`, or --suggest FILE")
    Atlas(atlas).name_cluster(cluster, text, description, clusters)
    document = {"cluster": cluster, "name": text, "description": description}
    console.emit(document, lambda: console.say(f"cluster {cluster} is {text!r}"))


def _suggest(atlas: Atlas, path: Path, clusters: str | None) -> None:
    from ...artifacts.files import read_text
    from ...index.view import View
    from .queries import embed_text_with

    lines = [" ".join(line.split()) for line in read_text(path).lstrip("\ufeff").splitlines()]
    words = list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if len(words) < 2:
        raise BadInput(f"{path} has {len(words)} words; expected at least 2, one per line")
    vectors = embed_text_with(atlas)(words)
    rows = atlas.ask(View.suggest_names, words, vectors, clusters)

    def human() -> None:
        if not rows:
            console.say("the clustering has no clusters, only noise")
            return
        table = [(row["cluster"], row["name"], ", ".join(row["words"])) for row in rows]
        console.table("", ("cluster", "name", "words that fit best"), table)
        console.say("The words are ranked among those of the file; none of them has to be right.")

    console.emit(rows, human)


def drift(atlas: Path, clusters: str | None = None) -> None:
    """Check whether tiles added after the fit still match clusters.

    Exit code 1: they do not; the share of them that fits no cluster (unknown) is significantly larger than
    that of the fitted tiles.
    """
    from ...index.atlas import Atlas

    report = Atlas(atlas).drift(clusters)

    def human() -> None:
        def row(title: str, facts: dict[str, Any]) -> tuple[Any, ...]:
            low, high = facts["interval_95"] or (None, None)
            return title, facts["tiles"], facts["unknown"], facts["share"], low, high

        rows = [row("fitted", report["fitted"]), row("added later", report["later"])]
        columns = ("tiles", "number", "unknown", "share", "95 % from", "to")
        console.table(f"clustering {report['clustering']}", columns, rows)
        slides = [(s["slide"], s["tiles"], s["unknown"], s["share"]) for s in report["slides"][:20]]
        if slides:
            console.table("slides added later", ("slide", "tiles", "unknown", "share"), slides)
        if report["drifted"]:
            text = "DRIFT: the added tiles differ from the fitted tiles; check these slides, or fit again"
        else:
            text = "no drift" if report["later"]["tiles"] else "no tiles were added after the fit"
        console.say(text)

    console.emit(report, human)
    if report["drifted"]:
        raise typer.Exit(console.EXIT_FAILED)


def map_(atlas: Path, seed: int = 0) -> None:
    """Compute the map of all tiles (t-SNE). Otherwise the page computes it when it is first needed."""
    from ...index.atlas import Atlas

    with console.working("computing the map with t-SNE"):
        made = Atlas(atlas).make_layout(seed)
    document = {
        "method": made.method,
        "tiles": made.tiles,
        "landmarks": len(made.points),
        "trustworthiness": made.trust,
        "stored": made.stored,
    }
    text = f"map of {made.tiles:,} tiles: {made.method} of {len(made.points):,} tiles, "
    lost = "" if made.stored else "; not stored, because the folder cannot be written"
    console.emit(
        document, lambda: console.say(f"{text}trustworthiness {made.trust:.3f} (at most 1){lost}")
    )
