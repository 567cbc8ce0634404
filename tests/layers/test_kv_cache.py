"""The key/value cache: what is written is read, in the network's dtype and in eight bits."""

import math
from pathlib import Path

import pytest
import torch

from llama import Llama
from llama.checkpoint.sharding import cache_bytes
from llama.layers.batch import Segment, token_places
from llama.layers.kv_cache import KVCache
from llama.perplexity import perplexity

CPU = torch.device("cpu")
SHAPE = (3, 2, 8, 16)  # slots, heads, positions, head_dim
SEGMENTS = [Segment(0, 0, 2), Segment(2, 3, 3)]


def places(segments: list[Segment]) -> list[torch.Tensor]:
    """Slots and positions of the segments' tokens."""
    return [torch.tensor(numbers) for numbers in token_places(segments)]


def make_cache(dtype: torch.dtype = torch.float32, int8: bool = False) -> KVCache:
    return KVCache(SHAPE, dtype, CPU, int8)


def entries(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values for SEGMENTS."""
    generator = torch.Generator().manual_seed(seed)
    xk, xv = (torch.randn(5, 2, 16, generator=generator).to(dtype) for _ in range(2))
    return xk, xv


def whole(kv_cache: KVCache, slot: int) -> torch.Tensor:
    """All keys and values of a slot, (2, n_kv_heads, max_seq_len, head_dim)."""
    return torch.cat(kv_cache.read(slice(slot, slot + 1), SHAPE[2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_written_is_read_at_its_place_and_nowhere_else(dtype: torch.dtype) -> None:
    """A failure means that a sequence attends to keys of another, or at other positions."""
    kv_cache, x = make_cache(dtype), entries(dtype=dtype)
    kv_cache.update(*x, *places(SEGMENTS))
    expected = torch.zeros(3, 2, *SHAPE[1:], dtype=dtype)
    for i, (slot, position) in enumerate(((0, 0), (0, 1), (2, 3), (2, 4), (2, 5))):
        for which in range(2):
            expected[slot, which, :, position] = x[which][i]
    for slot in range(3):
        assert torch.equal(whole(kv_cache, slot), expected[slot])


def test_a_read_ends_at_the_filled_part_and_covers_its_slots() -> None:
    """A failure means that attention reads more of the cache than it needs."""
    kv_cache = make_cache()
    kv_cache.update(*entries(), *places(SEGMENTS))
    for found in kv_cache.read(slice(1, 3), 5):
        assert found.shape == (2, 2, 5, 16)
        assert not found[0].any() and found[1, :, 3:].all()


@pytest.mark.parametrize("int8", [False, True])
def test_a_copy_brings_the_beginning_and_leaves_the_rest(int8: bool) -> None:
    """A failure means that a sequence which reuses another's beginning reads something else."""
    kv_cache = make_cache(int8=int8)
    for slot in (0, 1):
        segments = [Segment(slot, 0, 5)]
        kv_cache.update(*entries(seed=slot), *places(segments))
    source, before = whole(kv_cache, 0), whole(kv_cache, 1)
    kv_cache.copy(0, 1, 3)
    assert torch.equal(whole(kv_cache, 1)[:, :, :3], source[:, :, :3])
    assert torch.equal(whole(kv_cache, 1)[:, :, 3:], before[:, :, 3:])
    assert torch.equal(whole(kv_cache, 0), source)


@pytest.mark.parametrize("int8", [False, True])
def test_nothing_is_left_after_clear(int8: bool) -> None:
    """A failure means that a NaN spreads from a damaged pass to later sequences."""
    kv_cache = make_cache(int8=int8)
    xk, xv = entries()
    kv_cache.update(xk.fill_(math.nan), xv, *places(SEGMENTS))
    kv_cache.clear()
    assert all(not whole(kv_cache, slot).any() for slot in range(3))


@pytest.mark.parametrize("int8", [False, True])
def test_it_is_as_large_as_is_said_and_no_part_of_a_checkpoint(int8: bool) -> None:
    """A failure means that machines run out of memory where the estimate says they don't."""
    kv_cache = make_cache(torch.bfloat16, int8)
    size = sum(buffer.nbytes for buffer in kv_cache.buffers())
    assert size == 2 * 3 * 2 * 8 * (16 + 2 if int8 else 32)
    assert not kv_cache.state_dict()


def test_entries_are_within_half_a_step() -> None:
    kv_cache = KVCache((2, 3, 8, 16), torch.float32, CPU, int8=True)
    x = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(0))
    x[2, 1] = 0
    segments = [Segment(0, 0, 2), Segment(1, 3, 3)]
    kv_cache.update(x, x / 2, *places(segments))
    for i, (slot, position) in enumerate(((0, 0), (0, 1), (1, 3), (1, 4), (1, 5))):
        found = kv_cache.read(slice(slot, slot + 1), 8)
        for entries, exact in zip(found, (x[i], x[i] / 2), strict=True):
            step = exact.abs().amax(-1, keepdim=True) / 127
            assert ((entries[0, :, position] - exact).abs() <= step * 0.501).all()


