"""Adapters on CUDA, on a CPU: passes that have some never replay what was recorded without."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_cuda
import pytest
import torch
from torch._dynamo.utils import counters

from llama import Llama
from llama.adapters import Adapter, Change, LowRank
from llama.engine.sequence import Sequence
from llama.generation import TINY
from llama.sampling import SamplingParams

PROMPTS = [[1, 20, 300], [1, *range(40, 80)], [1], [1, *range(500, 517)]]
CHOICES = ["a", None, "b", "a"]


def make_adapter(name: str, llama: Llama, seed: int) -> Adapter:
    """Random changes of each linear layer."""
    generator = torch.Generator().manual_seed(seed)
    changes: dict[str, Change] = {}
    for path, module in llama.model.named_modules():
        if hasattr(module, "plain_weight"):
            n_out, n_in = module.plain_weight().shape
            a, b = (torch.randn(shape, generator=generator) for shape in ((2, n_in), (n_out, 2)))
            changes[path] = LowRank(a / n_in**0.5, b, 0.3)
    return Adapter(name, changes)


def with_adapters(llama: Llama) -> Llama:
    for seed, name in enumerate("ab"):
        llama.adapters.add(make_adapter(name, llama, seed))
    return llama


@pytest.fixture
def usual() -> Llama:
    return with_adapters(Llama.build(dtype=torch.float32, device="cpu", max_batch_size=4))


def build(path: Path = TINY, **how: Any) -> Llama:
    llama = Llama.build(path, dtype=torch.float32, device="cpu", max_batch_size=4, **how)
    return with_adapters(llama)


def run(llama: Llama, choices: list[str | None], **settings: Any) -> list[list[int]]:
    sequences: list[Sequence] = []
    for prompt, name in zip(PROMPTS, choices, strict=True):
        params = SamplingParams(**{"temperature": 0, "max_gen_len": 20, **settings}, adapter=name)
        sequences += llama.tasks.generate([prompt], params, "ids")
    llama.engine.submit(sequences)
    while llama.engine.n_running or llama.engine.n_waiting:
        llama.engine.step()
    return [sequence.tokens for sequence in sequences]


@pytest.mark.parametrize("drafts", [0, 4])
def test_recorded_steps_are_for_passes_without_adapters(
    drafts: int, usual: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure means that a GPU answers with the base's network, or keeps an adapter's."""
    plain: list[str | None] = [None] * 4
    how = {"prompt_lookup_num_tokens": drafts}
    expected = {tuple(choices): run(usual, choices, **how) for choices in (CHOICES, plain)}
    fake_cuda.pretend(monkeypatch.setattr)
    llama = build()
    for choices in (CHOICES, plain, CHOICES, plain):
        before = fake_cuda.n_replays(llama.engine.decode)
        assert run(llama, choices, **how) == expected[tuple(choices)]
        n_replays = fake_cuda.n_replays(llama.engine.decode) - before
        assert (n_replays > 8) is (choices == plain)
        assert n_replays == 0 or choices == plain


def test_passes_ahead_of_the_host_keep_their_adapters(
    usual: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pass after one that is still running has the same rows, whose tokens aren't known yet."""
    expected = run(usual, CHOICES, temperature=0.8, seed=3)
    fake_cuda.pretend(monkeypatch.setattr)
    llama = build()
    assert llama.engine.runs_ahead
    assert run(llama, CHOICES, temperature=0.8, seed=3) == expected


@pytest.mark.slow
def test_compiled_steps_stay_as_they_were_compiled(checkpoint_dir: Callable[..., Path]) -> None:
    """A failure means that a first request with an adapter waits for a compiler, or gets none."""
    if not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("there is no C++ compiler")
    path = checkpoint_dir(n_layers=1)
    usual, llama = build(path), build(path, compile=True)
    plain: list[str | None] = [None] * 4
    run(llama, plain)
    n_compiled = counters["stats"]["unique_graphs"]
    for choices in (CHOICES, plain, CHOICES):
        assert run(llama, choices) == run(usual, choices)
        assert counters["stats"]["unique_graphs"] == n_compiled
