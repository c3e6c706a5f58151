"""How answers look: cards, sentences, tables, as HTML whose every text is escaped."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import quote

from ..images import Rgb, encode_jpeg
from ..index.cases import Similar
from ..index.records import Hit
from ..index.scales import scales_line
from .additions import Addition
from .answers import Clustered, Found
from .colours import VIRIDIS, colour_of

NOTICE_TEXT = "Research use only. Similarity is no diagnosis."
EXAMPLES = 6
LABELS_SHOWN = 4


def holds(stats: Mapping[str, Any]) -> str:
    """Say how much an atlas holds."""
    slides = stats["slides"]
    noun = "slide or tile set" if slides == 1 else "slides and tile sets"
    return f"{stats['tiles']:,} tiles of {slides:,} {noun}"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural where it must be."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def header(stats: Mapping[str, Any], atlas: str) -> str:
    """Return the page's head: name, what the atlas holds, the notice."""
    return (
        f'<header class="hs-head" data-revision="{stats["revision"]}"><h1>histoseek</h1>'
        f"<p><b>{escape(atlas)}</b> {escape(holds(stats))}</p>"
        f'<p class="hs-notice" role="note">{escape(NOTICE_TEXT)}</p></header>'
    )


def place(hit: Hit) -> str:
    """Say where a hit is: the file in a tile set, x and y in a slide."""
    return hit.file.rsplit("/", 1)[-1] if hit.file else f"x {hit.x}, y {hit.y}"


def cluster_name(cluster: int, names: Mapping[int, str] | None = None) -> str:
    """Return how a cluster is called on the page."""
    if cluster < 0:
        return "no cluster"
    return (names or {}).get(cluster) or f"cluster {cluster}"


def cluster_title(placed: Mapping[str, Any]) -> str:
    """Return how the cluster of a placed image is called."""
    return str(placed["name"] or cluster_name(placed["cluster"]))


def empty(title: str, text: str) -> str:
    """Return what stands where nothing is yet."""
    return f'<div class="hs-empty"><b>{escape(title)}</b><span>{escape(text)}</span></div>'


def problem(text: str) -> str:
    """Return how an error is shown."""
    return f'<div class="hs-problem" role="alert">{escape(text)}</div>'


# -- hits -------------------------------------------------------------------------------------------


def gallery(hits: Iterable[Hit], names: Mapping[int, str] | None = None) -> str:
    """Return hits as cards: the tile, which opens in its context, what is known, two buttons."""
    cards = "".join(_card(hit, names) for hit in hits)
    return f'<ul class="hs-hits">{cards}</ul>' if cards else no_hits()


def no_hits() -> str:
    """Say that nothing passed."""
    return empty("No tile passes.", "Loosen the filter, or leave less out.")


def _card(hit: Hit, names: Mapping[int, str] | None) -> str:
    where = f"{hit.slide}, {place(hit)}"
    title = escape(f"hit {hit.rank}: {where}", quote=True)
    cluster = "" if hit.cluster is None else cluster_name(hit.cluster, names)
    facts = " · ".join(escape(fact) for fact in (hit.label, cluster) if fact)
    patient = f"patient {escape(hit.patient)}" if hit.patient else ""
    scale = f" · {hit.target_mpp:.3g} µm per pixel" if hit.target_mpp else ""
    return (
        f'<li class="hs-card" data-tile="{hit.tile}">'
        f'<button class="hs-open" data-open="{hit.tile}" aria-label="Open {title} in context">'
        f'<img src="v1/tiles/{hit.tile}.jpg" alt="{title}" width="224" height="224"></button>'
        f'<div class="hs-facts"><div><b>#{hit.rank}</b> <span class="hs-score">score {hit.score:.3f}</span>'
        f"</div><div>{facts}</div><small>{escape(where)}{scale}</small><small>{patient}</small></div>"
        f'<div class="hs-two"><button data-like="{hit.tile}" aria-label="+ like {title}">+ like</button>'
        f'<button data-unlike="{hit.tile}" aria-label="− unlike {title}">− unlike</button></div></li>'
    )


