"""The projections: fairscale's parallel layers, and where their matrix products happen.

fairscale fills each new weight, through a full-size master copy when there are several ranks. A
checkpoint fills these: a weight is made in this rank's size, on the default device (``meta``
included), and its memory isn't touched.
"""

import itertools
import weakref
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel import layers as fairscale_layers
from fairscale.nn.model_parallel.mappings import (
    gather_from_model_parallel_region,
    reduce_from_model_parallel_region,
)
from torch import nn

from llama.layers.memory import release, trim
from llama.parallel import world_size

# Packing takes longer than a product: it begins with a weight's second use, lest it delays the
# first token, and is spread over as many uses, lest it delays any other by much.
_PACKED_OVER = 16
# oneDNN reads a packed weight for four tokens at 0.88 of the memory's speed, for one at 0.76.
_QUICK_TOKENS = 4


def _split(features: int, what: str) -> int:
    ranks = world_size()
    if features % ranks:
        raise ValueError(f"{what} of {features} can't be divided among {ranks} ranks")
    return features // ranks


def _empty_weight(out_features: int, in_features: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(out_features, in_features))


def _does_packing_pay() -> bool:
    """Whether oneDNN's own order of a bfloat16 weight is the fastest one for any number of rows.

    It is on processors with AVX-512's bfloat16 products. With AMX, whose order is another, a
    single row is slower than from the plain weight.
    """
    # Before torch 2.11 there is no public way to ask.
    capabilities: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    has = capabilities.get("avx512_bf16") and not capabilities.get("amx_bf16")
    return bool(has) and torch.backends.mkldnn.is_available()


_PACKING_PAYS = _does_packing_pay()


class _Linear(nn.Module):
    """``x @ weight.T``, by the kernel that suits device, dtype and number of rows."""

    weight: nn.Parameter
    shared = False  # whether the weight is another module's too, which needs it as it is
    _made = itertools.count()

    def __init__(self, in_features: int, out_features: int):
        nn.Module.__init__(self)
        self.weight = _empty_weight(out_features, in_features)
        self._uses_to_packing = 1 + next(self._made) % _PACKED_OVER
        # Once packed: the weight that holds this one, its number, and which rows of it are this
        # one's. It lasts as long as one of its layers does.
        self._packed: torch.Tensor | None = None
        self._number: torch.Tensor | None = None
        self._rows = slice(0)
        self._width = 0  # the rows of all of that

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (n_tokens, in_features) to (n_tokens, out_features), of this rank's part."""
        return project(x, self)[0]

    def products(self, x: torch.Tensor, layers: "Sequence[_Linear]") -> Sequence[torch.Tensor]:
        """What ``project`` gives for layers of which this is the first."""
        if not any(layer.is_packed for layer in layers) and _may_pack(layers):
            _pack_in_time(layers)
        if _are_neighbours(layers):
            out = _packed_rows_product(x, self, self._width)
            return [out[:, layer._rows] for layer in layers]
        return [_product_alone(x, layer) for layer in layers]

    def padding(self, n_tokens: int) -> int:
        """How many tokens more make the products of as few as ``n_tokens`` quicker."""
        weight = self.weight
        packs = _PACKING_PAYS and weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
        return max(0, _QUICK_TOKENS - n_tokens) if packs else 0

    @property
    def is_packed(self) -> bool:
        return self._number is not None

    def plain_weight(self) -> torch.Tensor:
        """The weight as a checkpoint has it, shape (out_features, in_features)."""
        if self._packed is None:
            return self.weight
        return self._packed.to_dense()[self._rows].clone()

    def _unpack(self) -> None:
        if self._number is not None:
            self.weight = nn.Parameter(self.plain_weight(), requires_grad=False)
            self._packed, self._number, self._rows = None, None, slice(0)

    # Whoever saves, loads or copies a layer sees the plain weight.

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        weight = self.plain_weight()
        destination[f"{prefix}weight"] = weight if keep_vars else weight.detach()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._unpack()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self._number is not None:
            plain = nn.Parameter(self.plain_weight(), requires_grad=False)
            state |= {"_parameters": {"weight": plain}, "_packed": None, "_number": None}
        return state


def project(x: torch.Tensor, *layers: _Linear) -> Sequence[torch.Tensor]:
    """Each layer's product with the same ``x``; once their weights are packed, all in one.

    Args:
        x: shape (n_tokens, in_features).

    Returns:
        For each layer this rank's part, shape (n_tokens, out_features).
    """
    return layers[0].products(x, layers)


def _are_neighbours(layers: Sequence[_Linear]) -> bool:
    """Whether the layers' weights are, in this order, all that one packed weight has."""
    row = 0
    for layer in layers:
        if not layer.is_packed or layer._rows.start != row:
            return False
        row = layer._rows.stop
    return row == layers[0]._width


