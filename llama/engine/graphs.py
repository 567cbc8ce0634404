"""Decoding steps that don't wait for Python: CUDA graphs, compiled code, or both.

Prompts of all lengths aren't worth it; a decoding step always looks the same. On CUDA it is
recorded as one graph for a few numbers of tokens and a few lengths of the cache, and replayed; on a
CPU when a number of tokens has come up a few times, where attention is compiled code. With
``compile=True`` its layers become compiled code first.
"""

import functools
import logging
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from llama import parallel
from llama.cli import progress
from llama.layers.batch import RaggedBatch, Segment, token_places
from llama.layers.kernels.compiled import FEW_TOKENS, MOST_POSITIONS
from llama.layers.kernels.graphs import CpuGraph, CudaGraph, Memory
from llama.layers.kernels.openmp import release_team
from llama.layers.varlen import MAX_DRAFT, Varlen
from llama.model import Transformer

logger = logging.getLogger(__name__)

_FIRST_LENGTH = 1024  # positions that the shortest graphs read; the others twice as many each


def decoding_steps(model: Transformer, compile: bool = False) -> "DecodingSteps | None":
    """Record or compile all of a model's decoding steps now, and log how long that took.

    Args:
        model: on CUDA its steps are recorded in any case, if its ranks can be.
        compile: whether steps are compiled.

    Returns:
        None where there is nothing to record or compile.
    """
    if model.params.labels is not None or not (compile or _can_record(model)):
        return None  # a classifier decodes nothing
    start = time.monotonic()
    steps = DecodingSteps(model, compile)
    try:
        steps.prepare()
        if model.capability.compiles:  # what prompts use, before the first one waits for it
            n = min(256, model.params.max_seq_len)
            tokens = model.freqs_cis.new_zeros(n, dtype=torch.long)
            model.forward_ragged(tokens, [Segment(0, 0, n)], tokens[:1])
    except RuntimeError as error:  # out of memory, or a kernel that can't be recorded
        if compile or parallel.world_size() > 1:  # where other ranks would wait
            raise
        logger.warning("decoding waits for Python, since steps can't be recorded: %s", error)
        return None
    finally:
        if compile or model.capability.kind == "cuda":  # else its memory isn't touched
            model.clear_cache()
        release_team()
    logger.info("prepared decoding steps in %.1f seconds", time.monotonic() - start)
    return steps


def _can_record(model: Transformer) -> bool:
    if model.capability.kind == "cuda":
        return parallel.can_capture()
    is_alone = model.capability.kind == "cpu" and parallel.world_size() == 1
    return is_alone and CpuGraph.fits(model.layers[0].attention)


