"""The answers of a request: the engine's updates, filtered by the guards."""

import asyncio
import functools
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from llama.errors import printable
from llama.guards import StreamGuard, refusal
from llama.server.errors import ApiError, log_failure
from llama.server.loop import Job, Update
from llama.server.schemas import FinishReason

T = TypeVar("T")


class Piece(NamedTuple):
    """New text of one of a request's answers."""

    number: int  # of the answer
    text: str
    n_tokens: int  # of the answer so far, whose log-probabilities may be sent
    finish: FinishReason
    stop_reason: str | int | None = None  # the text or the token id that ended it


class GuardExecutor:
    """Runs guards one after another in its own thread. If a guard fails, no text is released."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "guard")

    async def run(self, deadline: float, function: Callable[..., T], *args: Any) -> T:
        """Return the result of ``function``, which calls a guard.

        Args:
            deadline: by ``time.monotonic()``.

        Raises:
            ApiError: the deadline has passed, or the function raises.
        """
        future = asyncio.get_running_loop().run_in_executor(self._thread, function, *args)
        try:
            return await asyncio.wait_for(future, deadline - time.monotonic())
        except asyncio.TimeoutError:
            raise timed_out() from None
        except Exception as error:
            log_failure(error)
            raise ApiError(500, "the guard failed, so no text is released") from None


def timed_out() -> ApiError:
    return ApiError(504, "the request took longer than its timeout")


def _given_up(error: str) -> ApiError:
    reason = printable(error, 200)
    return ApiError(400, f"the form of the answer takes too much work, use a simpler one: {reason}")


class Answers:
    """The growing texts of one request.

    Args:
        refusals: the texts of refused answers, by number; their jobs never run.
        guards: one for each job, run by ``executor``; empty without an output guard.
        deadline: of the guards' calls.
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
        """Yield new text as it arrives.

        Raises:
            ApiError: the request took too long, its form takes too much work, or the engine or a
                guard failed.
        """
        open_jobs = set(range(len(self.jobs))) - set(self.refusals)
        try:
            for number, text in self.refusals.items():
                yield Piece(number, text, 0, "content_filter")
            while open_jobs:
                number, update = await self._updates.get()
                if number not in open_jobs:
                    continue  # refused in the meantime
                if update.finish_reason == "timeout":
                    raise timed_out()
                if update.finish_reason in ("error", "cancelled"):
                    grammar = self.jobs[number].sequence.grammar
                    if grammar is not None and grammar.error:
                        raise _given_up(grammar.error)
                    raise ApiError(500, "the server failed: see its log")
                piece = await self._guarded(number, update)
                if piece.finish is not None:
                    open_jobs.remove(number)
                if piece.text or piece.finish:
                    yield piece
        finally:
            self.close()

    async def _guarded(self, number: int, update: Update) -> Piece:
        finish: FinishReason = update.finish_reason  # type: ignore[assignment]
        stop = self.jobs[number].sequence.stop_reason if finish == "stop" else None
        if not self._guards:
            return Piece(number, update.text, update.n_tokens, finish, stop)
        guard = self._guards[number]
        run = functools.partial(self._executor.run, self._deadline)
        is_due = guard.is_due(update.text)
        text = await run(guard.push, update.text) if is_due else guard.push(update.text)
        if finish is not None and guard.refused is None:
            text += await run(guard.finish)
        if guard.refused is not None:
            self.jobs[number].cancelled = True
            text += ("\n\n" if guard.released else "") + refusal(guard.refused)
            finish, stop = "content_filter", None
        return Piece(number, text, update.n_tokens, finish, stop)

    def close(self) -> None:
        """Free the slots. Callers must call this, or exhaust or close ``pieces``."""
        for job in self.jobs:
            job.cancelled = True
