"""The interface of kernels, and the way compiled code calls one."""

import itertools
import weakref
from abc import ABC, abstractmethod
from collections.abc import MutableMapping

import torch

StoredWeight = dict[str, torch.Tensor]


class Kernel(ABC):
    """Multiplies by the weights of one or more linear layers, one below the other.

    It holds them in the order that its operator reads, and is their only copy.
    """

    out_features: int  # of all layers together
    min_tokens = 1  # a product of fewer tokens takes as long as one of so many, or longer
    opaque = False  # whether the compiler can't look into ``product``
    reads_rows = True  # whether ``weights`` reads those rows only

    def __init__(self, stored: StoredWeight):
        self.out_features = len(stored["weight"])
        self.number = next(_numbers)  # identifies an opaque kernel in compiled code
        if self.opaque:
            _opaque[self.number] = self
            self._number = torch.tensor(self.number, device="cpu")

    @abstractmethod
    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x @ weight.T``: (n_tokens, in_features) to (n_tokens, out_features)."""

    @abstractmethod
    def stored(self) -> StoredWeight:
        """Return the weights as a checkpoint stores them."""

    @abstractmethod
    def weights(self, rows: torch.Tensor) -> torch.Tensor:
        """Return some rows of the weights: shape (n,) to float32, (n, in_features)."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.opaque and torch.compiler.is_compiling():
            out: torch.Tensor = torch.ops.llama.product(x, self._number, self.out_features)
            return out
        return self.product(x)


# Compiled code can't hold a packed weight, but the number of a kernel that does.
_opaque: MutableMapping[int, Kernel] = weakref.WeakValueDictionary()
_numbers = itertools.count()
_library = torch.library.Library("llama", "FRAGMENT")
_library.define("product(Tensor x, Tensor number, int out_features) -> Tensor")


def _product(x: torch.Tensor, number: torch.Tensor, out_features: int) -> torch.Tensor:
    return _opaque[int(number)].product(x).contiguous()  # as the compiler is told


def _product_shape(x: torch.Tensor, number: torch.Tensor, out_features: int) -> torch.Tensor:
    return x.new_empty(x.shape[0], out_features)


_library.impl("product", _product, "CPU")
torch.library.register_fake("llama::product", _product_shape, lib=_library)
