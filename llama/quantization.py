"""Linear layers with fewer bits, which ``swap`` puts in the place of a network's usual ones.

A layer's state is what a checkpoint stores (``llama.rounding``). Before it is used, it is packed
into the order that the quickest kernel of its device reads (``llama.kernels``), together with the
layers that multiply the same input.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from fairscale.nn.model_parallel.mappings import gather_from_model_parallel_region
from torch import nn

from llama.kernels import Kernel, make_kernel
from llama.layers.memory import release, trim
from llama.layers.quantization import Scheme, StoredWeight
from llama.linear import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear, _Linear
from llama.model import Attention, FeedForward, Transformer


class _QuantizedLinear(_Linear):
    """What the two kinds of parallel layers have in common."""

    def _quantize(self, scheme: Scheme, dtype: torch.dtype, whole_width: int) -> None:
        """Make room for quantised parts instead of the weight."""
        self.scheme = scheme
        self._dtype = dtype  # of the inputs
        self._block = scheme.block_size(whole_width)
        self._kernel: Kernel | None = None
        _make_parts(self, scheme, *self.weight.shape)

    def products(self, x: torch.Tensor, layers: Sequence[_Linear]) -> Sequence[torch.Tensor]:
        if self._kernel is None:
            pack(layers)
        kernel = self._kernel
        if kernel is None or any(getattr(layer, "_kernel", None) is not kernel for layer in layers):
            return [layer.products(x, [layer])[0] for layer in layers]
        out = kernel(x)
        return [out[:, layer._rows] for layer in layers]

    def padding(self, n_tokens: int) -> int:
        return 0

    @property
    def is_packed(self) -> bool:
        return self._kernel is not None

    def parts(self) -> StoredWeight:
        """The parts as a checkpoint stores them."""
        if self._kernel is None:
            return {name: self.get_parameter(name).detach() for name in self.scheme.dtypes()}
        return {name: part[self._rows] for name, part in self._kernel.parts().items()}

    def plain_weight(self) -> torch.Tensor:
        """What the parts stand for, in float32, shape (out_features, in_features)."""
        return self.scheme.dequantize(self.parts(), self._block)

    def _unpack(self) -> None:
        if self._kernel is not None:
            for name, part in self.parts().items():
                setattr(self, name, nn.Parameter(part.clone(), requires_grad=False))
            self._kernel = None

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        for name, part in self.parts().items():
            destination[f"{prefix}{name}"] = part

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        plain = {
            name: nn.Parameter(part.clone(), requires_grad=False)
            for name, part in self.parts().items()
        }
        return state | {"_parameters": plain, "_kernel": None}


class QuantizedColumnParallelLinear(_QuantizedLinear, ColumnParallelLinear):
    """``ColumnParallelLinear`` with quantised weights, for inputs of ``dtype``."""

    def __init__(self, usual: ColumnParallelLinear, scheme: Scheme, dtype: torch.dtype):
        ColumnParallelLinear.__init__(
            self, usual.in_features, usual.out_features, gather_output=usual.gather_output
        )
        self._quantize(scheme, dtype, usual.in_features)


class QuantizedRowParallelLinear(_QuantizedLinear, RowParallelLinear):
    """``RowParallelLinear`` with quantised weights, for inputs of ``dtype``."""

    def __init__(self, usual: RowParallelLinear, scheme: Scheme, dtype: torch.dtype):
        RowParallelLinear.__init__(self, usual.in_features, usual.out_features)
        self._quantize(scheme, dtype, usual.in_features)


class QuantizedEmbedding(ParallelEmbedding):
    """``ParallelEmbedding`` whose rows are quantised; they become ``dtype`` when looked up."""

    def __init__(self, usual: ParallelEmbedding, scheme: Scheme, dtype: torch.dtype):
        super().__init__(usual.num_embeddings, usual.embedding_dim)
        self.scheme = scheme
        self._dtype = dtype
        self._block = scheme.block_size(usual.embedding_dim)
        _make_parts(self, scheme, *self.weight.shape)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        parts = {name: self.get_parameter(name)[tokens] for name in self.scheme.dtypes()}
        rows = self.scheme.dequantize(parts, self._block).to(self._dtype)
        split = rows.shape[1] != self.embedding_dim
        return gather_from_model_parallel_region(rows) if split else rows


def _make_parts(module: nn.Module, scheme: Scheme, out_features: int, in_features: int) -> None:
    dtypes = scheme.dtypes()
    for name, shape in scheme.shapes(out_features, in_features).items():
        part = torch.empty(shape, dtype=dtypes[name])
        setattr(module, name, nn.Parameter(part, requires_grad=False))


def projections(model: Transformer) -> Iterator[tuple[_Linear, ...]]:
    """The network's linear layers, those together that multiply the same input."""
    for module in model.modules():
        if isinstance(module, Attention):
            yield module.wq, module.wk, module.wv
            yield (module.wo,)
        elif isinstance(module, FeedForward):
            yield module.w1, module.w3
            yield (module.w2,)
    yield (model.output,)


def scheme_in(model: Transformer) -> Scheme | None:
    """How a network's layers are quantised."""
    return getattr(next(projections(model))[0], "scheme", None)


def swap(model: Transformer, scheme: Scheme, dtype: torch.dtype) -> None:
    """Replace the layers that a scheme quantises; a checkpoint is to fill the new ones."""
    kinds: dict[type, type] = {
        ColumnParallelLinear: QuantizedColumnParallelLinear,
        RowParallelLinear: QuantizedRowParallelLinear,
        ParallelEmbedding: QuantizedEmbedding,
    }
    for path, usual in list(model.named_modules()):
        if type(usual) in kinds and scheme.applies_to(path):
            model.set_submodule(path, kinds[type(usual)](usual, scheme, dtype))


def pack(layers: Sequence[_Linear]) -> None:
    """Bring the parts of layers that multiply the same input into a kernel's order."""
    quantized = [layer for layer in layers if isinstance(layer, _QuantizedLinear)]
    if len(quantized) != len(layers) or any(layer.is_packed for layer in quantized):
        quantized = quantized[:1]
    first = quantized[0]
    own = [layer.parts() for layer in quantized]
    joined = {name: torch.cat([parts[name] for parts in own]) for name in own[0]}
    kernel = make_kernel(joined, first.scheme, first._block, first._dtype)
    row = 0
    for layer, parts in zip(quantized, own, strict=True):
        layer._kernel = kernel
        layer._rows = slice(row, row + len(parts["weight"]))
        row = layer._rows.stop
        for name, part in parts.items():
            setattr(layer, name, nn.Parameter(part.new_empty(0), requires_grad=False))


def pack_all(model: Transformer) -> None:
    """Pack every linear layer, one group at a time, and let go of what was mapped or made."""
    for layers in projections(model):
        if not isinstance(layers[0], _QuantizedLinear):
            continue
        parts = [part for layer in layers for part in layer.parameters()]
        pack(layers)
        release(part for part in parts if getattr(part, "is_mapped", False))
        del parts
        trim()
