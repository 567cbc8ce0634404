"""Continuous batching: requests take rows of the cache as they come, and leave them as they end.

One thread runs the network. Each of its passes brings the next token of every row that is being
written, and beside them a piece of the prompts that wait to be read, so that nobody's stream
stands still while a newcomer's prompt is read.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from llama.decoding import score_prompt, take_checked
from llama.errors import NotFinite
from llama.generation import Llama
from llama.packing import PREFILL_CHUNK, PREFILL_TOKENS, Segment
from llama.prefixes import common_prefix
from llama.sampling import next_tokens, token_logprobs
from llama.server import ranks
from llama.server.jobs import Alternatives, Finish, Job

logger = logging.getLogger(__name__)

PIECE = 64  # tokens of prompts that a pass reads beside rows that are being written, on a CPU
GUESSING = 12  # tokens of writing rows in a pass, guessed ones included; more would slow it down
WORTH_COPYING = 8  # tokens that another row holds
HEARTBEAT = 5.0  # seconds between signs of life to the other ranks


class Busy(Exception):
    """The queue is full; the request may be tried again later."""


class Draining(Exception):
    """The server takes no more requests."""


@dataclass
class Counts:
    """What the engine has done so far."""

    prompt_tokens: int = 0  # read
    reused_tokens: int = 0  # that needed no reading
    generated_tokens: int = 0
    passes: int = 0


class Engine:
    """Works off jobs with a ``Llama``, which nobody else may use meanwhile.

    Args:
        max_queue: how many jobs may wait for a row of the cache.
    """

    def __init__(self, llama: Llama, max_queue: int = 64):
        self.llama = llama
        self.max_queue = max_queue
        self.counts = Counts()
        self.failure: BaseException | None = None  # what ended ``run``
        params = llama.model.params
        self._held: list[list[int]] = [[] for _ in range(params.max_batch_size)]
        self._last_use = [0] * params.max_batch_size
        self._free = set(range(params.max_batch_size))
        self._waiting: deque[Job] = deque()
        self._active: list[Job] = []  # in the order in which they came
        self._copies: list[tuple[int, int, int]] = []  # between rows, before the next pass
        self._wake = threading.Condition()
        self._draining = False
        self._piece = PIECE if llama.model.freqs_cis.device.type == "cpu" else PREFILL_CHUNK

    @property
    def n_active(self) -> int:
        return len(self._active)

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    @property
    def draining(self) -> bool:
        return self._draining

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs, all or none; callable from any thread.

        Raises:
            Busy: there are too many.
            Draining: the engine is about to stop.
        """
        with self._wake:
            if self._draining:
                raise Draining("the server is shutting down")
            room = self.max_queue + len(self._free) - len(self._waiting)
            if len(jobs) > room:
                raise Busy(f"{len(self._waiting)} requests wait already")
            self._waiting += jobs
            self._wake.notify()

    def drain(self) -> None:
        """Take no more jobs: ``run`` returns when those at hand are done."""
        with self._wake:
            self._draining = True
            self._wake.notify()

    def run(self) -> None:
        """Work until drained. An error that isn't a single job's ends it, and all jobs with it."""
        model = self.llama.model
        try:
            while self._wait():
                self.step()
            ranks.dismiss(model)
        except BaseException as error:
            self.failure = error
            raise
        finally:
            with self._wake:
                self._draining = True
            for job in [*self._active, *self._waiting]:
                job.tell(finish="error")

    def _wait(self) -> bool:
        """Until there is work; returns False where none is to come any more."""
        while True:
            with self._wake:
                if self._active or self._waiting:
                    return True
                if self._draining:
                    return False
                woken = self._wake.wait(HEARTBEAT)
            if not woken:
                ranks.beat(self.llama.model)

    def step(self) -> None:
        """Let rows go that are no longer wanted, let jobs in, and do one pass."""
        self._retire()
        self._admit()
        vector = next((job for job in self._active if job.embed and job.reading), None)
        try:
            if vector is not None:
                self._read_for_vector(vector)
            self._write()
        except NotFinite as error:
            logger.error("a pass failed: %s", error)
            self._held = [[] for _ in self._held]  # the cache is empty now
            for job in list(self._active):
                self._finish(job, "error")

    def _retire(self) -> None:
        now = time.monotonic()
        with self._wake:
            jobs = [*self._active, *self._waiting]
        for job in jobs:
            finish: Finish | None = None
            if job.cancelled:
                finish = "cancelled"
            elif now > job.deadline:
                finish = "timeout"
            if finish is not None:
                self._finish(job, finish)

    def _finish(self, job: Job, finish: Finish, text: str = "") -> None:
        with self._wake:
            if job.place < 0:
                self._waiting.remove(job)
            else:
                self._active.remove(job)
                self._free.add(job.place)
                self._last_use[job.place] = self.counts.passes
        job.tell(text, finish)

    def _admit(self) -> None:
        with self._wake:
            while self._free and self._waiting and not self._soon_held(self._waiting[0]):
                job = self._waiting.popleft()
                self._place(job)
                self._active.append(job)

    def _soon_held(self, job: Job) -> bool:
        """Whether a prompt that is being read has a beginning that spares this one's reading."""
        if job.scores_prompt or job.embed:
            return False
        prompt, limit = job.row.prompt, len(job.row.prompt) - 1
        held = max(common_prefix(prompt, tokens, limit) for tokens in self._held)
        return any(
            common_prefix(prompt, other.row.prompt, limit) > held + PIECE
            for other in self._active
            if other.reading
        )

    def _place(self, job: Job) -> None:
        """Give a job the row that holds the text it continues, else the one unused for longest.

        A beginning that another row holds is copied from there.
        """
        prompt = job.row.prompt
        # What is scored or pooled must pass through the network.
        limit = 0 if job.scores_prompt or job.embed else len(prompt) - 1
        common = [common_prefix(prompt, held, limit) for held in self._held]
        best = max(range(len(common)), key=lambda row: (common[row], row in self._free))
        continues = best in self._free and 2 * common[best] > len(self._held[best])
        place = best if continues else min(self._free, key=lambda row: self._last_use[row])
        if common[best] >= common[place] + WORTH_COPYING:
            self._copies.append((best, place, common[best]))
            common[place] = common[best]
        self._free.remove(place)
        self._held[place] = prompt[: common[place]]
        job.place, job.n_read, job.n_reused = place, common[place], common[place]
        self.counts.reused_tokens += common[place]

    def _forward(
        self, pieces: Sequence[tuple[Job, int, list[int]]], select: list[int] | None, hidden: bool
    ) -> torch.Tensor:
        """A pass over (job, first position, tokens), rows ascending."""
        segments = [Segment(job.place, start, len(tokens)) for job, start, tokens in pieces]
        ids = [token for _, _, tokens in pieces for token in tokens]
        work = ranks.Pass(self._copies, ids, segments, select, hidden)
        self._copies = []
        self.counts.passes += 1
        for job, start, tokens in pieces:
            # A guess that turns out wrong stays in the cache too, until it is written over.
            self._held[job.place][start:] = tokens
        return ranks.lead(self.llama.model, work)

    def _read_for_vector(self, job: Job) -> None:
        """Pass one more piece of a text whose vector is wanted."""
        alone = all(other.embed for other in self._active)
        length = PREFILL_CHUNK if alone else self._piece
        tokens = job.row.prompt[job.n_read : job.n_read + length]
        hidden = self._forward([(job, job.n_read, tokens)], None, hidden=True)
        if job.vector is None:
            job.vector = torch.zeros_like(hidden[0])
        job.vector += hidden.sum(0) / len(job.row.prompt)
        job.n_read += len(tokens)
        self.counts.prompt_tokens += len(tokens)
        if not job.reading:
            self._finish(job, "stop")

    def _next_pieces(self) -> list[tuple[Job, int, list[int]]]:
        """What the next pass reads: each writing row's last token, and some tokens of prompts."""
        n_writing = sum(not job.reading for job in self._active if not job.embed)
        budget = self._piece if n_writing else PREFILL_TOKENS
        most = max(GUESSING // max(n_writing, 1) - 1, 0)
        pieces = []
        for job in self._active:
            row = job.row
            if job.embed:
                continue
            if not job.reading:
                start = len(row.prompt) + len(row.tokens) - 1
                pieces.append((job, start, [row.tokens[-1], *row.guess(most)]))
            elif budget:
                tokens = row.prompt[job.n_read : job.n_read + min(budget, PREFILL_CHUNK)]
                pieces.append((job, job.n_read, tokens))
                budget -= len(tokens)
        return sorted(pieces, key=lambda piece: piece[0].place)

    def _write(self) -> None:
        """One pass of everything but vectors, and what comes of it."""
        pieces = self._next_pieces()
        if not pieces:
            return
        wanted: list[int] = []  # tokens of the pass whose logits are
        counts = []
        total = 0
        for job, start, tokens in pieces:
            total += len(tokens)
            if not job.reading or job.scores_prompt:
                count = len(tokens)
            else:
                count = int(start + len(tokens) == len(job.row.prompt))
            counts.append(count)
            wanted += range(total - count, total)
        logits = self._forward(pieces, None if len(wanted) == total else wanted, hidden=False)
        chosen_from = []
        for (job, start, tokens), part in zip(pieces, logits.split(counts), strict=True):
            if job.reading:
                part = self._read(job, start, len(tokens), part)
                tokens = tokens[:0]
            if len(part):
                chosen_from.append((job, tokens[1:], part))
        self._choose(chosen_from)

    def _read(self, job: Job, start: int, length: int, logits: torch.Tensor) -> torch.Tensor:
        """Note that a prompt's piece is read; returns the logits after its end, if it was."""
        self.counts.prompt_tokens += length
        job.n_read += length
        if job.scores_prompt:
            score_prompt(job.row, start, logits)
            if start == 0:
                job.prompt_top.append([])
            job.prompt_top += _top(logits, job)[: len(job.row.prompt) - start - 1]
        if job.reading:
            return logits[:0]
        if job.row.done:  # nothing but the prompt was asked for
            self._finish(job, "length")
            return logits[:0]
        return logits[-1:]

    def _choose(self, rows: Sequence[tuple[Job, list[int], torch.Tensor]]) -> None:
        """Give rows their next tokens: (job, what was guessed, the logits)."""
        if not rows:
            return
        logits = torch.cat([part for _, _, part in rows])
        owners = [job for job, _, part in rows for _ in range(len(part))]
        numbers = [job.row.uniform(i) for job, _, part in rows for i in range(len(part))]
        tokens = _draw(logits, owners, numbers)
        scores = iter([0.0] * len(owners))
        if any(job.request.logprobs for job in owners):
            scores = iter(token_logprobs(logits, tokens).tolist())
        ids = iter(tokens.tolist())
        for job, guess, part in rows:
            n = len(part)
            chosen = list(zip(islice(ids, n), islice(scores, n), strict=True))
            self._take(job, guess, chosen, part)

    def _take(
        self, job: Job, guess: list[int], chosen: list[tuple[int, float]], logits: torch.Tensor
    ) -> None:
        row = job.row
        before = len(row.tokens)
        text = "".join(take_checked(row, guess, chosen, job.request))
        self.counts.generated_tokens += max(len(row.tokens) - before, 0)
        if job.n_top:
            job.top += _top(logits[: max(len(row.tokens) - before, 0)], job)
        if row.done:
            self._finish(job, "stop" if row.ended else "length", text)
        else:
            job.tell(text)


def _draw(logits: torch.Tensor, owners: Sequence[Job], numbers: list[float]) -> torch.Tensor:
    """A token by each number, as its owner's request says; shape (len(owners),)."""
    n_words = owners[0].request.n_words
    uniforms = torch.tensor(numbers, device=logits.device)
    tokens = torch.zeros(len(owners), dtype=torch.long, device=logits.device)
    groups: dict[tuple[float, float], list[int]] = {}  # ways to draw, and whose they are
    for i, job in enumerate(owners):
        groups.setdefault((job.request.temperature, job.request.top_p), []).append(i)
    for (temperature, top_p), at in groups.items():
        rows = slice(None) if len(at) == len(owners) else at
        known = logits[rows, :n_words]
        tokens[rows] = next_tokens(known, temperature, top_p, uniforms[rows])
    return tokens


def _top(logits: torch.Tensor, job: Job) -> list[Alternatives]:
    """A job's likeliest tokens by each row of logits, with their log-probabilities."""
    if not job.n_top:
        return [[] for _ in logits]
    # Ids beyond the tokenizer's count in the probabilities, but mean nothing.
    values, ids = logits.log_softmax(-1)[:, : job.request.n_words].topk(job.n_top)
    return [
        list(zip(row_ids, row, strict=True))
        for row_ids, row in zip(ids.tolist(), values.tolist(), strict=True)
    ]
