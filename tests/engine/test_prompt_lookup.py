"""Prompt-lookup decoding: fewer passes where text repeats itself, and never another result."""

import random

import pytest
from conftest import passed_tokens

from llama import Llama
from llama.engine import sequence
from llama.engine.prompt_lookup import FIRST_DRAFT, LONGEST_PAUSE, PromptLookup
from llama.engine.sequence import Sequence

CODE = "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n"


def prompts(llama: Llama, seed: int) -> list[list[int]]:
    """A ragged batch, some of whose rows repeat themselves."""
    rng = random.Random(seed)
    piece = [rng.randrange(300, 700) for _ in range(rng.randint(3, 9))]
    return [
        [1, *piece * 3],
        llama.tokenizer.encode(CODE + CODE, bos=True, eos=False),
        [1, *(rng.randrange(300, 700) for _ in range(rng.randint(1, 40)))],
        [1, 400, 400, 400, 400],
    ]


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.5])
def test_tokens_and_scores_are_those_without_it(tiny: Llama, temperature: float) -> None:
    length = 0
    for seed in range(2):
        arguments = {"temperature": temperature, "seed": seed, "logprobs": True}
        batch = prompts(tiny, seed)
        plain, scores = tiny.generate(batch, 40, **arguments)
        for longest in (1, 10):
            found, found_scores = tiny.generate(
                batch, 40, **arguments, prompt_lookup_num_tokens=longest
            )
            assert found == plain
            for ours, theirs in zip(found_scores, scores, strict=True):
                assert ours == pytest.approx(theirs, abs=1e-4)
        length += sum(len(row) for row in plain)
    assert length > 150


@pytest.fixture
def circling(checkpoint_dir) -> Llama:
    """A model that follows each token by the one that it always is, and so goes in circles."""
    llama = Llama.build(checkpoint_dir(), max_seq_len=256, device="cpu")
    for block in llama.model.layers:
        block.attention.wo.weight.zero_()
        block.feed_forward.w2.weight.zero_()
    return llama


def test_text_that_repeats_itself_takes_fewer_passes(circling: Llama, monkeypatch) -> None:
    passes = passed_tokens(circling, monkeypatch)
    plain = circling.generate([[1, 5, 6], [7, 8]], 120, temperature=0)[0]
    without = len(passes)
    assert sum(map(len, plain)) > 200
    passes.clear()
    arguments = {"temperature": 0, "prompt_lookup_num_tokens": 10}
    assert circling.generate([[1, 5, 6], [7, 8]], 120, **arguments)[0] == plain
    assert len(passes) < without / 1.5


def test_every_task_takes_it(tiny: Llama, monkeypatch) -> None:
    made: list[int] = []

    def spied(prompt: list[int], longest: int) -> PromptLookup:
        made.append(longest)
        return PromptLookup(prompt, longest)

    monkeypatch.setattr(sequence, "PromptLookup", spied)
    dialog = [{"role": "user", "content": "What does the cow say? " * 6}]
    greedy = {"temperature": 0, "max_gen_len": 60}
    tasks = [
        lambda **a: tiny.text_completion([CODE + CODE], **a),
        lambda **a: tiny.chat_completion([dialog], **a),
        lambda **a: tiny.text_infilling([CODE], [CODE], **a),
        lambda **a: "".join(tiny.text_completion_stream(CODE + CODE, **a)),
        lambda **a: "".join(tiny.chat_completion_stream(dialog, **a)),
        lambda **a: "".join(tiny.text_infilling_stream(CODE, CODE, **a)),
    ]
    for task in tasks:
        plain = task(**greedy)
        assert not made
        assert task(**greedy, prompt_lookup_num_tokens=5) == plain
        assert made == [5]
        made.clear()


def test_the_end_of_the_cache_cuts_drafts(circling: Llama, monkeypatch) -> None:
    size = circling.model.params.max_seq_len
    passes = passed_tokens(circling, monkeypatch)
    circle = circling.generate([[7, 8]], 200, temperature=0)[0][0]
    for left in (0, 1, 2, 7, 50):
        prompt = (circle + circle)[: size - left]
        plain = circling.generate([prompt], size, temperature=0)
        passes.clear()
        assert len(plain[0][0]) == left
        found = circling.generate([prompt], size, temperature=0, prompt_lookup_num_tokens=10)
        assert found == plain
        assert any(n > 1 for n in passes[1:]) == (left > 2)  # drafts were checked


