"""Grammars: answers keep to their masks, whatever runs beside them."""

import json
import threading
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import fake_cuda
import pytest
import torch
from engine_client import Client
from grammars import Script
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import forked, script

from llama import Llama
from llama.logits.masks import barriers

REPEATED = "Tom has a red ball. Tom has a red ball. Tom has a"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sets(st.integers(0, 99)), min_size=1, max_size=3))
def test_a_bit_stands_for_each_token(rows: list[set[int]]) -> None:
    """A failure means that a grammar allows other tokens than it says, or a word's last bit."""
    masks = torch.cat([Script([row], 0, 100).masks([]) for row in rows])
    assert masks.dtype == torch.int32
    found = barriers(masks, 100)
    assert found.shape == (len(rows), 100) and set(found.unique().tolist()) <= {0, -torch.inf}
    assert [set((row == 0).nonzero().flatten().tolist()) for row in found] == rows


def places(tokens: Sequence[int], n_choices: int) -> list[Collection[int]]:
    """Some ids for each place, among them the given ones."""
    return [[token, *range(300 + i, 300 + i + n_choices)] for i, token in enumerate(tokens)]


def run(llama: Llama, prompt: str, grammar: Script | None, **how: Any) -> Any:
    client = Client(llama)
    sequence = client.sequence(prompt, **how)
    sequence.grammar = grammar
    client.engine.submit([sequence])
    client.run()
    return sequence


@pytest.mark.parametrize("how", [{"temperature": 0}, {"temperature": 1.5, "seed": 3}])
@pytest.mark.parametrize("n_drafted", [0, 6])
def test_answers_keep_to_their_masks(tiny: Llama, n_drafted: int, how: dict[str, Any]) -> None:
    """A failure means that a grammar is broken, or that an answer doesn't end where it does."""
    tokenizer = tiny.tokenizer
    ids = tokenizer.encode(" red ball. Tom has a red ball. Tom has a", False, False)
    allowed_ids = places(ids, 4)
    grammar = Script(allowed_ids, tokenizer.eos_id, tokenizer.n_words)
    found = run(tiny, REPEATED, grammar, prompt_lookup_num_tokens=n_drafted, **how)
    assert found.finish_reason == "stop" and len(found.tokens) == len(ids)
    assert all(token in some for token, some in zip(found.tokens, allowed_ids, strict=True))
    assert grammar.pushed == found.tokens and grammar.is_finished, "a pass draws the end alone"
    if n_drafted:
        without = Script(allowed_ids, tokenizer.eos_id, tokenizer.n_words)
        assert run(tiny, REPEATED, without, **how).tokens == found.tokens


