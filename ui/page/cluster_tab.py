"""The tab Upload and cluster: assigns images, or zips of images, to clusters and places on the map."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ...errors import BadInput, HistoseekError, TooLarge
from ..access.service import Server
from ..session import words
from ..session.answers import MAX_IMAGES, ClusterAnswer
from . import cluster_view, view
from .widgets import (
    EVENT,
    UPLOAD_BYTES,
    atlas_map,
    chooser,
    chosen,
    error_html,
    html,
    no_clusters,
    with_files,
)

EXAMPLES = 3
"""Tiles that stand for the cluster of each image."""
ZIP_BYTES = 512 * 2**20
ENTRIES = 4 * MAX_IMAGES
MAP_JS = """
const box = document.getElementById('stars');
const read = () => { try { return JSON.parse(box.textContent.trim()); } catch { return {stars: []}; } };
const map = histoseek.map(element, {stars: () => read().stars ?? []});
new MutationObserver(() => read().by ? map.set(read().by) : map.draw())
  .observe(box, {childList: true, characterData: true, subtree: true});
"""


def _stars(answer: ClusterAnswer) -> list[dict[str, Any]]:
    """Return the images' positions on the map; nothing if there is no map yet."""
    if answer.points is None:
        return []
    return [
        {"name": name, "x": x, "y": y, "cluster": words.cluster_title(placed)}
        for name, (x, y), placed in zip(
            answer.names, answer.points.tolist(), answer.placed, strict=True
        )
    ]


def cluster_tab(server: Server) -> None:
    """Build the tab."""
    session = server.session
    names = session.atlas.clusterings()
    if not names:
        no_clusters()
        return
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            files = chooser("uploads", "Choose images, or zips of them", "multiple", UPLOAD_BYTES)
            clustering = gr.Dropdown(names, value=names[0], label="Clustering")
            button = gr.Button("Assign to clusters", variant="primary", elem_id="place")
        with gr.Column(scale=3, min_width=320):
            table = html(
                view.empty(
                    "The clusters of your images appear here.", "Choose images on the left."
                ),
                elem_id="placed-box",
            )
            stars = html("{}", visible="hidden", elem_id="stars")
            atlas_map(MAP_JS, "map")

    def place(given: str, name: str, request: gr.Request) -> Any:
        try:
            files = chosen(given)
            if not files:
                return view.problem("No image yet. Choose one or more images first."), "{}"
            session.map.wait()
            images = unpacked([(f["name"], Path(f["path"])) for f in files])
            answer = session.cluster(images, name, EXAMPLES)
            server.note_assign(request, answer)
        except HistoseekError as error:
            return error_html(error, server.session), "{}"
        drawn = {"by": f"cluster.{answer.clustering}", "stars": _stars(answer)}
        examples = {c["cluster"]: [t["tile"] for t in c["examples"]] for c in answer.clusters}
        table = cluster_view.placed_table(answer, examples)
        return table, json.dumps(drawn).replace("<", "\\u003c")

    button.click(
        place,
        [files, clustering],
        [table, stars],
        js=with_files("uploads"),
        **EVENT,
        show_progress_on=[table],
    )


def unpacked(files: Sequence[tuple[str, Path]]) -> list[tuple[str, Path | bytes]]:
    """Return images with their names, including each image in a zip; nothing is written to disk.

    Raises:
        BadInput: a zip cannot be read, or has a password.
        TooLarge: there are too many images, or too many bytes when unpacked.
    """
    found: list[tuple[str, Path | bytes]] = []
    budget = ZIP_BYTES
    for name, path in files:
        if path.suffix.lower() != ".zip":
            found.append((name, path))
            continue
        try:
            if path.stat().st_size > UPLOAD_BYTES:
                raise TooLarge(
                    f"{name} has more than {UPLOAD_BYTES:,} bytes; split it into smaller zips"
                )
            with zipfile.ZipFile(path) as pack:
                if len(pack.infolist()) > ENTRIES:
                    raise TooLarge(
                        f"{name} has more than {ENTRIES:,} files and folders; split it into smaller zips"
                    )
                for item in pack.infolist():
                    inner = item.filename.rsplit("/", 1)[-1]
                    if (
                        item.is_dir()
                        or inner.startswith(".")
                        or item.filename.startswith("__MACOSX")
                    ):
                        continue
                    if len(found) >= MAX_IMAGES:
                        raise TooLarge(
                            f"there are more than {MAX_IMAGES} images with those in {name}; upload fewer"
                        )
                    with pack.open(item) as stream:  # do not trust the size in the zip
                        blob = stream.read(min(UPLOAD_BYTES, budget) + 1)
                    budget -= len(blob)
                    if len(blob) > UPLOAD_BYTES or budget < 0:
                        raise TooLarge(
                            f"{name} unpacks to too many bytes; upload fewer images at once"
                        )
                    found.append((f"{name}: {inner}", blob))
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError, OSError, EOFError) as error:
            raise BadInput(f"{name} cannot be unpacked ({error}); zip the images again") from error
        except Exception as error:  # zlib, lzma and bz2 raise other errors
            if isinstance(error, HistoseekError):
                raise
            raise BadInput(f"{name} is damaged ({error}); zip the images again") from error
    return found
