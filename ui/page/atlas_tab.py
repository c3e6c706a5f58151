"""The tab Atlas: the map of all tiles, and the clusters with editable names."""

from __future__ import annotations

import json
from typing import Any

import gradio as gr

from ...errors import HistoseekError
from ..session.session import Session
from . import cluster_view, view
from .widgets import EVENT, HIDDEN, atlas_map, error_html, html, no_clusters


def atlas_tab(session: Session, tab: Any) -> None:
    """Build the tab."""
    names = session.atlas.clusterings()
    fields = [(f"cluster.{name}", f"cluster ({name})") for name in names]
    fields += [(name, name) for name in session.atlas.view().columns.names() if name != "kind"]
    fields.append(("annotation.label", "annotation"))
    select = '<label for="hs-colour">Colour by</label> <select id="hs-colour"></select>'
    first = json.dumps(fields[0][0])
    listed = json.dumps(fields).replace("<", "\\u003c")
    js = f"histoseek.map(element, {{fields: {listed}, by: {first}}});"
    atlas_map(js, "atlas-map", select, '<div class="hs-lassoed"></div>')
    if not names:
        no_clusters()
        return
    chosen = gr.Dropdown(names, value=names[0], label="Clusters of")
    cards = html(view.empty("Clusters", "Loading …"), elem_id="clusters")

    def show(name: str) -> str:
        try:
            return cluster_view.cluster_cards(session.atlas.clusters(name, view.EXAMPLES), name)
        except HistoseekError as error:
            return error_html(error, session)

    if session.takes_text:
        _proposals(session, chosen)
    tab.select(show, chosen, cards, **HIDDEN)
    chosen.change(show, chosen, cards, **HIDDEN)


def _proposals(session: Session, chosen: Any) -> None:
    """Build the field for words, of which those that fit a cluster best are proposed as its name."""
    with gr.Accordion("Propose names for the clusters", open=False, elem_id="proposals"):
        words = gr.Textbox(
            label="Words to choose from, one per line", placeholder="tumour\nstroma\nfat", lines=4,
            max_lines=12,
        )  # fmt: skip
        button = gr.Button("Propose")
        table = html("", elem_id="proposed")

    def propose(text: str, name: str) -> str:
        try:
            rows = session.suggest_names((text or "").splitlines(), name)
        except HistoseekError as error:
            return error_html(error, session)
        return cluster_view.proposed_names(rows)

    button.click(propose, [words, chosen], table, **EVENT, show_progress_on=[table])
