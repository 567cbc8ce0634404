"""Linear layers and their kernels: whatever computes it, the product is the same."""

import copy
import gc
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from conftest import make_model

from llama import Transformer
from llama.checkpoint.save import save
from llama.layers.capability import Capability
from llama.layers.kernels import cpu
from llama.layers.kernels.base import Kernel
from llama.layers.linear import ColumnParallelLinear, ParallelLinear, pack

CPU = torch.device("cpu")
BF16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(
        not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        reason="oneDNN packs bfloat16 on processors with AVX-512 alone",
    ),
)
DTYPES = [torch.float32, BF16]
"""oneDNN's order is one for any dtype: its kernel is tested in float32 on every processor."""


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """A dtype that the packed kernel is chosen for."""
    monkeypatch.setattr(cpu.OneDnn, "is_fastest_for", lambda weight: True)
    return request.param


def make_packed(dtype: torch.dtype, **params: object) -> Transformer:
    model = make_model(**params).to(dtype).requires_grad_(False)
    model.allocate_buffers(CPU, dtype)
    model.pack()
    return model


def linear_layers(model: Transformer) -> list[ParallelLinear]:
    return [module for module in model.modules() if isinstance(module, ParallelLinear)]


def same_logits(a: Transformer, b: Transformer) -> None:
    found, expected = (model.forward(torch.tensor([[3, 1, 2]])) for model in (a, b))
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel_gives_the_float32_product(
    dtype: torch.dtype, packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu.OneDnn, "is_fastest_for", lambda weight: packs)
    make_model()  # the process group
    layer = ColumnParallelLinear(96, 160).to(dtype).requires_grad_(False)
    layer.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    exact = layer.weight.float()
    pack([layer], Capability())
    assert (layer.kernel is not None) == packs
    for n_tokens in (1, 2, 7, 33):
        x = torch.randn(n_tokens, 96).to(dtype)
        out = layer(x)
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), x.float() @ exact.T, atol=0.03, rtol=0.02)


def test_forward_changes_nothing_but_the_cache(dtype: torch.dtype) -> None:
    model = make_packed(dtype, n_layers=2)
    kernels = [layer.kernel for layer in linear_layers(model)]
    assert all(kernels)
    for _ in range(3):
        model.forward(torch.tensor([[1, 2, 3]]))
    assert [layer.kernel for layer in linear_layers(model)] == kernels


def test_a_bias_is_added_once_packed_or_not(dtype: torch.dtype) -> None:
    """A failure means that a kernel of several layers drops their biases, or mixes them up."""
    biased = {"n_kv_heads": 2, "attention_bias": True, "mlp_bias": True}
    plain = make_model(**biased).to(dtype).requires_grad_(False)
    plain.allocate_buffers(CPU, dtype)
    same_logits(make_packed(dtype, **biased), plain)
    layer = plain.layers[0].feed_forward.w2
    x = torch.randn(3, layer.in_features).to(dtype)
    exact = x.float() @ layer.weight.float().T + layer.bias.float()
    torch.testing.assert_close(layer(x).float(), exact, atol=0.05, rtol=0.05)


