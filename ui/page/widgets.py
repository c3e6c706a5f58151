"""Widgets and functions shared by the tabs: HTML in Gradio, file choosers, the map, and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gradio as gr

from ...errors import BadInput
from ..session.session import Session
from . import view

UPLOAD_BYTES = 64 * 2**20
EVENT: dict[str, Any] = {"api_visibility": "private", "queue": False}
"""Settings of every event. They keep it out of Gradio's public API, and out of its queue, which can lose an
answer: its stream closes after an event, and an event sent at that moment gets no answer (Gradio 6.31). The
guard and the batching queue limit the number of waiting requests.
"""
HIDDEN: dict[str, Any] = {**EVENT, "show_progress": "hidden"}

_FILES = """
<div class="hs-picker" data-limit="{limit}" {local}>
  <div class="hs-drop"><input type="file" id="{name}-input" {options}>
  <label for="{name}-input">{title}</label>, or drop {them} here</div>
  <ul class="hs-files" aria-label="Files to upload"></ul><p class="hs-picker-note" role="status"></p>
</div>"""
_FILES_JS = "histoseek.files(element, upload);"
_MAP = """
<div class="hs-mapbox">
  <div class="hs-mapbar">{select}{tools}
    <p class="hs-map-note" role="status">The map appears when this tab is open.</p></div>
  <div class="hs-plot">
    <canvas tabindex="0" role="application" aria-label="Map of the atlas's tiles; arrow keys move it, plus
 and minus zoom, 0 shows all, Enter opens the tile in the middle"></canvas>
    <svg class="hs-lasso" aria-hidden="true"><polygon></polygon></svg>
    <div class="hs-mapzoom">{zoom}</div></div>
  <ul class="hs-maplegend" aria-label="Legend; a click hides or shows a value"></ul>
  <div class="hs-peek" hidden></div>{gallery}
</div>"""


def html(value: str = "", **options: Any) -> Any:
    """Return an HTML widget without Gradio's text styles."""
    return gr.HTML(value, apply_default_css=False, **options)


def error_html(error: Exception, session: Session) -> str:
    """Return the message of an error as HTML, without the server's folders."""
    return view.problem(session.hide(str(error)))


def no_clusters() -> Any:
    """Return the widget that stands in for the clusters of an atlas without clusters."""
    text = "Run `histoseek index fit` and restart the page."
    return html(view.empty("This atlas has no clusters yet.", text))


def chooser(name: str, title: str, options: str, limit: int, local: bool = False) -> Any:
    """Return a field to choose or drop files; :func:`with_files` passes the files to an event.

    ``options`` are HTML attributes of the input, ``limit`` is bytes per file. ``local`` keeps the file in
    the browser; the tab's JavaScript sends it.
    """
    kind = 'data-local="1"' if local else ""
    them = "them" if "multiple" in options.split() else "it"
    template = _FILES.format(
        name=name, title=title, options=options, limit=limit, local=kind, them=them
    )
    html(html_template=template, js_on_load=_FILES_JS, elem_id=name)
    return gr.Textbox(visible="hidden")


def with_files(name: str) -> str:
    """Return JavaScript that replaces an event's first input by the files of a chooser."""
    return f"(...inputs) => [histoseek.chosen('{name}'), ...inputs.slice(1)]"


def chosen(text: str | None) -> list[dict[str, Any]]:
    """Return the uploaded files of a chooser.

    Raises:
        BadInput: files are still being sent, or the data names a file that was not uploaded.
    """
    data = json.loads(text or "{}")
    if data.get("sending"):
        raise BadInput("files are still being uploaded; try again when the list shows them")
    return [check_upload(item) for item in data.get("files", [])]


def check_upload(data: Any) -> dict[str, Any]:
    """Check an upload named by the browser; return its path, name, crop and scale.

    Raises:
        BadInput: the data names a file that was not uploaded.
    """
    from gradio.utils import get_upload_folder

    data = data if isinstance(data, dict) else {}
    path = Path(str(data.get("path"))).resolve()
    if not path.is_relative_to(Path(get_upload_folder()).resolve()):
        raise BadInput("the file was not uploaded to this server; choose it again")
    crop = data.get("crop")
    numbers = isinstance(crop, list) and len(crop) == 4
    if crop is not None and not (numbers and all(isinstance(c, int | float) for c in crop)):
        raise BadInput("the crop is not a list of four numbers; draw it again")
    mpp = data.get("mpp")
    if mpp is not None and not isinstance(mpp, int | float):
        raise BadInput("the scale is not a number; enter µm per pixel, or the magnification")
    name = Path(str(data.get("name", "image"))).name
    return {"path": str(path), "name": name, "crop": crop, "mpp": mpp}


_TOOLS = """
<span role="group" aria-label="What dragging does"><button type="button" class="hs-tool" data-tool="lasso"
 aria-pressed="true">Lasso</button><button type="button" class="hs-tool" data-tool="move"
 aria-pressed="false">Move</button></span>"""


_ZOOM = "".join(
    f'<button type="button" data-map="{act}" aria-label="{title}">{sign}</button>'
    for act, title, sign in (
        ("in", "Zoom in", "+"),
        ("out", "Zoom out", "−"),
        ("whole", "Show all", "All"),
    )
)


def atlas_map(js: str, elem_id: str, select: str = "", gallery: str = "") -> Any:
    """Return the map of the atlas; ``js`` calls ``histoseek.map``, which draws it when it becomes visible.

    ``select`` and ``gallery`` are HTML: the list of colourings, and the area for the tiles inside a lasso.
    """
    return html(
        html_template=_MAP.format(
            select=select, gallery=gallery, tools=_TOOLS if gallery else "", zoom=_ZOOM
        ),
        js_on_load=js,
        elem_id=elem_id,
    )
