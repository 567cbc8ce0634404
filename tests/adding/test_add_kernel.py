"""A kernel, added: weights in groups are multiplied as they are stored, and the sums scaled."""

import pytest
import torch

from llama import Llama
from llama.layers import linear
from llama.layers.capability import Capability
from llama.layers.kernels import Kernel, make_kernel, plain
from llama.layers.quantization import Form, Grouped, StoredWeight


class GroupSums(Kernel):
    """Sums of each group's products, of which as many are scaled as there are groups."""

    def __init__(self, stored: StoredWeight, form: Grouped):
        super().__init__(stored)
        self._stored, self._form = stored, form

    @staticmethod
    def supports(form: Form, dtype: torch.dtype, capability: Capability) -> bool:
        has_groups = isinstance(form, Grouped) and form.group_size > 0 and not form.ordered
        return has_groups and dtype == torch.float32 and capability.kind == "cpu"

    def product(self, x: torch.Tensor) -> torch.Tensor:
        values = self._form.values(self._stored["weight"])
        x, values = (each.unflatten(1, (-1, self._form.group_size)) for each in (x, values))
        sums = torch.einsum("tgi,ogi->tog", x, values)  # (n_tokens, out_features, n_groups)
        scales, *zeros = (self._stored[name].float() for name in self._form.scale_names)
        out = (sums * scales).sum(dim=2)  # (n_tokens, out_features)
        return out + x.sum(dim=2) @ zeros[0].T if zeros else out

    def stored(self) -> StoredWeight:
        return self._stored

    def weights(self, rows: torch.Tensor) -> torch.Tensor:
        return self._form.dequantize({name: part[rows] for name, part in self._stored.items()})


def choose(
    stored: StoredWeight,
    form: Form,
    dtype: torch.dtype,
    block_size: int,
    capability: Capability,
    owned: bool,
) -> Kernel:
    """Choose as ``make_kernel`` would with two more lines at its beginning."""
    if GroupSums.supports(form, dtype, capability):
        return GroupSums(stored, form)
    return make_kernel(stored, form, dtype, block_size, capability, owned)


def test_its_tokens_are_the_plain_kernel_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure means that a product, a saved weight or a tied embedding isn't the stored one's."""
    usual = Llama.build(quantize="int4", dtype=torch.float32, device="cpu")
    monkeypatch.setattr(linear, "make_kernel", choose)
    llama = Llama.build(quantize="int4", dtype=torch.float32, device="cpu")
    prompts = [[1, 300], [1, 400, 500]]
    assert llama.generate(prompts, 24, temperature=0) == usual.generate(prompts, 24, temperature=0)
    ours, theirs = (each.model.layers[0].attention.wo.kernel for each in (llama, usual))
    assert type(ours) is GroupSums and type(theirs) is plain.Widened
    x = torch.randn(5, 192, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    rows = torch.tensor([7, 0, 191])
    assert torch.equal(ours.weights(rows), theirs.weights(rows))
    assert all(torch.equal(part, theirs.stored()[name]) for name, part in ours.stored().items())
