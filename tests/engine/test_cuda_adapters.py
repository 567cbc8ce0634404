"""Adapters on CUDA, on a CPU: passes that have some never replay what was recorded without."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_cuda
import pytest
import torch
from fake_cuda import Launches, Waits
from test_cuda_counts import meta_model

from llama import Llama, Tokenizer
from llama.adapters import Adapter, Change, LowRank
from llama.engine.engine import Engine
from llama.engine.sequence import Sequence
from llama.generation import TINY
from llama.layers.linear import ParallelLinear
from llama.sampling import SamplingParams

PROMPTS = [[1, 20, 300], [1, *range(40, 80)], [1], [1, *range(500, 517)]]
CHOICES = ["a", None, "b", "a"]


def make_adapter(name: str, llama: Llama, seed: int) -> Adapter:
    """Random changes of each linear layer."""
    generator = torch.Generator().manual_seed(seed)
    changes: dict[str, Change] = {}
    for path, module in llama.model.named_modules():
        if isinstance(module, ParallelLinear):
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
    how = {"dtype": torch.float32, "device": "cpu", "max_batch_size": 4, **how}
    return with_adapters(Llama.build(path, **how))


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
    """The pass after one that is still running has the same rows, whose tokens aren't known yet.

    What it writes is the adapter's too: a dialog's next turn doesn't read the answer again.
    """
    expected = run(usual, CHOICES, temperature=0.8, seed=3)
    fake_cuda.pretend(monkeypatch.setattr)
    llama = build()
    assert llama.engine.runs_ahead
    assert run(llama, CHOICES, temperature=0.8, seed=3) == expected
    longer = [PROMPTS[0] + expected[0] + [7]]
    [sequence] = llama.tasks.generate(longer, SamplingParams(0, max_gen_len=2, adapter="a"), "ids")
    llama.engine.submit([sequence])
    llama.engine.step()
    assert sequence.n_reused == len(PROMPTS[0] + expected[0]) - 1


@pytest.mark.slow
def test_compiled_steps_stay_as_they_were_compiled(checkpoint_dir: Callable[..., Path]) -> None:
    """A failure means that a first request with an adapter waits for a compiler, or gets none."""
    if not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("there is no C++ compiler")
    from torch._dynamo.utils import counters  # slow to import, which other tests needn't wait for

    path = checkpoint_dir(n_layers=1)
    usual, llama = build(path), build(path, compile=True, max_batch_size=2)
    plain: list[str | None] = [None] * 4
    run(llama, plain)
    n_compiled = counters["stats"]["unique_graphs"]
    for choices in (CHOICES, plain, CHOICES):
        assert run(llama, choices) == run(usual, choices)
        assert counters["stats"]["unique_graphs"] == n_compiled


LLAMA2_7B = {"dim": 4096, "n_heads": 32, "vocab_size": 32000}


def meta_engine(n_layers: int, tokenizer: Tokenizer, names: list[str | None]) -> Engine:
    """An engine that is decoding eight sequences, whose adapters change all linear layers."""
    model = meta_model(n_layers, **LLAMA2_7B)
    engine = Engine(model, tokenizer)
    changes: dict[str, Change] = {}
    for path, module in model.named_modules():
        if isinstance(module, ParallelLinear) and path != "output":
            sizes = (16, module.in_features), (module.out_features, 16)
            a, b = (torch.empty(size, dtype=torch.bfloat16, device="meta") for size in sizes)
            changes[path] = LowRank(a, b, 1.0)
    adapters = {name: Adapter(name, changes) for name in names if name is not None}
    sequences = [
        Sequence([1, 2, i], SamplingParams(0), max_new_tokens=30, output="ids") for i in range(8)
    ]
    for sequence, name in zip(sequences, names, strict=True):
        sequence.adapter = None if name is None else adapters[name]
    engine.submit(sequences)
    for _ in range(3):
        with Waits():
            engine.step()
    return engine


# Of seven layers' outputs, three of which need to be joined.
WAYS: dict[str, tuple[list[str | None], int]] = {
    "none": ([None] * 8, 0),
    "one for all": (["a"] * 8, 7 * 3 + 1),
    "one for half": (["a"] * 4 + [None] * 4, 7 * 3 + 1),
    "one here and there": (["a", None] * 4, 7 * 5 + 1),
    "two here and there": (["a", "b"] * 4, 7 * 5 * 2 + 1),
}


@pytest.mark.parametrize("way", WAYS)
def test_adapters_launch_few_kernels_and_wait_for_nothing(
    way: str, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure means that docs/adapters.md counts wrongly, or that a GPU waits for the host."""
    fake_cuda.pretend(monkeypatch.setattr)
    names, more = WAYS[way]
    counts = []
    for n_layers in (1, 3):
        engine = meta_engine(n_layers, tiny_tokenizer, names)
        with Launches() as counted, Waits() as waits:
            engine.step()
        assert waits.downloads == ["cpu"] and waits.uploads == 2  # as without adapters
        counts.append(counted.names.total())
    assert (counts[1] - counts[0]) / 2 - 16 == more
