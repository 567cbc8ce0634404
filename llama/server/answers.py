"""The answers of a request as they come from the engine and pass the guards."""

import asyncio
import functools
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from llama.guards import StreamGuard, refusal
from llama.server.errors import ApiError, log_failure
from llama.server.jobs import Job, Update
from llama.server.schemas import FinishReason

T = TypeVar("T")


class Piece(NamedTuple):
    """What is new of a request's texts."""

    number: int  # which of them
    text: str
    n_tokens: int  # of this text so far, whose scores may be shown
    finish: FinishReason


class GuardExecutor:
    """Runs guards, one after another in a thread of its own. A failure lets nothing pass."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "guard")

    async def run(self, deadline: float, work: Callable[..., T], *args: Any) -> T:
        """Return the result of ``work``, which calls a guard, if it comes before ``deadline``
        (by ``time.monotonic()``).

        Raises:
            ApiError: there is none in time, or it fails.
        """
        asked = asyncio.get_running_loop().run_in_executor(self._thread, work, *args)
        try:
            return await asyncio.wait_for(asked, deadline - time.monotonic())
        except asyncio.TimeoutError:
            raise late() from None
        except Exception as error:
            log_failure(error)
            raise ApiError(500, "the guard failed, so that nothing passes") from None


def late() -> ApiError:
    return ApiError(504, "the request took longer than its timeout")


class Answers:
    """The texts of one request as they grow.

    Args:
        refusals: the texts of answers that are refused, by number; their jobs are never run.
        guards: one for each job, where a guard judges the answers, run by ``executor``.
        deadline: of these judgements.
    """

    def __init__(
        self,
        jobs: list[Job],
        updates: "asyncio.Queue[tuple[int, Update]]",
        refusals: dict[int, str],
        guards: list[StreamGuard],
        executor: GuardExecutor,
        deadline: float,
    ):
        self.jobs = jobs
        self.refusals = refusals
        self._updates = updates
        self._deadline = deadline
        self._guards = guards
        self._executor = executor

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Yield new text as it comes.

        Raises:
            ApiError: the request took too long, or the network or a guard failed.
        """
        open_jobs = set(range(len(self.jobs))) - set(self.refusals)
        try:
            for number, text in self.refusals.items():
                yield Piece(number, text, 0, "content_filter")
            while open_jobs:
                number, update = await self._updates.get()
                if number not in open_jobs:
                    continue  # refused meanwhile
                if update.finish_reason == "timeout":
                    raise late()
                if update.finish_reason in ("error", "cancelled"):
                    raise ApiError(500, "the server failed: its log says why")
                piece = await self._guarded(number, update)
                if piece.finish is not None:
                    open_jobs.remove(number)
                if piece.text or piece.finish:
                    yield piece
        finally:
            self.close()

    async def _guarded(self, number: int, update: Update) -> Piece:
        finish: FinishReason = update.finish_reason  # type: ignore[assignment]
        if not self._guards:
            return Piece(number, update.text, update.n_tokens, finish)
        guard = self._guards[number]
        run = functools.partial(self._executor.run, self._deadline)
        is_due = guard.is_due(update.text)
        text = await run(guard.push, update.text) if is_due else guard.push(update.text)
        if finish is not None and guard.refused is None:
            text += await run(guard.finish)
        if guard.refused is not None:
            self.jobs[number].cancelled = True
            text += ("\n\n" if guard.released else "") + refusal(guard.refused)
            finish = "content_filter"
        return Piece(number, text, update.n_tokens, finish)

    def close(self) -> None:
        """Free the slots. Callers must call it, or exhaust or close ``pieces``."""
        for job in self.jobs:
            job.cancelled = True
