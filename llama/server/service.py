"""Between the web and the engine: requests become jobs, and what these are told becomes answers."""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from llama.chat_formats import FORMATS
from llama.decoding import Request, Row
from llama.generation import Llama
from llama.guards import Gate, refusal
from llama.prompts import UNSAFE_ERROR, Dialog, Message
from llama.server.engine import Busy, Draining, Engine
from llama.server.errors import ApiError
from llama.server.jobs import Job, Update
from llama.server.metrics import Metrics
from llama.server.schemas import FinishReason

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Piece(NamedTuple):
    """What is new of a request's texts."""

    number: int  # which of them
    text: str
    n_tokens: int  # of this text so far, as scores may be told
    finish: FinishReason


class Answers:
    """The texts of one request on their way.

    Args:
        gates: one for each, where a guard judges them.
    """

    def __init__(self, jobs: list[Job], news: "asyncio.Queue[tuple[int, Update]]", gates: Any):
        self.jobs = jobs
        self._news = news
        self._gates: list[Gate] = gates

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """What is new, as it comes. Closing the generator frees the rows.

        Raises:
            ApiError: the request took too long, or the network failed.
        """
        open_jobs = set(range(len(self.jobs)))
        try:
            while open_jobs:
                index, update = await self._news.get()
                if index not in open_jobs:
                    continue  # refused meanwhile
                if update.finish == "timeout":
                    raise ApiError(504, "the request took longer than its timeout")
                if update.finish in ("error", "cancelled"):
                    raise ApiError(500, "the server failed: its log says why")
                piece = await self._judge(index, update)
                if piece.finish is not None:
                    open_jobs.remove(index)
                if piece.text or piece.finish:
                    yield piece
        finally:
            self.close()

    async def _judge(self, index: int, update: Update) -> Piece:
        finish: FinishReason = update.finish  # type: ignore[assignment]
        if not self._gates:
            return Piece(index, update.text, update.n_tokens, finish)
        gate = self._gates[index]
        text = await asyncio.to_thread(gate.push, update.text)
        if finish is not None and gate.refused is None:
            text += await asyncio.to_thread(gate.finish)
        if gate.refused is not None:
            self.jobs[index].cancelled = True
            text += ("\n\n" if gate.released else "") + refusal(gate.refused)
            finish = "content_filter"
        return Piece(index, text, update.n_tokens, finish)

    def close(self) -> None:
        """Free the rows."""
        for job in self.jobs:
            job.cancelled = True


