"""Compiled attention of few tokens."""

import math

import pytest
import torch

from llama.layers.attention import Sdpa, ragged_attention
from llama.layers.batch import RaggedBatch, Segment
from llama.layers.kernels import (
    attend,
    attend_prompt,
    compile_prompts,
    compiled,
    has_attention,
    has_prompt_attention,
)
from llama.layers.kv_cache import KVCache

BF16 = torch.bfloat16
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("needs_numba")


def filled(n_kv_heads: int, max_seq_len: int, head_dim: int, seed: int = 0) -> KVCache:
    cache = KVCache((4, n_kv_heads, max_seq_len, head_dim), BF16, CPU)
    generator = torch.Generator().manual_seed(seed)
    for entries in (cache.k, cache.v):
        entries.copy_(torch.randn(entries.shape, generator=generator))
    return cache


def exact(q: torch.Tensor, cache: KVCache, batch: RaggedBatch) -> torch.Tensor:
    n_rep, rows = q.shape[1] // cache.k.shape[1], []
    places = zip(batch.slots.tolist(), batch.positions.tolist(), strict=True)
    for query, (slot, position) in zip(q.double(), places, strict=True):
        keys, values = (
            entries[slot, :, : position + 1].double().repeat_interleave(n_rep, dim=0)
            for entries in (cache.k, cache.v)
        )
        scores = (keys @ query[:, :, None])[..., 0] / math.sqrt(q.shape[2])
        rows.append((scores.softmax(dim=-1)[:, None] @ values)[:, 0])
    return torch.stack(rows)


def laid_out(segments: list[Segment]) -> RaggedBatch:
    return Sdpa("cpu", BF16).layout(segments, CPU)


# Ends in and at vectors, and of the cache, whose length isn't a whole number of them.
@pytest.mark.parametrize("max_seq_len", [64, 203])
@pytest.mark.parametrize(
    ("n_heads", "n_kv_heads", "head_dim"), [(9, 3, 64), (8, 8, 96), (16, 2, 128), (2, 1, 256)]
)
def test_attention_is_exact_up_to_rounding(
    n_heads: int, n_kv_heads: int, head_dim: int, max_seq_len: int
) -> None:
    """A failure means other tokens: of a draft, of neighbours, or at an end of the cache."""
    cache, last = filled(n_kv_heads, max_seq_len, head_dim), max_seq_len - 1
    cases = [[(0, 0, 1)], [(2, last, 1)], [(3, 15, 1), (1, 16, 1), (0, 31, 1)], [(3, last - 4, 5)]]
    for case in cases:
        batch = laid_out([Segment(*some) for some in case])
        generator = torch.Generator().manual_seed(len(case))
        q = torch.randn(len(batch.slots), n_heads, head_dim, generator=generator).bfloat16()
        assert has_attention(q, cache, batch)
        found = ragged_attention(q, cache, batch)
        assert torch.equal(found, attend(q, cache, batch))
        expected = exact(q, cache, batch)
        torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=2**-9)
        alone = [
            attend(
                q[i, None], cache, RaggedBatch(batch.slots[i, None], batch.positions[i, None], ())
            )
            for i in range(len(q))
        ]
        assert torch.equal(found, torch.cat(alone))


@pytest.mark.parametrize("factor", [1e4, 1e-30])
def test_scores_of_any_size(factor: float) -> None:
    """A failure means zeros or NaNs where one position decides, or where all are alike."""
    cache, batch = filled(8, 64, 64), laid_out([Segment(1, 40, 1)])
    q = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(1)).mul(factor).bfloat16()
    expected = exact(q, cache, batch)
    torch.testing.assert_close(attend(q, cache, batch).double(), expected, rtol=2**-7, atol=2**-9)


def test_not_a_number_is_seen_where_it_is_read() -> None:
    """A failure means tokens of broken keys, or that a sequence's NaN is another's."""
    cache, q = filled(8, 64, 64), torch.ones(1, 8, 64, dtype=BF16)
    cache.k[0, 2, 20, 5], cache.v[0, 3, 20, 5], cache.k[0, :, 41:] = math.nan, math.nan, math.nan
    found = attend(q, cache, laid_out([Segment(0, 40, 1)]))[0]
    assert found[2].isnan().all() and found[3].isnan().sum() == 1
    assert found.isfinite().sum() == 6 * 64 + 63
    for batch in (laid_out([Segment(0, 19, 1)]), laid_out([Segment(1, 40, 1)])):
        assert attend(q, cache, batch).isfinite().all()


def test_other_queries_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure means that numbers of another form are read as bfloat16's bits."""
    cache, batch = filled(8, 64, 64), laid_out([Segment(0, 40, 1)])
    q = torch.ones(1, 8, 64, dtype=BF16)
    assert has_attention(q, cache, batch)
    eights = KVCache((4, 8, 64, 64), BF16, CPU, int8=True)
    majors = KVCache((4, 8, 64, 64), BF16, CPU, position_major=True)
    floats, short = KVCache((4, 8, 64, 64), torch.float32, CPU), filled(8, 7, 64)
    for other in (eights, majors, floats):
        assert not has_attention(q, other, batch)
    assert not has_attention(q, short, laid_out([Segment(0, 3, 1)]))
    others = (q.float(), q[..., :63], q[:, :4], torch.ones(1, 64, 8, dtype=BF16).mT)
    assert not any(has_attention(some, cache, batch) for some in others)
    many = laid_out([Segment(0, 0, compiled.FEW_TOKENS + 1)])
    assert not has_attention(q.expand(33, -1, -1).contiguous(), cache, many)
    assert not has_attention(q.expand(4, -1, -1).contiguous(), cache, batch)  # three are padding
    monkeypatch.setattr(compiled, "MOST_POSITIONS", 40)
    assert not has_attention(q, cache, batch)


