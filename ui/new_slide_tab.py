"""The tab New slide: a slide by upload or path, embedded in the background while one watches."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from ..errors import BadInput, HistoseekError
from . import view
from .service import Server
from .widgets import EVENT, HIDDEN, SLIDE_BYTES, chooser, chosen, html, told, with_files

CLEAR_JS = """() => { if (document.querySelector('#add-note [role=status]'))
  document.querySelector('#new-file .hs-picker').dispatchEvent(new Event('hs-clear')); }"""


def new_slide_tab(server: Server, tab: Any, head: Any, header: Callable[[], str]) -> None:
    """Lay the tab out.

    Args:
        server: what it works on.
        tab: it is in.
        head: of the page, which counts the tiles.
        header: that writes it.
    """
    additions = server.additions
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            file = chooser("new-file", "Choose a slide", "", SLIDE_BYTES)
            path = gr.Textbox(
                label="Or its path on the server", placeholder="/slides/case-7.svs",
                visible=additions.takes_paths, elem_id="new-path",
            )  # fmt: skip
            label = gr.Textbox(label="Label", max_length=200)
            patient = gr.Textbox(label="Patient", max_length=200)
            mpp = gr.Textbox(
                label="µm per pixel, if the file does not say", placeholder="0.5", max_length=20
            )
            again = gr.Checkbox(label="Replace a slide of that name")
            button = gr.Button("Add to the atlas", variant="primary", elem_id="add")
        with gr.Column(scale=3, min_width=320):
            note = html("", elem_id="add-note")
            jobs = html(view.job_list(additions.all()), elem_id="jobs")
    timer = gr.Timer(1.0, active=False)

    def busy() -> bool:
        return any(not job.over for job in additions.all())

    def add(
        listed: str,
        where: str,
        tag: str,
        who: str,
        scale: str,
        over: bool,
        request: gr.Request,
    ) -> Any:
        tag, who, scale, where = ((text or "").strip() for text in (tag, who, scale, where))
        row = {"label": tag, "patient": who, "mpp": scale}
        try:
            given = chosen(listed)
            if bool(given) == bool(where):
                raise BadInput("no slide yet: give either a file or a path")
            if given:
                with Path(given[0]["path"]).open("rb") as stream:
                    job = additions.upload(stream, given[0]["name"], row, over)
            else:
                job = additions.path(Path(where), row, over)
            server.note(request, "add", slide=job.slide, job=job.id)
        except HistoseekError as error:
            return told(error), view.job_list(additions.all()), gr.Timer(active=busy())
        text = f'<p role="status">{escape(job.slide)} is on its way.</p>'
        return text, view.job_list(additions.all()), gr.Timer(active=True)

    def tick() -> Any:
        return view.job_list(additions.all()), gr.Timer(active=busy()), header()

    button.click(
        add,
        [file, path, label, patient, mpp, again],
        [note, jobs, timer],
        js=with_files("new-file"),
        **EVENT,
    )
    # What was sent is gone from the list, and the next slide can be chosen.
    note.change(None, None, None, js=CLEAR_JS, **HIDDEN)
    timer.tick(tick, None, [jobs, timer, head], **HIDDEN)
    tab.select(tick, None, [jobs, timer, head], **HIDDEN)
