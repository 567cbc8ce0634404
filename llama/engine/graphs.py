"""Decoding steps, compiled: ``Llama.build(..., compile=True)``.

Prompts of all lengths aren't worth compiling; a decoding step, one token of each sequence, always
looks the same. Its layers become one compiled function, and on CUDA all of it one graph that is
replayed.
"""

import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence

import torch

from llama.layers.batch import RaggedBatch, Segment, Span
from llama.model import Transformer
from llama.parallel import world_size

logger = logging.getLogger(__name__)


def compile_decoding(model: Transformer) -> "CompiledSteps":
    """Compile all of the model's decoding steps now, and log how long that took.

    Raises:
        RuntimeError: PyTorch can't compile here; says what is missing.
    """
    from torch import _dynamo as dynamo  # slow to import, which others needn't wait for

    start = time.monotonic()
    device = model.freqs_cis.device
    check_compiler(device)
    steps = CompiledSteps(model)
    # Otherwise the models of a process would share eight shapes; any more would not be compiled.
    dynamo.config.cache_size_limit = max(dynamo.config.cache_size_limit, 256)
    last = model.params.max_seq_len - 1
    for n_slots in steps.slot_counts():
        tokens = torch.zeros(n_slots, dtype=torch.long, device=device)
        # On a CPU equal and different lengths differ, and each needs two lengths to be compiled
        # for any.
        for starts in ([0] * n_slots, [last] * n_slots, [min(1, last), *[0] * (n_slots - 1)]):
            steps(tokens, [Segment(i, p, 1) for i, p in enumerate(starts)])
    model.clear_cache()
    logger.info("compiled decoding in %.1f seconds", time.monotonic() - start)
    return steps


def check_compiler(device: torch.device) -> None:
    """Raise ``RuntimeError``, saying what is missing, unless PyTorch can compile for a device."""
    if device.type == "mps":
        raise RuntimeError("compile=True is for CUDA and CPUs: leave it out on MPS")
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise RuntimeError(
                "compile=True on CUDA needs Triton (pip install triton) and a GPU that it supports"
            )
        return
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    compiler = os.environ.get("CXX", usual)
    if shutil.which(compiler) is None:
        raise RuntimeError(
            f"compile=True on a CPU needs a C++ compiler, and there is no {compiler} in PATH: "
            "install one (Debian: apt-get install g++), name yours in CXX, or leave compile out"
        )


class CompiledSteps:
    """Decoding steps of a model, in as few shapes as possible.

    A step covers the first 1, 2, 4, 8 … slots of the cache. A slot among them without a new token
    gets one at the cache's last position, which no prompt can reuse: a last token is always new.
    """

    def __init__(self, model: Transformer):
        self._model = model
        self._device = model.freqs_cis.device
        # The modules stay as they are, for prompts. On a CPU the length of the cache varies.
        dynamic = None if self._device.type == "cpu" else False
        self._layers = [torch.compile(layer.forward, dynamic=dynamic) for layer in model.layers]
        self._graphs: dict[int, _Graph] = {}

    def slot_counts(self) -> list[int]:
        """Return the numbers of slots that steps can have."""
        most = self._model.params.max_batch_size
        return sorted({most, *(1 << power for power in range(most.bit_length()))})

    @torch.inference_mode()
    def __call__(self, tokens: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
        """Return the logits of one new token of each of some sequences.

        Arguments as in ``Transformer.forward_ragged``.
        """
        self._model.begin_pass(tokens, segments)
        max_seq_len = self._model.params.max_seq_len
        n_slots = min(n for n in self.slot_counts() if n > segments[-1].slot)
        starts = [segment.start_pos for segment in segments]
        # A graph reads all of the cache each time; on a CPU that would take longer than it saves.
        kv_len = max(starts) + 1 if self._device.type == "cpu" else max_seq_len
        is_ragged = self._device.type != "cpu" or min(starts) + 1 < kv_len
        token_of = [0] * n_slots  # which of the tokens each slot of the step brings
        positions = [max_seq_len - 1] * n_slots
        for i, (slot, start_pos, _) in enumerate(segments):
            token_of[slot], positions[slot] = i, start_pos
        inputs = (
            tokens[torch.tensor(token_of, device=self._device)],
            torch.tensor(positions, device=self._device),
        )
        if self._device.type == "cuda" and world_size() == 1:
            if n_slots not in self._graphs:
                self._graphs[n_slots] = _Graph(self._step, inputs, kv_len)
            logits = self._graphs[n_slots](inputs)
        else:
            logits = self._step(*inputs, kv_len, is_ragged)
        return logits[[segment.slot for segment in segments]]

    def _step(
        self, tokens: torch.Tensor, positions: torch.Tensor, kv_len: int, is_ragged: bool = True
    ) -> torch.Tensor:
        """Return logits for the first ``len(tokens)`` slots; no tensor's values decide anything."""
        mask = None
        if is_ragged:
            mask = torch.arange(kv_len, device=self._device) <= positions[:, None, None, None]
        every = slice(0, len(tokens))
        slots = torch.arange(len(tokens), device=self._device)
        batch = RaggedBatch(slots, positions, [Span(every, every, kv_len, mask)])
        h = self._model.forward_layers(tokens, batch, self._layers)
        return self._model.logits(self._model.norm(h))


class _Graph:
    """A step as one CUDA graph; its inputs are copied to where the recorded kernels read them."""

    def __init__(
        self, step: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], kv_len: int
    ):
        self._inputs = tuple(tensor.clone() for tensor in inputs)
        # Streams are the current device's, which another thread's or model's may be.
        with torch.cuda.device(self._inputs[0].device):
            # A first run compiles the step and sets up memory and libraries, before it is recorded.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    step(*self._inputs, kv_len)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            # Other threads may go on with other models on the same device.
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self._logits = step(*self._inputs, kv_len)

    def __call__(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        for static, tensor in zip(self._inputs, inputs, strict=True):
            static.copy_(tensor)
        self._graph.replay()
        return self._logits
