"""The tab Find similar: an image, tiles of the atlas or words, filters, and the most similar tiles."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ...errors import BadInput, HistoseekError
from ...index.federation.answers import Example
from ...index.search.filters import quoted, quoted_field
from ...index.search.query import Query
from ..access.service import Server
from ..session import words
from ..session.answers import Among, SearchAnswer, both
from ..session.report import matches
from ..session.scaled import tile_mpp_of
from ..session.session import Cutting, Session
from . import view
from .widgets import EVENT, HIDDEN, UPLOAD_BYTES, check_upload, error_html, html

Examples = dict[str, Any]
EMPTY: Examples = {"upload": None, "like": [], "unlike": []}
CHOICES = 2_000
"""Maximum number of values in a drop-down list; other values can be used in the filter's text."""
COLUMN_VALUES = 60
ANNOTATION = "annotation.label"
PICKER = """
<div class="hs-picker" data-limit="{limit}">
  <div class="hs-drop"><input type="file" id="hs-query-file" accept="image/*,.tif,.tiff">
  <label for="hs-query-file">Choose an image</label>, drop it here, or paste it</div>
  <div class="hs-stage" tabindex="0" role="group" hidden
       aria-label="Your image. Arrow keys move a box, Shift with arrow keys resizes it, Escape removes it.">
    <img alt=""><div class="hs-crop" hidden></div><div class="hs-match" hidden></div></div>
  <button class="hs-whole" type="button" hidden>Search with the whole image</button>
  <p class="hs-picker-note" role="status"></p>{scale}
</div>"""
SCALE = """
  <div class="hs-micron" hidden><label>Scale of your image
    <input type="number" min="0" step="any" placeholder="unknown" aria-describedby="hs-micron-note"></label>
    <select aria-label="Unit of the scale"><option value="mpp">µm per pixel</option>
      <option value="x">× magnification</option></select>
    <p id="hs-micron-note">{sample}A tile of this atlas is {um:.0f} µm wide ({mpp:.3g} µm per pixel). With
    the scale of your image, it is cut into such tiles; without, the image or the box is taken as one
    tile.</p></div>"""
SAMPLE = '<img src="v1/tiles/{tile}.jpg" alt="a tile of this atlas" width="72" height="72">'
PICKER_JS = """
histoseek.picker(element, (name, data) => trigger('upload', data), upload);
"""
BASKET_JS = """
histoseek.pick = (kind, tile) => trigger('select', {kind, tile});
element.addEventListener('click', (e) => {
  const button = e.target.closest('[data-drop],[data-clear],[data-image]');
  if (!button) return;
  if (button.dataset.image) { histoseek.clearPicker(); trigger('select', {kind: 'image'}); return; }
  const tile = button.dataset.drop;
  trigger('select', button.dataset.clear ? {kind: 'clear'} : {kind: 'drop', tile});
});
"""


def find_tab(server: Server, last: Any) -> None:
    """Build the tab."""
    session = server.session
    state = gr.State(EMPTY)
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            picker = html(html_template=_picker(session), js_on_load=PICKER_JS, elem_id="query")
            words_box = gr.Textbox(
                label="Words, alone or with an image", placeholder="lymphocytes around a nerve",
                max_lines=3, elem_id="words", visible=session.takes_text,
            )  # fmt: skip
            basket = html("", js_on_load=BASKET_JS, elem_id="basket")
            count = gr.Slider(1, 60, value=12, step=1, label="Number of hits")
            names = session.elsewhere.names if session.elsewhere else []
            atlases = gr.CheckboxGroup(
                names, value=names, label="Search in", elem_id="atlases", visible=len(names) > 1
            )
            with gr.Accordion("Filters", open=False, elem_id="filters") as filters:
                fields = {"text": words_box, "atlases": atlases, **_filters(session)}
            button = gr.Button("Find similar tiles", variant="primary", elem_id="find")
        with gr.Column(scale=3, min_width=320):
            note = html("", js_on_load="histoseek.answered(element);", elem_id="verdict")
            hits = html(
                view.empty(
                    "The most similar tiles appear here, best first.",
                    "Choose an image on the left, or a tile on the map of the atlas"
                    + (", or enter words." if session.takes_text else "."),
                ),
                elem_id="hits",
            )
    handlers = _Handlers(server, list(fields))
    inputs = [state, count, *fields.values()]
    outputs = [state, basket, note, hits, last]
    events: dict[str, Any] = {**EVENT, "show_progress_on": [hits]}
    picker.upload(handlers.uploaded, inputs, outputs, trigger_mode="always_last", **events)
    basket.select(handlers.picked, inputs, outputs, trigger_mode="multiple", **events)
    button.click(handlers.clicked, inputs, outputs, **events)
    words_box.submit(handlers.clicked, inputs, outputs, **events)
    filters.expand(lambda: _choices(session, list(fields)), None, list(fields.values()), **HIDDEN)


