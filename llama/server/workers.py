"""The same engine on all ranks: before each step rank 0 sends the new and cancelled sequences.

Only rank 0 has clocks, deadlines, cancellations and guards. The other ranks get one message a
step, with the sequences that are submitted and cancelled, and then run the same step.
"""

import contextlib
import json
import logging
import os
import signal
from collections.abc import Sequence as List
from dataclasses import asdict
from typing import Any

import torch

from llama import parallel
from llama.adapters import Adapters
from llama.engine.engine import Engine
from llama.engine.sequence import Sequence
from llama.errors import NotFinite
from llama.generation import Llama
from llama.sampling import SamplingParams
from llama.structure import hold_to_form

logger = logging.getLogger("llama.server")

# Tokens of prompts in a step that also decodes.
PREFILL_BESIDE_DECODING = {"cpu": 64, "cuda": 512, "mps": 512}
MAX_DECODED = 12  # tokens that a step decodes, drafts included: more slow it down
HEARTBEAT = 5.0  # seconds between messages to the other ranks while idle
_STOP = b"stop"
_FRAME = 1 << 12  # bytes of a message that is sent at once


def configure(engine: Engine) -> None:
    """Set up an engine so that streams stay smooth while prompts are processed."""
    engine.prefill_beside_decoding = PREFILL_BESIDE_DECODING[engine.model.capability.kind]
    engine.max_decoded = MAX_DECODED


class Workers:
    """The other ranks, seen from rank 0."""

    def __init__(self) -> None:
        self._numbers: dict[Sequence, int] = {}  # of sequences, for the other ranks
        self._n_submitted = 0

    def step(self, submitted: List[Sequence], cancelled: List[Sequence]) -> None:
        """Send the sequences that are submitted and cancelled before the next step.

        Raises:
            RuntimeError: a rank has ended.
        """
        if parallel.world_size() == 1:
            return
        for sequence in [s for s in self._numbers if s.finish_reason is not None]:
            del self._numbers[sequence]
        for sequence in submitted:
            self._numbers[sequence] = self._n_submitted
            self._n_submitted += 1
        message: dict[str, Any] = {}
        if submitted:
            message["submitted"] = [_describe(sequence) for sequence in submitted]
        if cancelled:  # perhaps one that has just been submitted
            message["cancelled"] = [self._numbers[sequence] for sequence in cancelled]
        broadcast_bytes(json.dumps(message).encode())

    def heartbeat(self) -> None:
        """Show the other ranks that rank 0 is alive, while there is nothing to do.

        Raises:
            RuntimeError: a rank has ended.
        """
        if parallel.world_size() > 1:
            broadcast_bytes(b"")

    def stop(self) -> None:
        """End ``worker_loop`` on the other ranks."""
        if parallel.world_size() > 1:
            broadcast_bytes(_STOP)


def run_worker(llama: Llama, streams: bool = True) -> None:
    """Take part in rank 0's steps until it stops; exit with status 1 if it fails.

    Args:
        streams: as in ``EngineLoop``.
    """
    for sig in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sig, signal.SIG_IGN)
    try:
        worker_loop(llama.engine, llama.adapters, streams)
    except RuntimeError as error:
        logger.error("this rank failed, or rank 0 has ended: %s", error)
        os._exit(1)


def worker_loop(engine: Engine, adapters: Adapters | None = None, streams: bool = True) -> None:
    """Take part in all steps, on a rank other than 0, until rank 0 stops the loop.

    Args:
        adapters: those that sequences name, loaded as on rank 0.
        streams: as in ``EngineLoop``.

    Raises:
        RuntimeError: rank 0 has ended.
    """
    if streams:
        configure(engine)
    sequences: dict[int, Sequence] = {}
    n_submitted = 0
    while (data := broadcast_bytes()) != _STOP:
        if not data:
            continue
        message = json.loads(data)
        submitted = message.get("submitted", ())
        new = [_restore(fields, engine, adapters) for fields in submitted]
        sequences |= dict(enumerate(new, n_submitted))
        n_submitted += len(new)
        engine.submit(new)
        for number in message.get("cancelled", ()):
            engine.cancel(sequences[number])
        # Logits that aren't finite are so on every rank; rank 0 reports them and continues.
        with contextlib.suppress(NotFinite):
            engine.step()
        sequences = {n: s for n, s in sequences.items() if s.finish_reason is None}


def _describe(sequence: Sequence) -> dict[str, Any]:
    params = asdict(sequence.params)
    params["stop_token_ids"] = sorted(params["stop_token_ids"])
    names = ("prompt", "seed", "max_new_tokens", "output", "in_context", "targets")
    sets = {"ends": list(sequence.ends), "visible": list(sequence.visible.items())}
    return {"params": params, **sets, **{name: getattr(sequence, name) for name in names}}


def _restore(fields: dict[str, Any], engine: Engine, adapters: Adapters | None = None) -> Sequence:
    params = fields["params"]
    biases = params.get("logit_bias", {})  # JSON has no keys but texts
    params["logit_bias"] = {int(i): bias for i, bias in biases.items()}
    ends, visible = frozenset(fields.get("ends", ())), dict(fields.get("visible", ()))
    restored = {"params": SamplingParams(**params), "ends": ends, "visible": visible}
    adapter = (adapters or Adapters()).find(params.get("adapter"))
    sequence = Sequence(**{**fields, **restored}, adapter=adapter)
    hold_to_form([sequence], engine.tokenizer, "later")
    return sequence


def broadcast_bytes(message: bytes = b"") -> bytes:
    """Send rank 0's message to every rank through CPUs: in one piece, if it is short.

    Raises:
        RuntimeError: a rank is gone.
    """
    frame = torch.zeros(_FRAME, dtype=torch.uint8, device="cpu")
    data = torch.frombuffer(bytearray(len(message).to_bytes(8, "big") + message), dtype=torch.uint8)
    frame[: min(len(data), _FRAME)] = data[:_FRAME]
    parallel.broadcast(frame)
    size = int.from_bytes(bytes(frame[:8].tolist()), "big")
    rest = torch.zeros(max(0, size + 8 - _FRAME), dtype=torch.uint8, device="cpu")
    if len(rest):
        rest[: max(0, len(data) - _FRAME)] = data[_FRAME:]
        parallel.broadcast(rest)
    return bytes(torch.cat((frame, rest))[8 : 8 + size].tolist())
