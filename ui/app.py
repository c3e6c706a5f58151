"""The page: three tabs laid out in Gradio over the handlers."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Any

from ..errors import BadInput, Busy, HistoseekError, MissingPart
from ..manifest import CARD
from . import view
from .handlers import Session

AUTH = "HISTOSEEK_UI_AUTH"
MAX_UPLOAD = "64mb"


def _gradio() -> Any:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import gradio
    except ImportError as error:
        raise MissingPart("the page needs Gradio: pip install 'histoseek[ui]'") from error
    return gradio


def build(session: Session) -> Any:
    """Return the page (``gradio.Blocks``) of an open atlas."""
    gr = _gradio()
    stats = session.atlas.stats()
    with gr.Blocks(title="histoseek", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(f"# histoseek\n{view.holds(stats)} · {view.NOTICE}")
        with gr.Tab("Find similar"):
            _find_tab(gr, session)
        with gr.Tab("Upload and cluster"):
            _cluster_tab(gr, session)
        with gr.Tab("About"):
            path = session.atlas.encoder_bundle / CARD
            card = path.read_text(encoding="utf-8") if path.is_file() else "It has no card."
            gr.Markdown(view.about(stats, card))
    return page


def _find_tab(gr: Any, session: Session) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            image = gr.Image(
                type="filepath",
                label="Your image",
                sources=["upload", "clipboard"],
                height=300,
                elem_id="query",
            )
            # Our own decoder judges the upload: Gradio's would change what it cannot show.
            image.preprocess = lambda upload: upload.path if upload else None
            count = gr.Slider(1, 50, value=12, step=1, label="How many hits")
            button = gr.Button("Find similar tiles", variant="primary", elem_id="find")
            note = gr.Markdown(
                "Upload or paste an image; it is cropped to a square.", elem_id="verdict"
            )
        with gr.Column(scale=3, min_width=340):
            hits = gr.HTML(view.NO_HITS, elem_id="hits")
            table = gr.Dataframe(
                headers=view.HIT_COLUMNS,
                label="Hits",
                interactive=False,
                wrap=True,
                elem_id="hit-table",
            )

    def find(path: str | None, k: float) -> tuple[Any, ...]:
        if not path:
            return view.NO_HITS, [], "**No image yet.** Upload or paste one first."
        try:
            answer = session.find_similar(Path(path), int(k))
        except HistoseekError as error:
            return view.NO_HITS, [], f"**Not searched.** {_without_path(error, path)}"
        return view.gallery(answer), view.hit_rows(answer.hits), view.verdict(answer)

    button.click(find, [image, count], [hits, table, note], api_name="search")
    image.upload(find, [image, count], [hits, table, note], api_name=False)


def _cluster_tab(gr: Any, session: Session) -> None:
    names = session.clusterings()
    if not names:
        gr.Markdown("This atlas has no clusters yet: run `histoseek index fit` and open it again.")
        return
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            files = gr.File(
                file_count="multiple", label="Your images", height=200, elem_id="uploads"
            )
            chosen = gr.Dropdown(names, value=names[0], label="Clustering")
            button = gr.Button("Place in clusters", variant="primary", elem_id="place")
            note = gr.Markdown("Upload one or more images.", elem_id="placed-note")
        with gr.Column(scale=3, min_width=340):
            plot = gr.Plot(
                view.map_figure(session.map(names[0]), None, names[0]), label="Map", elem_id="map"
            )
            table = gr.Dataframe(
                headers=view.PLACED_COLUMNS,
                label="Placed images",
                wrap=True,
                interactive=False,
                elem_id="placed",
            )

    def place(paths: list[str] | None, name: str) -> tuple[Any, ...]:
        empty = view.map_figure(session.map(name), None, name)
        if not paths:
            return empty, [], "**No image yet.** Upload one or more first."
        try:
            answer = session.cluster([(Path(p).name, Path(p)) for p in paths], name)
        except HistoseekError as error:
            return empty, [], f"**Not placed.** {error}"
        unknown = sum(bool(p["unknown"]) for p in answer.placed)
        text = (
            f"{len(answer.names)} placed, {unknown} of them unknown, {len(answer.refused)} refused."
        )
        return view.map_figure(session.map(name), answer, name), view.placed_rows(answer), text

    button.click(place, [files, chosen], [plot, table, note], api_name="assign")
    chosen.change(place, [files, chosen], [plot, table, note], api_name=False)


def _without_path(error: HistoseekError, path: str) -> str:
    return str(error).replace(path, Path(path).name)


def serve(atlas: Path, host: str, port: int, encoder: str | None = None) -> tuple[Any, str]:
    """Open an atlas and serve the page, in threads of its own.

    Args:
        atlas: the folder.
        host: address to listen on; any but a loopback address needs ``HISTOSEEK_UI_AUTH``.
        port: to listen on.
        encoder: that embeds what is asked, such as ``triton://…``; the atlas's own when None.

    Returns:
        The running page and its address.

    Raises:
        BadInput: a host that others can reach, without user and password.
        Busy: the port is taken.
    """
    credentials = _credentials(host)
    if not 1 <= port <= 65535:
        raise BadInput(f"--port is {port}; expected 1 to 65535")
    gr = _gradio()
    page = build(Session(atlas, encoder))
    fonts = ["system-ui", "Segoe UI", "Helvetica", "sans-serif"]
    theme = gr.themes.Soft(primary_hue="teal", font=fonts, font_mono=["ui-monospace", "monospace"])
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            auth=credentials,
            share=False,
            quiet=True,
            show_error=False,
            prevent_thread_lock=True,
            ssr_mode=False,
            run_history=False,
            enable_monitoring=False,
            footer_links=[],
            max_file_size=MAX_UPLOAD,
            theme=theme,
            css_paths=Path(__file__).parent / "page.css",
        )
    except OSError as error:
        raise Busy(
            f"port {port} on {host} cannot be used ({error}); choose another --port"
        ) from error
    return page, str(address)


def _credentials(host: str) -> tuple[str, str] | None:
    given = os.environ.get(AUTH)
    if given:
        user, _, password = given.partition(":")
        if not user or not password:
            raise BadInput(f"{AUTH} is set but not as user:password; correct or unset it")
        return user, password
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local:
        raise BadInput(
            f"--host {host} lets other machines in, and the page shows patients' tissue; set "
            f"{AUTH}=user:password first, or listen on 127.0.0.1"
        )
    return None


__all__ = ["build", "serve"]
