"""Further kinds of an adapter's changes: of rows, of biases, by virtual tokens, several at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from llama.adapters import Adapter, Change
from llama.layers.kv_cache import KVCache


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of an embedding or of the output in place of the module's own.

    Args:
        indices: int64, shape (k,); of the output within this rank's rows.
        rows: shape (k, in_features), or this rank's columns of the embedding's.
    """

    indices: torch.Tensor
    rows: torch.Tensor

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if x.is_floating_point():
            return out.index_copy(1, self.indices, F.linear(x, self.rows))
        if not len(self.rows):
            return out
        hits = x[:, None] == self.indices  # (n, k)
        own = self.rows[hits.int().argmax(1)]
        return torch.where(hits.any(1, keepdim=True), own, out)


@dataclass(frozen=True, eq=False)
class Shifted:
    """``out + bias``: the difference of a bias, which a sum over ranks must get from one only."""

    bias: torch.Tensor

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return out + self.bias


@dataclass(frozen=True, eq=False)
class Chain:
    """Several changes of one module, one after another."""

    changes: Sequence[Change]

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        for change in self.changes:
            out = change(x, out)
        return out


@dataclass(frozen=True, eq=False)
class VirtualTokens:
    """Embeddings of ids beyond the vocabulary.

    Args:
        rows: this rank's columns of their embeddings, shape (n_virtual, ...).
        first: the first one's id, which is the size of the vocabulary.
    """

    rows: torch.Tensor
    first: int

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        own = self.rows[(x - self.first).clamp(0, len(self.rows) - 1)]
        return torch.where((x >= self.first)[:, None], own, out)


def write_prefix(model: nn.Module, slot: int, adapter: Adapter | None, n_cached: int) -> int:
    """Write an adapter's prefix, if it has one, to a slot of the cache that lacks it.

    Args:
        model: whose layers' caches are written.
        slot: of the cache.
        adapter: of the sequence that has the slot.
        n_cached: how many of the sequence's tokens the slot holds, virtual ones included.

    Returns:
        How many it holds now.
    """
    if adapter is None or adapter.prefix is None or n_cached >= len(adapter.virtual):
        return n_cached
    caches = [module for module in model.modules() if isinstance(module, KVCache)]
    keys, values = adapter.prefix
    positions = torch.arange(len(adapter.virtual), device=keys.device)
    for cache, xk, xv in zip(caches, keys, values, strict=True):
        cache.update(xk, xv, torch.full_like(positions, slot), positions)
    return len(adapter.virtual)