def _product_alone(x: torch.Tensor, layer: _Linear) -> torch.Tensor:
    if layer.is_packed:  # with others, which are calculated in vain
        return _packed_rows_product(x, layer, layer._width)[:, layer._rows]
    weight = layer.weight
    bf16_on_cpu = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    if bf16_on_cpu and x.shape[0] == 1 and not _PACKING_PAYS:
        # With AMX at the speed of memory, unlike linear and what the compiler makes of mv.
        out: torch.Tensor = torch.ops.llama.mv(weight, x[0])[None]
        return out
    return F.linear(x, weight)


def _packed_rows_product(x: torch.Tensor, layer: _Linear, width: int) -> torch.Tensor:
    n_tokens = x.shape[0]
    if n_tokens < _QUICK_TOKENS:
        x = F.pad(x, (0, 0, 0, _QUICK_TOKENS - n_tokens))
    out: torch.Tensor = torch.ops.llama.packed_product(x, layer._number, width)
    return out[:n_tokens]


def _may_pack(layers: Sequence[_Linear]) -> bool:
    return _PACKING_PAYS and not any(
        layer.weight.dtype != torch.bfloat16
        or layer.weight.device.type != "cpu"
        or layer.weight.requires_grad
        or layer.shared
        for layer in layers
    )


def _pack_in_time(layers: Sequence[_Linear]) -> None:
    layers[0]._uses_to_packing -= 1
    if layers[0]._uses_to_packing < 0:
        _pack(layers)


def pack_now(*layers: _Linear) -> None:
    """Pack weights that ``project`` will be given together, if that pays."""
    if not layers[0].is_packed and _may_pack(layers):
        _pack(layers)


def _pack(layers: Sequence[_Linear]) -> None:
    """Bring weights into oneDNN's order, one below the other, and let the plain ones go."""
    plain: list[torch.Tensor] = [layer.weight for layer in layers]
    mapped = [weight for weight in plain if getattr(weight, "is_mapped", False)]
    joined = torch.cat(plain) if len(plain) > 1 else plain[0].detach()
    if len(plain) > 1:
        release(mapped)  # what was copied needn't stay while it is packed
    packed = torch.ops.mkldnn._reorder_linear_weight(joined, None)
    number = next(_numbers)
    _packed_weights[number] = packed
    first_row = 0
    for layer, weight in zip(layers, plain, strict=True):
        layer._packed = packed
        layer._number = torch.tensor(number, device="cpu")
        layer._width = joined.shape[0]
        layer._rows = slice(first_row, first_row + weight.shape[0])
        layer.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)
        first_row = layer._rows.stop
    release(mapped)
    del plain, joined, weight
    trim()  # the gaps that plain weights leave are too small for what comes next


# Compiled code can't hold a tensor in oneDNN's order, but the number of one.
_packed_weights: MutableMapping[int, torch.Tensor] = weakref.WeakValueDictionary()
_numbers = itertools.count()
_library = torch.library.Library("llama", "FRAGMENT")
_library.define("packed_product(Tensor x, Tensor number, int width) -> Tensor")
_library.define("mv(Tensor weight, Tensor x) -> Tensor")


def _packed_product(x: torch.Tensor, number: torch.Tensor, width: int) -> torch.Tensor:
    weight = _packed_weights[int(number)]
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return out


def _packed_product_shape(x: torch.Tensor, number: torch.Tensor, width: int) -> torch.Tensor:
    return x.new_empty(x.shape[0], width)


def _mv_shape(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(weight.shape[0])


_library.impl("packed_product", _packed_product, "CPU")
_library.impl("mv", torch.mv, "CPU")
torch.library.register_fake("llama::packed_product", _packed_product_shape, lib=_library)
torch.library.register_fake("llama::mv", _mv_shape, lib=_library)


class ColumnParallelLinear(_Linear, fairscale_layers.ColumnParallelLinear):
    """``x @ weight.T``, each rank computing its part of the outputs.

    ``gather_output`` joins the parts on every rank.
    """

    def __init__(self, in_features: int, out_features: int, *, gather_output: bool = False):
        _Linear.__init__(self, in_features, _split(out_features, "an output width"))
        self.in_features = in_features
        self.out_features = out_features
        self.gather_output = gather_output
        self.bias = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.product(x)
        parts = self.gather_output and out.shape[-1] != self.out_features
        return gather_from_model_parallel_region(out) if parts else out


class RowParallelLinear(_Linear, fairscale_layers.RowParallelLinear):
    """``x @ weight.T`` of inputs that lie split over the ranks; the ranks' sums are added."""

    def __init__(self, in_features: int, out_features: int):
        _Linear.__init__(self, _split(in_features, "an input width"), out_features)
        self.in_features = in_features
        self.out_features = out_features
        self.input_is_parallel = True
        self.bias = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.product(x)
        parts = x.shape[-1] != self.in_features
        return reduce_from_model_parallel_region(out) if parts else out


class ParallelEmbedding(fairscale_layers.ParallelEmbedding):
    """The token embedding; each rank keeps its part of every row."""

    def __init__(self, num_embeddings: int, embedding_dim: int):
        nn.Module.__init__(self)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = None
        self.max_norm = None
        self.norm_type = 2.0
        self.scale_grad_by_freq = False
        self.sparse = False
        self.weight = _empty_weight(num_embeddings, _split(embedding_dim, "the embedding width"))
