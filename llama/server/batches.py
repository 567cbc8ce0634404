"""Large requests: their sequences are submitted in parts, so that others get their turn."""

import threading
from collections import deque
from collections.abc import Iterable

from llama.engine.engine import PREFILL_TOKENS
from llama.engine.results import FinishReason
from llama.server.loop import EngineLoop, Job

MAX_HELD = 40_960  # sequences of all large requests: as many as 2,048 prompts with 20 answers
FORM_WEIGHT = 16  # as many sequences take the memory of one with the state of a form


class Batch:
    """The jobs of a large request, of which the engine has some."""

    def __init__(self, jobs: Iterable[Job], n_held: int):
        self.n_held = n_held  # of MAX_HELD
        self.waiting = deque(jobs)
        self.n_submitted = 0  # and not ended
        self.n_tokens = 0  # of texts among them that are only read


class Batches:
    """Submits the jobs of large requests, the next ones whenever some have ended.

    Texts that are only read fill one pass at most, and those that are written leave a slot to
    other requests. Several large requests share the slots.
    """

    def __init__(self, loop: EngineLoop):
        self._loop = loop
        self._n_slots = loop.engine.model.params.max_batch_size
        self._lock = threading.Lock()  # of requests' thread and the engine's
        self._open: set[Batch] = set()

    @property
    def n_held(self) -> int:
        """The share of MAX_HELD that is taken."""
        with self._lock:
            return sum(batch.n_held for batch in self._open)

    def is_large(self, n_sequences: int) -> bool:
        """Return whether a request has more sequences than there are slots."""
        return n_sequences > self._n_slots

    def begin(self, batch: Batch) -> None:
        """Submit the first part of a batch.

        Raises:
            QueueFull, Draining: see ``EngineLoop.submit``.
        """
        with self._lock:
            self._open.add(batch)
            try:
                self._loop.submit(self._next_part(batch))
            except BaseException:
                self._open.remove(batch)
                raise

    def go_on(self, batch: Batch, job: Job, reason: FinishReason) -> None:
        """Submit more of a batch, one of whose jobs has ended."""
        with self._lock:
            batch.n_submitted -= 1
            batch.n_tokens -= _n_read(job)
            if reason in ("error", "timeout"):  # which end the request
                batch.waiting.clear()
            if part := self._next_part(batch):
                self._loop.submit(part, is_admitted=True)
            if not batch.n_submitted:
                self._open.discard(batch)

    def _next_part(self, batch: Batch) -> list[Job]:
        part = []
        while batch.waiting and self._has_room(batch, batch.waiting[0]):
            job = batch.waiting.popleft()
            if not job.cancelled:
                batch.n_submitted += 1
                batch.n_tokens += _n_read(job)
                part.append(job)
        return part

    def _has_room(self, batch: Batch, job: Job) -> bool:
        if not batch.n_submitted:
            return True
        # A text that is read frees its slot with the pass; one that is written may keep it long.
        n_slots = self._n_slots - (not job.sequence.is_read_only)
        has_slot = batch.n_submitted < n_slots // len(self._open)
        return has_slot and batch.n_tokens + _n_read(job) <= PREFILL_TOKENS


def _n_read(job: Job) -> int:
    return len(job.sequence.prompt) if job.sequence.is_read_only else 0
