"""Connections: how many may be open, and how long without a whole request."""

import asyncio
import contextlib
from typing import ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

PATIENCE = 30.0  # seconds for a request's head, and from one to two times as long for its body
_MOST_FILES = 65_536  # are enough, also where the system sets no limit


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
    and then, would stay, with the memory that they take. So would those that don't read what they
    asked for. Beyond ``most`` the oldest of those that wait is closed for each new one.
    """

    most = 4096
    _waiting: ClassVar["dict[Connection, None]"] = {}  # of all connections, the oldest first
    _timer: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._timer, self._unread):
            if timer is not None:
                timer.cancel()
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
        if len(self._waiting) > self.most:
            self._make_room()

    def _make_room(self) -> None:
        """Close the oldest connection that waits for a request, or else the oldest upload."""
        oldest = None
        for each in [each for each in self._waiting if each.loop is self.loop]:
            if each.cycle is None or each.cycle.response_complete:
                oldest = each
                break
            if each.cycle.more_body:
                oldest = oldest or each
            else:  # it has its request, and comes back after the answer
                del self._waiting[each]
        if len(self._waiting) > self.most and oldest is not None:
            del self._waiting[oldest]
            oldest.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(2 * PATIENCE, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def _check(self, begun: RequestResponseCycle | None) -> None:
        """Close the connection if it has sent no head, or still not the body of ``begun``."""
        cycle = self.cycle
        waits = cycle is None or cycle.response_complete or (cycle.more_body and cycle is begun)
        if waits:
            self.transport.close()
        elif cycle.more_body:
            self._expect_request(cycle)