def test_few_tokens_are_padded_once_a_pass(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu.OneDnn, "min_tokens", 4)
    plain = make_model().to(dtype).requires_grad_(False)
    plain.allocate_buffers(CPU, dtype)
    model = make_packed(dtype)
    seen: list[int] = []
    product = cpu.OneDnn.product

    def counted(self: Kernel, x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return product(self, x)

    monkeypatch.setattr(cpu.OneDnn, "product", counted)
    found = model.forward(torch.tensor([[1], [2]]))
    torch.testing.assert_close(found, plain.forward(torch.tensor([[1], [2]])), atol=0.05, rtol=0.05)
    assert seen == [4] * (len(seen) - 1) + [2]  # the output's tokens are those that were asked for


def test_weights_that_are_trained_are_left_alone(dtype: torch.dtype) -> None:
    make_model()
    layer = ColumnParallelLinear(96, 160).to(dtype).requires_grad_(True)
    assert pack([layer], Capability()) == []
    layer(torch.ones(2, 96).to(dtype)).sum().backward()
    assert layer.kernel is None


def test_a_packed_model_is_saved_as_it_was(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model().to(dtype).requires_grad_(False)
    model.allocate_buffers(CPU, dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.pack()
    model.forward(torch.tensor([[1]]))
    save([model.state_dict()], model.params, tmp_path / "out")
    after = torch.load(tmp_path / "out" / "consolidated.00.pth")
    assert all(layer.kernel for layer in linear_layers(model))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_tied_embedding_keeps_its_rows(dtype: torch.dtype) -> None:
    model = make_model(tie_word_embeddings=True).to(dtype).requires_grad_(False)
    model.output.weight = model.tok_embeddings.weight
    model.allocate_buffers(CPU, dtype)
    before = model.tok_embeddings.weight.clone()
    model.pack()
    model.forward(torch.tensor([[1]]))
    assert torch.equal(model.tok_embeddings.weight, before)
    assert model.output.kernel is None  # a packed copy would be a second one


def test_layers_with_one_input_share_a_kernel_that_goes_with_their_model(
    dtype: torch.dtype,
) -> None:
    plain = make_model(n_layers=2).to(dtype).requires_grad_(False)
    plain.allocate_buffers(CPU, dtype)
    model = make_packed(dtype, n_layers=2)
    same_logits(model, plain)
    kernels = {weakref.ref(layer.kernel) for layer in linear_layers(model)}
    assert len(kernels) == 4 * 2 + 1  # qkv, o, gate and up, down; output
    del model
    gc.collect()
    assert all(ref() is None for ref in kernels)


@pytest.fixture
def packed(dtype: torch.dtype) -> Transformer:
    model = make_packed(dtype, n_kv_heads=2, attention_bias=True, mlp_bias=True)
    assert model.layers[0].attention.wk.kernel is not None
    return model


def test_a_packed_layer_alone_gives_its_own_product(
    packed: Transformer, dtype: torch.dtype
) -> None:
    attention = packed.layers[0].attention
    x = torch.randn(5, 64).to(dtype)
    for layer in (attention.wq, attention.wk, attention.wv):
        exact = x.float() @ layer.plain_weight().float().T + layer.bias.float()
        torch.testing.assert_close(layer(x).float(), exact, atol=0.05, rtol=0.05)


def test_a_layer_packed_alone_stays_usable_among_its_neighbours(dtype: torch.dtype) -> None:
    model = make_model(n_kv_heads=2).to(dtype).requires_grad_(False)
    model.allocate_buffers(CPU, dtype)
    plain = copy.deepcopy(model)
    pack([model.layers[0].attention.wk], Capability())
    assert model.layers[0].attention.wk.kernel is not None
    same_logits(model, plain)


def test_copies_of_a_packed_model_are_whole(packed: Transformer) -> None:
    copied = copy.deepcopy(packed)
    pickled = pickle.loads(pickle.dumps(packed))  # our own bytes
    same_logits(copied, packed)
    same_logits(pickled, packed)
    del packed.layers[0].attention  # a copy doesn't need the original's weights
    gc.collect()
    same_logits(copied, pickled)
    copied.pack()
    assert all(layer.kernel for layer in linear_layers(copied))
    same_logits(copied, pickled)


def test_a_packed_model_takes_other_weights(packed: Transformer, dtype: torch.dtype) -> None:
    other = make_model(seed=5, n_kv_heads=2, attention_bias=True, mlp_bias=True)
    other = other.to(dtype).requires_grad_(False)
    other.allocate_buffers(CPU, dtype)
    for assign in (False, True):
        old = [weakref.ref(layer.kernel) for layer in linear_layers(packed)]
        packed.load_state_dict(other.state_dict(), assign=assign)
        assert not any(ref() is not None for ref in old)  # which would be second copies
        same_logits(packed, other)
        assert all(layer.kernel for layer in linear_layers(packed))


def test_a_packed_models_tensors_hold_no_more_than_themselves(packed: Transformer) -> None:
    for name, tensor in packed.state_dict().items():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
