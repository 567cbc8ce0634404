"""From HTTP to the engine and back: requests become jobs, whose updates become answers."""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

from llama.chat.prompts import UNSAFE_ERROR, Dialog, Message
from llama.engine.sequence import Sequence as EngineSequence
from llama.engine.tasks import between_prompts
from llama.errors import PromptTooLong, WrongForm
from llama.generation import Llama
from llama.guards import InputGuard, StreamGuard, input_refusal
from llama.sampling import SamplingParams
from llama.server.answers import Answers, GuardExecutor, timed_out
from llama.server.batches import FORM_WEIGHT, MAX_HELD, Batch, Batches
from llama.server.config import ServerConfig
from llama.server.errors import ApiError, ContextLengthExceeded
from llama.server.loop import Draining, EngineLoop, Job, QueueFull, Update
from llama.server.metrics import Metrics
from llama.server.threads import Pauses
from llama.tokenizers.spellings import Spellings

MAX_SCORES = 400_000  # log-probabilities of a request; each takes about 300 bytes

logger = logging.getLogger(__name__)

Updates = asyncio.Queue[tuple[int, Update]]


class Service:
    """A served model: it submits requests to the engine and applies the guards."""

    def __init__(self, llama: Llama, config: ServerConfig, streams: bool = True):
        """Wrap a model.

        Args:
            streams: as in ``EngineLoop``.

        Raises:
            ValueError: ``--sampling checkpoint``, and the checkpoint recommends nothing.
        """
        self.llama = llama
        llama.tasks.ranks = "alone"  # the others get the sequences
        self.config = config
        self.name = config.name
        self.created = int(time.time())
        self.loop = EngineLoop(llama.engine, config.max_queue, streams)
        # Where nobody watches, an answer comes in one piece: each costs the engine some time. An
        # output guard judges as the text grows.
        self._in_pieces = streams or llama.output_guard is not None
        self._batches = Batches(self.loop)
        self.metrics = Metrics(self.loop)
        self.max_tokens = llama.model.params.max_seq_len
        self.infills = llama.tokenizer.prefix_id is not None
        self.chat_format = llama.chat.name
        self.spellings = Spellings(llama.tokenizer)
        params = SamplingParams(
            sampling=config.sampling, prompt_lookup_num_tokens=config.prompt_lookup_num_tokens
        )
        # Applied once, so that a request may also set a value that is the library's default.
        self.defaults = replace(llama.tasks.recommended.apply(params), sampling=None)
        self._guards = GuardExecutor()
        self._capacity = config.max_queue + llama.model.params.max_batch_size
        self._n_preparing = 0  # sequences that will be queued
        self._n_preparing_held = 0  # those of large requests
        # Forms may take long: with threads of their own, other requests don't wait for them.
        self._forms = ThreadPoolExecutor(self._capacity, "form")
        # Large requests hold Python's lock for long: one after another, and not once they are left.
        self._large = ThreadPoolExecutor(1, "large")
        self._mean_seconds = 1.0  # of recent answers, approximately

    async def submit(
        self,
        make: Callable[[], list[EngineSequence]],
        n_sequences: int,
        n: int = 1,
        dialogs: Sequence[Dialog] | None = None,
        timeout: float | None = None,
        has_form: bool = False,
        has_scores: bool = False,
    ) -> Answers:
        """Submit prompts and return their answers, once the input guard has allowed them.

        More sequences than there are slots are worked through in parts, beside other requests.

        Args:
            make: makes the sequences, ``n`` of each prompt; called in a thread, as it takes a
                while to tokenise a long text.
            n_sequences: the number of sequences that ``make`` returns.
            dialogs: the prompts as guards read them; by default their texts as user messages.
            timeout: seconds, if fewer than the server allows.
            has_form: whether ``make`` compiles a form of answers.
            has_scores: whether log-probabilities are returned.

        Raises:
            ApiError: an argument is wrong, a prompt is too long, the queue is full, the deadline
                has passed, or the server is shutting down.
        """
        begin = time.monotonic()
        deadline = begin + min(self.config.timeout, timeout or math.inf)
        input_guard, output_guard = self.llama.input_guard, self.llama.output_guard
        with self._place(n_sequences, has_form) as n_held:
            try:
                threads = self._forms if has_form else self._large if n_held else None
                prepared = self._prepare(make, threads, dialogs is not None, has_scores)
                sequences = await asyncio.wait_for(prepared, deadline - time.monotonic())
                if any(sequence.is_read_only for sequence in sequences):
                    input_guard = output_guard = None  # nothing is generated
                elif dialogs is None and (input_guard or output_guard):
                    decode = self.llama.tokenizer.decode
                    dialogs = [as_dialog(decode(sequence.prompt)) for sequence in sequences[::n]]
                refusals: dict[int, str] = {}
                for i, dialog in enumerate(dialogs or ()):
                    refused = await self._refusal(input_guard, dialog, deadline)
                    if refused is not None:
                        refusals |= dict.fromkeys(range(i * n, (i + 1) * n), refused)
            except asyncio.TimeoutError:
                raise timed_out() from None
        guards = []
        if output_guard is not None and dialogs is not None:
            guards = [StreamGuard(dialogs[i // n], output_guard) for i in range(n_sequences)]
        jobs, updates = self._queue(sequences, refusals, begin, deadline, n_held)
        return Answers(jobs, updates, refusals, guards, self._guards, deadline)

    @contextlib.contextmanager
    def _place(self, n_sequences: int, has_form: bool) -> Iterator[int]:
        """Keep places in the queue for sequences that are being prepared.

        A large request takes as many as its parts need. Returns its share of ``MAX_HELD``.
        """
        n_queued, n_held = n_sequences, 0
        if self._batches.is_large(n_sequences):
            n_queued = self.llama.model.params.max_batch_size
            n_held = n_sequences * (FORM_WEIGHT if has_form else 1)
            if n_held > MAX_HELD:
                raise ApiError(
                    400,
                    f"the request has {n_sequences:,} answers, and the server can hold "
                    f"{MAX_HELD:,}, or {MAX_HELD // FORM_WEIGHT:,} that have a form: send fewer "
                    "prompts, or ask for fewer answers to each",
                )
        if self._n_preparing + self.loop.n_waiting + n_queued > self._capacity:
            raise self._queue_full()
        if n_held and self._n_preparing_held + self._batches.n_held + n_held > MAX_HELD:
            raise self._queue_full()
        self._n_preparing += n_queued
        self._n_preparing_held += n_held
        try:
            yield n_held
        finally:
            self._n_preparing -= n_queued
            self._n_preparing_held -= n_held

    async def _prepare(
        self,
        make: Callable[[], list[EngineSequence]],
        threads: ThreadPoolExecutor | None,
        is_chat: bool,
        has_scores: bool,
    ) -> list[EngineSequence]:
        def make_and_check() -> list[EngineSequence]:
            if threads is self._large:  # it has one thread, whose context this is
                between_prompts.set(Pauses(lambda: self.loop.n_active > 0).rest)
            sequences = make()
            self._check(sequences, is_chat)
            if has_scores:
                _check_scores(sequences)
            return sequences

        try:
            return await asyncio.get_running_loop().run_in_executor(threads, make_and_check)
        except PromptTooLong as error:
            raise self._too_long(error.n_tokens, error.n_virtual, is_chat) from error
        except WrongForm as error:
            raise ApiError(400, str(error), "response_format") from error
        except ImportError as error:  # of what compiles forms
            raise ApiError(501, f"the server lacks a package: {error}") from error
        except (ValueError, TypeError) as error:
            raise ApiError(400, str(error)) from error

    def _check(self, sequences: Sequence[EngineSequence], is_chat: bool) -> None:
        """Raise ``ApiError`` for a prompt that can't be answered."""
        n_words = self.llama.tokenizer.n_words
        for sequence in sequences:
            if not sequence.prompt:
                raise ApiError(400, UNSAFE_ERROR if is_chat else "a prompt has no tokens")
            if max(sequence.prompt) >= n_words:
                raise ApiError(400, f"token ids end with {n_words - 1}")
            leaves_room = len(sequence.input_ids) < self.max_tokens or sequence.is_read_only
            if not leaves_room and sequence.params.max_gen_len != 0:
                raise self._too_long(len(sequence.prompt), sequence.n_virtual, is_chat)

    def _too_long(self, n_tokens: int, n_virtual: int, is_chat: bool) -> ApiError:
        field = "messages" if is_chat else "prompt"
        return ContextLengthExceeded(self.max_tokens, n_tokens, n_virtual, field)

    def _queue_full(self) -> ApiError:
        seconds = min(60, max(1, round(self._mean_seconds)))
        return ApiError(
            429, "the queue is full: try again later", headers={"Retry-After": str(seconds)}
        )

    async def _refusal(
        self, guard: InputGuard | None, dialog: Dialog, deadline: float
    ) -> str | None:
        """Return the input guard's refusal of a dialog; None if it is allowed."""
        if guard is None:
            return None
        return await self._guards.run(deadline, input_refusal, guard, dialog)

    def _queue(
        self,
        sequences: Sequence[EngineSequence],
        refusals: dict[int, str],
        begin: float,
        deadline: float,
        n_held: int,
    ) -> tuple[list[Job], Updates]:
        """Queue the sequences that aren't refused; return a job for each, and their updates.

        Those of a large request, which has ``n_held``, are queued in parts.
        """
        updates: Updates = asyncio.Queue()
        loop = asyncio.get_running_loop()
        is_waiting = True  # for a first token

        def notify(number: int, update: Update) -> None:
            nonlocal is_waiting
            if not self._in_pieces:
                if update.finish_reason is None:
                    return
                update = update._replace(text=jobs[number].sequence.text)
            seconds = time.monotonic() - begin
            if is_waiting and update.n_tokens:
                is_waiting = False
                self.metrics.first_token.observe(seconds)
            if update.finish_reason in ("stop", "length") and not sequences[number].is_read_only:
                self.metrics.duration.observe(seconds)
                self._mean_seconds += 0.1 * (seconds - self._mean_seconds)
            with contextlib.suppress(RuntimeError):  # the event loop has ended
                loop.call_soon_threadsafe(updates.put_nowait, (number, update))
            if batch is not None and update.finish_reason is not None:
                self._batches.go_on(batch, jobs[number], update.finish_reason)

        jobs = [Job(sequence, partial(notify, i), deadline) for i, sequence in enumerate(sequences)]
        if self.config.log_prompts:
            for sequence in sequences:
                logger.info("prompt: %r", self.llama.tokenizer.decode(sequence.prompt))
        allowed = [job for i, job in enumerate(jobs) if i not in refusals]
        batch = Batch(allowed, n_held) if n_held and allowed else None
        try:
            if batch is None:
                self.loop.submit(allowed)
            else:
                self._batches.begin(batch)
        except QueueFull as error:
            raise self._queue_full() from error
        except Draining as error:
            raise ApiError(503, str(error), headers={"Retry-After": "10"}) from error
        return jobs, updates

    def params(self, **given: Any) -> SamplingParams:
        """Return sampling parameters: those that are given, and the server's defaults.

        Raises:
            ApiError: a token id isn't in the vocabulary.
        """
        n_words = self.llama.tokenizer.n_words
        for name in ("logit_bias", "stop_token_ids"):
            largest = max(given.get(name, ()), default=0)
            if largest >= n_words:
                raise ApiError(400, f"{name}: token ids end with {n_words - 1}", name)
        return replace(self.defaults, **given)


def _check_scores(sequences: Sequence[EngineSequence]) -> None:
    """Raise ``ApiError`` if several texts have more log-probabilities than a request may have."""
    if len(sequences) < 2:
        return
    params = sequences[0].params
    n_tokens = sum(s.max_new_tokens + (len(s.prompt) if params.echo else 0) for s in sequences)
    n_scores = n_tokens * (1 + params.top_logprobs)
    if n_scores > MAX_SCORES:
        raise ApiError(
            400,
            f"up to {n_tokens:,} tokens with {params.top_logprobs} alternatives each are "
            f"{n_scores:,} log-probabilities, more than the {MAX_SCORES:,} that a request of "
            "several texts may have: ask for fewer prompts, answers, tokens or alternatives at "
            "once",
            "logprobs",
        )


def as_dialog(prompt: str) -> Dialog:
    """Return a prompt as a dialog of one user message, for guards."""
    return [Message(role="user", content=prompt)]
