"""The projections' kernels: whatever computes it, the product is the same."""

import copy
import gc
import itertools
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from conftest import make_model

from llama import Transformer, linear
from llama.checkpoint.save import save
from llama.linear import ColumnParallelLinear


@pytest.fixture
def projection() -> ColumnParallelLinear:
    make_model()  # the process group
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = ColumnParallelLinear(96, 160).to(torch.bfloat16).requires_grad_(False)
        layer.weight.normal_(std=0.1)
    return layer


@pytest.mark.parametrize("packs", [True, False])
def test_every_kernel_gives_the_float32_product(projection, packs: bool, monkeypatch) -> None:
    monkeypatch.setattr(linear, "_PACKING_PAYS", packs)
    exact = projection.weight.float()
    for use in range(linear._PACKED_OVER + 3):
        for rows in (1, 2, 7, 33):
            x = torch.randn(rows, 96).bfloat16()
            out = projection(x)
            assert out.dtype == torch.bfloat16
            torch.testing.assert_close(out.float(), x.float() @ exact.T, atol=0.03, rtol=0.02), use
    assert projection.is_packed == packs


def test_packing_waits_for_the_second_use_and_is_spread(monkeypatch) -> None:
    monkeypatch.setattr(linear, "_PACKING_PAYS", True)
    model = make_model(n_layers=4).to(torch.bfloat16).requires_grad_(False)
    model.allocate_buffers(torch.device("cpu"), torch.bfloat16)
    layers = [m for m in model.modules() if isinstance(m, linear._Linear)]
    counts = []
    for _ in range(linear._PACKED_OVER + 1):
        model.forward(torch.tensor([[1]]))
        counts.append(len({int(layer._number) for layer in layers if layer.is_packed}))
    assert counts[0] == 0  # the first token doesn't wait
    assert all(layer.is_packed for layer in layers)
    steps = [b - a for a, b in itertools.pairwise(counts)]
    assert max(steps) <= -(-counts[-1] // linear._PACKED_OVER)  # nor does any other for all


def test_weights_that_are_trained_are_left_alone(projection, monkeypatch) -> None:
    monkeypatch.setattr(linear, "_PACKING_PAYS", True)
    projection.requires_grad_(True)
    for _ in range(linear._PACKED_OVER + 3):
        projection(torch.ones(2, 96).bfloat16()).sum().backward()
    assert not projection.is_packed


def test_a_packed_model_is_saved_as_it_was(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(linear, "_PACKING_PAYS", True)
    model = make_model().to(torch.bfloat16).requires_grad_(False)
    model.allocate_buffers(torch.device("cpu"), torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(linear._PACKED_OVER + 1):
        model.forward(torch.tensor([[1]]))
    save([model.state_dict()], model.params, tmp_path / "out")
    after = torch.load(tmp_path / "out" / "consolidated.00.pth")
    assert all(layer.is_packed for layer in model.modules() if isinstance(layer, linear._Linear))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_tied_embedding_keeps_its_rows(monkeypatch) -> None:
    monkeypatch.setattr(linear, "_PACKING_PAYS", True)
    model = make_model(tie_word_embeddings=True).to(torch.bfloat16).requires_grad_(False)
    model.output.weight = model.tok_embeddings.weight
    model.allocate_buffers(torch.device("cpu"), torch.bfloat16)
    before = model.tok_embeddings.weight.clone()
    for _ in range(linear._PACKED_OVER + 1):
        model.forward(torch.tensor([[1]]))
    assert torch.equal(model.tok_embeddings.weight, before)
    assert not model.output.is_packed  # a packed copy would be a second one


def test_neighbours_are_packed_into_one_and_go_with_their_model(monkeypatch) -> None:
    monkeypatch.setattr(linear, "_PACKING_PAYS", True)
    before = len(linear._packed_weights)
    model = make_model(n_layers=2).to(torch.bfloat16).requires_grad_(False)
    model.allocate_buffers(torch.device("cpu"), torch.bfloat16)
    plain = model.forward(torch.tensor([[1, 2, 3]]))
    for _ in range(linear._PACKED_OVER + 1):
        packed = model.forward(torch.tensor([[1, 2, 3]]))
    torch.testing.assert_close(packed, plain, atol=0.05, rtol=0.05)
    assert len(linear._packed_weights) - before == 4 * 2 + 1  # qkv, o, gate and up, down; output
    del model
    gc.collect()
    assert len(linear._packed_weights) == before


@pytest.fixture
def packed(monkeypatch) -> Transformer:
    monkeypatch.setattr(linear, "_PACKING_PAYS", True)
    model = make_model(n_kv_heads=2).to(torch.bfloat16).requires_grad_(False)
    model.allocate_buffers(torch.device("cpu"), torch.bfloat16)
    for _ in range(linear._PACKED_OVER + 1):
        model.forward(torch.tensor([[1, 2, 3]]))
    assert model.layers[0].attention.wk.is_packed
    return model


def same_logits(a: Transformer, b: Transformer) -> None:
    found, expected = (model.forward(torch.tensor([[3, 1, 2]])) for model in (a, b))
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)


def test_a_packed_layer_alone_gives_its_own_product(packed: Transformer) -> None:
    attention = packed.layers[0].attention
    x = torch.randn(5, 64).bfloat16()
    for layer in (attention.wq, attention.wk, attention.wv):
        exact = x.float() @ layer.plain_weight().float().T
        torch.testing.assert_close(layer(x).float(), exact, atol=0.05, rtol=0.05)


def test_a_layer_packed_alone_stays_usable_among_its_neighbours(monkeypatch) -> None:
    monkeypatch.setattr(linear, "_PACKING_PAYS", True)
    model = make_model(n_kv_heads=2).to(torch.bfloat16).requires_grad_(False)
    model.allocate_buffers(torch.device("cpu"), torch.bfloat16)
    plain = copy.deepcopy(model)
    for _ in range(linear._PACKED_OVER + 1):
        model.layers[0].attention.wk(torch.ones(1, 64).bfloat16())
    assert model.layers[0].attention.wk.is_packed
    for _ in range(linear._PACKED_OVER + 1):
        same_logits(model, plain)


def test_copies_of_a_packed_model_are_whole(packed: Transformer) -> None:
    copied = copy.deepcopy(packed)
    pickled = pickle.loads(pickle.dumps(packed))  # our own bytes
    same_logits(copied, packed)
    same_logits(pickled, packed)
    del packed.layers[0].attention  # a copy doesn't need the original's weights
    gc.collect()
    same_logits(copied, pickled)


def test_a_packed_model_takes_other_weights(packed: Transformer) -> None:
    other = make_model(seed=5, n_kv_heads=2).to(torch.bfloat16).requires_grad_(False)
    other.allocate_buffers(torch.device("cpu"), torch.bfloat16)
    layers = [m for m in packed.modules() if isinstance(m, linear._Linear)]
    for assign in (False, True):
        old = [weakref.ref(layer._packed) for layer in layers]
        packed.load_state_dict(other.state_dict(), assign=assign)
        assert not any(ref() is not None for ref in old)  # which would be second copies
        same_logits(packed, other)
        assert all(layer.is_packed for layer in layers)


def test_a_packed_models_tensors_hold_no_more_than_themselves(packed: Transformer) -> None:
    for name, tensor in packed.state_dict().items():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
