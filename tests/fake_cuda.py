"""CUDA's branches on a CPU: the attention operator, and graphs that are replayed in earnest."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llama.engine import graphs
from llama.layers.capability import Capability
from llama.layers.kernels import compiled, groups

# An H100 whose attention operator takes float32 too, so that tokens can be compared.
H100 = Capability("cuda", (9, 0), (torch.float32, torch.float16, torch.bfloat16))
varlen_calls: list[dict[str, Any]] = []  # what the operator was asked for


def _flash_attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cum_seq_q: torch.Tensor,
    cum_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    seqused_k: torch.Tensor,
    **others: Any,
) -> tuple[torch.Tensor, ...]:
    """PyTorch's FlashAttention for sequences of any lengths, with its demands on CUDA."""
    assert not (dropout_p or return_debug_mask or any(x is not None for x in others.values()))
    numbers = (cum_seq_q, cum_seq_k, seqused_k)
    assert all(x.dtype == torch.int32 and x.is_contiguous() for x in numbers)
    assert all(x.dim() == 3 and x.stride(-1) == 1 for x in (query, key, value))
    assert key.shape == value.shape and query.dtype == key.dtype == value.dtype
    n_sequences = len(seqused_k)
    assert cum_seq_q.shape == cum_seq_k.shape == (n_sequences + 1,)
    assert cum_seq_q[-1] == len(query) and (cum_seq_k[:-1] + seqused_k <= len(key)).all()
    assert int(cum_seq_q.diff().max()) <= max_q and int(seqused_k.max()) <= max_k
    is_divided = max_q == 1 and not is_causal and query.shape[1] > key.shape[1]
    varlen_calls.append({"max_q": max_q, "max_k": max_k, "is_divided": is_divided})
    n_rep = query.shape[1] // key.shape[1]
    out = torch.full_like(query, torch.nan)
    for i in range(n_sequences):
        some = slice(int(cum_seq_q[i]), int(cum_seq_q[i + 1]))
        used, first = int(seqused_k[i]), int(cum_seq_k[i])
        keys, values = (
            x[first : first + used].transpose(0, 1).repeat_interleave(n_rep, 0).float()
            for x in (key, value)
        )
        n = some.stop - some.start
        mask = torch.ones(n, used, dtype=torch.bool)
        if is_causal:
            mask = mask.tril(used - n)
        q = query[some].transpose(0, 1).float()
        attended = torch.nn.functional.scaled_dot_product_attention(q, keys, values, mask)
        out[some] = attended.transpose(0, 1).to(out.dtype)
    rng = torch.zeros(2, dtype=torch.uint64)
    sums = query.new_zeros(query.shape[1], len(query), dtype=torch.float32)
    return out, sums, rng, rng, query.new_empty(0)


_library = torch.library.Library("aten", "IMPL")
_library.impl("_flash_attention_forward", _flash_attention_forward, "CPU")


class _Tape(TorchDispatchMode):
    """Records the operators of a step, with the tensors that they read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a graph can't wait"
        out = func(*args, **(kwargs or {}))
        self.ops.append((func, args, kwargs or {}, out))
        return out


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class ReplayedGraph:
    """Stands for ``graphs.CudaGraph``: the same operators on the same memory, and nothing else.

    A value of the host that went into the record stays what it was, an input that isn't copied too,
    and another graph of the pool leaves NaN in all that this one made.
    """

    def __init__(
        self,
        step: Callable[[torch.Tensor], torch.Tensor],
        inputs: torch.Tensor,
        pool: "list[ReplayedGraph]",
    ):
        self._inputs = inputs.clone()
        with _Tape() as tape:
            self._logits = step(self._inputs)
        self._ops = tape.ops
        self._made: list[torch.Tensor] = []  # in the pool's memory
        for _, args, kwargs, results in tape.ops:
            given = {x.untyped_storage().data_ptr() for x in _tensors((args, kwargs))}
            made = [x for x in _tensors(results) if x.untyped_storage().data_ptr() not in given]
            self._made += [x for x in made if x.is_floating_point()]
        self._pool = pool
        self.n_replays = 0

    @staticmethod
    def pool(network: nn.Module) -> "list[ReplayedGraph]":
        return []

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        self.n_replays += 1
        for graph in self._pool:  # the last one, whose memory this one uses
            for tensor in graph._made:
                tensor.fill_(torch.nan)
        self._pool[:] = [self]
        self._inputs.copy_(inputs)
        for func, args, kwargs, recorded in self._ops:
            read = {x.untyped_storage().data_ptr() for x in _tensors((args, kwargs))}
            results = func(*args, **kwargs)
            for old, new in zip(_tensors(recorded), _tensors(results), strict=True):
                if old.untyped_storage().data_ptr() not in read:  # views follow by themselves
                    if func.namespace == "_c10d_functional":
                        new = torch.ops._c10d_functional.wait_tensor(new)
                    old.copy_(new)
        return self._logits


def pretend(setattr: Callable[..., None]) -> None:
    """Take CUDA's branches from here on; ``setattr`` is the builtin, or monkeypatch's."""
    setattr(Capability, "of", staticmethod(lambda device: H100))
    setattr(graphs, "CudaGraph", ReplayedGraph)
    for module in (compiled, groups):  # whose calls graphs wouldn't record
        setattr(module, "has_numba", lambda: False)


def n_replays(steps: graphs.DecodingSteps | None) -> int:
    """Return how many steps were replayed so far."""
    assert steps is not None
    return sum(graph.n_replays for graph in steps._graphs.values())


class Launches(TorchDispatchMode):
    """Counts the operators that launch a kernel, on meta tensors, and the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.largest = 0  # elements

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().partition("::")[2].partition(".")[0]
        given = {x.untyped_storage()._cdata for x in _tensors((args, kwargs))}
        made = [x for x in _tensors(out) if x.untyped_storage()._cdata not in given]
        is_launch = made or func._schema.is_mutable  # neither is a view
        on_device = any(x.device.type == "meta" for x in _tensors((args, kwargs, out)))
        if is_launch and on_device and not name.startswith(("empty", "new_empty")):
            self.names[name] += 1
            self.largest = max([self.largest, *(x.numel() for x in made)])
        return out


class Waits(TorchFunctionMode):
    """Notes where the host waits for a device, on meta tensors, and answers with ones."""

    def __init__(self) -> None:
        super().__init__()
        self.downloads: list[str] = []
        self.uploads = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        tensor = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if tensor is not None and tensor.device.type == "meta":
            if name in ("__bool__", "item", "__int__", "__index__", "__float__"):
                self.downloads.append(name)
                return 1
            if name in ("cpu", "tolist", "nonzero"):
                self.downloads.append(name)
                ones = torch.ones(tensor.shape, dtype=tensor.dtype, device="cpu")
                return ones.tolist() if name == "tolist" else ones
            if name in ("__getitem__", "__setitem__"):
                indices = args[1] if isinstance(args[1], tuple) else (args[1],)
                for index in indices:
                    if isinstance(index, list):
                        self.downloads.append("a list as an index, which is sent and waited for")
                    if isinstance(index, torch.Tensor) and index.dtype == torch.bool:
                        self.downloads.append("a boolean index")
        out = func(*args, **(kwargs or {}))
        is_sent = isinstance(out, torch.Tensor) and out.device.type == "meta"
        if is_sent and (name == "tensor" or (tensor is not None and tensor.device.type == "cpu")):
            self.uploads += 1
        return out
