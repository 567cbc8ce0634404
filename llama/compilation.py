"""Decoding steps, compiled: ``Llama.build(..., compile=True)``.

Prompts of all lengths aren't worth compiling; a step, one token a row, always looks the same. Its
layers become one compiled function, and on CUDA all of it one graph that is replayed.
"""

import logging
import shutil
import time
from collections.abc import Callable, Sequence

import torch

from llama.linear import pack_now
from llama.model import Transformer, TransformerBlock
from llama.packing import Packed, Segment, Span
from llama.parallel import world_size

logger = logging.getLogger(__name__)


def compile_decoding(model: Transformer) -> None:
    """Make the model's decoding steps compiled ones; tells the log what that took.

    Raises:
        RuntimeError: PyTorch can't compile here, with what it lacks.
    """
    start = time.monotonic()
    device = model.freqs_cis.device
    _check_compiler(device)
    for block in model.layers:
        assert isinstance(block, TransformerBlock)
        attention, feed_forward = block.attention, block.feed_forward
        pack_now(attention.wq, attention.wk, attention.wv)
        pack_now(attention.wo)
        pack_now(feed_forward.w1, feed_forward.w3)
        pack_now(feed_forward.w2)
    pack_now(model.output)
    model.compiled = CompiledSteps(model)
    token = torch.zeros(1, dtype=torch.long, device=device)
    for position in (0, model.params.max_seq_len - 1):  # two fillings, for any to come
        model.forward_packed(token, [Segment(0, position, 1)])
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
    elif not any(map(shutil.which, ("g++", "clang++", "cl", "c++"))):
        raise RuntimeError(
            "compile=True on a CPU needs a C++ compiler, and there is no g++ and no clang++ in "
            "PATH: install one (Debian: apt-get install g++), or leave compile out"
        )


class CompiledSteps:
    """Decoding steps of a model, in as few shapes as possible.

    A step covers the first 1, 2, 4, 8 … rows of the cache. A row among them that brings no token
    gets one at the cache's last position, which no prompt can reuse: a last token is always new.
    """

    def __init__(self, model: Transformer):
        self._model = model
        self._device = model.freqs_cis.device
        # The modules stay as they are, for prompts. On a CPU the cache's filling varies.
        dynamic = None if self._device.type == "cpu" else False
        self._layers = [torch.compile(layer.forward, dynamic=dynamic) for layer in model.layers]
        self._graphs: dict[int, _Graph] = {}

    def __call__(self, tokens: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
        """Logits of one new token for each of some rows; arguments as in ``forward_packed``."""
        params = self._model.params
        n_rows = min(1 << segments[-1].row.bit_length(), params.max_batch_size)
        starts = [segment.start_pos for segment in segments]
        # A graph reads all of the cache each time; on a CPU that would take longer than it saves.
        filled = max(starts) + 1 if self._device.type == "cpu" else params.max_seq_len
        ragged = min(starts) + 1 < filled
        token_of = [0] * n_rows  # which of the tokens each row of the step brings
        positions = [params.max_seq_len - 1] * n_rows
        for i, (row, start_pos, _) in enumerate(segments):
            token_of[row], positions[row] = i, start_pos
        inputs = (
            tokens[torch.tensor(token_of, device=self._device)],
            torch.tensor(positions, device=self._device),
        )
        if self._device.type == "cuda" and world_size() == 1:
            if n_rows not in self._graphs:
                self._graphs[n_rows] = _Graph(self._step, inputs, filled)
            logits = self._graphs[n_rows](inputs)
        else:
            logits = self._step(*inputs, filled, ragged)
        return logits[[segment.row for segment in segments]]

    def _step(
        self,
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
        h = self._model.pass_layers(tokens, packed, self._layers)
        return self._model.logits(self._model.norm(h))


class _Graph:
    """A step as one CUDA graph: its inputs are copied to where the recorded kernels read them."""

    def __init__(
        self, step: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], filled: int
    ):
        self._inputs = tuple(tensor.clone() for tensor in inputs)
        # What is recorded must have run before: compiled, its memory and libraries set up.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                step(*self._inputs, filled)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = step(*self._inputs, filled)

    def __call__(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        for static, tensor in zip(self._inputs, inputs, strict=True):
            static.copy_(tensor)
        self._graph.replay()
        return self._logits
