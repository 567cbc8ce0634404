"""Compiled code for what a token needs besides products: norms, rotation, the cache, SwiGLU."""

import math

import pytest
import torch
import torch.nn.functional as F

from llama import parallel
from llama.args import ModelArgs
from llama.layers import kernels
from llama.layers.batch import RaggedBatch
from llama.layers.kernels import (
    compiled,
    cpu,
    groups,
    has_rotation,
    plain,
    rms_norm,
    rotate,
    swiglu,
    tiles,
)
from llama.layers.kv_cache import KVCache
from llama.layers.quantization import Rotated
from llama.model import Transformer, apply_rotary_emb

BF16 = torch.bfloat16


pytestmark = pytest.mark.usefixtures("needs_numba")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("dim", [512, 1000, 2048])
@pytest.mark.parametrize("n_tokens", [1, 2, 7])
def test_compiled_norms_are_pytorchs(n_tokens: int, dim: int) -> None:
    """A failure means other logits in bfloat16, or norms that take three times as long."""
    x, weight = random(n_tokens, dim) * 5, random(dim)
    assert compiled.has_rms_norm(x, weight)
    found, others = rms_norm(x, weight, 1e-3), plain.rms_norm(x, weight, 1e-3)
    exact = F.rms_norm(x.double(), (dim,), weight.double(), 1e-3)
    assert found.dtype == BF16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-9)
    assert (found == others).float().mean() > 0.999
    assert torch.equal(found, torch.cat([rms_norm(row[None], weight, 1e-3) for row in x]))
    x[0, 3] = math.nan
    assert rms_norm(x, weight, 1e-3)[0].isnan().all()


def test_other_norms_are_pytorchs_own() -> None:
    """A failure means that inputs of another dtype, or in part of a tensor, are read as bits."""
    weight, x = random(512), random(3, 1024)
    for some, its_weight in ((x[:, :512], weight), (x[:, :512].float(), weight.float())):
        assert not compiled.has_rms_norm(some, its_weight)
        expected = F.rms_norm(some.double(), (512,), its_weight.double(), 1e-5)
        torch.testing.assert_close(
            rms_norm(some, its_weight, 1e-5).double(), expected, rtol=1e-2, atol=1e-3
        )


def test_rows_of_zeros_are_divided_as_pytorch_does() -> None:
    """A failure means that rows behind one of zeros are what memory held before."""
    x, weight = random(3, 512), torch.ones(512, dtype=BF16)
    x[0] = 0
    out = rms_norm(x, weight, 0.0)
    assert out[0].isnan().all() and out[1:].isfinite().all()


def test_norms_that_are_trained_have_gradients() -> None:
    """A failure means that a fine-tuned norm never changes."""
    x, weight = random(3, 512), random(512).requires_grad_()
    rms_norm(x, weight, 1e-5).sum().backward()
    assert weight.grad is not None and weight.grad.any()
    with torch.inference_mode():
        assert compiled.has_rms_norm(x, weight)


@pytest.mark.parametrize("n_tokens", [1, 3, 9])
def test_compiled_swiglu_is_pytorchs(n_tokens: int) -> None:
    """A failure means other logits in bfloat16, or infinite ones from large inputs."""
    gate, up = (random(n_tokens, 2 * 700) * 4).split(700, dim=1)
    gate[0, :4] = torch.tensor([-1000, -90, 90, 1000])
    assert compiled.has_swiglu(gate, up)
    exact = F.silu(gate.double()) * up.double()
    found = swiglu(gate, up)
    assert found.dtype == BF16 and found.is_contiguous()
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-30)
    gate[0, 5] = math.nan
    assert swiglu(gate, up)[0, 5].isnan()


def test_other_gates_are_pytorchs_own() -> None:
    """A failure means that other inputs are read as bits, or that gates can't be trained."""
    whole = random(3, 1400)
    narrow, far = whole[:, :1400:2], whole[:2, :700].contiguous()
    others = [(narrow, narrow + 1), (whole[:2, :700], far), (far.float(), far.float() + 1)]
    others.append((whole[:, :700], whole[:1, 700:]))
    for gate, up in others:
        assert not compiled.has_swiglu(gate, up)
        expected = F.silu(gate.double()) * up.double()
        torch.testing.assert_close(swiglu(gate.clone(), up).double(), expected, rtol=2**-6, atol=0)
    trained = far.clone().requires_grad_()
    assert not compiled.has_swiglu(trained, far)