def test_neighbours_do_not_notice(tiny: Llama) -> None:
    """A failure means that a mask reaches other rows of its batch, or misses its own."""
    tokenizer = tiny.tokenizer
    prompts = ["The cow", REPEATED, "One day", "The cow"]
    grammars = [
        None,
        Script(places([400, 401, 402] * 5, 2), tokenizer.eos_id, tokenizer.n_words),
        None,
        Script(places([500, 7, 500, 7] * 3, 0), tokenizer.eos_id, tokenizer.n_words),
    ]
    hows: list[dict[str, Any]] = [
        {"temperature": 0.9, "seed": 1, "logprobs": True},
        {"temperature": 0.9, "seed": 2, "prompt_lookup_num_tokens": 4, "logprobs": True},
        {"temperature": 0, "prompt_lookup_num_tokens": 4, "logprobs": True},
        {"temperature": 0, "prompt_lookup_num_tokens": 4, "logprobs": True},
    ]
    client, sequences = Client(tiny), []
    for prompt, grammar, how in zip(prompts, grammars, hows, strict=True):
        sequences.append(client.sequence(prompt, max_gen_len=20, **how))
        sequences[-1].grammar = grammar
        client.engine.submit(sequences[-1:])
        client.step()
    client.run()
    assert sequences[3].tokens == [500, 7, 500, 7] * 3
    for sequence, prompt, grammar, how in zip(sequences, prompts, grammars, hows, strict=True):
        again = None if grammar is None else Script(grammar._places, *grammar._rest)
        alone = run(tiny, prompt, again, max_gen_len=20, **how)
        assert sequence.tokens == alone.tokens, prompt
        assert sequence.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def test_masks_are_built_while_the_network_computes(
    tiny: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure means that each token takes a mask's time longer."""
    order: list[str] = []
    begun, computed = threading.Event(), threading.Event()

    class Slow(Script):
        def masks(self, draft: Sequence[int]) -> torch.Tensor:
            begun.set()
            assert computed.wait(10), "the network waits for the mask"
            computed.clear()
            order.append("mask")
            return super().masks(draft)

    hidden_states = tiny.model.hidden_states

    def network(*arguments: Any) -> torch.Tensor:
        assert begun.wait(10), "the mask is begun after the network"
        begun.clear()
        hidden = hidden_states(*arguments)
        order.append("network")
        computed.set()
        return hidden

    monkeypatch.setattr(tiny.model, "hidden_states", network)
    tokenizer = tiny.tokenizer
    found = run(tiny, "The cow", Slow([[5], [6]], tokenizer.eos_id, tokenizer.n_words))
    assert found.tokens == [5, 6] and order == ["network", "mask"] * 2


def test_the_end_comes_where_nothing_else_may_in_spite_of_a_ban(tiny: Llama) -> None:
    """A failure means that a draw is made among no tokens: NaN, or a forbidden one."""
    tokenizer = tiny.tokenizer
    for temperature in (0, 1.0):
        grammar = Script([[5], [6]], tokenizer.eos_id, tokenizer.n_words)
        how = {"min_tokens": 9, "logit_bias": {6: -100}, "temperature": temperature}
        found = run(tiny, "The cow", grammar, **how)
        assert (found.tokens, found.finish_reason) == ([5, 6], "stop")


def test_passes_of_a_grammar_wait_for_its_tokens(
    tiny: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure means that on CUDA a mask is built for a token that the grammar doesn't know."""
    fake_cuda.pretend(monkeypatch.setattr)
    llama = Llama.build(dtype=torch.float32, device="cpu", max_batch_size=2)
    assert llama.engine.runs_ahead
    tokenizer = llama.tokenizer
    some = places(tokenizer.encode(" saw a big red ball", False, False), 5)
    how: dict[str, Any] = {"temperature": 1.0, "seed": 4}
    found, expected = (
        run(each, "The cow", Script(some, tokenizer.eos_id, tokenizer.n_words), **how)
        for each in (llama, tiny)
    )
    assert found.tokens == expected.tokens


RANKS = """
import json, os, sys, torch
from grammars import Script
from llama import Llama
from llama.engine import runner
from llama.sampling import SamplingParams
sample = runner.sample
def other(*arguments):
    tokens, is_enough = sample(*arguments)
    return 0 * tokens, is_enough
if os.environ["RANK"] == "1":  # whose own draws must not matter
    runner.sample = other
llama = Llama.build(device="cpu", dtype=torch.float32)
prompt, places = json.loads(sys.argv[2])
tokenizer, found = llama.tokenizer, []
for temperature in (0, 1.5):
    params = SamplingParams(temperature, seed=3, prompt_lookup_num_tokens=6)
    [sequence] = llama.tasks.text([prompt], params)
    sequence.grammar = Script(places, tokenizer.eos_id, tokenizer.n_words)
    llama._run([sequence])
    found.append(sequence.tokens)
with open(sys.argv[1] + os.environ["RANK"], "w") as file:
    json.dump(found, file)
"""


@pytest.mark.slow
def test_two_ranks_agree(tiny: Llama, tmp_path: Path) -> None:
    """A failure means that ranks check drafts of different lengths, and wait for ever."""
    out, tokenizer = tmp_path / "rank", tiny.tokenizer
    ids = tokenizer.encode(" red ball. Tom has a red ball. Tom has a", False, False)
    some = [list(each) for each in places(ids, 4)]
    arguments = (script(tmp_path, RANKS), str(out), json.dumps([REPEATED, some]))
    done = forked(*arguments, path=str(Path(__file__).parents[1]), n=2)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = [
        run(tiny, REPEATED, Script(some, tokenizer.eos_id, tokenizer.n_words), **how).tokens
        for how in ({"temperature": 0}, {"temperature": 1.5, "seed": 3})
    ]
    for rank in range(2):
        assert json.loads(Path(f"{out}{rank}").read_text()) == expected