@pytest.mark.slow
def test_stop_strings_and_tokens_end_a_sequence_within_a_draft(
    circling: Llama, monkeypatch
) -> None:
    passes = passed_tokens(circling, monkeypatch)
    circle = circling.generate([[7, 8]], 200, temperature=0)[0][0]
    prompt, rest = circle[:100], circle[100:]
    for after in range(5, 15):
        stop_token = rest[after]
        expected = rest[: rest.index(stop_token)]
        text = circling.tokenizer.decode(rest[: after + 1])[-3:]
        for arguments in ({"stop_token": stop_token}, {"stop": [text]}):
            arguments |= {"temperature": 0, "max_gen_len": 90}
            plain = circling.generate([prompt], **arguments)[0]
            passes.clear()
            found = circling.generate([prompt], **arguments, prompt_lookup_num_tokens=10)[0]
            assert found == plain
            assert len(plain[0]) < 90
            if "stop_token" in arguments:
                assert plain[0] == expected
            assert len(plain[0]) < 4 or any(n > 1 for n in passes[1:])


@pytest.mark.slow
def test_the_cache_after_rejected_drafts_is_reused_correctly(tiny: Llama) -> None:
    for seed in range(4):
        first = tiny.generate(prompts(tiny, seed), 30, seed=seed, prompt_lookup_num_tokens=6)[0]
        longer = [p + row for p, row in zip(prompts(tiny, seed), first, strict=True)]
        reused = tiny.generate(longer, 10, temperature=0, prompt_lookup_num_tokens=6)
        tiny.reset_cache()
        assert tiny.generate(longer, 10, temperature=0) == reused


def test_it_is_a_whole_number(tiny: Llama) -> None:
    for wrong in (-1, 2.5, "3"):
        with pytest.raises(ValueError, match="prompt_lookup_num_tokens"):
            tiny.generate([[1]], 2, prompt_lookup_num_tokens=wrong)


class TestDrafts:
    def test_what_followed_the_last_three_tokens_goes_before_the_last_two(self) -> None:
        lookup = PromptLookup([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], 10)
        assert lookup.draft(10) == [4, 9, 2]
        assert PromptLookup([7, 2, 3, 4, 9, 1, 2, 3], 2).draft(10) == [4, 9]
        assert PromptLookup([7, 2, 3, 4, 9, 1, 2, 3], 10).draft(1) == [4]
        assert PromptLookup([7, 2, 3, 4, 9, 1, 2, 3], 10).draft(0) == []
        assert PromptLookup([1, 2, 3, 4], 10).draft(5) == []
        assert PromptLookup([], 10).draft(5) == []

    def test_the_latest_place_counts(self) -> None:
        assert PromptLookup([1, 2, 8, 1, 2, 9, 1, 2], 1).draft(5) == [9]

    def test_accepted_drafts_grow_and_rejected_ones_pause(self) -> None:
        lookup = PromptLookup([1, 2] * 50, 12)
        assert len(lookup.draft(50)) == FIRST_DRAFT
        lookup.learn(FIRST_DRAFT, FIRST_DRAFT)
        assert len(lookup.draft(50)) > FIRST_DRAFT
        for _ in range(9):
            lookup.learn(12, 12)
        assert len(lookup.draft(50)) == 12
        waits, n_tokens = [], 100
        for _ in range(9):
            lookup.learn(3, 0)
            steps = 0
            while not lookup.draft(50):
                lookup.push(1 + (n_tokens % 2))
                n_tokens, steps = n_tokens + 1, steps + 1
            waits.append(steps)
        assert waits == sorted(waits)
        assert waits[0] == 1
        assert waits[-1] == LONGEST_PAUSE

    def test_draws_belong_to_positions_and_not_to_passes(self, tiny_tokenizer) -> None:
        def begun() -> Sequence:
            sequence = Sequence([1], seed="3 0", max_new_tokens=9)
            sequence.begin(tiny_tokenizer)
            return sequence

        one, other = begun(), begun()
        ahead = [one.uniform(j) for j in range(4)]
        for number in ahead:
            assert other.uniform(0) == number
            other.tokens.append(5)
