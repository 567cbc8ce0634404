"""Whose turn it is: one cache serves one call at a time."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llama import parallel


class Turns:
    """Keeps a model's cache to one call: other threads wait, the same thread takes over."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # held by the call that has the cache
        # Held for a moment, to look at what follows; reentrant: a stream may be collected then.
        self._state = threading.RLock()
        self._turn: object = None  # which call has the cache
        self._owner: int | None = None  # the thread that works or iterates on it
        self._home: int | None = None  # the thread that calls, where there are several ranks

    @contextmanager
    def exclusive(self) -> Iterator[Callable[[], None]]:
        """Keep the cache to one call. Yields what a stream asks before it goes on."""
        me = threading.get_ident()
        if parallel.world_size() > 1 and self._home not in (None, me):
            raise RuntimeError(
                "several ranks work on each call, and threads could bring calls to them in "
                "different orders: make all calls from one thread"
            )
        self._home = me
        turn = object()

        def still_mine() -> None:
            with self._state:
                if self._turn is not turn:
                    raise RuntimeError(
                        "another call has used this Llama since the stream began: exhaust or "
                        "close() a stream before the next call"
                    )
                self._owner = threading.get_ident()  # a stream may be handed on to another thread

        try:
            with self._state:
                if self._owner == me:
                    # A thread can't wait for a stream of its own: it takes over from it.
                    self._turn = turn
            if self._turn is not turn:
                self._lock.acquire()
                with self._state:
                    self._turn, self._owner = turn, me
            yield still_mine
        finally:
            with self._state:
                if self._turn is turn:
                    self._turn = self._owner = None
                    self._lock.release()
