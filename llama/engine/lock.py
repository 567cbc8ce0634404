"""One cache serves one call at a time."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llama import parallel
from llama.layers.kernels.openmp import release_team


class CacheLock:
    """Gives a model's cache to one call: other threads wait, the same thread takes over."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # held by the call that has the cache
        # Held for a moment, to look at what follows; reentrant: a stream may be collected then.
        self._state = threading.RLock()
        self._call: object = None  # which call has the cache
        self._owner: int | None = None  # the thread that works or iterates on it
        self._caller: int | None = None  # the thread that calls, where there are several ranks

    def check_thread(self) -> None:
        """Note which thread calls, where there are several ranks.

        Raises:
            RuntimeError: another one has called before.
        """
        me = threading.get_ident()
        if parallel.world_size() > 1 and self._caller not in (None, me):
            raise RuntimeError(
                "several ranks work on each call, and threads could bring calls to them in "
                "different orders: make all calls from one thread"
            )
        self._caller = me

    @contextmanager
    def exclusive(self) -> Iterator[Callable[[], None]]:
        """Hold the cache for one call, and yield a function that a stream calls before it goes on.

        Raises:
            RuntimeError: on several ranks, a second thread calls; or, from the function yielded,
                another call of the same thread has taken the cache over.
        """
        self.check_thread()
        me, call = threading.get_ident(), object()

        def check_ownership() -> None:
            with self._state:
                if self._call is not call:
                    raise RuntimeError(
                        "another call has used this Llama since the stream began: exhaust or "
                        "close() a stream before the next call"
                    )
                self._owner = threading.get_ident()  # a stream may be handed on to another thread

        try:
            with self._state:
                if self._owner == me:
                    # A thread can't wait for a stream of its own: it takes over from it.
                    self._call = call
            if self._call is not call:
                self._lock.acquire()
                with self._state:
                    self._call, self._owner = call, me
            yield check_ownership
        finally:
            with self._state:
                if self._call is call:
                    release_team()  # the next call may come from another thread
                    self._call = self._owner = None
                    self._lock.release()
