"""What can go wrong, grouped by what the caller can do about it.

::

    HistoseekError          anything histoseek refuses or could not finish
    ├── BadInput            an image, slide, table or option is wrong: correct or replace it
    │   ├── TooLarge        more bytes, pixels or items than are accepted: crop, downsample or split it
    │   ├── Unsupported     a format or kind of picture that is not read: convert it
    │   ├── BrokenFile      an input file is truncated or damaged: copy it again
    │   └── NotFound        a tile, slide, cluster or result of that name is not there (any more)
    ├── Mismatch            two artifacts do not belong together (other encoder, other dimension)
    ├── Damaged             a stored artifact fails its own check: rebuild or restore it
    ├── MissingPart         an optional package is not installed: install the extra that is named
    ├── Busy                another process holds the resource: wait and try again
    ├── Unavailable         a server does not answer or has no room: see to it and run again
    └── StorageFailed       the disk is full, read-only or failing: free space and run again

Every message says what was wrong, with which value, what was expected, and the remedy.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from types import ModuleType


class HistoseekError(Exception):
    """Base of every error that histoseek raises on purpose."""


class BadInput(HistoseekError):
    """An input must be corrected or replaced by the caller."""


class TooLarge(BadInput):
    """An input has more bytes, pixels or items than are accepted."""


class Unsupported(BadInput):
    """An input is of a format or kind that is not read."""


class BrokenFile(BadInput):
    """An input file is truncated or damaged."""


class NotFound(BadInput):
    """What was asked for by name or id is not there."""


class Mismatch(HistoseekError):
    """Two artifacts do not belong together."""


class Damaged(HistoseekError):
    """A stored artifact fails its own check."""


class MissingPart(HistoseekError):
    """An optional package is missing."""


class Busy(HistoseekError):
    """Another process holds the resource; the same call may succeed later."""


class Unavailable(HistoseekError):
    """A server does not answer, or answers that it cannot take more, for longer than was allowed."""


class StorageFailed(HistoseekError):
    """Writing failed for a reason outside of histoseek (space, permission, quota)."""


def need(module: str, extra: str) -> ModuleType:
    """Import an optional module.

    Args:
        module: such as ``onnxruntime``.
        extra: of this package, that installs it.

    Raises:
        MissingPart: it cannot be imported; says which extra to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPart(
            f"{module} cannot be imported ({error}): pip install 'histoseek[{extra}]'"
        ) from error


SHOWN = 30
"""Choices that a message names."""


def unknown_name(kind: str, name: str, choices: Iterable[str]) -> NotFound:
    """Return the error for a name that is not in a registry, with the choices listed."""
    known = sorted(choices)
    more = f" … and {len(known) - SHOWN:,} more" if len(known) > SHOWN else ""
    return NotFound(f"unknown {kind} {name!r}; choose one of: {', '.join(known[:SHOWN])}{more}")
