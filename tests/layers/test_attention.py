"""Attention of ragged batches: what a plain float32 computation gives, token by token."""

import math
from typing import Any

import fake_cuda
import pytest
import torch
import torch.nn.functional as F
from conftest import make_model

from llama.layers.attention import Backend, Sdpa, ragged_attention
from llama.layers.batch import RaggedBatch, Segment, token_places
from llama.layers.kv_cache import KVCache
from llama.layers.varlen import Varlen

CPU = torch.device("cpu")
BACKENDS = ["sdpa", "sdpa on cuda", "sdpa on mps", "varlen"]
HEAD_DIM, N_HEADS, N_SLOTS, MAX_SEQ_LEN = 16, 4, 4, 192
BATCHES = {
    "a prompt": [Segment(1, 0, 9)],
    "a prompt of several spans": [Segment(0, 0, 150)],
    "a prompt whose last span is a token": [Segment(0, 0, 65)],
    "a piece after a past": [Segment(2, 70, 80)],
    "neighbours of one length": [Segment(0, 12, 1), Segment(1, 12, 1)],
    "neighbours of several lengths": [Segment(1, 12, 1), Segment(2, 0, 1), Segment(3, 99, 1)],
    "slots with gaps": [Segment(0, 5, 1), Segment(2, 9, 1), Segment(3, 4, 1)],
    "a draft and a token": [Segment(0, 40, 7), Segment(3, 0, 1)],
    "decoding, then prompts": [
        Segment(1, 3, 1),
        Segment(3, 9, 4),
        Segment(0, 0, 70),
        Segment(2, 9, 20),
    ],
    "both at once": [Segment(0, 3, 1), Segment(1, 0, 70), Segment(2, 40, 1), Segment(3, 7, 5)],
}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_backend(name: str, dtype: torch.dtype = torch.float32) -> Backend:
    if name == "varlen":
        return Varlen(MAX_SEQ_LEN)
    return Sdpa(name.rpartition(" ")[2].replace("sdpa", "cpu"), dtype)


def filled_cache(
    segments: list[Segment],
    n_kv_heads: int,
    dtype: torch.dtype,
    int8: bool = False,
    position_major: bool = False,
) -> KVCache:
    """A cache with what came before the segments and what they bring; the rest is stale."""
    shape = N_SLOTS, n_kv_heads, MAX_SEQ_LEN, HEAD_DIM
    kv_cache = KVCache(shape, dtype, CPU, int8, position_major)
    for buffer in (kv_cache.k, kv_cache.v):
        buffer.fill_(100)
    whole = [Segment(slot, 0, start_pos + length) for slot, start_pos, length in segments]
    n_tokens = sum(segment.length for segment in whole)
    xk, xv = (normal(n_tokens, n_kv_heads, HEAD_DIM, seed=i).to(dtype) for i in range(2))
    kv_cache.update(xk, xv, *map(torch.tensor, token_places(whole)))
    return kv_cache


