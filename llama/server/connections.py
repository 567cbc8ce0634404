"""Connections: how many may be open, and how long without a whole request."""

import asyncio
import contextlib
from typing import ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

PATIENCE = 30.0  # seconds for a request's head, and from one to two times as long for its body
_MOST_FILES = 65_536  # as many connections take a gigabyte


def allow_files() -> int:
    """Let this process open as many files as it may; return half of them, for connections.

    Systems begin with 256 or 1,024, which strangers' idle connections would take.
    """
    try:
        import resource
    except ImportError:  # on Windows, which has no such limit
        return _MOST_FILES // 2
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if most == resource.RLIM_INFINITY else min(most, _MOST_FILES)
    if limit != resource.RLIM_INFINITY and limit < wanted:
        with contextlib.suppress(ValueError, OSError):  # macOS has another limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
            limit = wanted
    return (_MOST_FILES if limit == resource.RLIM_INFINITY else limit) // 2


class Connection(H11Protocol):
    """A connection that is closed if no request arrives.

    uvicorn closes idle connections after an answer only: those that send nothing, or a byte now
    and then, would stay, with the memory that they take. Beyond ``most`` the oldest of those that
    wait is closed for each new one.
    """

    most = 4096
    _waiting: ClassVar["dict[Connection, None]"] = {}  # of all connections, the oldest first
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._waiting.pop(self, None)
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._expect_request()
        super().on_response_complete()

    def _expect_request(self, begun: RequestResponseCycle | None = None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(PATIENCE, self._check, begun)
        self._waiting.pop(self, None)
        self._waiting[self] = None
        while len(self._waiting) > self.most:
            oldest = next(iter(self._waiting))
            del self._waiting[oldest]
            cycle = oldest.cycle
            if cycle is None or cycle.response_complete or cycle.more_body:
                oldest.transport.close()

    def _check(self, begun: RequestResponseCycle | None) -> None:
        """Close the connection if it has sent no head, or still not the body of ``begun``."""
        cycle = self.cycle
        waits = cycle is None or cycle.response_complete or (cycle.more_body and cycle is begun)
        if waits:
            self.transport.close()
        elif cycle.more_body:
            self._expect_request(cycle)
