"""The tab Slides and cases: one slide with its clusters or a heat map, and similar slides or cases."""

from __future__ import annotations

from typing import Any

import gradio as gr
import numpy as np

from ...errors import BadInput, HistoseekError, NotFound
from ..access.service import Server
from ..session.answers import SearchAnswer
from . import slide_view, view
from .widgets import EVENT, HIDDEN, html, told

SLIDES_SHOWN = 60
SLIDES_JS = """
element.addEventListener('click', (e) => {
  const button = e.target.closest('[data-slide]');
  if (button) trigger('select', {slide: button.dataset.slide});
});
"""


def slides_tab(server: Server, last: Any, tab: Any) -> None:
    """Build the tab.

    Args:
        server: the server's state.
        last: Gradio state with the id of the last search.
        tab: the Gradio tab.
    """
    session = server.session
    names = session.atlas.clusterings()
    chosen = gr.State("")
    with gr.Row():
        text = gr.Textbox(
            label="Find a slide", placeholder="part of its name", elem_id="slide-name"
        )
        shows = gr.Radio(
            [
                ("the slide", "slide"),
                ("its clusters", "clusters"),
                ("similarity to the last search", "similarity"),
            ],
            value="clusters" if names else "slide",
            label="Show",
            elem_id="shows",
        )
        clustering = gr.Dropdown(names, value=names[0] if names else None, label="Clustering")
        by = gr.Radio([("slides", "slide"), ("cases", "patient")], value="slide", label="Similar")
    detail = html(
        view.empty("Choose a slide below.", "Its clusters and the slides like it appear here."),
        elem_id="slide-detail",
    )
    cards = html("", js_on_load=SLIDES_JS, elem_id="slides")

    def listed(part: str, name: str) -> str:
        rows = [s for s in session.atlas.slides() if (part or "").lower() in s["name"].lower()]
        return slide_view.slide_cards(rows[:SLIDES_SHOWN], len(rows), name)

    def detailed(
        name: str, how: str, fitted: str | None, kind: str, result: str, request: Any
    ) -> str:
        try:
            return _detail(server, name, how, fitted, kind, result, request)
        except HistoseekError as error:
            return told(error)

    def select(
        event: gr.EventData, part: str, how: str, fitted: str | None, kind: str, result: str,
        request: gr.Request,
    ) -> Any:  # fmt: skip
        name = str(event._data["slide"])
        return name, detailed(name, how, fitted, kind, result, request), listed(part, name)

    def again(
        name: str, how: str, fitted: str | None, kind: str, result: str, request: gr.Request
    ) -> Any:
        return detailed(name, how, fitted, kind, result, request) if name else gr.skip()

    inputs = [shows, clustering, by, last]
    cards.select(
        select,
        [text, *inputs],
        [chosen, detail, cards],
        **EVENT,
        show_progress_on=[detail],
    )
    for widget in (shows, clustering, by):
        widget.change(again, [chosen, *inputs], detail, **EVENT)
    text.change(listed, [text, chosen], cards, **HIDDEN)
    tab.select(listed, [text, chosen], cards, **HIDDEN)
    tab.select(again, [chosen, *inputs], detail, **HIDDEN)


def _detail(
    server: Server,
    name: str,
    shows: str,
    clustering: str | None,
    by: str,
    result: str,
    request: Any,
) -> str:
    session = server.session
    row = next((s for s in session.atlas.slides() if s["name"] == name), None)
    if row is None:
        raise NotFound(f"the atlas holds no slide {name!r} (any more)")
    if row["kind"] != "slide":
        shows = "slide"
    counts: dict[int, int] = {}
    if clustering and shows == "clusters":
        columns = session.atlas.view().columns
        own = columns.clusters(clustering)
        if own is not None:
            number = [s["name"] for s in columns.slides].index(name)
            found, sizes = np.unique(
                own[columns.starts[number] : columns.starts[number + 1]], return_counts=True
            )
            counts = dict(zip(found.tolist(), sizes.tolist(), strict=True))
    if shows == "similarity" and not result:
        raise BadInput("no search has been made yet; find similar tiles first, then come back here")
    scale = (0.0, 1.0)
    if shows == "similarity":
        found_before = session.results.get(result)
        if isinstance(found_before, SearchAnswer) and row["tiles"]:
            scale = session.pictures.scale(session.atlas.scores_in(name, found_before.vector))
    asked = row["patient"] if by == "patient" and row["patient"] else name
    try:
        similar = session.similar_slides(asked, by="patient" if by == "patient" else "slide")
        server.note(request, "similar", slide=name, by=by, found=len(similar))
    except BadInput:  # there is nothing to compare with
        similar = []
    names = session.atlas.cluster_names(clustering) if clustering else {}
    return slide_view.slide_detail(
        row, shows, clustering, result, names, counts, similar, by, scale
    )