def naive_attention(q: torch.Tensor, kv_cache: KVCache, batch: RaggedBatch) -> torch.Tensor:
    """The formula for each token and head by itself, in float32."""
    out = torch.zeros(len(batch.slots), *q.shape[1:])
    places = zip(batch.slots.tolist(), batch.positions.tolist(), strict=True)
    for i, (slot, position) in enumerate(places):
        if kv_cache.position_major:
            read = (x[slot, : position + 1].transpose(0, 1) for x in (kv_cache.k, kv_cache.v))
        else:
            read = (x[0] for x in kv_cache.read(slice(slot, slot + 1), position + 1))
        keys, values = (x.float() for x in read)  # (n_kv_heads, position + 1, head_dim)
        for head in range(q.shape[1]):
            kv_head = head // (q.shape[1] // len(keys))
            scores = keys[kv_head] @ q[i, head].float() / math.sqrt(HEAD_DIM)
            out[i, head] = scores.softmax(0) @ values[kv_head]
    return out


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [*((BACKENDS[0], dtype) for dtype in TOLERANCE), *((b, torch.float32) for b in BACKENDS[1:])],
    ids=str,
)
def test_each_token_attends_to_its_own_past(
    backend: str, name: str, dtype: torch.dtype, n_kv_heads: int
) -> None:
    """A failure means that a token reads others' keys, later ones, or the wrong heads' values.

    With ``mha`` in half precision a query is doubled, which must leave no trace.
    """
    layout = make_backend(backend, dtype)
    position_major = layout.position_major
    kv_cache = filled_cache(BATCHES[name], n_kv_heads, dtype, position_major=position_major)
    batch = layout.layout(BATCHES[name], CPU)
    q = normal(len(batch.slots), N_HEADS, HEAD_DIM, seed=7).to(dtype)
    out = ragged_attention(q, kv_cache, batch)
    assert (out.dtype, out.shape) == (dtype, q.shape)
    expected = naive_attention(q, kv_cache, batch)
    torch.testing.assert_close(out.float(), expected, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("name", BATCHES)
def test_an_int8_cache_is_read_as_its_rounded_values(name: str) -> None:
    """A failure means that entries are read without their own scales."""
    kv_cache = filled_cache(BATCHES[name], 2, torch.float32, int8=True)
    batch = make_backend("sdpa").layout(BATCHES[name], CPU)
    q = normal(len(batch.slots), N_HEADS, HEAD_DIM, seed=7)
    out = ragged_attention(q, kv_cache, batch)
    torch.testing.assert_close(out, naive_attention(q, kv_cache, batch), atol=1e-5, rtol=0)
    exact = filled_cache(BATCHES[name], 2, torch.float32)
    torch.testing.assert_close(out, naive_attention(q, exact, batch), atol=0.05, rtol=0)


@pytest.mark.parametrize("name", BATCHES)
def test_padding_gets_zeros_and_changes_nothing(name: str) -> None:
    """A failure means that rows which only fill up a kernel's batch reach real tokens."""
    kv_cache = filled_cache(BATCHES[name], 2, torch.float32)
    batch = make_backend("sdpa").layout(BATCHES[name], CPU)
    q = normal(len(batch.slots) + 3, N_HEADS, HEAD_DIM, seed=7)
    q[-3:] = math.nan
    out = ragged_attention(q, kv_cache, batch)
    assert torch.equal(out[-3:], torch.zeros_like(out[-3:]))
    alone = ragged_attention(q[:-3], kv_cache, batch)
    torch.testing.assert_close(out[:-3], alone, atol=1e-6, rtol=0)


def test_attention_reads_the_filled_part_of_the_cache_only() -> None:
    """A failure means that steps take as long as the cache is large, or that it isn't clean."""
    model = make_model(n_kv_heads=2)
    tokens = torch.randint(0, 96, (2, 12))
    expected = model(tokens, 0)
    for layer in model.layers:
        layer.attention.cache.k.fill_(float("nan"))
        layer.attention.cache.v.fill_(float("nan"))
    pieces = [model(tokens[:, :7], 0), model(tokens[:, 7:11], 7), model(tokens[:, 11:], 11)]
    torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=2e-5, rtol=0)


DEVICE_GATHERS = [(0, 5), (2, 9), (2, 8), (3, 100)]  # slot and position of each token


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("kv_len", [101, MAX_SEQ_LEN])
@pytest.mark.parametrize("name", BACKENDS[1:])  # a CPU reads the first slots as they are
def test_tokens_whose_places_only_the_device_knows(name: str, kv_len: int, n_kv_heads: int) -> None:
    """A failure means that a recorded step reads other slots, or more than is filled."""
    segments = [Segment(slot, position, 1) for slot, position in DEVICE_GATHERS if position != 8]
    backend = make_backend(name)
    position_major = backend.position_major
    kv_cache = filled_cache(segments, n_kv_heads, torch.float32, position_major=position_major)
    slots, positions = torch.tensor(DEVICE_GATHERS).T
    batch = backend.decoding(slots, positions, kv_len)
    q = normal(len(slots), N_HEADS, HEAD_DIM, seed=7)
    expected = naive_attention(q, kv_cache, batch)
    torch.testing.assert_close(ragged_attention(q, kv_cache, batch), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
def test_decoding_can_be_divided_among_processors(n_kv_heads: int) -> None:
    """A failure means that a GPU reads a long text with a few of its processors, at any length."""
    segments = [Segment(0, 3, 1), Segment(3, 9, 4), Segment(1, 0, 70)]
    kv_cache = filled_cache(segments, n_kv_heads, torch.float32, position_major=True)
    fake_cuda.varlen_calls.clear()
    q = normal(75, N_HEADS, HEAD_DIM, seed=7)
    ragged_attention(q, kv_cache, make_backend("varlen").layout(segments, CPU))
    assert [(call["max_q"], call["is_divided"]) for call in fake_cuda.varlen_calls] == [
        (1, True),
        (70, False),
    ]


@pytest.mark.parametrize("name", ["a prompt", "slots with gaps", "a piece after a past"])
def test_mps_gets_no_strides_and_no_flag(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure means wrong sums on Apple's GPUs, or tokens that see later ones."""
    kv_cache = filled_cache(BATCHES[name], 2, torch.float32)
    real, calls = F.scaled_dot_product_attention, []

    def watched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **how: Any) -> torch.Tensor:
        # Heads that share keys expand to them; the keys themselves are contiguous.
        calls.append(k[:1].is_contiguous() and v[:1].is_contiguous() and not how.get("is_causal"))
        return real(q, k, v, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    batch = make_backend("sdpa on mps").layout(BATCHES[name], CPU)
    q = normal(N_HEADS, len(batch.slots), HEAD_DIM, seed=7).transpose(0, 1)
    ragged_attention(q, kv_cache, batch)
    assert calls and all(calls)
