"""The thread that runs the engine: jobs come in from any thread, and are told what is new."""

import logging
import threading
import time
from collections.abc import Sequence as List

from llama.engine.engine import Counts, Engine
from llama.engine.sequence import Event, FinishReason, Sequence
from llama.errors import NotFinite
from llama.server.jobs import Job
from llama.server.workers import HEARTBEAT, Workers, configure

logger = logging.getLogger(__name__)


class QueueFull(Exception):
    """The queue is full; the request may be tried again later."""


class Draining(Exception):
    """The server accepts no more requests."""


class EngineLoop:
    """Runs an engine, which nobody else may use meanwhile, on all ranks.

    Args:
        max_queue: how many jobs may wait for a slot of the cache.
    """

    def __init__(self, engine: Engine, max_queue: int = 64):
        configure(engine)
        self.engine = engine
        self.max_queue = max_queue
        self.failure: BaseException | None = None  # what ended ``run``
        self._workers = Workers()
        self._jobs: dict[Sequence, Job] = {}  # submitted and not finished
        self._inbox: list[Sequence] = []  # submitted and not known to the engine
        self._wake = threading.Condition()
        self._draining = False

    @property
    def counts(self) -> Counts:
        return self.engine.counts

    @property
    def n_active(self) -> int:
        return self.engine.n_running

    @property
    def n_waiting(self) -> int:
        return max(len(self._jobs) - self.engine.n_running, 0)

    @property
    def draining(self) -> bool:
        return self._draining

    def submit(self, jobs: List[Job]) -> None:
        """Queue jobs, all or none; callable from any thread.

        Raises:
            QueueFull: there are too many.
            Draining: the server is about to stop.
        """
        with self._wake:
            if self._draining:
                raise Draining("the server is shutting down")
            room = self.max_queue + self.engine.model.params.max_batch_size - len(self._jobs)
            if len(jobs) > room:
                raise QueueFull(f"{self.n_waiting} requests wait already")
            self._jobs |= {job.sequence: job for job in jobs}
            self._inbox += [job.sequence for job in jobs]
            self._wake.notify()

    def drain(self) -> None:
        """Accept no more jobs: ``run`` returns when those at hand are done."""
        with self._wake:
            self._draining = True
            self._wake.notify()

    def run(self) -> None:
        """Run until drained. An error that isn't a single job's ends it, and all jobs with it."""
        try:
            while self._wait():
                self.step()
            self._workers.stop()
        except BaseException as error:
            self.failure = error
            raise
        finally:
            with self._wake:
                self._draining = True
            for job in list(self._jobs.values()):
                job.update(finish_reason="error")

    def _wait(self) -> bool:
        """Wait for work; returns False where none is to come any more."""
        while True:
            with self._wake:
                if self._jobs:
                    return True
                if self._draining:
                    return False
                woken = self._wake.wait(HEARTBEAT)
            if not woken:
                self._workers.heartbeat()

    def step(self) -> None:
        """Pass on what was submitted and cancelled, run one step, and tell jobs what is new."""
        with self._wake:
            submitted, self._inbox = self._inbox, []
            ended = self._ended()
        self._workers.step(submitted, [job.sequence for job, _ in ended])
        self.engine.submit(submitted)
        for job, reason in ended:
            self.engine.cancel(job.sequence, reason)
            self._tell(Event(job.sequence))
        try:
            events = self.engine.step()
        except NotFinite as error:
            logger.error("a pass failed: %s", error)
            events = [Event(s) for s in list(self._jobs) if s.finish_reason is not None]
        for event in events:
            self._tell(event)

    def _ended(self) -> list[tuple[Job, FinishReason]]:
        """Return the jobs that nobody waits for any longer."""
        now = time.monotonic()
        ended: list[tuple[Job, FinishReason]] = []
        for job in self._jobs.values():
            if job.cancelled:
                ended.append((job, "cancelled"))
            elif now > job.deadline:
                ended.append((job, "timeout"))
        return ended

    def _tell(self, event: Event) -> None:
        job = self._jobs[event.sequence]
        if event.finish_reason is not None:
            with self._wake:
                del self._jobs[event.sequence]
        job.update(event.text, event.finish_reason)