def verdict_text(answer: Found) -> str:
    """Return in words what the nearest tiles are and whether the query fits the atlas."""
    found = answer.verdict
    count = len(answer.hits)
    if not count:
        return "No tile passes the filter."
    parts = []
    if any(label for label, _ in found.labels):
        counted = ", ".join(
            f"{label or 'no label'} {n} of {count}" for label, n in found.labels[:LABELS_SHOWN]
        )
        parts.append(f"Nearest labels: {counted}.")
    else:
        counted = ", ".join(f"{slide} ({n})" for slide, n in found.slides[:LABELS_SHOWN])
        parts.append(f"The nearest tiles come from {counted}.")
    if found.foreign:
        parts.append(
            "It is unlike the stained tissue that the encoder knows: what is nearest says little."
        )
    elif found.placed is not None:
        if found.placed["unknown"]:
            parts.append("It fits no cluster of this atlas.")
        else:
            name = cluster_title(found.placed)
            parts.append(f"It belongs to {name} (strength {found.placed['strength']:.2f}).")
    if found.nearer_than is not None:
        parts.append(
            f"It is nearer to the atlas than {found.nearer_than:.0%} of the atlas's own tiles are to "
            "those of other patients."
        )
    if len(answer.query.images) + len(answer.query.like) > 1 or answer.query.unlike:
        parts.append("Of several examples together it is not judged whether they fit the atlas.")
    return " ".join(parts)


def verdict(answer: Found) -> str:
    """Return the verdict line, with a warning where the query is unlike anything in the atlas."""
    text = escape(verdict_text(answer))
    warning = ""
    if answer.verdict.unknown:
        warning = (
            '<strong class="hs-unknown">Unlike anything here: read the hits with care.</strong> '
        )
    links = " ".join(
        f'<a href="v1/results/{answer.id}/{kind}" download>{name}</a>'
        for kind, name in (("html", "Report"), ("csv", "CSV"), ("json", "JSON"))
    )
    spent = sum(answer.milliseconds.values())
    return (
        f'<div class="hs-verdict" role="status"><p>{warning}{text}</p>'
        f'<p class="hs-save">Save: {links} <span>{spent:.0f} ms</span></p></div>'
    )


def basket(images: Sequence[Rgb], like: Sequence[int], unlike: Sequence[int]) -> str:
    """Return what is searched for: the image as the encoder sees it, and tiles that can be dropped."""
    if not len(images) and not like and not unlike:
        return ""
    seen = "".join(
        '<button class="hs-chip" data-image="1" aria-label="Drop your image">'
        f'<img class="hs-seen" src="data:image/jpeg;base64,{b64encode(encode_jpeg(image)).decode()}" '
        'alt="your image as the encoder sees it" width="64" height="64">×</button>'
        for image in images
    )

    def tiles(kind: str, numbers: Sequence[int]) -> str:
        return "".join(
            f'<button class="hs-chip" data-drop="{tile}" aria-label="Drop tile {tile} ({kind})">'
            f'<img src="v1/tiles/{tile}.jpg" alt="tile {tile}" width="48" height="48">×</button>'
            for tile in numbers
        )

    rows = [
        f'<div class="hs-basket-row"><b>{title}</b>{shown}</div>'
        for title, shown in (
            ("like", seen + tiles("like", like)),
            ("unlike", tiles("unlike", unlike)),
        )
        if shown
    ]
    clear = '<button data-clear="1">Clear tiles</button>' if like or unlike else ""
    return f'<div class="hs-basket">{"".join(rows)}{clear}</div>'


# -- clusters ---------------------------------------------------------------------------------------


