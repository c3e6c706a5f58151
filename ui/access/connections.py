"""HTTP connections that do not wait for ever for a request."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEADERS_S = 20.0
"""Time in s in which a request's headers must arrive; then the connection is closed."""


class PatientConnection(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """A connection that is closed if the headers of a request do not arrive in time.

    uvicorn itself only closes a connection on which nothing arrives after a first request.
    """

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """See ``asyncio.Protocol``."""
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """See ``asyncio.Protocol``."""
        self._forget()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See ``asyncio.Protocol``."""
        super().data_received(data)
        if self._reads_headers():
            self._wait()
        else:
            self._forget()

    def _reads_headers(self) -> bool:
        """Whether no request is being processed."""
        return self.cycle is None or bool(self.cycle.response_complete)

    def _wait(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEADERS_S, self._end)

    def _forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None

    def _end(self) -> None:
        self._timer = None
        if self._reads_headers():
            self.transport.close()
