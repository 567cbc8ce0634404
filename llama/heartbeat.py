"""Signs of life between the ranks: a lost machine ends the job, which would wait for it.

When a process dies, its machine closes its connections, and the ranks that wait for it see that. A
machine without power or network closes nothing: its partners would wait in a collective for ever.
So each rank writes a number to the store where the ranks met, once a second, and reads the others'.
"""

import contextlib
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from llama.errors import RankLost

logger = logging.getLogger(__name__)

INTERVAL = 1.0  # seconds between two signs of life
LIMIT = 20  # intervals without one, after which a rank is lost
_GRACE = 4  # seconds for last words to clients, before a process ends because of a lost rank
_LEFT = "has ended: see what it printed"


class Sign(NamedTuple):
    """A rank's sign of life."""

    machine: str = "an unknown machine"
    number: int = 0
    last_words: str = ""  # of a rank that has ended


class Heart:
    """Shows the other ranks that this one is alive, and watches them, in two threads.

    Args:
        store: where the ranks met, by a connection that nothing else uses.
        rank: of this process.
        n_ranks: how many there are.
        end: called with the error when a rank is lost.
    """

    def __init__(self, store: Store, rank: int, n_ranks: int, end: Callable[[RankLost], None]):
        self._store, self._rank, self._end = store, rank, end
        self._signs = [Sign()] * n_ranks
        self._is_broken = False  # the connection to the store
        self._last_words = ""
        self._lingers = False
        self._leaving = threading.Event()
        # A call of the store may hang when its machine is lost, so another thread watches.
        self._writer = threading.Thread(target=self._write, name="heart", daemon=True)
        self._writer.start()
        threading.Thread(target=self._watch, name="heart's watch", daemon=True).start()

    def leave(self, error: BaseException | None = None, lingers: bool = False) -> None:
        """Tell the other ranks that this one ends, and watch them no longer.

        Args:
            error: the one that ends it, if any.
            lingers: wait until they know, as the store ends with this process.
        """
        self._last_words = f"failed: {type(error).__name__}: {error}" if error else _LEFT
        self._lingers = lingers
        self._leaving.set()
        self._writer.join(4 * INTERVAL)

    def cause(self) -> RankLost | None:
        """Return the loss that made a collective fail, which takes some intervals to find out."""
        before = self._signs
        end = time.monotonic() + 4 * INTERVAL
        while time.monotonic() < end:
            if self._is_broken or self._ended():
                return self._loss([])
            if not self._silent(before):
                return None
            time.sleep(INTERVAL / 10)
        return self._loss(self._silent(before))

    def _write(self) -> None:
        """Write this rank's signs and read the others', until it leaves."""
        machine, number = socket.gethostname(), 0
        keys = [str(rank) for rank in range(len(self._signs))]
        before = None  # when this rank's last words were written
        try:
            while before is None or (self._lingers and self._silent(before)):
                number += 1
                sign = Sign(machine, number, self._last_words)
                self._store.set(keys[self._rank], json.dumps(sign))
                self._signs = [Sign(*json.loads(text)) for text in self._store.multi_get(keys)]
                if sign.last_words and before is None:
                    before = self._signs
                self._leaving.wait(INTERVAL) if before is None else time.sleep(0.1)
        except RuntimeError:  # as PyTorch's errors of stores are
            self._is_broken = True

    def _watch(self) -> None:
        """Call ``end`` when a rank is lost, after intervals that this process itself has seen."""
        missed, last = [0] * len(self._signs), self._signs
        while not self._leaving.wait(INTERVAL):
            signs = self._signs
            if any(sign.last_words == _LEFT for sign in signs):
                return  # no collective is possible any more: the job comes to its end
            pairs = zip(missed, last, signs, strict=True)
            missed, last = [n + 1 if old == new else 0 for n, old, new in pairs], signs
            silent = [rank for rank, n in enumerate(missed) if n >= LIMIT]
            if silent and missed[self._rank] > 2:  # then this rank's readings are the old ones
                silent.append(self._rank)
            loss = self._loss(silent)
            if loss is not None:
                return self._end(loss)

    def _ended(self) -> list[int]:
        """Return the other ranks that have ended."""
        return [
            rank for rank, sign in enumerate(self._signs) if sign.last_words and rank != self._rank
        ]

    def _silent(self, before: list[Sign]) -> list[int]:
        """Return the ranks without two new signs: the first may be older than its reading."""
        pairs = enumerate(zip(before, self._signs, strict=True))
        return [r for r, (old, new) in pairs if new.number < old.number + 2 and not new.last_words]

    def _loss(self, silent: list[int]) -> RankLost | None:
        texts = [self._name(rank) + self._signs[rank].last_words for rank in self._ended()]
        if self._is_broken or self._rank in silent:
            texts.append(
                "the store where the ranks meet can't be reached: the launcher on its machine, "
                "the machine or the network is gone"
            )
        else:
            texts += [f"{self._name(rank)}has died, or can't be reached" for rank in silent]
        return RankLost("; ".join(texts)) if texts else None

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._signs[rank].machine} "


at_loss: list[Callable[[RankLost], None]] = []  # called before a process ends
_heart: Heart | None = None  # of this process, where there are other ranks


def start(group: dist.ProcessGroup) -> None:
    """Start the heartbeat of this process, by a connection of its own to the ranks' store.

    Args:
        group: of all ranks, for tensors on CPUs.
    """
    global _heart
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    job = torch.randint(2**62, (1,), device="cpu")  # a launcher's store outlives a job
    dist.broadcast(job, src=0, group=group)
    if isinstance(store, TCPStore):
        own = TCPStore(store.host, store.port, is_master=False, timeout=timedelta(days=365))
        prefixed = PrefixStore(f"llama/{int(job)}", own)
        _heart = Heart(prefixed, dist.get_rank(), dist.get_world_size(), _end)


def stop() -> None:
    """Tell the other ranks that this one ends."""
    if _heart is not None:
        has_store = dist.is_initialized() and dist.get_rank() == 0
        by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        _heart.leave(getattr(sys, "last_value", None), has_store and not by_launcher)


def _end(error: RankLost) -> None:
    """End the process, whose main thread may wait for a lost rank for ever."""
    logger.critical("this rank ends: %s", error)
    for call in at_loss:
        call(error)
    time.sleep(_GRACE if at_loss else 0)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(1)


def explain(error: BaseException) -> None:
    """Raise ``RankLost`` if another rank is the reason for an error, else return."""
    if _heart is not None and isinstance(error, RuntimeError) and not isinstance(error, RankLost):
        cause = _heart.cause()
        if cause is not None:
            raise cause from error


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Raise ``RankLost`` in place of a collective's error, if another rank is its reason."""
    try:
        yield
    except RuntimeError as error:
        explain(error)
        raise
