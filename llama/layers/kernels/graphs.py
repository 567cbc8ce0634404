"""Records of what a step computes, which are replayed without Python: on CUDA, and on a CPU."""

import ctypes
import itertools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llama import parallel
from llama.layers.batch import RaggedBatch
from llama.layers.kernels.compiled import gather, has_attention, is_read
from llama.layers.kernels.machine_code import code
from llama.layers.kernels.openmp import by_rows, call_in_parallel, recording

_MOST = 1 << 28  # bytes that a graph may keep
_OFTEN = 4  # times that a step comes up until it is recorded
_CHUNK, _LINE = 1 << 20, 64


class CudaGraph:
    """A step as one CUDA graph.

    Args:
        step: takes ``inputs`` and returns logits.
        inputs: of any values; the graph reads where they are.
        pool: the memory that all graphs of a model share, and the stream that it belongs to.
    """

    def __init__(
        self, step: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor, pool: Any
    ):
        self._inputs = inputs.clone()
        memory, stream = pool
        # Streams are the current device's, which another thread's or model's may be.
        with torch.cuda.device(inputs.device):
            # A first run compiles the step and sets up memory and libraries, before it is recorded.
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    step(self._inputs)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            parallel.graphs.add(self._graph)
            # Other threads may go on with other models on the same device.
            with torch.cuda.graph(
                self._graph, pool=memory, stream=stream, capture_error_mode="thread_local"
            ):
                self._logits = step(self._inputs)

    @staticmethod
    def pool(network: nn.Module) -> Any:
        """Return memory for graphs of a network, of which one runs at a time."""
        device = next(network.buffers()).device
        return torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the logits of inputs, until any graph of the pool is replayed."""
        self._inputs.copy_(inputs, non_blocking=True)
        self._graph.replay()
        return self._logits


class CpuGraph:
    """A step on a CPU as calls of compiled code, which replay in one, and other operators.

    Between products Python and small operators take a time that doesn't depend on the weights: as
    long as the products of a small network, a tenth of a large one's.

    To notice changed weights and hooks takes 0.3 ms, since reading weights evicts the modules'
    dictionaries from the caches: ``Memory.look_again`` tells at which steps.

    Args:
        step: takes ``inputs`` and returns logits; no tensor's values decide what it computes.
        inputs: of any values; the graph reads where they are.
        pool: the memory that all graphs of a network share.
    """

    def __init__(
        self, step: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor, pool: "Memory"
    ):
        self._step, self._inputs, self._memory = step, inputs.clone(), pool
        self._used, self._n_threads = _Used(pool.network), 0  # not recorded yet
        self._n_looks, self._has_hooks = -1, False
        self._parts: list[Callable[[], None]] | None = None
        # Steps of several tokens are recorded, in the time of another one, once they are common.
        self._n_more = _OFTEN - 1 if inputs.shape[-1] > 1 else 0

    @staticmethod
    def fits(attention: Any) -> bool:
        """Return whether a layer's attention is compiled code, which reads positions."""
        q = attention.cache.k.new_empty(1, attention.n_local_heads, attention.head_dim)
        place = torch.zeros(1, dtype=torch.long, device="cpu")
        return has_attention(q, attention.cache, RaggedBatch(place, place, ()))

    @staticmethod
    def pool(network: nn.Module) -> "Memory":
        """Return memory for graphs of a network, of which one runs at a time."""
        return Memory(network)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the logits of inputs, until any graph of the pool is replayed."""
        is_rare, self._n_more = self._n_more > 0, self._n_more - 1
        if self._memory.looks_always or self._n_looks != self._memory.n_looks:
            self._look()
        if is_rare or self._has_hooks:  # someone wants to know what modules compute
            return self._step(inputs)
        self._inputs.copy_(inputs)
        if self._n_threads != torch.get_num_threads():
            self._record()
            return self._logits
        if self._parts is None:
            return self._step(inputs)
        for part in self._parts:
            part()
        return self._logits

    def _look(self) -> None:
        """Notice what has changed in the network."""
        if not self._used.are_same():
            self._n_threads, self._used = 0, _Used(self._memory.network)
        self._has_hooks, self._n_looks = self._used.have_hooks(), self._memory.n_looks

    def _record(self) -> None:
        """Compute the step, and record how, if its tensors fit into memory."""
        used, n_threads, parts = _Used(self._memory.network), torch.get_num_threads(), None
        recording.calls = []
        try:
            with _Operators(self._memory) as operators:
                logits = self._step(self._inputs)
            parts = list(_parts(recording.calls))
        except _TooLarge:
            recording.calls = None
            logits = self._step(self._inputs)
        finally:
            recording.calls = None
        # Only now, so that an interrupted record isn't replayed, nor reads what is freed.
        self._used, self._n_threads = used, n_threads
        self._parts, self._logits = parts, logits
        self._kept = operators.kept  # tensors that calls read and write


class _TooLarge(RuntimeError):
    """The tensors of a step take more memory than a graph may keep."""


class Memory:
    """Memory that the graphs of a network share, of which one runs at a time.

    Attributes:
        network: whose graphs they are.
        left: bytes that a graph which is being recorded may still take.
        n_looks: how many times graphs were told to look for changes of the network.
        looks_always: whether they do so at each step.
    """

    def __init__(self, network: nn.Module):
        self.network, self.n_looks, self.looks_always = network, 0, True
        self._chunks: list[torch.Tensor] = []
        self.begin()

    def begin(self) -> None:
        """Begin with another graph."""
        self._place, self._offset, self.left = 0, 0, _MOST

    def look_again(self, always: bool) -> None:
        """Have each graph notice changes of the network at its next step, or always at each."""
        self.n_looks, self.looks_always = self.n_looks + 1, always

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor's values in this memory, where it may be kept.

        Raises:
            _TooLarge: the graph has taken too much.
        """
        n_bytes = -(-tensor.nbytes // _LINE) * _LINE
        self.left -= n_bytes
        if self.left < 0:
            raise _TooLarge
        if not tensor.is_contiguous() or tensor.is_mkldnn:
            return tensor
        while True:
            if self._place == len(self._chunks):
                size = max(n_bytes, _CHUNK)
                self._chunks.append(torch.empty(size, dtype=torch.uint8, device="cpu"))
            chunk = self._chunks[self._place]
            if self._offset + n_bytes <= len(chunk):
                break
            self._place, self._offset = self._place + 1, 0
        own = chunk[self._offset : self._offset + tensor.nbytes]
        self._offset += n_bytes
        return own.view(tensor.dtype).view(tensor.shape).copy_(tensor)


class _Used:
    """A network's kernels, parameters and buffers, whose addresses a graph knows.

    They live as long as this does, even if the network gets others.
    """

    def __init__(self, network: nn.Module):
        modules = list(network.modules())
        owners = [(vars(module), "kernel") for module in modules if "kernel" in vars(module)]
        for module in modules:
            for own in (module._parameters, module._buffers, module._modules):
                owners += [(own, name) for name in own]
        self._owners, self._names = zip(*owners, strict=True)
        self._parts = [own[name] for own, name in owners]
        self._memory = [x.detach() for x in self._parts if isinstance(x, torch.Tensor)]
        self._weights = [x for x in self._parts if isinstance(x, nn.Parameter) and x.numel()]
        self._places = [x.data_ptr() for x in self._weights]
        self._hooks = [module._forward_hooks for module in modules]
        self._hooks += [module._forward_pre_hooks for module in modules]

    def are_same(self) -> bool:
        """Return whether the network still has them."""
        found = map(dict.get, self._owners, self._names)
        have_places = [x.data_ptr() for x in self._weights] == self._places  # not of another's data
        return have_places and all(map(operator.is_, found, self._parts))

    def have_hooks(self) -> bool:
        """Return whether a module calls functions of a caller's."""
        return any(self._hooks) or _has_any_global_hook()


class _Recorder:
    """Records operators among the calls of compiled code, which replaces some of them.

    Views and new tensors aren't recorded: they stay as they are.
    """

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        memory.begin()
        self._memory = memory
        self.kept: list[torch.Tensor] = []  # what operators returned

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        calls = recording.calls
        assert calls is not None
        out = _operate(func, args, kwargs, self._memory)
        if out is None:
            n_before = len(calls)
            out = func(*args, **kwargs)
            assert len(calls) == n_before, f"{func} calls compiled code"
            given = {_place(x) for x in _tensors((args, kwargs))}
            news = [x for x in _tensors(out) if _place(x) not in given]
            if isinstance(out, torch.Tensor) and news:
                out = self._memory.copy(out)
            is_empty = func.overloadpacket.__name__ in _EMPTY
            if func._schema.is_mutable or (news and not is_empty):
                calls.append((_operator(func, args, kwargs, out, bool(news)), None))
        self.kept += _tensors(out)
        return out


class _Operators(_Recorder, TorchDispatchMode):
    """Of two classes, since PyTorch imports its compiler for a mode that has the method itself."""


def _operate(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], memory: Memory
) -> torch.Tensor | None:
    """Return what an operator of PyTorch does, done by compiled code; None where it has none."""
    if func in _GATHERING:
        rows = [args[1]] if isinstance(args[1], torch.Tensor) else args[1]
        return _gathered(args[0], rows[0], memory) if len(rows) == 1 else None
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    fit = all(x.is_cpu and x.is_contiguous() and x.dim() > 1 for x in tensors)
    if kwargs or not tensors or not fit:
        return None
    first, last = tensors[0], args[-1]
    is_sum = func is torch.ops.aten.add.Tensor and len(tensors) == len(args) == 2
    if is_sum and first.shape == last.shape and is_read(first, last):
        return _by_rows(code("numba_tokens", "add"), memory.copy(torch.empty_like(first)), *tensors)
    pair = len(args) == 2 and (first.dtype, last)
    if func is torch.ops.aten.to.dtype and pair == (torch.bfloat16, torch.float32):
        out = memory.copy(torch.empty_like(first, dtype=last))
        return _by_rows(code("numba_tokens", "to_float32"), out, first)
    if func is torch.ops.aten.to.dtype and pair == (torch.float32, torch.bfloat16):
        out = memory.copy(torch.empty_like(first, dtype=last))
        return _by_rows(code("numba_tokens", "to_bfloat16"), out, first)
    return None


