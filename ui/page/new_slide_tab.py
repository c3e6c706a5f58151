"""The tab New slide: adds a slide by upload or path, with progress; embedding runs in the background."""

from __future__ import annotations

import json
from collections.abc import Callable
from html import escape
from typing import Any

import gradio as gr

from ..access.service import Server
from ..session.addition import PLAIN
from . import view
from .widgets import EVENT, HIDDEN, chooser, html

ADD_JS = "(...row) => histoseek.addSlide('new-file')(...row)"
"""Sends the slide to the API, which accepts large files, and replaces the path by the API's answer."""


def new_slide_tab(server: Server, tab: Any, head: Any, header: Callable[[], str]) -> None:
    """Build the tab; ``head`` is the page's head, which shows the number of tiles."""
    additions = server.additions
    html(view.readers_only(), elem_id="readers-note")
    with gr.Row():
        with gr.Column(scale=1, min_width=300, elem_id="new-form"):
            chooser("new-file", "Choose a slide", "", 0, local=True)
            path = gr.Textbox(
                label="Or enter its path on the server", placeholder="/slides/case-7.svs",
                visible=additions.takes_paths, elem_id="new-path",
            )  # fmt: skip
            label = gr.Textbox(label="Label", max_length=200)
            patient = gr.Textbox(label="Patient", max_length=200)
            mpp = gr.Textbox(
                label="µm per pixel, if the file does not contain it",
                placeholder="0.5",
                max_length=20,
            )
            again = gr.Checkbox(label="Replace the slide of that name")
            with gr.Accordion("Which tiles", open=False, elem_id="new-tiles"):
                tissue = gr.Radio(
                    [("absorbance", "absorbance"), ("a network", "small")],
                    value=PLAIN.tissue_model, label="Tissue is found by",
                    info="The network takes fewer pen strokes, bubbles and edges of glass for tissue.",
                )  # fmt: skip
                sharpness = gr.Slider(
                    0, 1, PLAIN.min_sharpness, step=0.01, label="Lowest sharpness",
                    info="Less sharp tiles are left out as blurred; 0 keeps all.",
                )  # fmt: skip
                pen = gr.Slider(
                    0, 1, PLAIN.max_pen, step=0.01, label="Highest share of pen ink",
                    info="Tiles with more green or blue ink are left out; 1 keeps all.",
                )  # fmt: skip
            button = gr.Button("Add to the atlas", variant="primary", elem_id="add")
        with gr.Column(scale=3, min_width=320):
            note = html("", elem_id="add-note")
            jobs = html(view.job_list(additions.all()), elem_id="jobs")
    timer = gr.Timer(1.0, active=False)

    def busy() -> bool:
        return any(not job.over for job in additions.all())

    def added(answer_json: str, *row: Any) -> Any:
        answer = json.loads(answer_json or "{}")
        text = str(answer.get("text", ""))
        shown = f'<p role="status">{escape(text)}</p>' if answer.get("ok") else view.problem(text)
        cleared = ["", "", ""] if answer.get("ok") else [gr.skip()] * 3
        return shown, view.job_list(additions.all()), gr.Timer(active=busy()), *cleared

    def tick() -> Any:
        return view.job_list(additions.all()), gr.Timer(active=busy()), header()

    button.click(
        added,
        [path, label, patient, mpp, again, tissue, sharpness, pen],
        [note, jobs, timer, path, label, patient],
        js=ADD_JS,
        **EVENT,
    )
    timer.tick(tick, None, [jobs, timer, head], **HIDDEN)
    tab.select(tick, None, [jobs, timer, head], **HIDDEN)
