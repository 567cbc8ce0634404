"""Sequences run by the engine on all ranks, while only rank 0 knows what is asked."""

from collections.abc import Iterable, Iterator
from itertools import islice

from llama.engine.engine import AHEAD, Engine
from llama.engine.sequence import Sequence
from llama.server.workers import Workers


class Runner:
    """Runs sequences; the other ranks take part by ``llama.server.workers.run_worker``."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._workers = Workers()
        self._limit = AHEAD * engine.model.params.max_batch_size

    def run(self, sequences: Iterable[Sequence]) -> Iterator[Sequence]:
        """Yield sequences as they end. They are taken in order, a few ahead of those that run.

        Raises:
            NotFinite: the network's output isn't.
            RuntimeError: a rank has ended.
        """
        engine, rest = self._engine, iter(sequences)
        while True:
            n_active = engine.n_running + engine.n_waiting
            new = list(islice(rest, self._limit - n_active))
            if not new and not n_active:
                return
            self._workers.step(new, [])
            engine.submit(new)
            for event in engine.step():
                if event.finish_reason is not None:
                    yield event.sequence