def _picker(session: Session) -> str:
    """Return the field for the query image, with its scale if that of the atlas is known."""
    columns, mpp, scale = session.atlas.view().columns, tile_mpp_of(session.atlas), ""
    if mpp is not None:
        present = columns.present()
        shown = columns.ids(present[len(present) // 2 :][:1]).tolist()
        sample = SAMPLE.format(tile=shown[0]) if shown else ""
        um = mpp * session.atlas.manifest.size_px
        scale = SCALE.format(sample=sample, um=um, mpp=mpp)
    return PICKER.format(limit=UPLOAD_BYTES, scale=scale)


class _Handlers:
    """Handlers of the tab's events. Each takes and returns the query's examples, and searches."""

    def __init__(self, server: Server, fields: Sequence[str]) -> None:
        self.server, self.fields = server, fields

    def clicked(self, request: gr.Request, query: Examples, k: float, *values: Any) -> Any:
        chosen = dict(zip(self.fields, values, strict=True))
        if _is_empty(query, chosen):
            text = (
                "No query yet. Choose an image or a tile of the atlas, or enter words."
                if self.server.session.takes_text
                else "No image yet. Choose an image first, or a tile of the atlas."
            )
            return query, _basket(query), view.problem(text), gr.skip(), ""
        try:
            session = self.server.session
            asked, scaled, among = _query(session, query, int(k), chosen)
            answer = session.search(asked, scaled=scaled, among=among)
            self.server.note_search(request, answer)
            names = session.atlas.cluster_names() if session.atlas.clusterings() else {}
        except HistoseekError as error:
            return _failed(self.server.session, query, error)
        basket = view.basket(answer.query.images, query["like"], query["unlike"])
        cards = view.gallery(answer.hits, names, matches(answer), _homes(session, answer))
        return query, basket, view.verdict(answer), cards, answer.id

    def uploaded(
        self, event: gr.EventData, request: gr.Request, query: Examples, k: float, *values: Any
    ) -> Any:
        try:
            query = {**query, "upload": check_upload(event._data)}
        except HistoseekError as error:
            return _failed(self.server.session, query, error)
        return self.clicked(request, query, k, *values)

    def picked(
        self, event: gr.EventData, request: gr.Request, query: Examples, k: float, *values: Any
    ) -> Any:
        query = _picked(query, event._data)
        if _is_empty(query, dict(zip(self.fields, values, strict=True))):
            empty = view.empty("No query.", "Choose an image, or a tile with + like.")
            return query, _basket(query), "", empty, ""
        return self.clicked(request, query, k, *values)


def _homes(session: Session, answer: SearchAnswer) -> list[view.Home]:
    """Return the atlas of each hit; [] if there is only the server's own."""
    if session.elsewhere is None:
        return []
    names = answer.atlases or [session.elsewhere.own] * len(answer.hits)
    return [view.Home(session.elsewhere.names.index(name), name) for name in names]


def _is_empty(query: Examples, chosen: dict[str, Any]) -> bool:
    return not query["upload"] and not query["like"] and not (chosen["text"] or "").strip()


def _basket(query: Examples) -> str:
    return view.basket((), query["like"], query["unlike"])


def _failed(session: Session, query: Examples, error: Exception) -> tuple[Any, ...]:
    return (
        query,
        _basket(query),
        error_html(error, session),
        view.empty("No search.", "See the message above."),
        "",
    )


def _filters(session: Session) -> dict[str, Any]:
    """Return the filter widgets by the part of the query that they set."""
    columns = session.atlas.view().columns
    others = [
        name
        for name in columns.names()
        if name not in {"slide", "kind", "label", "patient"}
        and 1 < len(columns.coded(name).names) <= COLUMN_VALUES
    ]
    many = {"multiselect": True, "choices": []}
    fields = {"in label": gr.Dropdown(label="Label", **many)}
    for name in others:
        fields[f"in {name}"] = gr.Dropdown(label=name, **many)
    fields[f"in {ANNOTATION}"] = gr.Dropdown(label="In an annotation with the label", **many)
    fields["in slide"] = gr.Dropdown(label="Slide", **many)
    fields["in cluster"] = gr.Dropdown(label="Cluster", **many)
    fields["not in patient"] = gr.Dropdown(label="Leave out these patients", **many)
    fields["leave_out"] = gr.Radio(
        [("only the tile", ""), ("its slide", "slide"), ("its patient", "patient")],
        value="",
        label="If the query is a tile of the atlas, leave out",
    )
    fields["per_slide"] = gr.Checkbox(label="At most one hit per slide")
    fields["where"] = gr.Textbox(
        label="Other filter", placeholder="organ = 'colon' and x > 2000", max_lines=3
    )
    return fields


def _choices(session: Session, names: Sequence[str]) -> list[Any]:
    """Return the current values of each filter."""
    columns = session.atlas.view().columns
    updates = []
    for name in names:
        field = name.removeprefix("not in ").removeprefix("in ")
        if field == name:  # it has no list of choices
            updates.append(gr.skip())
        elif field == "cluster":
            updates.append(gr.update(choices=_cluster_choices(session)))
        elif field == ANNOTATION:
            labels = {item.label for item in columns.annotations if item.label}
            updates.append(gr.update(choices=sorted(labels)[:CHOICES]))
        else:
            updates.append(gr.update(choices=_values(session, field)[:CHOICES]))
    return updates


def _values(session: Session, field: str) -> list[str]:
    """Return the values of a column in all atlases on disk that are searched."""
    columns = [session.atlas.view().columns]
    if session.elsewhere is not None:
        columns += session.elsewhere.columns()
    return sorted({name for each in columns for name in each.coded(field).names})


def _cluster_choices(session: Session) -> list[tuple[str, int]]:
    if not session.atlas.clusterings():
        return []
    _, clustering = session.atlas.clustering(None)
    names = session.atlas.cluster_names()
    return [(words.cluster_name(c, names), c) for c in range(clustering.clusters)]


def _query(
    session: Session, query: Examples, k: int, values: dict[str, Any]
) -> tuple[Query, list[Cutting], Among]:
    """Return the query from the widgets' values, its image if its scale is known, and what to search."""
    where = (values.pop("where") or "").strip() or None
    leave_out: Any = values.pop("leave_out") or "tile"
    per_slide = values.pop("per_slide")
    text = (values.pop("text") or "").strip()
    atlases = values.pop("atlases") or []
    if session.elsewhere is not None and not atlases:
        raise BadInput("no atlas is chosen under “Search in”; choose one or more")
    for name, chosen in values.items():
        operator, _, field = name.rpartition(" ")
        if chosen:
            listed = ", ".join(str(v) if field == "cluster" else quoted(v) for v in chosen)
            clause = f"{quoted_field(field)} {operator} ({listed})"
            where = both(where, clause) if where else clause
    images, scaled = [], []
    if upload := query["upload"]:
        crop = tuple(upload["crop"]) if upload["crop"] else None
        path, name, mpp = Path(upload["path"]), upload["name"], upload["mpp"]
        if mpp is None:
            images.append(session.read(path, name, crop))
        else:
            scaled.append(session.cut(path, name, mpp, crop))
    (like, like_elsewhere), (unlike, unlike_elsewhere) = (
        _examples(session, query[kind]) for kind in ("like", "unlike")
    )
    asked = Query(
        tuple(images), tiles=like, unlike_tiles=unlike, k=k, where=where, per_slide=bool(per_slide),
        leave_out=leave_out, texts=(text,) if text else (),
    )  # fmt: skip
    return asked, scaled, Among(tuple(atlases), like_elsewhere, unlike_elsewhere)


def _examples(session: Session, keys: Sequence[str]) -> tuple[tuple[int, ...], tuple[Example, ...]]:
    """Return the tiles of the server's own atlas and those of further ones, by their keys on the page."""
    own = tuple(int(key) for key in keys if key.isdigit())
    others = [key for key in keys if not key.isdigit()]
    if others and session.elsewhere is None:
        raise BadInput(f"there is no tile {others[0]!r}; this server has one atlas")
    return own, tuple(session.elsewhere.example(key) for key in others) if session.elsewhere else ()


def _picked(query: Examples, data: Any) -> Examples:
    """Return the state after a tile was added or removed, or all were cleared."""
    kind = data.get("kind")
    if kind == "image":
        return {**query, "upload": None}
    if kind == "clear":
        return {**query, "like": [], "unlike": []}
    tile = str(data.get("tile"))
    if kind not in {"like", "unlike", "drop"} or not re.fullmatch(r"(\d{1,3}:)?\d{1,16}", tile):
        return query
    like = [t for t in query["like"] if t != tile]
    unlike = [t for t in query["unlike"] if t != tile]
    if kind == "like":
        like.append(tile)
    elif kind == "unlike":
        unlike.append(tile)
    return {**query, "like": like, "unlike": unlike}
