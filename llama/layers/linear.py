"""Linear layers and embeddings divided among ranks: fairscale's, with kernels of our own.

fairscale fills each new weight, through a full-size master copy when there are several ranks. A
checkpoint fills these: a weight is made in this rank's size, on the default device (``meta``
included), and its memory isn't touched.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel import layers as fairscale_layers
from torch import nn

from llama.layers.capability import Capability
from llama.layers.kernels import Kernel, make_kernel, plain, plain_kernel
from llama.layers.quantization import Form, StoredWeight
from llama.parallel import all_gather, all_reduce, world_size


def _split(features: int, name: str) -> int:
    ranks = world_size()
    if features % ranks:
        raise ValueError(f"{name} of {features} can't be divided among {ranks} ranks")
    return features // ranks


class _Stored(nn.Module):
    """A weight in the form in which a checkpoint stores it, or in the order of its kernel."""

    form: Form | None = None  # None: as it is
    weight: nn.Parameter
    bias: nn.Parameter | None
    in_features: int
    kernel: Kernel | None = None  # None: the stored weight is used as it is
    rows = slice(None)  # of the kernel's weights
    # Changes this rank's outputs, given the inputs and those, in a pass with adapters.
    adapted: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None

    def _allocate(self, out_features: int, in_features: int) -> None:
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.dtype = self.weight.dtype  # of the inputs

    def quantize(self, form: Form, dtype: torch.dtype) -> None:
        """Store the weight in a form, for a checkpoint to fill; inputs are of ``dtype``."""
        self.form, self.dtype = form, dtype
        dtypes = form.dtypes()
        for name, shape in form.shapes(*self.weight.shape).items():
            part = torch.empty(shape, dtype=dtypes[name], device=self.weight.device)
            setattr(self, name, nn.Parameter(part, requires_grad=False))

    @property
    def block_size(self) -> int:
        return self.form.block_size(self.in_features) if self.form else 1

    def adapt(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Return this rank's outputs as the pass's adapters change them."""
        return out if self.adapted is None else self.adapted(x, out)

    def give_to(self, kernel: Kernel, rows: slice) -> None:
        """Let a kernel take over the weight, as some of its rows."""
        if self.form is None:
            self.dtype = self.weight.dtype
        for name, part in self.stored().items():
            setattr(self, name, nn.Parameter(part.new_empty(0), requires_grad=False))
        self.kernel, self.rows = kernel, rows

    def stored(self) -> StoredWeight:
        """Return the weight as a checkpoint stores it."""
        if self.kernel is None:
            parameters = self.named_parameters()
            return {name: part.detach() for name, part in parameters if name != "bias"}
        return {
            name: part.clone() if name == "order" else part[self.rows].clone()
            for name, part in self.kernel.stored().items()
        }

    def plain_weight(self) -> torch.Tensor:
        """Return the weight that is stored, (out_features, in_features); float32 if quantised."""
        if self.form is None:
            return self.stored()["weight"]
        return self.form.dequantize(self.stored(), self.block_size)

    # Saving, loading and copying a layer use the stored weight.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, part in self.stored().items():
            destination[prefix + name] = part
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias.detach()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        for name, part in self.__getstate__()["_parameters"].items():
            setattr(self, name, part)
        self.kernel = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self.kernel is not None:
            stored = self.stored().items()
            parameters: dict[str, nn.Parameter | None] = {
                name: nn.Parameter(part, requires_grad=False) for name, part in stored
            }
            if "bias" in self._parameters:
                parameters["bias"] = self.bias
            state |= {"_parameters": parameters, "kernel": None}
        return state


class ParallelLinear(_Stored):
    """``x @ weight.T``: a stored weight and, once it is chosen, the kernel that holds it.

    A layer that has a bias adds it.
    """

    is_shared = False  # whether the weight is another module's too

    def __init__(
        self, in_features: int, out_features: int, shape: tuple[int, int], n_biases: int = 0
    ):
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self._allocate(*shape)
        self.bias = nn.Parameter(torch.empty(n_biases)) if n_biases else None

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of ``x @ weight.T``: (n_tokens, in_features) to (n_tokens, …)."""
        if self.kernel is not None:
            return self.adapt(x, self.kernel(x)[:, self.rows])
        weight = self.weight if self.form is None else self.plain_weight().to(x.dtype)
        return self.adapt(x, plain.linear(x, weight))

    def biased(self, out: torch.Tensor) -> torch.Tensor:
        """Add the bias, where the layer has one, to a product."""
        return out if self.bias is None else out + self.bias


Layers = Sequence[ParallelLinear]


def fused_linear(x: torch.Tensor, *layers: ParallelLinear) -> Sequence[torch.Tensor]:
    """Multiply the same ``x`` by several layers' weights, in one product where a kernel has them.

    Args:
        x: shape (n_tokens, in_features).

    Returns:
        For each layer this rank's part, shape (n_tokens, out_features).
    """
    products: dict[Kernel, torch.Tensor] = {}
    parts = []
    for layer in layers:
        if layer.kernel is None:
            parts.append(layer.product(x))
            continue
        if layer.kernel not in products:
            products[layer.kernel] = layer.kernel(x)
        out = products[layer.kernel][:, layer.rows]
        parts.append(layer.biased(layer.adapt(x, out)))
    return parts


def joined_linear(x: torch.Tensor, *layers: ParallelLinear) -> torch.Tensor:
    """Return ``fused_linear``'s parts side by side, without a copy where a kernel makes them so."""
    kernel = layers[0].kernel
    is_shared = kernel is not None and all(layer.kernel is kernel for layer in layers)
    if not is_shared or any(layer.adapted or layer.bias is not None for layer in layers):
        return torch.cat(tuple(fused_linear(x, *layers)), dim=1)
    assert kernel is not None
    return kernel(x)


