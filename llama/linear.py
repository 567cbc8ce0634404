"""The projections: fairscale's parallel layers, and where their matrix products happen.

fairscale fills each new weight, through a full-size master copy when there are several ranks. A
checkpoint fills these: a weight is made in this rank's size, on the default device (``meta``
included), and its memory isn't touched.
"""

import functools
import itertools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel import layers as fairscale_layers
from fairscale.nn.model_parallel.mappings import (
    gather_from_model_parallel_region,
    reduce_from_model_parallel_region,
)
from torch import nn

from llama.memory import release
from llama.parallel import world_size

# Packing takes longer than a product: it begins with a weight's second use, lest it delays the
# first token, and is spread over as many uses, lest it delays any other by much.
_PACKED_OVER = 16


def _split(features: int, what: str) -> int:
    ranks = world_size()
    if features % ranks:
        raise ValueError(f"{what} of {features} can't be divided among {ranks} ranks")
    return features // ranks


def _empty_weight(out_features: int, in_features: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(out_features, in_features))


@functools.cache
def _packing_pays() -> bool:
    """Whether oneDNN's own order of a bfloat16 weight is the fastest one for any number of rows.

    It is on processors with AVX-512's bfloat16 products. With AMX, whose order is another, a
    single row is slower than from the plain weight.
    """
    # Before torch 2.11 there is no public way to ask.
    capabilities: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    has = capabilities.get("avx512_bf16") and not capabilities.get("amx_bf16")
    return bool(has) and torch.backends.mkldnn.is_available()


class _Linear(nn.Module):
    """``x @ weight.T``, by the kernel that suits device, dtype and number of rows."""

    weight: nn.Parameter
    shared = False  # whether the weight is another module's too, which needs it as it is
    _made = itertools.count()

    def __init__(self, in_features: int, out_features: int):
        nn.Module.__init__(self)
        self.weight = _empty_weight(out_features, in_features)
        self._uses_to_packing = 1 + next(self._made) % _PACKED_OVER

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (n_tokens, in_features) to (n_tokens, out_features), of this rank's part."""
        weight = self.weight
        if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
            return F.linear(x, weight)
        if not (weight.is_mkldnn or weight.requires_grad or self.shared) and _packing_pays():
            weight = self._pack_in_time()
        if weight.is_mkldnn:
            out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
            return out
        if x.shape[0] == 1 and not _packing_pays():
            return torch.mv(weight, x[0])[None]  # with AMX at the speed of memory, unlike linear
        return F.linear(x, weight)

    def _pack_in_time(self) -> nn.Parameter:
        if self._uses_to_packing == 0:
            plain = self.weight
            packed = torch.ops.mkldnn._reorder_linear_weight(plain.detach(), None)
            self.weight = nn.Parameter(packed, requires_grad=False)
            if getattr(plain, "is_mapped", False):
                release([plain])
        self._uses_to_packing -= 1
        return self.weight


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
        return gather_from_model_parallel_region(out) if self.gather_output else out


class RowParallelLinear(_Linear, fairscale_layers.RowParallelLinear):
    """``x @ weight.T`` of inputs that lie split over the ranks; the ranks' sums are added."""

    def __init__(self, in_features: int, out_features: int):
        _Linear.__init__(self, _split(in_features, "an input width"), out_features)
        self.in_features = in_features
        self.out_features = out_features
        self.input_is_parallel = True
        self.bias = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return reduce_from_model_parallel_region(self.product(x))


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