class DecodingSteps:
    """Decoding steps of a model, in as few shapes as possible.

    A graph has 1, 2, 4, 8 … tokens, each of which attends on its own: of different sequences, or of
    one sequence's draft. What is missing repeats the last token, which changes nothing. On a CPU a
    graph has any number of tokens, up to 32. Compiled code without graphs covers 1, 2, 4, 8 … of
    the first slots instead.

    Args:
        model: whose steps they are.
        compile: whether to compile the layers, or to record them as they are.

    Attributes:
        max_tokens: the most tokens of a step.
        lengths: how many positions graphs read at most.
    """

    def __init__(self, model: Transformer, compile: bool):
        self._model = model
        self._on_cpu = model.capability.kind == "cpu"
        self._is_recorded = _can_record(model) and not (self._on_cpu and compile)
        self._kind = CpuGraph if self._on_cpu else CudaGraph
        self._graphs: dict[tuple[int, int], CpuGraph | CudaGraph] = {}
        self._pool: Any = self._kind.pool(model) if self._is_recorded else None
        most, last = model.params.max_batch_size, model.params.max_seq_len
        # SDPA reads a copy of each token's slot: of a draft's tokens that would be too many.
        if self._is_recorded and isinstance(model.backend, Varlen):
            most = max(most, MAX_DRAFT)
        self._counts = sorted({most, *(1 << power for power in range(most.bit_length()))})
        if self._on_cpu and self._is_recorded:
            most, last = min(max(most, MAX_DRAFT), FEW_TOKENS), min(last, MOST_POSITIONS)
            self._counts = [*range(model.min_tokens, most + 1)]  # each is recorded within a step
        self.max_tokens = most
        # SDPA reads all of it. FlashAttention reads what is filled, but divides the length among
        # processors: where a quarter of it is filled, three quarters of them would have no work.
        self.lengths = [last if self._on_cpu else _FIRST_LENGTH]
        while self.lengths[-1] < last:
            self.lengths.append(2 * self.lengths[-1])
        self.lengths[-1] = last
        self._layers: list[Callable[..., torch.Tensor]] = list(model.layers)
        self._output: Callable[[torch.Tensor], torch.Tensor] = model.output_logits
        if compile:
            from torch import _dynamo as dynamo  # slow to import, which others needn't wait for

            # All layers of all models share these numbers; any more would not be compiled.
            dynamo.config.cache_size_limit = dynamo.config.accumulated_cache_size_limit = 4096
            # The modules stay as they are, for prompts. On a CPU the length of the cache varies.
            options = None if self._on_cpu else {"coordinate_descent_tuning": True}
            how: Any = {"dynamic": None if self._on_cpu else False, "options": options}
            self._layers = [torch.compile(layer.forward, **how) for layer in model.layers]
            self._output = torch.compile(model.output_logits, **how)

    @torch.inference_mode()
    def prepare(self) -> None:
        """Record or compile all steps."""
        counts, last = self._counts, self._model.params.max_seq_len
        counts = counts[:1] if self._on_cpu and self._is_recorded else counts
        # Compiled code for CPUs needs two lengths to take any; behind a prompt they are 2 at least.
        lengths = self.lengths if self._is_recorded else [min(2, last), last]
        with progress(len(counts) * len(lengths), "preparing decoding", "steps") as show:
            # From the largest on, whose memory the others share.
            for i, n in enumerate(reversed(counts)):
                for j, kv_len in enumerate(reversed(lengths)):
                    positions = self._model.freqs_cis.new_zeros(n, dtype=torch.long)
                    positions[0] = kv_len - 1
                    inputs = torch.stack((torch.zeros_like(positions), positions * 0, positions))
                    self._run(inputs, kv_len)
                    show(i * len(lengths) + j + 1)

    def look_again(self, always: bool) -> None:
        """Have the next step on a CPU, or always each, notice changed weights and hooks."""
        if isinstance(self._pool, Memory):
            self._pool.look_again(always)

    def supports(self, segments: Sequence[Segment]) -> bool:
        """Return whether a step can have all of the segments' tokens."""
        lengths = [segment.length for segment in segments]
        fits = max(start + n for _, start, n in segments) <= self.lengths[-1]
        return sum(lengths) <= self.max_tokens and (
            fits if self._is_recorded else max(lengths) == 1
        )

    def places(self, segments: Sequence[Segment]) -> tuple[list[int], list[int]]:
        """Return the slots and positions of a step's rows, also of those without a token."""
        slots, positions = token_places(segments)
        if self._is_recorded:
            n_more = min(n for n in self._counts if n >= len(slots)) - len(slots)
            return slots + slots[-1:] * n_more, positions + positions[-1:] * n_more
        # Compiled code reads the first slots where they are. No prompt reuses the last position.
        rows = range(min(n for n in self._counts if n > max(slots)))
        found, last = dict(zip(slots, positions, strict=True)), self._model.params.max_seq_len - 1
        return list(rows), [found.get(slot, last) for slot in rows]

    @torch.inference_mode()
    def __call__(
        self,
        tokens: torch.Tensor,
        segments: Sequence[Segment],
        slots: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Return the logits of some sequences' next tokens, float32, (n_tokens, n_outputs).

        Args:
            tokens: token ids of all segments one after another, shape (n_tokens,).
            segments: where they go, each slot at most once.
            slots, positions: what ``places`` returned, on the device.
        """
        self._model.begin_pass(tokens, segments)
        kv_len = max(segment.start_pos + segment.length for segment in segments)
        if self._is_recorded:
            kv_len = min(length for length in self.lengths if length >= kv_len)
            repeated = tokens[-1:].expand(len(slots) - len(tokens))
            inputs = torch.stack((torch.cat((tokens, repeated)), slots, positions))
            # A graph's own output lasts until the next one is replayed.
            return self._run(inputs, kv_len)[: len(tokens)].clone()
        rows = [segment.slot for segment in segments]
        of_slots = torch.zeros_like(slots).index_copy_(0, slots[rows], tokens)
        return self._run(torch.stack((of_slots, slots, positions)), kv_len)[rows]

    def _run(self, inputs: torch.Tensor, kv_len: int) -> torch.Tensor:
        if not self._is_recorded:
            return self._step(inputs, kv_len)
        key = (inputs.shape[1], kv_len)
        if key not in self._graphs:
            own: Any = weakref.proxy(self)  # without a circle of references
            step = functools.partial(DecodingSteps._step, own, kv_len=kv_len)
            self._graphs[key] = self._kind(step, inputs, self._pool)
        return self._graphs[key](inputs)

    def _step(self, inputs: torch.Tensor, kv_len: int) -> torch.Tensor:
        """Return logits of (tokens, slots, positions); no tensor's values decide anything."""
        tokens, slots, positions = inputs
        batch = RaggedBatch(slots, positions, ())  # which compiled attention needs on a CPU
        if not (self._on_cpu and self._is_recorded):
            batch = self._model.backend.decoding(slots, positions, kv_len)
        return self._output(self._model.forward_layers(tokens, batch, self._layers))