def pack(layers: Layers, capability: Capability, owned: bool = False) -> list[Kernel]:
    """Give layers that multiply the same input kernels, which take over their weights.

    Args:
        layers: linear layers; those whose weights have one form share a kernel.
        capability: of the weights' device.
        owned: whether nobody else reads the weights, so that they may be changed where they are.

    Returns:
        The kernels; none where the stored weights are multiplied as they are.
    """
    if any(weight.requires_grad for layer in layers for weight in layer.parameters()):
        return []  # which are trained
    alike: list[list[ParallelLinear]] = []
    for layer in layers:
        for others in alike:
            if _have_one_form(others[0], layer):
                others.append(layer)
                break
        else:
            alike.append([layer])
    return [kernel for some in alike if (kernel := _packed(some, capability, owned))]


def _have_one_form(first: ParallelLinear, second: ParallelLinear) -> bool:
    one, other = (getattr(layer, "order", None) for layer in (first, second))
    return first.form == second.form and (one is None or other is None or torch.equal(one, other))


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return matrices one below the other; where they lie so, as a view."""
    end = parts[0].data_ptr()
    for part in parts:
        shares = part.untyped_storage().data_ptr() == parts[0].untyped_storage().data_ptr()
        if not (shares and part.is_contiguous() and part.data_ptr() == end):
            return torch.cat(tuple(parts))
        end += part.nbytes
    shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
    return parts[0].as_strided(shape, parts[0].stride())


def _packed(layers: Sequence[ParallelLinear], capability: Capability, owned: bool) -> Kernel | None:
    first, form = layers[0], layers[0].form
    kind = None
    if form is None:
        kind = plain_kernel(first.weight, len(layers), first.is_shared, capability)
        if kind is None:
            return None
    own = [layer.stored() for layer in layers]
    joined = {
        name: part if name == "order" else _joined([stored[name] for stored in own])
        for name, part in own[0].items()
    }
    if kind is not None:
        kernel = kind(joined)
        if first.is_shared and not kernel.reads_rows:
            return None  # a second copy, which takes as much memory
    else:
        assert form is not None
        owned = owned or joined["weight"].data_ptr() != own[0]["weight"].data_ptr()  # a copy
        kernel = make_kernel(joined, form, first.dtype, first.block_size, capability, owned)
    row = 0
    for layer, stored in zip(layers, own, strict=True):
        n_rows = len(stored["weight"])
        layer.give_to(kernel, slice(row, row + n_rows))
        row += n_rows
    return kernel


class ColumnParallelLinear(ParallelLinear, fairscale_layers.ColumnParallelLinear):
    """``x @ weight.T + bias``, each rank computing its part of the outputs.

    ``gather_output`` joins the parts on every rank.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        gather_output: bool = False,
    ):
        shape = (_split(out_features, "an output width"), in_features)
        ParallelLinear.__init__(self, in_features, out_features, shape, bias * shape[0])
        self.gather_output = gather_output

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return self.biased(super().product(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.product(x)
        return all_gather(out) if self.gather_output else out


class RowParallelLinear(ParallelLinear, fairscale_layers.RowParallelLinear):
    """``x @ weight.T + bias`` of inputs that lie split over the ranks, whose sums are added.

    Each rank has the whole bias, and adds it to the sum.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False):
        shape = (out_features, _split(in_features, "an input width"))
        ParallelLinear.__init__(self, in_features, out_features, shape, bias * out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.biased(all_reduce(self.product(x)))


class ParallelEmbedding(_Stored, fairscale_layers.ParallelEmbedding):
    """The token embedding; each rank keeps its part of every row."""

    def __init__(self, num_embeddings: int, embedding_dim: int):
        nn.Module.__init__(self)
        self.num_embeddings = num_embeddings
        self.embedding_dim = self.in_features = embedding_dim
        self._allocate(num_embeddings, _split(embedding_dim, "the embedding width"))
        self.bias = None

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        # Adapters embed ids beyond the vocabulary.
        known = tokens if self.adapted is None else tokens.clamp(max=self.num_embeddings - 1)
        if self.kernel is not None:  # which is the output's
            out = self.kernel.weights(known).to(self.dtype)
        elif self.form is None:
            out = F.embedding(known, self.weight)
        else:
            stored = {
                name: part if name == "order" else part[known]
                for name, part in self.named_parameters()
            }
            out = self.form.dequantize(stored, self.block_size).to(self.dtype)
        return all_gather(self.adapt(tokens, out))
