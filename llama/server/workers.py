"""The same engine on all ranks: rank 0 says which sequences come and go before each step.

Clocks, deadlines, cancellations and guards are rank 0's alone. The other ranks get one message a
step, with the sequences that are submitted and cancelled, and then do what rank 0's engine does.
"""

import contextlib
import json
from collections.abc import Sequence as List
from dataclasses import asdict
from typing import Any

from llama import parallel
from llama.engine.engine import PREFILL_CHUNK, Engine
from llama.engine.sequence import Sequence
from llama.errors import NotFinite
from llama.sampling import SamplingParams

PREFILL_BESIDE_DECODING = 64  # tokens of prompts in a step, on a CPU
MAX_DECODED = 12  # tokens that a step decodes, drafts included: more would slow it down
HEARTBEAT = 5.0  # seconds between signs of life to the other ranks
_STOP = b"stop"


def configure(engine: Engine) -> None:
    """Set an engine up for streams that shall flow while prompts come in."""
    on_cpu = engine.model.freqs_cis.device.type == "cpu"
    engine.prefill_beside_decoding = PREFILL_BESIDE_DECODING if on_cpu else PREFILL_CHUNK
    engine.max_decoded = MAX_DECODED


class Workers:
    """The other ranks, seen from rank 0."""

    def __init__(self) -> None:
        self._numbers: dict[Sequence, int] = {}  # by which the other ranks know a sequence
        self._n_submitted = 0

    def step(self, submitted: List[Sequence], cancelled: List[Sequence]) -> None:
        """Send what comes and goes before the next step.

        Raises:
            RuntimeError: a rank is gone.
        """
        if parallel.world_size() == 1:
            return
        for sequence in [s for s in self._numbers if s.finish_reason is not None]:
            del self._numbers[sequence]
        message: dict[str, Any] = {}
        if cancelled:
            numbers = [self._numbers.get(sequence) for sequence in cancelled]
            message["cancelled"] = [number for number in numbers if number is not None]
        if submitted:
            message["submitted"] = [_describe(sequence) for sequence in submitted]
            for sequence in submitted:
                self._numbers[sequence] = self._n_submitted
                self._n_submitted += 1
        parallel.broadcast_bytes(json.dumps(message).encode())

    def heartbeat(self) -> None:
        """Let the other ranks know, while there is nothing to do, that rank 0 is alive.

        Raises:
            RuntimeError: one of them is gone.
        """
        if parallel.world_size() > 1:
            parallel.broadcast_bytes(b"")

    def stop(self) -> None:
        """End ``worker_loop`` on the other ranks."""
        if parallel.world_size() > 1:
            parallel.broadcast_bytes(_STOP)


def worker_loop(engine: Engine) -> None:
    """On a rank other than 0: take part in all steps until rank 0 stops it.

    Raises:
        RuntimeError: rank 0 is gone.
    """
    configure(engine)
    sequences: dict[int, Sequence] = {}
    n_submitted = 0
    while (data := parallel.broadcast_bytes()) != _STOP:
        if not data:
            continue
        message = json.loads(data)
        for number in message.get("cancelled", ()):
            if number in sequences:
                engine.cancel(sequences[number])
        new = [_restore(fields) for fields in message.get("submitted", ())]
        sequences |= dict(enumerate(new, n_submitted))
        n_submitted += len(new)
        engine.submit(new)
        # What isn't finite is so on every rank: rank 0 reports it, and goes on.
        with contextlib.suppress(NotFinite):
            engine.step()
        sequences = {n: s for n, s in sequences.items() if s.finish_reason is None}


def _describe(sequence: Sequence) -> dict[str, Any]:
    params = asdict(sequence.params)
    params["stop_token_ids"] = sorted(params["stop_token_ids"])
    names = ("prompt", "seed", "max_new_tokens", "output", "in_context")
    return {"params": params, **{name: getattr(sequence, name) for name in names}}


def _restore(fields: dict[str, Any]) -> Sequence:
    return Sequence(**{**fields, "params": SamplingParams(**fields["params"])})
