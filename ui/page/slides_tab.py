"""The tab Slides and cases: one slide with its clusters or a heat map, and similar slides or cases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr
import numpy as np

from ...errors import BadInput, HistoseekError, NotFound
from ...index.view import View
from ..access.service import Server
from ..session.answers import SearchAnswer, SimilarAnswer
from . import slide_view, view
from .widgets import EVENT, HIDDEN, error_html, html

SLIDES_SHOWN = 60
SLIDES_JS = """
element.addEventListener('click', (e) => {
  const button = e.target.closest('[data-slide]');
  if (button) trigger('select', {slide: button.dataset.slide});
});
"""


def slides_tab(server: Server, last: Any, tab: Any) -> None:
    """Build the tab; ``last`` is the state with the id of the last search."""
    names = server.session.atlas.clusterings()
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
        others = server.session.elsewhere.names if server.session.elsewhere else []
        atlases = gr.CheckboxGroup(
            others,
            value=others,
            label="Compare with",
            elem_id="similar-in",
            visible=len(others) > 1,
        )
    detail = html(
        view.empty("Choose a slide below.", "Its clusters and similar slides appear here."),
        elem_id="slide-detail",
    )
    cards = html("", js_on_load=SLIDES_JS, elem_id="slides")

    handlers = _Handlers(server)
    inputs = [shows, clustering, by, atlases, last]
    cards.select(
        handlers.selected,
        [text, *inputs],
        [chosen, detail, cards],
        **EVENT,
        show_progress_on=[detail],
    )
    for widget in (shows, clustering, by, atlases):
        widget.change(handlers.changed, [chosen, *inputs], detail, **EVENT)
    text.change(handlers.listed, [text, chosen], cards, **HIDDEN)
    tab.select(handlers.listed, [text, chosen], cards, **HIDDEN)
    tab.select(handlers.changed, [chosen, *inputs], detail, **HIDDEN)


class _Handlers:
    """Handlers of the tab's events."""

    def __init__(self, server: Server) -> None:
        self.server, self.session = server, server.session

    def listed(self, part: str, chosen: str) -> str:
        """Return the cards of the slides whose names contain a text."""
        part = (part or "").lower()
        rows = [s for s in self.session.atlas.slides() if part in s["name"].lower()]
        if not rows and not part:
            return view.empty("The atlas has no slides yet.", "Add one in the tab New slide.")
        return slide_view.slide_cards(rows[:SLIDES_SHOWN], len(rows), chosen)

    def selected(
        self, event: gr.EventData, part: str, shows: str, clustering: str | None, by: str,
        atlases: list[str], result: str, request: gr.Request,
    ) -> Any:  # fmt: skip
        name = str(event._data["slide"])
        detail = self.changed(name, shows, clustering, by, atlases, result, request)
        return name, detail, self.listed(part, name)

    def changed(
        self,
        name: str,
        shows: str,
        clustering: str | None,
        by: str,
        atlases: list[str],
        result: str,
        request: gr.Request,
    ) -> Any:
        """Return the chosen slide."""
        if not name:
            return gr.skip()
        try:
            return self._detail(name, shows, clustering, by, atlases, result, request)
        except HistoseekError as error:
            return error_html(error, self.server.session)

    def _detail(
        self, name: str, shows: str, clustering: str | None, by: str, atlases: list[str], result: str,
        request: Any,
    ) -> str:  # fmt: skip
        atlas = self.session.atlas
        row = next((s for s in atlas.slides() if s["name"] == name), None)
        if row is None:
            raise NotFound(f"the atlas has no slide {name!r}; it may have been removed")
        if row["kind"] != "slide":
            shows = "slide"
        if shows == "similarity" and not result:
            raise BadInput("there is no search yet; search in the tab Find similar, then come back")
        scale = self._scale(row, result) if shows == "similarity" else (0.0, 1.0)
        counts = self._cluster_sizes(name, clustering) if clustering and shows == "clusters" else {}
        if self.session.elsewhere is not None and not atlases:
            raise BadInput("no atlas is chosen under “Compare with”; choose one or more")
        try:
            similar = self.session.similar_slides(
                row["patient"] if by == "patient" and row["patient"] else name,
                by="patient" if by == "patient" else "slide",
                atlases=atlases,
            )
            self.server.note_similar(request, name, by, "median", similar)
        except BadInput:  # there is nothing to compare with
            similar = SimilarAnswer([])
        numbers = self.session.elsewhere.names if self.session.elsewhere else []
        homes = [view.Home(numbers.index(name), name) for name in similar.atlases]
        names = atlas.cluster_names(clustering) if clustering else {}
        return slide_view.slide_detail(
            row, shows, clustering, result, names, counts, similar, homes, by, scale
        )

    def _scale(self, row: Mapping[str, Any], result: str) -> tuple[float, float]:
        """Return the scores at the ends of the heat map's colours."""
        answer = self.session.result(result)
        if not isinstance(answer, SearchAnswer) or not row["tiles"]:
            return 0.0, 1.0
        scores = self.session.atlas.scores_in(row["name"], answer.vector)
        return self.session.pictures.scale(scores, answer.query.by_text)

    def _cluster_sizes(self, name: str, clustering: str) -> dict[int, int]:
        """Return the number of the slide's tiles in each cluster."""

        def count(view: View) -> dict[int, int]:
            columns = view.columns
            assigned = columns.clusters(clustering)
            if assigned is None:
                return {}
            number = [s["name"] for s in columns.slides].index(name)
            tiles = assigned[columns.starts[number] : columns.starts[number + 1]]
            clusters, sizes = np.unique(tiles, return_counts=True)
            return dict(zip(clusters.tolist(), sizes.tolist(), strict=True))

        return self.session.atlas.ask(count)