def _gathered(table: torch.Tensor, rows: torch.Tensor, memory: Memory) -> torch.Tensor | None:
    """Return the rows of a table, copied by compiled code; None where it has none.

    Numbers are of tokens and positions, which are checked before: of others it takes an end's row.
    """
    are_numbers = rows.dtype == torch.int64 and rows.dim() == 1 and rows.is_contiguous()
    are_words = table.dim() > 1 and table[0].nbytes % 4 == 0 and table.data_ptr() % 4 == 0
    if not (are_numbers and are_words and table.is_contiguous() and table.is_cpu):
        return None
    words = table.flatten(1).view(torch.int32)
    out = memory.copy(torch.empty(len(rows), words.shape[1], dtype=torch.int32, device="cpu"))
    copies = gather(words, rows, len(table), out)
    return copies.view(table.dtype).view(len(rows), *table.shape[1:])


def _by_rows(function: Any, out: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
    """Call a function that writes a tensor, given others of its shape."""
    rows = out.flatten(0, -2)
    places = [x.data_ptr() for x in (*tensors, out)]
    by_rows(function, len(rows), *places, *rows.shape)
    return out


_GATHERING = (torch.ops.aten.index.Tensor, torch.ops.aten.embedding.default)
_EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


def _place(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_mkldnn else tensor.untyped_storage().data_ptr()


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _operator(func: Any, args: Any, kwargs: Any, outs: Any, is_copied: bool) -> Callable[[], None]:
    """Return a function that repeats an operator, and copies what it returns to where it was."""

    def repeat() -> None:
        news = func(*args, **kwargs)
        if is_copied:
            for out, new in zip(_tensors(outs), _tensors(news), strict=True):
                out.copy_(new)

    return repeat


def _parts(calls: list[tuple[Any, Any]]) -> Iterator[Callable[[], None]]:
    """Yield functions that repeat calls in their order, neighbours of compiled code in one."""
    for is_operator, some in itertools.groupby(calls, lambda call: callable(call[0])):
        if is_operator:
            yield from (repeat for repeat, _ in some)
        else:
            yield _Replay(list(some))


class _Replay:
    """Calls of compiled code, one after another."""

    def __init__(self, calls: list[tuple[int, Any]]):
        self._calls = calls  # which own the data
        places = [place for address, data in calls for place in (address, ctypes.addressof(data))]
        self._data = (ctypes.c_int64 * (1 + len(places)))(len(calls), *places)
        self._code = code("numba_tokens", "replay").address

    def __call__(self) -> None:
        call_in_parallel(self._code, self._data)
