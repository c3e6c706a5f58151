"""The tab About: contents of the atlas, encoder, recall of the index, and versions."""

from __future__ import annotations

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import gradio as gr

from ... import __version__
from ...artifacts.manifest import CARD
from ...errors import HistoseekError
from ..session.session import Session
from . import view
from .widgets import EVENT, HIDDEN, error_html, html

AUDIT_QUERIES = 200


def about_tab(session: Session, tab: Any) -> None:
    """Build the tab."""
    about = html(_about(session))
    button = gr.Button("Measure the recall of the index", elem_id="audit")
    note = html("", elem_id="audit-note")

    def measure() -> str:
        try:
            return view.audit_text(session.atlas.audit(AUDIT_QUERIES))
        except HistoseekError as error:
            return error_html(error, session)

    button.click(measure, None, note, **EVENT)
    tab.select(lambda: _about(session), None, about, **HIDDEN)


def _about(session: Session) -> str:
    versions = {"histoseek": __version__}
    for name in ("gradio", "onnxruntime", "faiss-cpu"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    path = session.atlas.store.encoder_folder / CARD
    card = path.read_text(encoding="utf-8") if path.is_file() else "The encoder has no model card."
    return view.about(session.atlas.stats(), card, versions)
