"""Between the web and the engine: requests become jobs, and what these are told becomes answers."""

import asyncio
import contextlib
import logging
import math
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from llama.chat.formats import FORMATS
from llama.chat.prompts import UNSAFE_ERROR, Dialog, Message
from llama.decoding import Request, Row
from llama.generation import Llama
from llama.guards import Gate, InputGuard, checked_verdict, refusal
from llama.server.answers import Answers, Judge
from llama.server.engine import Busy, Draining, Engine
from llama.server.errors import ApiError
from llama.server.jobs import Job, Update
from llama.server.metrics import Metrics

MAX_SCORES = 400_000  # log-probabilities of a request; each takes some 300 bytes

logger = logging.getLogger(__name__)


class Service:
    """A served model.

    Args:
        name: the model's id.
        max_queue: how many texts may wait for a row of the cache.
        timeout: seconds that a request may take, at most.
        prompt_lookup_num_tokens: as in ``Llama.generate``.
        log_prompts: whether the log may hold prompts.
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
        self._judge = Judge()
        self._capacity = max_queue + llama.model.params.max_batch_size
        self._timeout = timeout
        self._n_lookup = prompt_lookup_num_tokens
        self._log_prompts = log_prompts
        self._n_preparing = 0  # rows that are on their way to the queue
        self._mean_seconds = 1.0  # of late answers, roughly

    async def ask(
        self,
        build: Callable[..., tuple[list[Row], Request]],
        *prompts: Sequence[Any],
        n: int = 1,
        dialogs: Sequence[Dialog] | None = None,
        n_top: int = 0,
        timeout: float | None = None,
        embed: bool = False,
        **settings: Any,
    ) -> Answers:
        """Answers to prompts, ``n`` to each, which guards have been asked about.

        Args:
            build: one of ``Llama``'s ways to make rows, which takes ``prompts`` and ``settings``.
            dialogs: the prompts as guards read them; by default their texts as a user's.
            n_top: how many of the likeliest tokens to keep at each place.
            timeout: seconds, if fewer than the server allows.
            embed: whether only the prompts' vectors are wanted, which guards don't judge.

        Raises:
            ApiError: an argument is wrong, a prompt too long, the queue full, or the server about
                to end.
        """
        begin = time.monotonic()
        deadline = begin + min(self._timeout, timeout or math.inf)
        input_guard, output_guard = self.llama.input_guard, self.llama.output_guard
        if embed:
            input_guard = output_guard = None
        count = len(prompts[0]) * n
        if count > self._capacity:
            raise ApiError(
                400, f"{count} answers are asked for, and the server can queue {self._capacity}"
            )
        if self._n_preparing + self.engine.n_waiting + count > self._capacity:
            raise self._busy()
        self._n_preparing += count
        try:
            repeated = [[prompt for prompt in each for _ in range(n)] for each in prompts]
            rows, request = await self._prepare(build, repeated, settings)
            if request.logprobs:
                _check_scores(rows, request.echo, n_top)
            if dialogs is None and (input_guard or output_guard):
                decode = self.llama.tokenizer.decode
                dialogs = [as_dialog(decode(row.prompt)) for row in rows[::n]]
            refusals: dict[int, str] = {}
            for i, dialog in enumerate(dialogs or ()):
                against = await self._refusal(input_guard, dialog, deadline)
                if against is not None:
                    refusals |= dict.fromkeys(range(i * n, (i + 1) * n), against)
        finally:
            self._n_preparing -= count
        gates = []
        if output_guard is not None and dialogs is not None:
            gates = [Gate(dialogs[i // n], output_guard) for i in range(count)]
        jobs, news = self._submit(rows, request, refusals, begin, deadline, n_top, embed)
        return Answers(jobs, news, refusals, gates, self._judge, deadline)

    async def _prepare(
        self,
        build: Callable[..., tuple[list[Row], Request]],
        prompts: Sequence[Sequence[Any]],
        settings: dict[str, Any],
    ) -> tuple[list[Row], Request]:
        try:
            # A long text takes a while to be cut into tokens.
            rows, request = await asyncio.to_thread(
                build, *prompts, **{"prompt_lookup_num_tokens": self._n_lookup, **settings}
            )
        except (ValueError, TypeError) as error:
            found = re.match(r"prompt \d+ has (\d+) tokens, more than max_seq_len", str(error))
            raise self._too_long(found[1]) if found else ApiError(400, str(error)) from error
        for row in rows:
            if not row.prompt:
                chat = build == self.llama.chat_rows
                raise ApiError(400, UNSAFE_ERROR if chat else "a prompt has no tokens")
            if max(row.prompt) >= request.n_words:
                raise ApiError(400, f"token ids end with {request.n_words - 1}")
            if len(row.prompt) >= self.max_tokens and settings["max_gen_len"] != 0:
                raise self._too_long(len(row.prompt))
        return rows, request

    def _too_long(self, n_tokens: int | str) -> ApiError:
        return ApiError(
            400,
            f"the prompt has {n_tokens} tokens, which leaves no room for an answer in the "
            f"{self.max_tokens} that the server has for both: shorten it, or start the server with "
            "a larger --max_seq_len",
            code="context_length_exceeded",
        )

    def _busy(self) -> ApiError:
        seconds = min(60, max(1, round(self._mean_seconds)))
        return ApiError(
            429, "the queue is full: try again later", headers={"Retry-After": str(seconds)}
        )

    async def _refusal(
        self, guard: InputGuard | None, dialog: Dialog, deadline: float
    ) -> str | None:
        """What the input guard has to say against a dialog, if it has."""
        if guard is None:
            return None
        verdict = await self._judge.ask(deadline, lambda: checked_verdict(guard(dialog)))
        return None if verdict.allowed else refusal(verdict)

    def _submit(
        self,
        rows: Sequence[Row],
        request: Request,
        refusals: dict[int, str],
        begin: float,
        deadline: float,
        n_top: int,
        embed: bool,
    ) -> tuple[list[Job], "asyncio.Queue[tuple[int, Update]]"]:
        """Queue the rows that aren't refused; returns a job for each, and where they tell news."""
        news: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        waits = True  # for a first token, which vectors have none of

        def tell(number: int, update: Update) -> None:
            nonlocal waits
            seconds = time.monotonic() - begin
            if waits and update.n_tokens:
                waits = False
                self.metrics.first_token.observe(seconds)
            if update.finish in ("stop", "length") and not embed:
                self.metrics.duration.observe(seconds)
                self._mean_seconds += 0.1 * (seconds - self._mean_seconds)
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody listens
                loop.call_soon_threadsafe(news.put_nowait, (number, update))

        jobs = [
            Job(row, request, partial(tell, i), n_top, embed, deadline)
            for i, row in enumerate(rows)
        ]
        if self._log_prompts:
            for row in rows:
                logger.info("prompt: %r", self.llama.tokenizer.decode(row.prompt))
        try:
            self.engine.submit([job for i, job in enumerate(jobs) if i not in refusals])
        except Busy as error:
            raise self._busy() from error
        except Draining as error:
            raise ApiError(503, str(error), headers={"Retry-After": "10"}) from error
        return jobs, news

    async def chat(
        self, dialog: list[Message], temperature: float, top_p: float, max_tokens: int | None
    ) -> AsyncGenerator[str, None]:
        """The answer to a dialog, piece by piece, for the page.

        Raises:
            ValueError: what is wrong, in words for the user.
        """
        sampling = _sampling(temperature, top_p, max_tokens)
        asked = self.ask(self.llama.chat_rows, [dialog], dialogs=[dialog], **sampling)
        async for text in _texts(asked):
            yield text

    async def complete(
        self, prompt: str, temperature: float, top_p: float, max_tokens: int | None
    ) -> AsyncGenerator[str, None]:
        """As ``chat``, of a text's continuation."""
        sampling = _sampling(temperature, top_p, max_tokens)
        asked = self.ask(self.llama.text_rows, [prompt], in_context=True, **sampling)
        async for text in _texts(asked):
            yield text

    async def infill(
        self, prefix: str, suffix: str, temperature: float, top_p: float, max_tokens: int | None
    ) -> AsyncGenerator[str, None]:
        """As ``chat``, of what is missing between two texts."""
        sampling = _sampling(temperature, top_p, max_tokens)
        async for text in _texts(
            self.ask(self.llama.infilling_rows, [prefix], [suffix], **sampling)
        ):
            yield text


