"""Every architecture by its public name. ``MODELS`` is the registry; names map to builders."""

from __future__ import annotations

from collections.abc import Callable

from ...errors import unknown_name
from .embedding import Encoder
from .mobilenet_v3 import build_mobilenet_v3_small

MODELS: dict[str, Callable[..., Encoder]] = {
    "mobilenet-v3-small": build_mobilenet_v3_small,
}


def build(model: str, **options: object) -> Encoder:
    """Build a registered model by name, with the options of its builder.

    Raises:
        BadInput: the name is not registered; the choices are listed.
    """
    if model not in MODELS:
        raise unknown_name("model", model, MODELS)
    return MODELS[model](**options)


__all__ = ["MODELS", "Encoder", "build"]
