"""Every architecture by its public name. ``MODELS`` is the registry; names map to builders."""

from __future__ import annotations

from collections.abc import Callable

from ...errors import unknown_name
from .embedding import Encoder
from .mobilenet_v3 import build_mobilenet_v3_small

MODELS: dict[str, Callable[..., Encoder]] = {
    "mobilenet-v3-small": build_mobilenet_v3_small,
}


def build(name: str, **options: object) -> Encoder:
    """Build a registered model.

    Raises:
        BadInput: the name is not registered; the choices are listed.
    """
    if name not in MODELS:
        raise unknown_name("model", name, MODELS)
    return MODELS[name](**options)


__all__ = ["MODELS", "Encoder", "build"]
