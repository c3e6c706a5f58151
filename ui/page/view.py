"""HTML of answers: cards, sentences and tables, with all text escaped."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from ...artifacts.images import Rgb, encode_jpeg
from ...index.store.rows import Hit
from ...index.store.scales import scales_line
from ..session.addition import Addition
from ..session.answers import SearchAnswer
from ..session.words import NOTICE_TEXT, cluster_name, place, verdict_text

EXAMPLES = 6
NAMES = 5


def header(stats: Mapping[str, Any], atlas: str, others: Sequence[str] = ()) -> str:
    """Return the page's head: name, contents of the atlas, further atlases, and the notice."""
    slides = stats["slides"]
    noun = "slide or tile set" if slides == 1 else "slides and tile sets"
    counts = f"{stats['tiles']:,} tiles of {slides:,} {noun}"
    return (
        f'<header class="hs-head" data-revision="{stats["revision"]}"><h1>histoseek</h1>'
        f"<p><b>{escape(atlas)}</b> {counts}{_further(others)}</p>"
        f'<p class="hs-notice" role="note">{escape(NOTICE_TEXT)}</p></header>'
        + ("" if stats["tiles"] else _FIRST_STEPS)
    )


def _further(names: Sequence[str]) -> str:
    """Return the names of the further atlases that are searched."""
    shown = ", ".join(map(escape, names[:NAMES])) + (" …" if len(names) > NAMES else "")
    return f"; also searched: {shown}" if names else ""


_FIRST_STEPS = """<section class="hs-first" aria-label="First steps"><b>This atlas is empty.</b><ol>
<li><button type="button" class="hs-act" data-tab="New slide">Add a slide here</button> or add many on the
 command line: <code>histoseek embed slides/ --out features</code>, then
 <code>histoseek index add ATLAS features</code>.</li>
<li>Fit clusters, for the tabs Upload and cluster, and Atlas: <code>histoseek index fit ATLAS</code>.</li>
<li>Search: choose an image, or draw a box on a slide.</li></ol></section>"""


def purpose(text: str) -> str:
    """Return the sentence that says what a tab is for."""
    return f'<p class="hs-about">{escape(text)}</p>'


def empty(title: str, text: str) -> str:
    """Return the placeholder for an empty area."""
    return f'<div class="hs-empty"><b>{escape(title)}</b><span>{escape(text)}</span></div>'


def problem(text: str) -> str:
    """Return the HTML of an error."""
    return f'<div class="hs-problem" role="alert">{escape(text)}</div>'


# -- hits -------------------------------------------------------------------------------------------


def gallery(
    hits: Sequence[Hit],
    names: Mapping[int, str] | None = None,
    matches: Sequence[Mapping[str, Any]] = (),
    homes: Sequence[Home] = (),
) -> str:
    """Return hits as cards: the tile with a link to its context, its metadata, and two buttons.

    Args:
        hits: best first.
        names: of the clusters.
        matches: the parts of the query image that hits resemble, for the page to show.
        homes: the atlas of each hit; empty if it is the server's own.
    """
    parts = [",".join(f"{v:.4f}" for v in match["box"]) for match in matches] or [""] * len(hits)
    homes = homes or [OWN] * len(hits)
    cards = "".join(
        _card(hit, names, part, home) for hit, part, home in zip(hits, parts, homes, strict=True)
    )
    if not cards:
        return empty("No tile passes the filter.", "Loosen the filter, or leave out less.")
    return f'<ul class="hs-hits">{cards}</ul>'


class Home(NamedTuple):
    """The atlas of a hit.

    Attributes:
        number: 0 is the server's own.
        name: "" if only the server's own is searched.
    """

    number: int
    name: str

    def key(self, tile: int) -> str:
        """Return what the page calls a tile: its id, with the number of a further atlas in front."""
        return f"{self.number}:{tile}" if self.number else str(tile)


OWN = Home(0, "")


def tile_url(key: str) -> str:
    """Return the address of a tile's image."""
    number, _, tile = key.rpartition(":")
    return f"v1/atlases/{number}/tiles/{tile}.jpg" if number else f"v1/tiles/{tile}.jpg"


def _card(hit: Hit, names: Mapping[int, str] | None, part: str = "", home: Home = OWN) -> str:
    where = f"{hit.slide}, {place(hit)}"
    title = escape(f"hit {hit.rank}: {where}", quote=True)
    key = home.key(hit.tile)
    atlas = f'<small class="hs-atlas">atlas {escape(home.name)}</small>' if home.name else ""
    cluster = "" if hit.cluster is None or home.number else cluster_name(hit.cluster, names)
    facts = " · ".join(escape(fact) for fact in (hit.label, cluster) if fact)
    patient = f"patient {escape(hit.patient)}" if hit.patient else ""
    shown = f' data-part="{part}"' if part else ""
    scale = f" · {hit.target_mpp:.3g} µm per pixel" if hit.target_mpp else ""
    return (
        f'<li class="hs-card" data-tile="{key}"{shown}>'
        f'<button class="hs-open" data-open="{key}" aria-label="Open {title} in context">'
        f'<img src="{tile_url(key)}" alt="{title}" width="224" height="224"></button>'
        f'<div class="hs-facts"><div><b>#{hit.rank}</b> <span class="hs-score">score {hit.score:.3f}</span>'
        f"</div><div>{facts}</div><small>{escape(where)}{scale}</small><small>{patient}</small>{atlas}</div>"
        f'<div class="hs-two"><button data-like="{key}" aria-label="+ like {title}">+ like</button>'
        f'<button data-unlike="{key}" aria-label="− unlike {title}">− unlike</button></div></li>'
    )