def places(*pairs: tuple[int, int]) -> RaggedBatch:
    slots, positions = torch.tensor(pairs).unbind(1)
    return RaggedBatch(slots.contiguous(), positions.contiguous(), [])


PLACES = [(3, 7), (0, 0), (1, 9), (2, 4), (2, 5), (2, 6)]  # slots and positions


@pytest.mark.parametrize(("n_heads", "n_kv_heads", "head_dim"), [(8, 2, 64), (9, 9, 32)])
@pytest.mark.parametrize("n_tokens", [1, 6])
@pytest.mark.parametrize("n_padding", [0, 3])
@pytest.mark.parametrize("gap", [0, 32])  # between rows, as a padded weight leaves them
def test_a_rotation_writes_the_cache_as_pytorch_does(
    n_heads: int, n_kv_heads: int, head_dim: int, n_tokens: int, n_padding: int, gap: int
) -> None:
    """A failure means that tokens attend to keys at other places, or turned by other angles."""
    n_rows, heads = n_tokens + n_padding, (n_heads, n_kv_heads)
    width = (n_heads + 2 * n_kv_heads) * head_dim
    xqkv = random(n_rows, width + gap)[:, :width].unflatten(1, (-1, head_dim))
    angles = torch.arange(n_rows * head_dim // 2).view(n_rows, -1) * 0.1
    freqs_cis = torch.stack((angles.cos(), angles.sin()), dim=-1)
    batch = places(*PLACES[:n_tokens])
    shape = (4, n_kv_heads, 10, head_dim)
    found, expected = (KVCache(shape, BF16, torch.device("cpu")) for _ in range(2))
    for cache in (found, expected):
        cache.k.copy_(random(*shape, seed=1))
        cache.v.copy_(random(*shape, seed=2))
    assert has_rotation(xqkv, freqs_cis, found, batch)
    xq = rotate(xqkv, freqs_cis, found, batch)
    xqk, xv = xqkv.split((sum(heads), n_kv_heads), dim=1)
    its_xq, xk = apply_rotary_emb(xqk, freqs_cis).split(heads, dim=1)
    expected.update(xk[:n_tokens], xv[:n_tokens], batch.slots, batch.positions)
    for ours, theirs in (
        (xq[:n_tokens], its_xq[:n_tokens]),
        (found.k, expected.k),
        (found.v, expected.v),
    ):
        assert (ours == theirs).float().mean() > 0.999
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-12)
    assert xq.shape == (n_rows, n_heads, head_dim)


def test_other_caches_are_written_by_pytorch() -> None:
    """A failure means that a cache of another layout or dtype holds bits of another."""
    device, xqkv = torch.device("cpu"), random(2, 12, 64)
    shape = (2, 2, 8, 64)
    others = [
        KVCache(shape, BF16, device, int8=True),
        KVCache(shape, BF16, device, position_major=True),
        KVCache(shape, torch.float32, device),
    ]
    freqs_cis, batch, cache = (
        torch.ones(2, 32, 2),
        places((0, 1), (1, 1)),
        KVCache(shape, BF16, device),
    )
    assert has_rotation(xqkv, freqs_cis, cache, batch)
    assert not any(has_rotation(xqkv, freqs_cis, other, batch) for other in others)
    assert not has_rotation(xqkv.float(), freqs_cis, others[2], batch)
    assert not has_rotation(xqkv.transpose(0, 1), freqs_cis, cache, batch)
    # As of a network that was converted whole.
    assert not has_rotation(xqkv, freqs_cis.bfloat16(), cache, batch)
    assert not has_rotation(xqkv, torch.ones(2, 2, 32).transpose(1, 2), cache, batch)
    in_int32 = batch._replace(slots=batch.slots.int())
    far = batch._replace(positions=torch.ones(4, dtype=torch.long)[::2])
    assert not any(has_rotation(xqkv, freqs_cis, cache, other) for other in (in_int32, far))


