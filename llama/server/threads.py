"""Work for requests that keeps the processor busy, in a thread of its own."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from fastapi import Request, Response
from pydantic import BaseModel

from llama.server.answers import timed_out
from llama.server.errors import ApiError
from llama.server.events import unless_disconnected

_MAX_WAITING = 64  # requests
_WORK = 0.001  # seconds of work between two rests
_REST = 0.1  # seconds of a rest, at most


class Pauses:
    """Rests of a thread that holds Python's lock for long, in which the engine's gets on.

    Without them each of a step's operators waits for it.

    Args:
        needed: tells whether anything runs.
    """

    def __init__(self, needed: Callable[[], bool]):
        self._needed = needed
        self._since = time.monotonic()

    def rest(self) -> None:
        """Rest three times as long as the thread has worked, a tenth of a second at most."""
        worked = time.monotonic() - self._since
        if worked > _WORK:
            if self._needed():
                time.sleep(min(3 * worked, _REST))
            self._since = time.monotonic()


class RequestThread:
    """Answers requests of a kind one after another, so that they slow no others down.

    Args:
        kind: of the requests, e.g. "tokens".
        timeout: seconds that a request may take.
    """

    def __init__(self, kind: str, timeout: float):
        self._kind = kind
        self._timeout = timeout
        self._thread = ThreadPoolExecutor(1, kind)
        self._n_waiting = 0

    async def answer(self, request: Request, build: Callable[[], BaseModel]) -> Response:
        """Return the result of ``build`` as JSON.

        Raises:
            ApiError: its argument is wrong, too many requests wait, or it took too long.
        """
        if self._n_waiting >= _MAX_WAITING:
            raise ApiError(
                429,
                f"{_MAX_WAITING} requests about {self._kind} wait already: try again later",
                headers={"Retry-After": "1"},
            )
        self._n_waiting += 1
        try:
            loop = asyncio.get_running_loop()
            text = loop.run_in_executor(self._thread, lambda: build().model_dump_json().encode())
            found = await unless_disconnected(request, asyncio.wait_for(text, self._timeout))
        except asyncio.TimeoutError:
            raise timed_out() from None
        except (ValueError, TypeError) as error:
            raise ApiError(400, str(error)) from error
        finally:
            self._n_waiting -= 1
        return Response(found, media_type="application/json")