def verdict(answer: SearchAnswer) -> str:
    """Return the verdict; with a warning if the query is unlike anything in the atlas."""
    text = escape(verdict_text(answer))
    warning = ""
    if answer.verdict.unknown:
        warning = '<strong class="hs-unknown">Unlike anything here: the hits may be meaningless.</strong> '
    links = " ".join(
        f'<a href="v1/results/{answer.id}/{kind}" download>{name}</a>'
        for kind, name in (("html", "Report"), ("csv", "CSV"), ("json", "JSON"))
    )
    spent = sum(answer.milliseconds.values())
    return (
        f'<div class="hs-verdict" role="status"><p>{warning}{text}</p>'
        f'<p class="hs-save">Save: {links} <span>{spent:.0f} ms</span></p></div>'
    )


def basket(images: Sequence[Rgb], like: Sequence[str], unlike: Sequence[str]) -> str:
    """Return the query's examples: images as the encoder sees them, and tiles that can be removed.

    ``like`` and ``unlike`` are keys of tiles; see :meth:`Home.key`.
    """
    if not len(images) and not like and not unlike:
        return ""
    seen = "".join(
        '<button class="hs-chip" data-image="1" aria-label="Remove your image">'
        f'<img class="hs-seen" src="data:image/jpeg;base64,{b64encode(encode_jpeg(image)).decode()}" '
        'alt="your image as the encoder sees it" width="64" height="64">×</button>'
        for image in images
    )

    def tiles(kind: str, numbers: Sequence[str]) -> str:
        return "".join(
            f'<button class="hs-chip" data-drop="{tile}" aria-label="Remove tile {tile} ({kind})">'
            f'<img src="{tile_url(tile)}" alt="tile {tile}" width="48" height="48">×</button>'
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


# -- additions --------------------------------------------------------------------------------------


def job_list(jobs: Sequence[Addition]) -> str:
    """Return the slides being added, with progress bars."""
    if not jobs:
        return empty(
            "No slide has been added since the start of the server.",
            "Slides are shown here while they are added.",
        )
    return f'<ul class="hs-jobs">{"".join(_job(job) for job in jobs[:20])}</ul>'


def _job(job: Addition) -> str:
    share = job.done / job.total if job.total else float(job.state == "done")
    count = f"{job.done:,} of {job.total:,} tiles" if job.total and not job.over else ""
    title = escape(job.slide, quote=True)
    return (
        f'<li class="hs-job hs-{job.state}"><b>{escape(job.slide)}</b> <span>{job.state}</span> '
        f'<progress max="1" value="{share:.3f}" aria-label="progress of {title}"></progress> '
        f"<span>{count}</span> <span>{escape(job.message)}</span></li>"
    )


def readers_only() -> str:
    """Return the message that readers see instead of the form."""
    return empty(
        "You are a reader.",
        "Only editors can add slides. The list shows the slides that are being added.",
    )


# -- about ------------------------------------------------------------------------------------------


def about(stats: Mapping[str, Any], card: str, versions: Mapping[str, str]) -> str:
    """Return the atlas's contents, its encoder, the index's recall, and the versions."""
    encoder = stats["encoder"]
    labels = ", ".join(f"{name} ({count:,})" for name, count in list(stats["labels"].items())[:20])
    fitted = ", ".join(f"{c['name']} ({c['clusters']} clusters)" for c in stats["clusterings"])
    rows = [
        ("slides and tile sets", f"{stats['slides']:,}"), ("tiles", f"{stats['tiles']:,}"),
        ("labels", labels or "–"), ("clusterings", fitted or "none"),
        ("encoder", f"{encoder['name']} ({encoder['arch']}), {encoder['dim']}-d, {encoder['metric']}"),
        ("encoder sha256", encoder["sha256"]),
        ("stain normalisation", encoder["stain_normalise"] or "none"),
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
        f"<details><summary>Model card of the encoder</summary><pre>{escape(card)}</pre></details>"
    )


def _index(index: Mapping[str, Any]) -> str:
    return f"generation {index['generation']}" + (
        f", {index['plan']['kind']}" if isinstance(index.get("plan"), dict) else ""
    )


def audit_text(report: Mapping[str, Any]) -> str:
    """Return a line with the measured recall of the index."""
    return (
        f'<p role="status">Recall@{report["k"]} {report["recall"]:.4f}, compared with exact search, for '
        f"{report['queries']} tiles of this atlas; {report['index_ms_per_query']:.2f} ms per query.</p>"
    )
