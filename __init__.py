"""histoseek: train an encoder, embed whole slides, build a searchable atlas, and serve it as a web page.

The names below are the public interface; each is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .errors import HistoseekError
    from .index.store.rows import Hit
    from .serving.encoders.open import open_encoder
    from .serving.slides.slide import open_slide
    from .ui.api.client import Client
    from .ui.notebook.atlas import Atlas
    from .ui.notebook.embed import embed

__all__ = [
    "Atlas",
    "Client",
    "HistoseekError",
    "Hit",
    "__version__",
    "embed",
    "open_encoder",
    "open_slide",
]
_HOME = {
    "Atlas": ".ui.notebook.atlas",
    "Client": ".ui.api.client",
    "HistoseekError": ".errors",
    "Hit": ".index.store.rows",
    "embed": ".ui.notebook.embed",
    "open_encoder": ".serving.encoders.open",
    "open_slide": ".serving.slides.slide",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name], __name__), name)
    return value


def __dir__() -> list[str]:
    """Return the public names, imported or not."""
    return sorted({*globals(), *__all__})
