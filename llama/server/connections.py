"""Connections: how long one may stay open without a whole request."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

PATIENCE = 30.0  # seconds for a request's head, and from one to two times as long for its body


class Connection(H11Protocol):
    """A connection that is closed if no request arrives.

    uvicorn closes idle connections after an answer only: those that send nothing, or a byte now
    and then, would stay, with the memory that they take.
    """

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._expect_request()
        super().on_response_complete()

    def _expect_request(self, begun: RequestResponseCycle | None = None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(PATIENCE, self._check, begun)

    def _check(self, begun: RequestResponseCycle | None) -> None:
        """Close the connection if it has sent no head, or still not the body of ``begun``."""
        cycle = self.cycle
        waits = cycle is None or cycle.response_complete or (cycle.more_body and cycle is begun)
        if waits:
            self.transport.close()
        elif cycle.more_body:
            self._expect_request(cycle)
