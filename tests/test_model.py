"""The network: equal to an independent implementation, in every published size, chunk by chunk."""

import pytest
import torch
from conftest import make_model
from hf_files import as_transformers

from llama import ModelArgs, Transformer, parallel
from llama.layers.batch import Segment

VARIANTS = {
    "mha": {},
    "gqa": {"n_kv_heads": 2},
    "mqa": {"n_kv_heads": 1},
    "odd_ffn": {"n_kv_heads": 4, "ffn_dim_multiplier": 1.3, "multiple_of": 24},
    "rope_1e6": {"n_kv_heads": 2, "rope_theta": 1e6, "norm_eps": 1e-6},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant: str) -> None:
    model = make_model(**VARIANTS[variant])
    tokens = torch.randint(0, 96, (3, 100), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = as_transformers(model)(tokens).logits
    assert (model(tokens, 0) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_ids_of_a_ragged_batch_equal_transformers(variant: str) -> None:
    model = make_model(**VARIANTS[variant])
    reference = as_transformers(model)
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(0, 96, (n,), generator=generator) for n in (3, 40, 1, 17)]
    packed = model.forward_ragged(
        torch.cat(prompts), [Segment(i, 0, len(p)) for i, p in enumerate(prompts)]
    )
    ends = torch.tensor([len(p) for p in prompts]).cumsum(0) - 1
    ids = packed[ends].argmax(-1)
    rows = [[int(i)] for i in ids]
    for step in range(63):
        starts = [len(p) + step for p in prompts]
        ids = model(ids[:, None], starts)[:, 0].argmax(-1)
        for row, token in zip(rows, ids.tolist(), strict=True):
            row.append(token)
    for prompt, row in zip(prompts, rows, strict=True):
        expected = reference.generate(
            prompt[None], max_new_tokens=64, do_sample=False, pad_token_id=0
        )
        assert row == expected[0, len(prompt) :].tolist()


def test_pieces_of_a_sequence_give_the_logits_of_the_whole() -> None:
    model = make_model(n_kv_heads=2)
    tokens = torch.randint(0, 96, (2, 50), generator=torch.Generator().manual_seed(3))
    whole = model(tokens, 0)
    pieces, start = [], 0
    for length in (7, 1, 20, 1, 21):
        pieces.append(model(tokens[:, start : start + length], start))
        start += length
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=2e-5, rtol=0)


def test_rows_at_their_own_positions_give_what_they_give_alone() -> None:
    model = make_model(n_kv_heads=4)
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, 96, (3, 30), generator=generator)
    whole = model(tokens, 0)
    starts = [5, 20, 11]
    for row, start in enumerate(starts):  # fill the cache to different lengths
        model.forward_ragged(tokens[row, :start], [Segment(row, 0, start)])
    new = torch.stack([tokens[row, start : start + 4] for row, start in enumerate(starts)])
    several = model(new, torch.tensor(starts))
    for row, start in enumerate(starts):
        torch.testing.assert_close(several[row], whole[row, start : start + 4], atol=2e-5, rtol=0)


def test_selected_positions_are_those_of_all() -> None:
    model = make_model()
    tokens = torch.randint(0, 96, (2, 10))
    everything = model(tokens, 0)
    torch.testing.assert_close(
        model(tokens, 0, positions=[-1, 3]), everything[:, [-1, 3]], atol=1e-6, rtol=0
    )
    assert everything.dtype == torch.float32
    assert model(tokens, 0, positions=[]).shape == (2, 0, 96)
    with pytest.raises(ValueError, match="position 10 of 10"):
        model(tokens, 0, positions=[10])


def test_neighbouring_rows_and_stale_cache_leave_no_trace() -> None:
    model = make_model(n_kv_heads=2)
    tokens = torch.randint(0, 96, (1, 12))
    fresh = model(tokens, 0)
    model(torch.randint(0, 96, (4, 60)), 0)
    torch.testing.assert_close(model(tokens, 0), fresh, atol=0, rtol=0)


LLAMA = {"norm_eps": 1e-6, "vocab_size": 32000}
CODE = {"rope_theta": 1e6, "ffn_dim_multiplier": 1.0}
KV70 = {"n_kv_heads": 8, "multiple_of": 4096, "ffn_dim_multiplier": 1.3}
PUBLISHED = {
    "LLaMA 7B": (6_738_415_616, 4096, 32, 32, LLAMA),
    "LLaMA 13B": (13_015_864_320, 5120, 40, 40, LLAMA),
    "LLaMA 33B": (32_528_943_616, 6656, 60, 52, LLAMA),
    "LLaMA 65B": (65_285_660_672, 8192, 80, 64, LLAMA),
    "Llama 2 70B": (68_976_648_192, 8192, 80, 64, {**KV70, "vocab_size": 32000}),
    "Code Llama 7B": (6_738_546_688, 4096, 32, 32, {**CODE, "vocab_size": 32016}),
    "Code Llama 13B": (13_016_028_160, 5120, 40, 40, {**CODE, "vocab_size": 32016}),
    "Code Llama 34B": (
        33_743_970_304,
        8192,
        48,
        64,
        {**CODE, "n_kv_heads": 8, "vocab_size": 32000},
    ),
    "Code Llama 70B": (68_976_910_336, 8192, 80, 64, {**CODE, **KV70, "vocab_size": 32016}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_their_parameter_counts(name: str) -> None:
    parallel.initialize(torch.device("cpu"))
    count, dim, n_layers, n_heads, more = PUBLISHED[name]
    args = ModelArgs(dim=dim, n_layers=n_layers, n_heads=n_heads, **more)
    with torch.device("meta"):
        model = Transformer(args)
    assert sum(p.numel() for p in model.parameters()) == count
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
