"""Decoding steps, compiled: ``Llama.build(..., compile=True)``.

Prompts of all lengths aren't worth compiling; a step, one token a row, always looks the same. Its
layers become one compiled function, and on CUDA all of it one graph that is replayed.
"""

import functools
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence

import torch

from llama.linear import pack_now
from llama.model import Transformer
from llama.packing import Packed, Segment, Span
from llama.parallel import world_size
from llama.quantization import projections

logger = logging.getLogger(__name__)


def compile_decoding(model: Transformer) -> None:
    """Make the model's decoding steps compiled ones; tells the log what that took.

    Raises:
        RuntimeError: PyTorch can't compile here, with what it lacks.
    """
    from torch import _dynamo as dynamo  # takes its time, which others needn't wait for

    start = time.monotonic()
    device = model.freqs_cis.device
    _check_compiler(device)
    for layers in projections(model):
        pack_now(*layers)
    steps = CompiledSteps(model)
    # Otherwise the models of a process would share eight shapes; any more would not be compiled.
    dynamo.config.cache_size_limit = max(dynamo.config.cache_size_limit, 256)
    model.compiled = steps
    last = model.params.max_seq_len - 1
    for n_rows in steps.row_counts():
        token = torch.zeros(n_rows, dtype=torch.long, device=device)
        # On a CPU rows of one length and of several differ, and each needs two lengths to be
        # compiled for any.
        for starts in ([0] * n_rows, [last] * n_rows, [min(1, last), *[0] * (n_rows - 1)]):
            model.forward_packed(token, [Segment(i, p, 1) for i, p in enumerate(starts)])
    model.clear_cache()
    logger.info("compiled decoding in %.1f seconds", time.monotonic() - start)


def _check_compiler(device: torch.device) -> None:
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

    A step covers the first 1, 2, 4, 8 … rows of the cache. A row among them that brings no token
    gets one at the cache's last position, which no prompt can reuse: a last token is always new.
    """

    def __init__(self, model: Transformer):
        self._device = model.freqs_cis.device
        self._max_rows = model.params.max_batch_size
        # The modules stay as they are, for prompts. On a CPU the cache's filling varies.
        dynamic = None if self._device.type == "cpu" else False
        self._layers = [torch.compile(layer.forward, dynamic=dynamic) for layer in model.layers]
        self._graphs: dict[int, _Graph] = {}

    def row_counts(self) -> list[int]:
        """The numbers of rows that steps can have."""
        powers = range(self._max_rows.bit_length())
        return sorted({self._max_rows, *(1 << power for power in powers)})

    def __call__(
        self, model: Transformer, tokens: torch.Tensor, segments: Sequence[Segment]
    ) -> torch.Tensor:
        """Logits of one new token for each of some rows; arguments as in ``forward_packed``."""
        max_seq_len = model.params.max_seq_len
        n_rows = min(n for n in self.row_counts() if n > segments[-1].row)
        starts = [segment.start_pos for segment in segments]
        # A graph reads all of the cache each time; on a CPU that would take longer than it saves.
        filled = max(starts) + 1 if self._device.type == "cpu" else max_seq_len
        ragged = self._device.type != "cpu" or min(starts) + 1 < filled
        token_of = [0] * n_rows  # which of the tokens each row of the step brings
        positions = [max_seq_len - 1] * n_rows
        for i, (row, start_pos, _) in enumerate(segments):
            token_of[row], positions[row] = i, start_pos
        inputs = (
            tokens[torch.tensor(token_of, device=self._device)],
            torch.tensor(positions, device=self._device),
        )
        if self._device.type == "cuda" and world_size() == 1:
            if n_rows not in self._graphs:
                step = functools.partial(self._step, model)
                self._graphs[n_rows] = _Graph(step, inputs, filled)
            logits = self._graphs[n_rows](inputs)
        else:
            logits = self._step(model, *inputs, filled, ragged)
        return logits[[segment.row for segment in segments]]

    def _step(
        self,
        model: Transformer,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        filled: int,
        ragged: bool = True,
    ) -> torch.Tensor:
        """Logits for the first ``len(tokens)`` rows; nothing here depends on a tensor's values."""
        mask = None
        if ragged:
            mask = torch.arange(filled, device=self._device) <= positions[:, None, None, None]
        every = slice(0, len(tokens))
        rows = torch.arange(len(tokens), device=self._device)
        packed = Packed(rows, positions, [Span(every, every, filled, mask)])
        h = model.pass_layers(tokens, packed, self._layers)
        return model.logits(model.norm(h))


class _Graph:
    """A step as one CUDA graph: its inputs are copied to where the recorded kernels read them."""

    def __init__(
        self, step: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], filled: int
    ):
        self._inputs = tuple(tensor.clone() for tensor in inputs)
        # Streams are the current device's, which another thread's or model's may be.
        with torch.cuda.device(self._inputs[0].device):
            # What is recorded must have run before: compiled, its memory and libraries set up.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    step(*self._inputs, filled)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            # Other threads may go on with other models on the same device.
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self._logits = step(*self._inputs, filled)

    def __call__(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        for static, tensor in zip(self._inputs, inputs, strict=True):
            static.copy_(tensor)
        self._graph.replay()
        return self._logits
