"""Weights that compiled code widens, for CUDA with ``compile=True``.

PyTorch widens a weight by a dozen operators, each of which reads and writes all of it; compiled
code reads its codes once. Calling such code from Python takes some tenths of a millisecond, so it
is recorded as a CUDA graph for each weight. All write to the same memory, one after the other.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from llama.layers.quantization import Grouped

ROOM = 1 << 26  # weights that are widened at a time
_BITS = 0x4B000000  # of the float32 2 ** 23, to which whole numbers are added as its lowest bits


class Widening:
    """Products of many tokens with a weight that is widened in parts.

    Args:
        widen: returns some rows in the dtype of the inputs, or more of them, of their tensors.
        parts: returns the tensors of some rows.
        out_features, in_features: the weight's shape.
    """

    def __init__(
        self,
        widen: Callable[..., torch.Tensor],
        parts: Callable[[slice], Sequence[torch.Tensor | None]],
        out_features: int,
        in_features: int,
    ):
        self._widen, self._parts = widen, parts
        self._in_features = in_features
        n_rows = max(8, ROOM // in_features // 8 * 8)  # a multiple of the int4 operator's tiles
        firsts = range(0, out_features, n_rows)
        self._rows = [slice(first, min(first + n_rows, out_features)) for first in firsts]
        self._graphs: dict[int, Callable[[], object]] = {}
        self._room: _Room | None = None  # to which the graphs write

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x @ weight.T``: (n_tokens, in_features) to (n_tokens, out_features)."""
        multiply = self._multiply_here if torch.compiler.is_compiling() else self._multiply
        products = [multiply(x, rows) for rows in self._rows]
        return products[0] if len(products) == 1 else torch.cat(products, dim=1)

    def _multiply_here(self, x: torch.Tensor, rows: slice) -> torch.Tensor:
        return F.linear(x, self._widen(*self._parts(rows))[: rows.stop - rows.start])

    def _multiply(self, x: torch.Tensor, rows: slice) -> torch.Tensor:
        n_rows = rows.stop - rows.start
        self._room = self._room or _room(x.device, x.dtype)
        with self._room.alone() as room:
            weights = room[: n_rows * self._in_features].view(n_rows, -1)
            if rows.start not in self._graphs:
                write = functools.partial(_written(self._widen), weights, *self._parts(rows))
                self._graphs[rows.start] = _recorded(write, x.device)
            self._graphs[rows.start]()
            return F.linear(x, weights)


class _Room:
    """The memory of widened weights, which one product at a time has, whatever its stream."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        with torch.inference_mode(False):  # so that it can be written in any mode
            self.weights = torch.empty(ROOM, device=device, dtype=dtype)
        self._lock, self._device = threading.Lock(), device
        self._used = torch.cuda.Event() if device.type == "cuda" else None

    @contextlib.contextmanager
    def alone(self) -> Iterator[torch.Tensor]:
        """Give the memory to one thread, whose stream waits for the one before."""
        with self._lock:
            if self._used is None:
                yield self.weights
                return
            with torch.cuda.device(self._device):  # whose graphs and streams are the current ones
                self._used.wait()
                yield self.weights
                self._used.record()


_rooms: dict[tuple[torch.device, torch.dtype], _Room] = {}
_rooms_lock = threading.Lock()


def _room(device: torch.device, dtype: torch.dtype) -> _Room:
    with _rooms_lock:
        if (device, dtype) not in _rooms:
            _rooms[device, dtype] = _Room(device, dtype)
        return _rooms[device, dtype]


@functools.cache
def _written(widen: Callable[..., torch.Tensor]) -> Callable[..., None]:
    """Return compiled code that writes what a function returns."""

    def write(out: torch.Tensor, *parts: torch.Tensor | None) -> None:
        out.copy_(widen(*parts)[: len(out)])

    return torch.compile(write, dynamic=False)


def _recorded(write: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Return a call's kernels as a CUDA graph; elsewhere, the call."""
    # All forms and shapes count together; any more than the limit would not be compiled.
    with torch._dynamo.config.patch(cache_size_limit=4096, accumulated_cache_size_limit=4096):
        write()
    if device.type != "cuda":
        return write
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        write()
    return functools.partial(_replay, graph, write)


def _replay(graph: Any, write: object) -> None:
    """Replay a graph, of which ``write`` owns what it reads."""
    graph.replay()


@functools.cache
def dequantizing(form: Grouped, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """Return a function of a form's codes and scales that returns weights in a dtype."""

    def dequantize(weight: torch.Tensor, *scales: torch.Tensor) -> torch.Tensor:
        scaled = dict(zip(form.scale_names, scales, strict=True))
        return form.dequantize({"weight": weight, **scaled}).to(dtype)

    return dequantize


@functools.cache
def widening_tiles(width: int) -> Callable[..., torch.Tensor]:
    """Return a function of the int4 operator's tiles, whose groups have ``width`` inputs.

    It takes tiles, int32, shape (n / 8, n_tiles, 32, …), the input of each place in one output's
    part of a tile, and scales and zeros, (n, n_groups). It returns weights in bfloat16, shape
    (n, in_features), each tile's inputs in the order in which they lie.
    """

    def widen(
        tiles: torch.Tensor,
        inputs: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
    ) -> torch.Tensor:
        shifts = torch.arange(0, 32, 4, device=tiles.device, dtype=torch.int32)
        codes = ((tiles.unsqueeze(4) >> shifts) & 15).flatten(2).unflatten(2, (8, -1))
        values = (codes - 8).transpose(1, 2).flatten(0, 1).float()  # (n, n_tiles, inputs)
        n_inputs = len(inputs)
        groups = inputs // min(width, n_inputs)

        def spread(part: torch.Tensor) -> torch.Tensor:
            of_tiles = part.float().repeat_interleave(max(1, width // n_inputs), 1)
            return of_tiles.unflatten(1, (tiles.shape[1], -1))[:, :, groups]

        weights = values * spread(scales)
        return (weights if zeros is None else weights + spread(zeros)).flatten(1).bfloat16()

    return widen


def sums_of_words(
    x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the products of a few tokens with int8 weights, as sums that compiled code fuses.

    Args:
        x: shape (n_tokens, in_features).
        words: int32, shape (out_features, in_features / 4), each number with four codes.
        scales, zeros: shape (out_features, n_groups); groups of a multiple of four inputs.

    Returns:
        float32, shape (n_tokens, out_features).
    """
    n_words = words.shape[1] // scales.shape[1]

    def spread(part: torch.Tensor) -> torch.Tensor:
        return part.float().unsqueeze(2).expand(-1, -1, n_words).reshape(words.shape)

    from_zero = words ^ -0x7F7F7F80  # codes from 0 to 255
    bits = [((from_zero >> shift) & 255) | _BITS for shift in (0, 8, 16, 24)]
    codes = [part.view(torch.float32) - (2**23 + 128) for part in bits]
    scale, zero = spread(scales), None if zeros is None else spread(zeros)
    sums = []
    for row in x.float().unflatten(1, (-1, 4)):
        product = sum(code * row[:, i] for i, code in enumerate(codes)) * scale
        if zero is not None:
            product = product + zero * row.sum(1)
        sums.append(product.sum(1))
    return torch.stack(sums)
