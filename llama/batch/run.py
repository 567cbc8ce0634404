"""The work on a file: its requests are answered, and its answers written as they come."""

import asyncio
import time
from collections import deque
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

from llama.batch.model import Model, Result
from llama.batch.requests import Request, Requests
from llama.batch.results import Results
from llama.cli import progress
from llama.engine.engine import Counts

SYNC = 5.0  # seconds between calls of fsync


class Tally:
    """Writes the answers to a file's requests, and shows how much of it is done.

    Args:
        requests: the file, of which some may be answered before.
        counts: of tokens, as they grow.
    """

    def __init__(self, requests: Requests, results: Results, counts: Counts):
        self._requests = requests
        self._results = results
        self._counts = counts
        self._n_written = 0
        self._n_bytes = 0  # of the requests that were answered here
        self._begin = self._synced = time.monotonic()
        self._show = progress(requests.path.stat().st_size, "answering")

    def write(self, result: Result, size: int) -> None:
        """Write the answer to a request of ``size`` bytes."""
        self._results.write(*result)
        self._n_written += 1
        self._n_bytes += size
        self._show(self._n_bytes + self._requests.answered_bytes, self._detail())
        if time.monotonic() > self._synced + SYNC:
            self._results.sync()
            self._synced = time.monotonic()

    def _detail(self) -> str:
        """Return the speed, and the time left for the rest of the bytes."""
        seconds = time.monotonic() - self._begin
        n_left = self._show.total - self._n_bytes - self._requests.answered_bytes
        left = timedelta(seconds=round(seconds * max(n_left, 0) / self._n_bytes))
        return f"{self._speed(seconds)}, {left} left"

    def _speed(self, seconds: float) -> str:
        n_read, n_written = self._counts.prompt_tokens, self._counts.generated_tokens
        return f"tokens/s: {n_read / seconds:,.0f} read, {n_written / seconds:,.0f} written"

    def summary(self, errors: Path) -> str:
        """Return a sentence about what was done."""
        seconds = time.monotonic() - self._begin
        n_before, n_failed = self._requests.n_answered, self._results.n_failed
        before = f" ({n_before:,} were answered before)" if n_before else ""
        failed = f", {n_failed:,} of them by errors, see {errors}" if n_failed else ""
        return (
            f"answered {self._n_written:,} requests in {timedelta(seconds=round(seconds))}{before}"
            f"{failed}; {self._speed(seconds)}"
        )


async def answer_all(model: Model, requests: Requests, tally: Tally) -> None:
    """Have a model answer a file's requests, as many at once as keep its engine full.

    Raises:
        EngineFailed: some have no answer.
        OSError: a file can't be read or written.
    """
    source = _Source(requests)

    async def work() -> None:
        while (request := await source.next()) is not None:
            tally.write(await model.answer(request), request.size)

    tasks = [asyncio.create_task(work()) for _ in range(model.n_ahead)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def run_beside(model: Model, work: Coroutine[Any, Any, None]) -> None:
    """Run a model's engine in this thread, and beside it what has requests answered.

    Raises:
        EngineFailed, OSError: as the work does.
    """

    def answer() -> None:
        try:
            asyncio.run(work)
        finally:
            model.stop()

    with ThreadPoolExecutor(1, "requests") as thread:
        ended = thread.submit(answer)
        model.run()
        ended.result()


class _Source:
    """Hands requests out to several tasks. The windows are read in a thread."""

    def __init__(self, requests: Requests):
        self._windows = requests.windows()
        self._window: deque[Request] = deque()
        self._lock = asyncio.Lock()

    async def next(self) -> Request | None:
        """Return the next request; None after the last one."""
        async with self._lock:
            if not self._window:
                self._window.extend(await asyncio.to_thread(next, self._windows, ()))
            return self._window.popleft() if self._window else None