def test_a_default_device_or_dtype_changes_nothing() -> None:
    """A failure means that code writes to another device's memory, or beyond what it was given."""
    x, weight, cache = (
        random(2, 1024),
        random(512),
        KVCache((1, 2, 8, 64), BF16, torch.device("cpu")),
    )
    xqkv, freqs_cis, batch = random(1, 12, 64), torch.ones(1, 32, 2), places((0, 3))
    matrix, kernels = random(512, 512), [tiles.Bfloat16]
    if cpu.OneDnn.is_fastest_for(matrix):
        kernels.append(cpu.OneDnn)
    made = [kind({"weight": matrix}) for kind in kernels]
    if cpu.OneDnnInt8.is_fastest():
        stored = {"weight": matrix.mul(20).to(torch.int8), "scale": torch.ones(512, 1)}
        made.append(cpu.OneDnnInt8(stored, Rotated(), 64))

    def results() -> list[torch.Tensor]:
        return [
            rms_norm(x[:, :512].contiguous(), weight, 1e-5),
            swiglu(x[:, :512], x[:, 512:]),
            rotate(xqkv, freqs_cis, cache, batch),
            *(kernel.product(x[:1, :512]) for kernel in made),
        ]

    expected = results()
    try:
        torch.set_default_dtype(BF16)
        torch.set_default_device("meta")
        found = [results() for _ in range(20)][-1]
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_network_gives_the_logits_that_it_has_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure means that the parts, each right, don't fit together."""
    parallel.initialize()
    args = ModelArgs(dim=512, n_layers=3, n_heads=8, n_kv_heads=2, vocab_size=300, max_seq_len=32)
    args.max_batch_size = 3
    model = Transformer(args).bfloat16()
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        # Queries and keys so large that scores decide where a token attends to.
        scale = 0.12 if "wq" in name or "wk" in name else 0.04
        values = torch.randn(weight.shape, generator=generator).mul_(scale).bfloat16()
        weight.data = torch.ones_like(values) if "norm" in name else values
    model.requires_grad_(False)
    model.allocate_buffers(torch.device("cpu"), BF16)

    def logits() -> torch.Tensor:
        model.clear_cache()
        prompts = torch.arange(30).view(3, 10) * 7
        read = model(prompts)
        return torch.cat([read, *(model(prompts[:, i : i + 1], [10 + i] * 3) for i in range(3))], 1)

    calls: list[int] = []
    unturned = torch.tensor([1.0, 0.0]).expand(30, 32, 2).contiguous()
    original = kernels.rotate
    monkeypatch.setattr(kernels, "rotate", lambda *args: calls.append(1) or original(*args))
    found = logits()
    assert len(calls) == 12  # of each layer, in each pass
    monkeypatch.setattr(
        kernels, "rotate", lambda x, _, *rest: original(x, unturned[: len(x)], *rest)
    )
    others = logits()
    monkeypatch.setattr(compiled, "has_numba", lambda: False)
    monkeypatch.setattr(groups, "has_numba", lambda: False)
    expected = logits()
    assert (found - expected).norm() < 0.02 * expected.norm()
    assert (others - expected).norm() > 0.1 * expected.norm()  # without a rotation


@pytest.mark.parametrize("n_rows", [1, 3, 40])
def test_rows_are_gathered_within_the_table(n_rows: int) -> None:
    """A failure means that a token gets another one's vector, or reads memory behind the table."""
    table = torch.arange(7 * 6, dtype=torch.int32).view(7, 6)
    rows = torch.arange(n_rows) % 7
    assert torch.equal(compiled.gather(table, rows, 7), table[rows])
    tiles_ = torch.arange(2 * 6 * 4, dtype=torch.int32).view(2, 6, 4)
    expected = tiles_.transpose(1, 2).flatten(0, 1)[rows]
    assert torch.equal(compiled.gather(tiles_, rows, 7), expected)
    outside = torch.tensor([-1, 7, 1 << 40])
    assert torch.equal(compiled.gather(table, outside, 7), table[[0, 6, 6]])