# Fewer tokens than a block and more, with an incomplete tile; past positions that end within keys.
@pytest.mark.parametrize(("n_tokens", "past"), [(16, 0), (17, 63), (64, 64), (150, 0), (130, 41)])
@pytest.mark.parametrize(
    ("n_heads", "n_kv_heads", "head_dim"), [(9, 3, 64), (8, 8, 96), (16, 2, 128), (2, 1, 256)]
)
def test_prompts_are_exact_up_to_rounding(
    n_heads: int, n_kv_heads: int, head_dim: int, n_tokens: int, past: int, amx: None
) -> None:
    """A failure means that a prompt is read otherwise, or sees what comes later."""
    cache, kv_len = filled(n_kv_heads, 256, head_dim), past + n_tokens
    cache.k[2, :, kv_len:], cache.v[2, :, kv_len:] = math.nan, math.nan
    compiled_too = Sdpa("cpu", BF16, n_heads // n_kv_heads, is_compiled=True)
    batch = compiled_too.layout([Segment(2, past, n_tokens)], CPU)
    generator = torch.Generator().manual_seed(n_tokens)
    q = torch.randn(n_tokens, n_heads, head_dim, generator=generator).bfloat16()
    assert has_prompt_attention(q, cache, slice(2, 3))
    assert [call.mask for call in batch.calls] == [None]
    found = attend_prompt(q, cache, slice(2, 3), kv_len)
    expected = exact(q, cache, batch)
    torch.testing.assert_close(found.double(), expected, rtol=2**-6, atol=2**-8)
    difference = (found.double() - expected).norm() / expected.norm()
    assert difference < 4e-3
    if n_tokens > compiled.FEW_TOKENS:
        assert torch.equal(ragged_attention(q, cache, batch), found)


@pytest.mark.parametrize("n_kv_heads", [2, 8])
def test_short_prompts_beside_long_ones_are_exact(n_kv_heads: int, amx: None) -> None:
    """A failure means that a few new tokens of a sequence don't see what came before them."""
    cache = filled(n_kv_heads, 256, 64)
    backend = Sdpa("cpu", BF16, 8 // n_kv_heads, is_compiled=True)
    segments = [Segment(0, 50, 10), Segment(1, 0, 9), Segment(2, 7, 130), Segment(3, 60, 1)]
    batch = backend.layout(segments, CPU)
    q = torch.randn(150, 8, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = ragged_attention(q, cache, batch)
    torch.testing.assert_close(found.double(), exact(q, cache, batch), rtol=2**-6, atol=2**-7)


@pytest.mark.parametrize(
    ("n_heads", "head_dim", "dtype"), [(8, 64, torch.float32), (8, 48, BF16), (2, 64, BF16)]
)
def test_other_heads_are_not_compiled(n_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """A failure means that prompts have no masks where PyTorch's operator needs them."""
    assert not compile_prompts(dtype, n_heads, head_dim)


@pytest.mark.parametrize("factor", [1e4, 1e-30])
def test_prompts_with_scores_of_any_size(factor: float, amx: None) -> None:
    """A failure means zeros or NaNs where one position decides, or where all are alike."""
    cache, batch = filled(8, 128, 64), laid_out([Segment(1, 40, 70)])
    q = torch.randn(70, 8, 64, generator=torch.Generator().manual_seed(1)).mul(factor).bfloat16()
    found = attend_prompt(q, cache, slice(1, 2), 110)
    torch.testing.assert_close(found.double(), exact(q, cache, batch), rtol=2**-6, atol=2**-7)


def test_a_prompts_nan_is_seen_from_there_on(amx: None) -> None:
    """A failure means that broken numbers are hidden, or in what came before or in other heads."""
    cache, q = filled(8, 128, 64), torch.ones(100, 8, 64, dtype=BF16)
    cache.k[0, 2, 70] = math.nan
    q[3, 5, 7] = math.nan
    found = attend_prompt(q, cache, slice(0, 1), 100).isnan().all(dim=2)
    expected = torch.zeros_like(found)
    expected[70:, 2] = expected[3, 5] = True
    assert torch.equal(found, expected)


def test_other_prompts_are_left_to_pytorch(amx: None) -> None:
    """A failure means that numbers of another form are read as bfloat16's bits."""
    cache, q, slot = filled(8, 64, 64), torch.ones(16, 8, 64, dtype=BF16), slice(0, 1)
    assert has_prompt_attention(q, cache, slot)
    others = [KVCache((4, 8, 64, 64), BF16, CPU, int8=True)]
    others.append(KVCache((4, 8, 64, 64), BF16, CPU, position_major=True))
    others.append(KVCache((4, 8, 64, 64), torch.float32, CPU))
    assert not any(has_prompt_attention(q, other, slot) for other in others)
    queries = (q[:15], q.float(), q[..., :48].contiguous(), q[:, :4].contiguous(), q[:, ::2])
    assert not any(has_prompt_attention(some, cache, slot) for some in queries)
    assert not has_prompt_attention(q, cache, slice(0, 16))  # of 16 sequences
    assert not has_prompt_attention(q, cache, torch.tensor([0]))
