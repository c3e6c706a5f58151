"""HTML of answers for Jupyter."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape


def table_html(
    columns: Sequence[str], rows: Sequence[Sequence[object]], notes: Sequence[str] = ()
) -> str:
    """Return a table as HTML; all text is escaped."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(_text(value))}</td>" for value in row) + "</tr>"
        for row in rows
    )
    below = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{below}"


def figure_html(jpeg: bytes | None, lines: Sequence[str], side_px: int = 128) -> str:
    """Return an image with lines of text below it as HTML; without an image a grey square."""
    style = f"width:{side_px}px;height:{side_px}px;object-fit:contain;background:#ddd"
    image = f'<div style="{style}"></div>'
    if jpeg is not None:
        data = base64.b64encode(jpeg).decode()
        image = f'<img alt="tile" style="{style}" src="data:image/jpeg;base64,{data}">'
    text = "<br>".join(escape(line) for line in lines)
    box = f"display:inline-block;margin:4px;width:{side_px}px;vertical-align:top"
    return f'<figure style="{box}">{image}<figcaption>{text}</figcaption></figure>'


def _text(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