class Service:
    """A served model.

    Args:
        name: the model's id.
        timeout: seconds that a request may take, at most.
        prompt_lookup_num_tokens: as in ``Llama.generate``.
        log_prompts: whether the log may hold prompts and answers.
    """

    def __init__(
        self,
        llama: Llama,
        name: str,
        max_queue: int = 64,
        timeout: float = 600.0,
        prompt_lookup_num_tokens: int = 0,
        log_prompts: bool = False,
    ):
        self.llama = llama
        self.name = name
        self.created = int(time.time())
        self.engine = Engine(llama, max_queue)
        self.metrics = Metrics(self.engine)
        self.max_tokens = llama.model.params.max_seq_len
        self.infills = llama.tokenizer.prefix_id is not None
        names = [name for name, format in FORMATS.items() if format is llama.chat]
        self.chat_format = names[0] if names else "the checkpoint's own template"
        self._timeout = timeout
        self._n_lookup = prompt_lookup_num_tokens
        self._log_prompts = log_prompts
        self._mean_seconds = 1.0  # of late requests, roughly

    async def prepare(
        self,
        build: Callable[..., tuple[list[Row], Request]],
        *prompts: Any,
        max_gen_len: int | None,
        **settings: Any,
    ) -> tuple[list[Row], Request]:
        """Rows and what they have in common, by one of ``Llama``'s ways to make them.

        Raises:
            ApiError: an argument is wrong, or a prompt too long.
        """
        settings |= {"max_gen_len": max_gen_len, "prompt_lookup_num_tokens": self._n_lookup}
        try:
            # A long text takes a while to be cut into tokens.
            rows, request = await asyncio.to_thread(build, *prompts, **settings)
        except (ValueError, TypeError) as error:
            code = "context_length_exceeded" if "max_seq_len" in str(error) else None
            raise ApiError(400, str(error), code=code) from error
        for row in rows:
            if not row.prompt:
                raise ApiError(400, UNSAFE_ERROR, code="special_tags")
            if len(row.prompt) >= self.max_tokens and max_gen_len != 0:
                raise ApiError(
                    400,
                    f"the prompt has {len(row.prompt)} tokens, which leaves no room for an answer "
                    f"in the {self.max_tokens} that the server has for both: shorten it, or start "
                    "the server with a larger --max_seq_len",
                    code="context_length_exceeded",
                )
        return rows, request

    async def refused(self, dialog: Dialog) -> str | None:
        """What the input guard has to say against a dialog, if it has."""
        if self.llama.input_guard is None:
            return None
        try:
            verdict = await asyncio.to_thread(self.llama.input_guard, dialog)
        except ValueError as error:
            raise ApiError(400, f"the guard can't judge this: {error}") from error
        return None if verdict.allowed else refusal(verdict)

    def write(
        self,
        rows: Sequence[Row],
        request: Request,
        dialog: Dialog = (),
        n_top: int = 0,
        timeout: float | None = None,
        pooling: str | None = None,
    ) -> Answers:
        """Queue the rows of one request.

        Raises:
            ApiError: the queue is full, or the server is shutting down.
        """
        news: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        begin = time.monotonic()
        deadline = begin + min(self._timeout, timeout or math.inf)
        started = False

        def tell(index: int, update: Update) -> None:
            nonlocal started
            if not started:
                started = True
                self.metrics.first_token.observe(time.monotonic() - begin)
            if update.finish is not None:
                seconds = time.monotonic() - begin
                self.metrics.duration.observe(seconds)
                self._mean_seconds += 0.1 * (seconds - self._mean_seconds)
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody listens
                loop.call_soon_threadsafe(news.put_nowait, (index, update))

        jobs = [
            Job(row, request, partial(tell, i), n_top, pooling, deadline)
            for i, row in enumerate(rows)
        ]
        if self._log_prompts:
            for row in rows:
                logger.info("prompt: %r", self.llama.tokenizer.decode(row.prompt))
        if len(jobs) > self.engine.max_queue + self.llama.model.params.max_batch_size:
            raise ApiError(400, f"{len(jobs)} answers at once are more than the queue can hold")
        try:
            self.engine.submit(jobs)
        except Busy as error:
            seconds = min(60, max(1, round(self._mean_seconds)))
            headers = {"Retry-After": str(seconds)}
            raise ApiError(429, f"{error}: try again later", headers=headers) from error
        except Draining as error:
            raise ApiError(503, str(error), headers={"Retry-After": "10"}) from error
        guard = self.llama.output_guard
        return Answers(jobs, news, [] if guard is None else [Gate(dialog, guard) for _ in jobs])

    async def chat(
        self, dialog: list[Message], temperature: float, top_p: float, max_tokens: int | None
    ) -> AsyncGenerator[str, None]:
        """The answer to a dialog, piece by piece, for the page.

        Raises:
            ValueError: what is wrong, in words for the user.
        """
        build = self.llama.chat_rows
        async for text in self._text(build, [dialog], dialog, temperature, top_p, max_tokens):
            yield text

    async def complete(
        self, prompt: str, temperature: float, top_p: float, max_tokens: int | None
    ) -> AsyncGenerator[str, None]:
        """As ``chat``, of a text's continuation."""
        build, dialog = self.llama.text_rows, as_dialog(prompt)
        async for text in self._text(build, [prompt], dialog, temperature, top_p, max_tokens):
            yield text

    async def infill(
        self, prefix: str, suffix: str, temperature: float, top_p: float, max_tokens: int | None
    ) -> AsyncGenerator[str, None]:
        """As ``chat``, of what is missing between two texts."""
        build = partial(self.llama.infilling_rows, [prefix])
        dialog = as_dialog(prefix + suffix)
        async for text in self._text(build, [suffix], dialog, temperature, top_p, max_tokens):
            yield text

    async def _text(
        self,
        build: Callable[..., tuple[list[Row], Request]],
        prompts: Any,
        dialog: Dialog,
        temperature: float,
        top_p: float,
        max_tokens: int | None,
    ) -> AsyncGenerator[str, None]:
        try:
            rows, request = await self.prepare(
                build, prompts, temperature=temperature, top_p=top_p, max_gen_len=max_tokens
            )
            against = await self.refused(dialog)
            if against is not None:
                yield against
                return
            async with contextlib.aclosing(self.write(rows, request, dialog).pieces()) as pieces:
                async for piece in pieces:
                    yield piece.text
        except ApiError as error:
            raise ValueError(str(error)) from error


def as_dialog(prompt: str) -> Dialog:
    """A plain text as guards read it: what a user says."""
    return [Message(role="user", content=prompt)]
