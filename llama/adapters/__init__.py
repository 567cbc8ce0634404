"""Adapters on call: changes of some modules, which sequences of one batch choose by name.

The weights stay as they are. A pass computes the base's products for all of its tokens, and an
adapter then changes the outputs of its own sequences' tokens (``rows.py``).
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F

from llama.errors import short

_numbers = itertools.count()


class Change(Protocol):
    """An adapter's change of one module, this rank's part of it."""

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Return the changed outputs.

        Args:
            x: the module's inputs, shape (n, in_features); of the embedding token ids, (n,).
            out: this rank's part of its outputs, shape (n, out_features). Afterwards a row-parallel
                layer's are summed over the ranks, and a bias is added.

        Returns:
            The shape and dtype of ``out``.
        """


@dataclass(frozen=True, eq=False)
class LowRank:
    """``out + scale * b(a(x))`` (LoRA, https://arxiv.org/abs/2106.09685).

    Args:
        a: shape (r, in_features); of a row-parallel layer this rank's columns.
        b: shape (out_features, r); of a column-parallel layer this rank's rows.
        scale: of the product.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        low = F.linear(x, self.a) if x.is_floating_point() else F.embedding(x, self.a.T)  # (n, r)
        return torch.addmm(out, low, self.b.T, alpha=self.scale)


@dataclass(frozen=True, eq=False)
class Dora(LowRank):
    """LoRA whose outputs are scaled, each by its own ratio (https://arxiv.org/abs/2402.09353).

    Args:
        ratio: the trained magnitudes divided by the changed weight's, shape (out_features,).
    """

    ratio: torch.Tensor

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return super().__call__(x, out) * self.ratio


@dataclass(frozen=True, eq=False)
class Replaced:
    """A weight in place of the module's own.

    Args:
        weight: this rank's part, shape (out_features, in_features), or an embedding's rows; of a
            norm its factors, shape (dim,).
        eps: of the norm.
    """

    weight: torch.Tensor
    eps: float | None = None

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if self.weight.dim() == 1:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        product = F.linear if x.is_floating_point() else F.embedding
        return product(x, self.weight)


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter as it was loaded, this rank's part of it.

    Args:
        name: which callers choose it by.
        changes: by the names of the modules that they change: ``layers.0.attention.wq``,
            ``tok_embeddings``, ``output``, ``norm`` and others.
        virtual: the ids of virtual tokens in front of every prompt, which follow the vocabulary's.
            The embedding's change embeds them, unless there is a prefix.
        prefix: the virtual tokens' keys and values as the cache holds them, each of the shape
            (n_layers, n_virtual, local key/value heads, head_dim).
        head: a classifier's weight, shape (n_labels, dim).
        labels: the classifier's.
    """

    name: str
    changes: Mapping[str, Change]
    virtual: range = range(0)
    prefix: tuple[torch.Tensor, torch.Tensor] | None = None
    head: torch.Tensor | None = None
    labels: list[str] | None = None
    number: int = field(default_factory=_numbers.__next__, init=False)  # of each one that is loaded


def n_virtual(adapter: Adapter | None) -> int:
    """Return the number of virtual tokens in front of every prompt."""
    return 0 if adapter is None else len(adapter.virtual)


def keyed(tokens: Sequence[int], adapter: Adapter | None, salt: int = 0) -> Sequence[int]:
    """Return tokens as an adapter's own, so that a cache of prefixes finds no other's for them.

    Those with another salt aren't found either.
    """
    owner = (0 if adapter is None else adapter.number + 1) + (salt << 40)
    return [token + (owner << 40) for token in tokens] if owner else tokens


class Adapters(Mapping[str, Adapter]):
    """The adapters that sequences may choose, by name."""

    def __init__(self) -> None:
        self._by_name: dict[str, Adapter] = {}

    def __getitem__(self, name: str) -> Adapter:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._by_name))  # which another thread may change

    def __len__(self) -> int:
        return len(self._by_name)

    def __repr__(self) -> str:
        return f"Adapters({', '.join(self)})"

    def add(self, adapter: Adapter) -> None:
        """Take an adapter in, in place of one with the same name, which its sequences keep."""
        self._by_name[adapter.name] = adapter

    def remove(self, name: str) -> None:
        """Drop an adapter; sequences that have it already keep it until they end.

        Raises:
            ValueError: there is none of this name.
        """
        if self._by_name.pop(name, None) is None:
            raise self._missing(name)

    def classifier(
        self, name: str | Adapter | None, labels: list[str] | None
    ) -> tuple[list[str], torch.Tensor | None]:
        """Return the labels of an adapter, or those of its base, and the adapter's head if any.

        Raises:
            ValueError: neither has labels, or there is no adapter of this name.
        """
        adapter = self.find(name)
        if adapter is not None and adapter.head is not None and adapter.labels is not None:
            return adapter.labels, adapter.head
        if not labels:
            raise ValueError(
                "this checkpoint has no labels, which classifying needs: an adapter may bring them"
            )
        return labels, None

    def find(self, name: str | Adapter | None, writes: bool = False) -> Adapter | None:
        """Return the adapter of a name, for one that ``writes`` text if so; None for None.

        One that has been found is returned as it is, whatever its name stands for by now.

        Raises:
            ValueError: there is none of this name, or it classifies.
        """
        if name is None or isinstance(name, Adapter):
            return name
        adapter = self.get(name)  # once: another thread may unload it meanwhile
        if adapter is None:
            raise self._missing(name)
        if writes and adapter.head is not None:
            raise ValueError(f"the adapter {short(name, 80)} writes no text: use classify")
        return adapter

    def _missing(self, name: object) -> ValueError:
        known = ", ".join(map(repr, self)) or "none"
        return ValueError(
            f"there is no adapter {short(name, 80)}: loaded are {known}; load it with load_adapter"
        )
