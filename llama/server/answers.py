"""Answers on their way from the engine: what is told of them, as guards let it pass."""

import asyncio
import functools
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from llama.guards import Gate, refusal
from llama.server.errors import ApiError, log_failure
from llama.server.jobs import Job, Update
from llama.server.schemas import FinishReason

T = TypeVar("T")


class Piece(NamedTuple):
    """What is new of a request's texts."""

    number: int  # which of them
    text: str
    n_tokens: int  # of this text so far, as scores may be told
    finish: FinishReason


class Judge:
    """Asks guards, one after another in a thread of its own. What goes wrong lets nothing pass."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "guard")

    async def ask(self, deadline: float, work: Callable[..., T], *args: Any) -> T:
        """What ``work``, which asks a guard, gives until ``deadline`` (by ``time.monotonic()``).

        Raises:
            ApiError: it gives nothing in time, or fails.
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
    """The texts of one request on their way.

    Args:
        refusals: what is said instead of an answer, by number; their jobs are never run.
        gates: one for each job, where a guard judges the answers, which ``judge`` asks.
        deadline: when these judgements must be there.
    """

    def __init__(
        self,
        jobs: list[Job],
        news: "asyncio.Queue[tuple[int, Update]]",
        refusals: dict[int, str],
        gates: list[Gate],
        judge: Judge,
        deadline: float,
    ):
        self.jobs = jobs
        self.refusals = refusals
        self._news = news
        self._deadline = deadline
        self._gates = gates
        self._judge = judge

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """What is new, as it comes.

        Raises:
            ApiError: the request took too long, or the network or a guard failed.
        """
        open_jobs = set(range(len(self.jobs))) - set(self.refusals)
        try:
            for number, text in self.refusals.items():
                yield Piece(number, text, 0, "content_filter")
            while open_jobs:
                number, update = await self._news.get()
                if number not in open_jobs:
                    continue  # refused meanwhile
                if update.finish == "timeout":
                    raise late()
                if update.finish in ("error", "cancelled"):
                    raise ApiError(500, "the server failed: its log says why")
                piece = await self._judged(number, update)
                if piece.finish is not None:
                    open_jobs.remove(number)
                if piece.text or piece.finish:
                    yield piece
        finally:
            self.close()

    async def _judged(self, number: int, update: Update) -> Piece:
        finish: FinishReason = update.finish  # type: ignore[assignment]
        if not self._gates:
            return Piece(number, update.text, update.n_tokens, finish)
        gate = self._gates[number]
        asks = gate.is_due(update.text)
        ask = functools.partial(self._judge.ask, self._deadline)
        text = await ask(gate.push, update.text) if asks else gate.push(update.text)
        if finish is not None and gate.refused is None:
            text += await ask(gate.finish)
        if gate.refused is not None:
            self.jobs[number].cancelled = True
            text += ("\n\n" if gate.released else "") + refusal(gate.refused)
            finish = "content_filter"
        return Piece(number, text, update.n_tokens, finish)

    def close(self) -> None:
        """Free the rows. Whoever asked for answers must call it, or exhaust or close ``pieces``."""
        for job in self.jobs:
            job.cancelled = True
