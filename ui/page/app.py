"""The page: seven tabs in Gradio on top of the session; ``view`` makes their HTML."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi.responses import FileResponse

from ...errors import MissingPart, NotFound
from ..access.service import Server
from ..session.session import Session
from . import view
from .about_tab import about_tab
from .atlas_tab import atlas_tab
from .cluster_tab import cluster_tab
from .find_tab import find_tab
from .new_slide_tab import new_slide_tab
from .slides_tab import slides_tab
from .viewer_tab import viewer_tab
from .widgets import HIDDEN, html

ASSETS = Path(__file__).parents[1] / "assets"
SCRIPTS = ("page.js", "map.js", "annotations.js", "viewer.js")
"""Loaded in this order; the first one makes what the others use."""
FONTS = ["system-ui", "Segoe UI", "Helvetica", "sans-serif"]
MONO = ["ui-monospace", "monospace"]

TABS = {
    "Find similar": "Find the tiles that look most like an image, a tile of the atlas, or words.",
    "Slide viewer": "Look at a slide, search for a region of it, see the hits in place, and annotate.",
    "Upload and cluster": "See to which clusters of the atlas your images belong.",
    "Atlas": "All tiles on one map, on which tiles that look alike lie close together.",
    "Slides and cases": "Compare whole slides and cases, and see where one resembles your last search.",
    "New slide": "Add a slide to the atlas. It can be searched as soon as it is embedded.",
    "About": "The encoder and the atlas, and how well its index searches.",
}
"""What each tab is for."""
AT_ROOT = '<link rel="manifest" href="/manifest.json" />'
FROM_HERE = '<link rel="icon" href="favicon.ico" /><link rel="manifest" href="manifest.json" />'


def mount(app: Any, server: Server) -> Any:
    """Mount the page on the API's app; return the app with both."""
    _fetch_nothing()
    _link_from_here()
    _assets(app)
    return gr.mount_gradio_app(
        app,
        build(server),
        path="/",
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        max_file_size=None,  # the guard limits bytes, with a higher limit for slides
        theme=_theme(),
        css_paths=ASSETS / "page.css",
        head="".join(f'<script src="page-assets/{name}"></script>' for name in SCRIPTS),
    )


def _theme() -> Any:
    """Return a theme with sufficient contrast of text (WCAG AA)."""
    theme = gr.themes.Soft(primary_hue="teal", font=FONTS, font_mono=MONO)
    both = {  # light, dark
        "block_title_background_fill": ("transparent", "transparent"),
        "block_title_text_color": ("*neutral_800", "*neutral_100"),
        "body_text_color_subdued": ("*neutral_600", "*neutral_300"),
        "block_label_background_fill": ("transparent", "transparent"),
        "block_label_text_color": ("*neutral_800", "*neutral_100"),
        "button_primary_background_fill": ("*primary_700", "*primary_700"),
        "button_primary_background_fill_hover": ("*primary_800", "*primary_800"),
        "input_border_color": ("*neutral_300", "*neutral_600"),
        "input_placeholder_color": ("*neutral_500", "*neutral_400"),
        "checkbox_label_background_fill_selected": ("*primary_700", "*primary_700"),
    }
    return theme.set(
        **{name: light for name, (light, _) in both.items()},
        **{f"{name}_dark": dark for name, (_, dark) in both.items()},
        block_title_padding="0",
        button_primary_text_color="white",
        input_border_width="1px",
        checkbox_border_width="1px",
        checkbox_border_color="*neutral_400",
        button_secondary_border_color="*neutral_300",
        button_border_width="1px",
    )


def _fetch_nothing() -> None:
    """Make Gradio refuse URLs in place of files, so that the server never downloads for a client."""
    from gradio import processing_utils

    def refuse(*_: Any, **__: Any) -> Any:
        raise ValueError("this server does not fetch URLs; upload the file")

    for name in ("save_url_to_cache", "async_save_url_to_cache", "ssrf_protected_download"):
        if hasattr(processing_utils, name):
            setattr(processing_utils, name, refuse)


def _link_from_here() -> None:
    """Make the links to manifest and icon relative: a proxy may publish the page under a path."""
    from gradio.routes import templates
    from jinja2 import BaseLoader

    environment = templates.env
    inner = environment.loader

    class FromHere(BaseLoader):
        def get_source(self, environment: Any, template: str) -> Any:
            source, *rest = inner.get_source(environment, template)
            return source.replace(AT_ROOT, FROM_HERE), *rest

    if inner.__class__.__name__ != FromHere.__name__:
        environment.loader = FromHere()
        environment.cache.clear()


def _assets(app: Any) -> None:
    leaflet = _package("js_lib_leaflet") / "static" / "js_lib_leaflet"
    files = {
        **{name: ASSETS / name for name in SCRIPTS},
        "leaflet.js": leaflet / "leaflet.js",
        "leaflet.css": leaflet / "leaflet.css",
    }

    def asset(name: str) -> FileResponse:
        if name not in files:
            raise NotFound(f"there is no file {name!r}; reload the page")
        own = files[name].parent == ASSETS
        return FileResponse(
            files[name],
            media_type="text/css" if name.endswith(".css") else "text/javascript",
            headers={"Cache-Control": "no-cache" if own else "private, max-age=86400"},
        )

    app.get("/page-assets/{name}", include_in_schema=False)(asset)


def _package(name: str) -> Path:
    """Return the folder of a package that has files for the browser; nothing of it is run."""
    from importlib.util import find_spec

    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise MissingPart(f"the page needs {name}; run: pip install 'histoseek[ui]'")
    return Path(spec.origin).parent


def build(server: Server) -> Any:
    """Return the page (``gradio.Blocks``)."""
    session = server.session
    with gr.Blocks(
        title=f"histoseek: {session.atlas.path.name}",
        analytics_enabled=False,
        fill_width=True,
        delete_cache=(600, 3600),
    ) as page:
        head = html(_header(session))
        last = gr.State("")
        with gr.Tabs():
            with _tab("Find similar"):
                find_tab(server, last)
            with _tab("Slide viewer"):
                viewer_tab(session)
            with _tab("Upload and cluster"):
                cluster_tab(server)
            with _tab("Atlas") as atlas:
                atlas_tab(session, atlas)
            with _tab("Slides and cases") as slides:
                slides_tab(server, last, slides)
            with _tab("New slide") as new:
                new_slide_tab(server, new, head, lambda: _header(session))
            with _tab("About") as about:
                about_tab(session, about)
        page.load(lambda: _header(session), None, head, **HIDDEN)
    page.queue(max_size=256, default_concurrency_limit=16)
    return page


@contextmanager
def _tab(name: str) -> Iterator[Any]:
    """Make a tab that begins with what it is for."""
    with gr.Tab(name) as tab:
        html(view.purpose(TABS[name]))
        yield tab


def _header(session: Session) -> str:
    others = session.elsewhere.names[1:] if session.elsewhere else ()
    return view.header(session.atlas.stats(), session.atlas.path.name, others)