def _check_scores(rows: Sequence[Row], echo: bool, n_top: int) -> None:
    """Raise an ``ApiError`` where several texts have more scores than a request may ask for."""
    n_tokens = sum(row.limit + (len(row.prompt) if echo else 0) for row in rows)
    n_scores = n_tokens * (1 + n_top)
    if len(rows) > 1 and n_scores > MAX_SCORES:
        raise ApiError(
            400,
            f"up to {n_tokens:,} tokens with {n_top} alternatives each are {n_scores:,} "
            f"log-probabilities, more than the {MAX_SCORES:,} that a request of several texts may "
            "have: ask for fewer prompts, answers, tokens or alternatives at once",
            "logprobs",
        )


def _sampling(temperature: float, top_p: float, max_tokens: int | None) -> dict[str, Any]:
    return {"temperature": temperature, "top_p": top_p, "max_gen_len": max_tokens}


async def _texts(asked: Awaitable[Answers]) -> AsyncGenerator[str, None]:
    try:
        async with contextlib.aclosing((await asked).pieces()) as pieces:
            async for piece in pieces:
                yield piece.text
    except ApiError as error:
        raise ValueError(str(error)) from error


def as_dialog(prompt: str) -> Dialog:
    """A plain text as guards read it: what a user says."""
    return [Message(role="user", content=prompt)]
