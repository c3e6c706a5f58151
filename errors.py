"""Exceptions, grouped by what the caller can do about them.

::

    HistoseekError          anything that histoseek refuses or cannot finish
    ├── BadInput            an image, slide, table or option is wrong: correct or replace it
    │   ├── TooLarge        more bytes, pixels or items than the limit: crop, downsample or split it
    │   ├── Unsupported     a format or kind of image that cannot be read: convert it
    │   ├── BrokenFile      an input file is truncated or damaged: copy it again
    │   └── NotFound        no tile, slide, cluster or result has that name (any more)
    ├── Mismatch            two artifacts do not belong together (other encoder, other dimension)
    ├── Damaged             a stored artifact fails its integrity check: rebuild or restore it
    ├── MissingPart         an optional package is not installed: install the extra that the message names
    ├── Busy                another process holds the resource: wait and try again
    ├── Unavailable         a server does not answer or is overloaded: check the server and run again
    └── StorageFailed       the disk is full, read-only or failing: free space and run again

Every message states the problem, the value, what was expected, and the remedy.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Iterable
from types import ModuleType
from typing import Any


class HistoseekError(Exception):
    """Base of every error that histoseek raises on purpose."""


class BadInput(HistoseekError):
    """An input must be corrected or replaced by the caller."""


class TooLarge(BadInput):
    """An input has more bytes, pixels or items than the limit."""


class Unsupported(BadInput):
    """An input has a format or kind that cannot be read."""


class BrokenFile(BadInput):
    """An input file is truncated or damaged."""


class NotFound(BadInput):
    """No object has the requested name or id."""


class Mismatch(HistoseekError):
    """Two artifacts do not belong together."""


class Damaged(HistoseekError):
    """A stored artifact fails its integrity check."""


class MissingPart(HistoseekError):
    """An optional package is missing."""


class Busy(HistoseekError):
    """Another process holds the resource; the same call may succeed later."""


class Unavailable(HistoseekError):
    """A server did not answer, or reported overload, until the deadline."""


class StorageFailed(HistoseekError):
    """Writing failed for a reason outside histoseek (space, permission, quota)."""


def need(module: str, extra: str) -> ModuleType:
    """Import an optional module.

    Args:
        module: the module's name, such as ``onnxruntime``.
        extra: the extra of this package that installs it.

    Raises:
        MissingPart: the module cannot be imported; the message names the extra to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPart(
            f"{module} cannot be imported ({error}); run: pip install 'histoseek[{extra}]'"
        ) from error


def whole(value: Any, name: str) -> int:
    """Return a whole number that a program gives, also if it is one of numpy's.

    Args:
        value: the number.
        name: what it is, for the message.

    Raises:
        BadInput: it is not a whole number, such as 2.5, "3" or True.
    """
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise BadInput(f"{name} is {value!r}; expected a whole number")


SHOWN = 30
"""Maximum number of choices that a message lists."""


def unknown_name(kind: str, name: str, choices: Iterable[str]) -> NotFound:
    """Return the error for a name that is not in a registry, with the choices listed."""
    names = sorted(choices)
    more = f" … and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    if not names:
        return NotFound(f"unknown {kind} {name!r}; there is no {kind} yet")
    return NotFound(f"unknown {kind} {name!r}; choose one of: {', '.join(names[:SHOWN])}{more}")
