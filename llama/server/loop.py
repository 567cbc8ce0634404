"""The thread that runs the engine: it takes jobs from any thread, and notifies them of updates."""

import logging
import math
import sys
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import NamedTuple

from llama.engine.engine import Counts, Engine
from llama.engine.results import FinishReason
from llama.engine.sequence import Event, Sequence
from llama.errors import NotFinite
from llama.server.workers import HEARTBEAT, Workers, configure

logger = logging.getLogger(__name__)

# Seconds after which a thread that reads requests hands the interpreter over, at most. The engine
# asks for it after each of a step's operators: with Python's 0.005 it is up to six times as slow
# beside one that parses without a pause.
SWITCH_INTERVAL = 0.0001


class Update(NamedTuple):
    """New text of a job, and the number of its tokens that have been decoded so far."""

    text: str
    n_tokens: int
    finish_reason: FinishReason | None = None


@dataclass(eq=False)
class Job:
    """A sequence and its recipient.

    Args:
        notify: called with each update, in the engine's thread; the last one has a
            ``finish_reason``.
        deadline: by ``time.monotonic()``.
    """

    sequence: Sequence
    notify: Callable[[Update], None]
    deadline: float = math.inf
    cancelled: bool = False  # set from any thread

    def update(self, text: str = "", finish_reason: FinishReason | None = None) -> None:
        """Notify the recipient of new text, or of the end."""
        self.notify(Update(text, self.sequence.n_decoded, finish_reason))


class QueueFull(Exception):
    """The queue is full; the request may be tried again later."""


class Draining(Exception):
    """The server accepts no more requests."""


class EngineLoop:
    """Runs an engine on all ranks. Nothing else may use the engine in the meantime.

    Args:
        max_queue: how many jobs may wait for a slot of the cache.
        streams: False if nobody watches answers grow; the same on all ranks.
    """

    def __init__(self, engine: Engine, max_queue: int = 64, streams: bool = True):
        if streams:
            configure(engine)
        self.engine = engine
        self.max_queue = max_queue
        self.failure: BaseException | None = None  # the error that ended ``run``
        self._workers = Workers()
        self._jobs: dict[Sequence, Job] = {}  # submitted and not finished
        self._inbox: list[Sequence] = []  # submitted and not yet passed to the engine
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

    def submit(self, jobs: List[Job], is_admitted: bool = False) -> None:
        """Queue all of the jobs or none; may be called from any thread.

        Args:
            is_admitted: whether they belong to a request whose first jobs have been queued.

        Raises:
            QueueFull: there are too many.
            Draining: the server is about to stop.
        """
        with self._wake:
            if self._draining and not is_admitted:
                raise Draining("the server is shutting down")
            room = self.max_queue + self.engine.model.params.max_batch_size - len(self._jobs)
            if len(jobs) > room and not is_admitted:
                raise QueueFull(f"{self.n_waiting} requests wait already")
            self._jobs |= {job.sequence: job for job in jobs}
            self._inbox += [job.sequence for job in jobs]
            self._wake.notify()

    def drain(self) -> None:
        """Accept no more jobs; ``run`` returns when the present ones have finished."""
        with self._wake:
            self._draining = True
            self._wake.notify()

    def run(self) -> None:
        """Run until drained, or until an error that isn't a single job's, which ends all jobs."""
        usual = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_INTERVAL)
        try:
            while self._wait():
                self.step()
            self._workers.stop()
        except BaseException as error:
            self.failure = error
            raise
        finally:
            sys.setswitchinterval(usual)
            self._end_jobs()

    def fail(self, error: BaseException) -> None:
        """End all jobs with an error, from any thread: the engine's may wait for a lost rank."""
        self.failure = error
        self._end_jobs()

    def _end_jobs(self) -> None:
        self.drain()
        for job in list(self._jobs.values()):
            job.update(finish_reason="error")

    def _wait(self) -> bool:
        """Wait for jobs; return False once the loop is drained."""
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
        """Pass new and cancelled jobs to the engine, run one step, and notify the jobs."""
        with self._wake:
            submitted, self._inbox = self._inbox, []
            expired = self._expired()
        self._workers.step(submitted, [job.sequence for job, _ in expired])
        self.engine.submit(submitted, network_may_change=False)
        for job, reason in expired:
            self.engine.cancel(job.sequence, reason)
            self._notify(Event(job.sequence))
        try:
            events = self.engine.step()
        except NotFinite as error:
            logger.error("a pass failed: %s", error)
            events = [Event(s) for s in list(self._jobs) if s.finish_reason is not None]
        for event in events:
            self._notify(event)

    def _expired(self) -> list[tuple[Job, FinishReason]]:
        """Return the jobs that are cancelled or past their deadline, with the reason."""
        now = time.monotonic()
        expired: list[tuple[Job, FinishReason]] = []
        for job in self._jobs.values():
            if job.cancelled:
                expired.append((job, "cancelled"))
            elif now > job.deadline:
                expired.append((job, "timeout"))
        return expired

    def _notify(self, event: Event) -> None:
        job = self._jobs[event.sequence]
        if event.finish_reason is not None:
            with self._wake:
                del self._jobs[event.sequence]
        job.update(event.text, event.finish_reason)