def placed_table(answer: Clustered, examples: Mapping[int, Sequence[int]]) -> str:
    """Return the placed images with the nearest tile of each, and the refused ones.

    Args:
        answer: what was placed.
        examples: ids of tiles that stand for each cluster.
    """
    rows = []
    for number, (name, placed, hit) in enumerate(
        zip(answer.names, answer.placed, answer.nearest, strict=True)
    ):
        title = escape(cluster_title(placed))
        why = (
            "unlike the stained tissue that the encoder knows"
            if placed["foreign"]
            else "fits no cluster"
        )
        note = f'<span class="hs-unknown">unknown: {why}</span>' if placed["unknown"] else ""
        rows.append(
            f'<tr><td data-label="image">{escape(name)}</td>'
            f'<td data-label="cluster">{_dot(placed["cluster"])}{title}</td>'
            f'<td data-label="strength">{placed["strength"]:.2f}</td>'
            f'<td data-label="distance">{placed["distance"]:.3f}</td>'
            f'<td data-label="nearest tile"><button class="hs-open hs-mini" data-open="{hit.tile}" '
            f'aria-label="Open the nearest tile of image {number + 1}"><img src="v1/tiles/{hit.tile}.jpg" '
            f'alt="nearest tile of {escape(name, quote=True)}" width="56" height="56"></button> '
            f"{escape(hit.label or hit.slide)} ({hit.score:.3f})</td>"
            f'<td data-label="its cluster">{_minis(examples.get(placed["cluster"], ()))}</td>'
            f'<td data-label="">{note}</td></tr>'
        )
    rows += [
        f'<tr class="hs-refused"><td data-label="image">{escape(name)}</td>'
        f'<td colspan="6">refused: {escape(why)}</td></tr>'
        for name, why in answer.refused
    ]
    unknown = sum(bool(placed["unknown"]) for placed in answer.placed)
    summary = (
        f"{len(answer.names)} placed in {escape(answer.clustering)}, {unknown} of them unknown, "
        f"{len(answer.refused)} refused."
    )
    links = " ".join(
        f'<a href="v1/results/{answer.id}/{kind}" download>{title}</a>'
        for kind, title in (("csv", "CSV"), ("json", "JSON"), ("html", "Report"))
    )
    heads = (
        "image",
        "cluster",
        "strength",
        "distance",
        "nearest tile",
        "examples of its cluster",
        "note",
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    return (
        f'<p role="status" id="placed-note">{summary} Save: {links}</p><table class="hs-table" id="placed">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _minis(tiles: Sequence[int]) -> str:
    return "".join(
        f'<button class="hs-open hs-mini" data-open="{tile}" aria-label="Open tile {tile}"><img '
        f'loading="lazy" src="v1/tiles/{tile}.jpg" alt="tile {tile}" width="56" height="56"></button>'
        for tile in tiles
    )


def _dot(cluster: int) -> str:
    return (
        f'<span class="hs-dot" style="background:{colour_of(cluster)}" aria-hidden="true"></span>'
    )


def cluster_cards(clusters: Sequence[Mapping[str, Any]], clustering: str) -> str:
    """Return the clusters as cards: examples, size, labels, and a name that can be changed."""
    cards = "".join(_cluster_card(cluster, clustering) for cluster in clusters)
    return f'<div class="hs-clusters">{cards}</div>'


def _cluster_card(cluster: Mapping[str, Any], clustering: str) -> str:
    number = cluster["cluster"]
    called = escape(cluster_name(number), quote=True)
    tiles = "".join(
        f'<button class="hs-open" data-open="{tile["tile"]}" aria-label="Open tile {tile["tile"]} of '
        f'{called}"><img loading="lazy" src="v1/tiles/{tile["tile"]}.jpg" alt="example of {called}" '
        'width="96" height="96"></button>'
        for tile in cluster["examples"][:EXAMPLES]
    )
    total = max(1, cluster["tiles"])
    named = [(name, n) for name, n in cluster["labels"].items() if name != "(none)"]
    bars = "".join(
        f'<li><span class="hs-bar" style="width:{100 * n / total:.1f}%"></span>'
        f"<span>{escape(name)}</span> <span>{n / total:.0%}</span></li>"
        for name, n in named[:LABELS_SHOWN]
    )
    title = "No cluster" if number < 0 else f"Cluster {number}"
    named_title = f"{title}: {escape(cluster['name'])}" if cluster["name"] else title
    shown = f"hs-name-{number}"
    return (
        f'<section class="hs-cluster" data-cluster="{number}" aria-label="{title}">'
        f"<h2>{_dot(number)}{named_title}</h2>"
        f"<p>{counted(cluster['tiles'], 'tile')}, {counted(cluster['slides'], 'slide')}"
        + (f", {cluster['unknown']:,} unknown" if cluster["unknown"] else "")
        + f'</p><div class="hs-examples">{tiles}</div>'
        + (f'<ul class="hs-labels">{bars}</ul>' if bars else "")
        + f'<form class="hs-rename" data-clustering="{escape(clustering, quote=True)}">'
        f'<label for="{shown}">Name</label><input id="{shown}" name="name" maxlength="200" '
        f'value="{escape(cluster["name"], quote=True)}" placeholder="what it shows">'
        f'<label for="{shown}-d">Description</label><input id="{shown}-d" name="description" '
        f'maxlength="1000" value="{escape(cluster["description"], quote=True)}">'
        '<button type="submit">Save</button><span role="status"></span></form></section>'
    )


# -- slides -----------------------------------------------------------------------------------------


def slide_cards(rows: Sequence[Mapping[str, Any]], total: int, chosen: str | None) -> str:
    """Return slides as cards with thumbnails."""
    if not rows:
        return empty("No slide of that name.", "Search for another part of it.")
    cards = "".join(_slide_card(row, row["name"] == chosen) for row in rows)
    more = f"<p>{len(rows)} of {total:,} shown; type part of a name to find others.</p>"
    return f'<ul class="hs-slides">{cards}</ul>{more if len(rows) < total else ""}'


def _slide_card(row: Mapping[str, Any], chosen: bool) -> str:
    name = escape(row["name"], quote=True)
    facts = " · ".join(
        escape(str(fact))
        for fact in (row["label"], row["patient"], f"{row['tiles']:,} tiles")
        if fact
    )
    return (
        f'<li><button class="hs-slide" data-slide="{name}" aria-pressed="{str(chosen).lower()}">'
        f'<img loading="lazy" src="v1/slides/{quote(row["name"], safe="")}/thumbnail.jpg" '
        f'alt="thumbnail of {name}" height="110"><b>{name}</b><small>{facts}</small></button></li>'
    )


def slide_detail(
    row: Mapping[str, Any],
    shows: str,
    clustering: str | None,
    result: str | None,
    names: Mapping[int, str],
    counts: Mapping[int, int],
    similar: Sequence[Similar],
    by: str,
    scale: tuple[float, float] = (0.0, 1.0),
) -> str:
    """Return one slide: its picture, with clusters or a heat map, and what is like it.

    Args:
        row: of the slide.
        shows: ``slide``, ``clusters`` or ``similarity``.
        clustering: that is laid over.
        result: id of the search that is laid over.
        names: of clusters, given by people.
        counts: tiles of the slide by cluster.
        similar: slides or cases.
        by: ``slide`` or ``patient``.
        scale: scores at the ends of the heat map's colours.
    """
    name = quote(row["name"], safe="")
    source, legend = f"v1/slides/{name}/thumbnail.jpg?longest=1024", ""
    if shows == "clusters" and clustering:
        source = f"v1/slides/{name}/clusters.jpg?clustering={quote(clustering, safe='')}"
        items = "".join(
            f"<li>{_dot(c)}{escape(cluster_name(c, names))} ({n:,})</li>" for c, n in counts.items()
        )
        legend = f'<ul class="hs-legend" aria-label="Clusters of this slide">{items}</ul>'
    elif shows == "similarity" and result:
        source = f"v1/slides/{name}/heat.jpg?result={quote(result, safe='')}"
        ramp = ", ".join(VIRIDIS)
        legend = (
            f'<div class="hs-scale"><span>similarity to the last search: {scale[0]:.2f}</span>'
            f'<span class="hs-ramp" style="background:linear-gradient(90deg, {ramp})"></span>'
            f"<span>{scale[1]:.2f}</span></div>"
        )
    if row["kind"] != "slide":
        legend = "<p>A set of ready tiles has no picture as a whole to lay anything over.</p>"
    facts = [
        ("label", row["label"]), ("patient", row["patient"]), ("tiles", f"{row['tiles']:,}"),
        ("µm per pixel", row["mpp"]), ("size", _size(row)), ("added", row["added_at"]),
        *row["metadata"].items(), ("no tiles because", row["reason"]),
    ]  # fmt: skip
    table = "".join(
        f"<tr><th scope='row'>{escape(str(k))}</th><td>{escape(str(v))}</td></tr>"
        for k, v in facts
        if v not in (None, "")
    )
    return (
        f'<article class="hs-detail"><h2>{escape(row["name"])}</h2><div class="hs-detail-two">'
        f'<figure><img class="hs-overview" src="{source}" alt="{escape(row["name"], quote=True)}, '
        f'{escape(shows, quote=True)}">{legend}</figure>'
        f'<table class="hs-facts-table">{table}</table></div>{_similar(similar, by)}</article>'
    )


def _size(row: Mapping[str, Any]) -> str:
    return f"{row['width']:,} × {row['height']:,}" if row["width"] and row["height"] else ""


def _similar(similar: Sequence[Similar], by: str) -> str:
    what = "slides" if by == "slide" else "cases"
    if not similar:
        return f"<h3>Similar {what}</h3>" + empty(
            "None.", "The atlas holds nothing else to compare."
        )
    rows = []
    for found in similar:
        pairs = "".join(
            '<span class="hs-pair">'
            + "".join(
                f'<button class="hs-open hs-mini" data-open="{tile}" aria-label="Open tile {tile}">'
                f'<img loading="lazy" src="v1/tiles/{tile}.jpg" alt="tile {tile}" width="72" height="72">'
                "</button>"
                for tile in (pair.query, pair.match)
                if tile is not None
            )
            + f"<small>{pair.score:.3f}</small></span>"
            for pair in found.pairs[:4]
        )
        label = f" · {escape(found.label)}" if found.label else ""
        rows.append(
            f"<li><div><b>{escape(found.name)}</b>{label} <small>score {found.score:.3f}</small></div>"
            f'<div class="hs-pairs">{pairs}</div></li>'
        )
    return (
        f"<h3>Similar {what}, with the regions that are alike (here, there)</h3>"
        f'<ol class="hs-similar">{"".join(rows)}</ol>'
    )


# -- additions --------------------------------------------------------------------------------------


def job_list(jobs: Sequence[Addition]) -> str:
    """Return slides on their way, with bars."""
    if not jobs:
        return empty("No slide has been added here yet.", "Upload one, or give its path.")
    return f'<ul class="hs-jobs">{"".join(_job(job) for job in jobs[:20])}</ul>'


def _job(job: Addition) -> str:
    share = job.done / job.total if job.total else float(job.state == "done")
    going = job.total and not job.over
    count = f"{job.done:,} of {job.total:,} tiles" if going else ""
    title = escape(job.slide, quote=True)
    return (
        f'<li class="hs-job hs-{job.state}"><b>{escape(job.slide)}</b> <span>{job.state}</span> '
        f'<progress max="1" value="{share:.3f}" aria-label="progress of {title}"></progress> '
        f"<span>{count}</span> <span>{escape(job.message)}</span></li>"
    )


def readers_only() -> str:
    """Return what a reader is told in the place of the form; editors do not see it."""
    return empty(
        "You are a reader here.", "Slides are added by editors; how far they are stands below."
    )


# -- about ------------------------------------------------------------------------------------------


def about(stats: Mapping[str, Any], card: str, versions: Mapping[str, str]) -> str:
    """Return what the atlas holds, by which encoder, how well the index finds, and the versions."""
    encoder = stats["encoder"]
    labels = ", ".join(f"{name} ({count:,})" for name, count in list(stats["labels"].items())[:20])
    fitted = ", ".join(f"{c['name']} ({c['clusters']} clusters)" for c in stats["clusterings"])
    rows = [
        ("slides and tile sets", f"{stats['slides']:,}"), ("tiles", f"{stats['tiles']:,}"),
        ("labels", labels or "–"), ("clusterings", fitted or "none fitted"),
        ("encoder", f"{encoder['name']} ({encoder['arch']}), {encoder['dim']}-d, {encoder['metric']}"),
        ("encoder sha256", encoder["sha256"]),
        ("scale of the tiles", scales_line(stats["scales"])),
        ("slides are read at", f"{encoder['mpp']} µm per pixel" if encoder["mpp"] else "–"),
        ("index", _index(stats["index"])), ("created", stats["created_at"]),
        *((f"{name} version", version) for name, version in versions.items()),
    ]  # fmt: skip
    table = "".join(
        f'<tr><th scope="row">{escape(k)}</th><td>{escape(str(v))}</td></tr>' for k, v in rows
    )
    return (
        f'<table class="hs-facts-table" id="about">{table}</table>'
        '<p><a href="docs">HTTP API</a> · <a href="openapi.json">OpenAPI</a> · '
        '<a href="metrics">Prometheus</a></p>'
        f"<details><summary>The encoder's card</summary><pre>{escape(card)}</pre></details>"
    )


def _index(index: Mapping[str, Any]) -> str:
    return f"generation {index['generation']}" + (
        f", {index['plan']['kind']}" if isinstance(index.get("plan"), dict) else ""
    )


def audit_text(report: Mapping[str, Any]) -> str:
    """Return the measured recall of the index in a line."""
    return (
        f'<p role="status">Recall@{report["k"]} {report["recall"]:.4f} of exact search, measured on '
        f"{report['queries']} tiles of this atlas; {report['index_ms_per_query']:.2f} ms per query.</p>"
    )