def test_small_entries_are_as_exact_in_float16() -> None:
    kv_cache = KVCache((1, 1, 8, 32), torch.float16, CPU, int8=True)
    x = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0)).half() / 1000
    kv_cache.update(x, x, *places([Segment(0, 0, 1)]))
    for entries in kv_cache.read(slice(0, 1), 1):
        assert (entries[0, :, 0] - x[0]).norm() / x.norm() < 0.02


class TestNetworksWithACacheInEightBits:
    def test_it_takes_about_half_the_memory(self) -> None:
        usual = Llama.build(dtype=torch.bfloat16)
        small = Llama.build(dtype=torch.bfloat16, kv_cache_dtype="int8")

        def size(llama: Llama) -> int:
            return sum(b.nbytes for n, b in llama.model.named_buffers() if ".cache." in n)

        args = usual.model.params
        assert size(usual) == cache_bytes(args, torch.bfloat16)
        assert size(small) == cache_bytes(args, torch.bfloat16, in_int8=True)
        assert size(small) / size(usual) == (24 + 2) / 48  # heads of 24 and a scale

    def test_perplexity_stays(self, tiny: Llama) -> None:
        small = Llama.build(dtype=torch.float32, device="cpu", kv_cache_dtype="int8")
        text = tiny.text_completion(["Once upon a time", "def "], temperature=1, seed=5)
        tokens = tiny.tokenizer.encode("".join(t["generation"] for t in text), True, False)
        usual = perplexity(tiny, tokens, 256, 128).value
        assert perplexity(small, tokens, 256, 128).value == pytest.approx(usual, rel=0.005)

    def test_ragged_rows_and_earlier_turns_give_what_a_prompt_gives_alone(self) -> None:
        llama = Llama.build(dtype=torch.float32, device="cpu", kv_cache_dtype="int8")
        prompts = [[1, 40, 50, 60, 70, 80], [1, 9], [1, 30, 31, 32]]
        together, _ = llama.generate(prompts, 20, temperature=0)
        for prompt, tokens in zip(prompts, together, strict=True):
            alone, _ = llama.generate([prompt], 20, temperature=0)
            assert alone == [tokens]
        longer = prompts[0] + together[0][:5] + [90]
        first, _ = llama.generate([longer], 10, temperature=0)  # its beginning is in the cache
        fresh = Llama.build(dtype=torch.float32, device="cpu", kv_cache_dtype="int8")
        assert fresh.generate([longer], 10, temperature=0)[0] == first

    def test_an_unknown_dtype(self) -> None:
        with pytest.raises(ValueError, match="kv_cache_dtype is 'fp8': expected None or 'int8'"):
            Llama.build(kv_cache_dtype="fp8")


def resident() -> int:
    """Bytes of this process that lie in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_a_cache_takes_memory_as_it_is_written() -> None:
    """A failure means a cache that is written before it is used: seconds of loading, and memory."""
    before = resident()
    cache = KVCache((64, 8, 8192, 128), torch.bfloat16, CPU)  # of 2 GB
    slot, xk = torch.tensor([63]), torch.ones(1, 8, 128, dtype=torch.bfloat16)
    cache.update(xk, xk, slot, torch.tensor([8191]))
    assert cache.k[63, :, 8191].eq(1).all() and cache.k[63, :, 8190].eq(0).all()
    assert cache.k[0].is_contiguous() and cache.k[0, 0, 0].eq(0).all()
    assert resident() - before < 100e6
