"""Slow results, computed in background threads while requests continue."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from ...errors import MissingPart

T = TypeVar("T")
AGAIN_S = 30.0
"""Seconds after which a failed computation is tried again."""


log = logging.getLogger("histoseek.background")


class Background:
    """Computes slow results in background threads, once per state; keeps the last result per name."""

    def __init__(self) -> None:
        """Start without results."""
        self._lock = threading.Lock()
        self._made: dict[str, tuple[Any, Any]] = {}
        self._making: dict[str, threading.Thread] = {}
        self._failed: dict[str, tuple[Any, Exception, float]] = {}

    def get(self, name: str, state: Any, make: Callable[[], T]) -> T | None:
        """Return the result of ``make`` for a state; until it is ready, an earlier state's result or None.

        Raises:
            MissingPart: a package that ``make`` needs is not installed.
        """
        with self._lock:
            state_made, made = self._made.get(name, (None, None))
            state_failed, error, at = self._failed.get(name, (None, None, 0.0))
            fresh = made is not None and state_made == state
            failed = state_failed == state and time.monotonic() - at < AGAIN_S
            if failed and not fresh and isinstance(error, MissingPart):
                raise error
            if not fresh and not failed and name not in self._making:
                thread = threading.Thread(
                    target=self._make, args=(name, state, make), name=f"make-{name}", daemon=True
                )
                self._making[name] = thread
                thread.start()
            return made  # type: ignore[no-any-return]

    def _make(self, name: str, state: Any, make: Callable[[], Any]) -> None:
        try:
            self._made[name] = state, make()
        except KeyboardInterrupt:
            return  # the command was asked to stop
        except Exception as error:
            log.warning("%s could not be computed: %s", name, error)
            self._failed[name] = state, error, time.monotonic()
        with self._lock:
            del self._making[name]

    def close(self, patience_s: float = 20.0) -> None:
        """Wait for running computations: a thread in native code must not outlive the interpreter."""
        with self._lock:
            threads = list(self._making.values())
        deadline = time.monotonic() + patience_s
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
