"""A prompt that begins like an earlier one is prefilled from there on, with the same result."""

import random

import pytest
import torch
from conftest import passed_tokens

from llama import Llama
from llama.engine.prefix_cache import PrefixCache, common_prefix

TEXT = [1, 2, 3, 4, 5, 6]


def held(n_slots: int, *texts: list[int]) -> PrefixCache:
    """A cache whose first slots hold texts and are free again, the first one longest."""
    prefixes = PrefixCache(n_slots)
    taken = [prefixes.take([1000 + i], 0)[0] for i in range(n_slots)]
    assert taken == list(range(n_slots))
    for slot in taken:
        prefixes.write(slot, 0, texts[slot] if slot < len(texts) else [])
        prefixes.release(slot)
    return prefixes


class TestSlots:
    def test_a_text_goes_on_in_its_slot(self) -> None:
        """A failure means that the next turn of a dialog is read from its beginning."""
        prefixes = held(3, [9, 9], TEXT)
        assert prefixes.take([*TEXT, 7, 8], 7) == (1, 6, None)
        assert prefixes.free == {0, 2}

    def test_no_more_is_reused_than_may_be(self) -> None:
        """A failure means that a prompt has no last token to pass, or scores are missing."""
        assert held(2, TEXT).take(TEXT, 5)[1:] == (5, None)
        assert held(2, TEXT).take(TEXT, 0)[1:] == (0, None)

    def test_a_slot_that_is_in_use_is_copied(self) -> None:
        """A failure means that equal prompts are read again, or that one writes to another's."""
        prefixes = held(2, TEXT)
        assert prefixes.take([*TEXT, 7], 6) == (0, 6, None)
        assert prefixes.take([*TEXT, 8], 6) == (1, 6, (0, 6))

    def test_a_long_text_is_not_given_up_for_a_short_beginning(self) -> None:
        """A failure means that a dialog is lost to a request that only begins like it."""
        prefixes = held(2, [9, 9], TEXT)
        assert prefixes.take([1, 2, 3, 70, 80], 4) == (0, 3, (1, 3))
        assert prefixes.longest([*TEXT, 7]) == 6

    def test_one_token_is_not_worth_a_copy(self) -> None:
        """A failure means a copy for the beginning that all texts share."""
        prefixes = held(2, TEXT, [5])
        prefixes.take([*TEXT, 7], 6)
        assert prefixes.take([1, 20, 30], 2) == (1, 0, None)

    def test_the_least_recently_used_slot_is_given_away(self) -> None:
        """A failure means that a text is lost which was used a moment ago."""
        prefixes = held(3)
        for slot in (prefixes.take([50 + i], 0)[0] for i in range(3)):
            assert slot in range(3)
        for slot in (2, 0, 1):
            prefixes.release(slot)
        assert [prefixes.take([60 + i], 0)[0] for i in range(3)] == [2, 0, 1]

    def test_a_rejected_draft_is_written_over(self) -> None:
        """A failure means that keys of tokens which were never chosen are reused."""
        prefixes = held(1, TEXT)
        slot, n, _ = prefixes.take([*TEXT, 7], 6)
        prefixes.write(slot, n, [7, 20, 21])  # the last two are a draft
        prefixes.write(slot, n + 1, [30])
        assert prefixes.longest([*TEXT, 7, 30, 21, 0]) == 8
        assert prefixes.longest([*TEXT, 7, 20, 21, 0]) == 7

    def test_nothing_is_held_after_clear(self) -> None:
        """A failure means that a slot is reused whose keys are another model's."""
        prefixes = held(2, TEXT)
        prefixes.clear()
        assert prefixes.longest(TEXT) == 0
        assert prefixes.take(TEXT, 5)[1:] == (0, None)

    def test_slots_hold_what_is_believed(self) -> None:
        """A failure means that some sequence of calls reuses tokens which a slot doesn't hold."""
        rng = random.Random(3)
        prefixes = PrefixCache(3)
        slots: list[list[int]] = [[], [], []]  # what the cache would hold
        busy: list[int] = []
        for _ in range(2000):
            if busy and (len(busy) == 3 or rng.random() < 0.5):
                prefixes.release(busy.pop(rng.randrange(len(busy))))
                continue
            prompt = [rng.randrange(2) for _ in range(rng.randint(1, 9))]
            slot, n, copy = prefixes.take(prompt, len(prompt) - 1)
            assert slot not in busy
            if copy is not None:
                source, n_copied = copy
                slots[slot][:n_copied] = slots[source][:n_copied]
            assert slots[slot][:n] == prompt[:n] and n < len(prompt)
            prefixes.write(slot, n, prompt[n:])
            slots[slot][n : len(prompt)] = prompt[n:]
            busy.append(slot)


def test_common_prefix() -> None:
    """A failure means that a beginning is reused which isn't the same."""
    assert common_prefix([1, 2, 3], [1, 2, 4], 3) == 2
    assert common_prefix([1, 2, 3], [1, 2, 3, 4], 2) == 2
    assert common_prefix([1, 2, 3], [1], 3) == 1
    assert common_prefix([1], [], 1) == 0


@pytest.fixture
def llama(tiny: Llama) -> Llama:
    tiny.reset_cache()
    return tiny


def greedy(llama: Llama, prompts: list[list[int]], length: int = 12) -> list[list[int]]:
    return llama.generate(prompts, length, temperature=0)[0]


def test_the_next_turn_prefills_only_what_is_new(llama: Llama, monkeypatch) -> None:
    dialog = [{"role": "user", "content": "What does the cow say?"}]
    answer = llama.chat_completion([dialog], temperature=0)[0]["generation"]
    dialog += [answer, {"role": "user", "content": "And what does a duck eat?"}]
    prompt = llama.chat.prompt(llama.tokenizer, dialog)
    passed = passed_tokens(llama, monkeypatch)
    second = llama.chat_completion([dialog], temperature=0)
    assert passed[0] < len(prompt) / 2
    llama.reset_cache()
    passed.clear()
    assert llama.chat_completion([dialog], temperature=0) == second
    assert passed[0] == len(prompt)


def test_the_same_prompt_is_not_prefilled_again(llama: Llama, monkeypatch) -> None:
    first = llama.generate([[1, 5, 9, 77]], 8, seed=3)
    passed = passed_tokens(llama, monkeypatch)
    assert llama.generate([[1, 5, 9, 77]], 8, seed=3) == first
    assert passed[0] == 1  # the last token's logits are needed


def test_slots_take_over_what_another_slot_holds(llama: Llama, monkeypatch) -> None:
    system = [1, *range(300, 360)]
    prompts = [system + [400 + i] * (i + 1) for i in range(4)]
    greedy(llama, [system])
    passed = passed_tokens(llama, monkeypatch)
    found = greedy(llama, prompts)
    assert passed[0] == sum(i + 1 for i in range(4))
    # Sequences change slots: each takes its beginning from where it was.
    passed.clear()
    assert greedy(llama, prompts[::-1]) == found[::-1]
    assert passed[0] == 4
    llama.reset_cache()
    assert greedy(llama, prompts) == found


@pytest.mark.slow
def test_any_sequence_of_calls_gives_what_fresh_ones_give(llama: Llama) -> None:
    rng = random.Random(0)
    pool = [[1, *(rng.randrange(300, 330) for _ in range(40))] for _ in range(2)]
    for _ in range(25):
        prompts = []
        for _ in range(rng.randint(1, 4)):
            prompt = rng.choice(pool)[: rng.randint(1, 40)]
            prompts.append(prompt + [rng.randrange(300, 330) for _ in range(rng.randint(0, 3))])
        reused = greedy(llama, prompts, 5)
        llama.reset_cache()
        assert greedy(llama, prompts, 5) == reused


PROMPT = [1, *range(300, 340)]


class TestNothingStaleIsReused:
    def check(self, llama: Llama) -> None:
        found = greedy(llama, [PROMPT])
        llama.reset_cache()
        assert greedy(llama, [PROMPT]) == found

    def test_after_other_work_on_the_model(self, llama: Llama) -> None:
        greedy(llama, [PROMPT])
        llama.model.forward(torch.full((1, 30), 9))
        self.check(llama)
        llama.embed(["Once upon a time there was a fox."])
        self.check(llama)

    def test_after_an_interruption(self, llama: Llama, monkeypatch) -> None:
        greedy(llama, [PROMPT])
        block = llama.model.layers[1]
        with monkeypatch.context() as patch:
            patch.setattr(block, "forward", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                greedy(llama, [[1, *range(500, 530)]])
        self.check(llama)

    def test_after_a_stream_that_was_closed_or_taken_over(self, llama: Llama) -> None:
        stream = llama.text_completion_stream("Once upon a time", temperature=0)
        next(stream)
        stream.close()
        self.check(llama)
        stream = llama.text_completion_stream("Once upon a time", temperature=0)
        next(stream)
        greedy(llama, [PROMPT])
        stream.close()
        self.check(llama)

    def test_after_the_cache_was_reset_while_a_stream_was_open(self, llama: Llama) -> None:
        """A failure means that generated tokens pass for a prompt's beginning."""
        stream = llama.text_completion_stream("Once upon a time", temperature=0, max_gen_len=40)
        tokens = list(next(stream).token_ids)
        llama.reset_cache()
        for piece in stream:
            tokens += piece.token_ids
        # What was written after the reset isn't the beginning of anything.
        prompts = [tokens[first:] + [300] for first in range(3)]
        found = greedy(llama, prompts)
        llama.reset_cache()
        assert greedy(llama, prompts) == found

    def test_after_an_interrupted_copy(self, llama: Llama, monkeypatch) -> None:
        """A failure means that a slot is lost, or passes for one that holds the copy."""
        greedy(llama, [PROMPT])
        longer = [PROMPT + [500 + i] for i in range(3)]
        with monkeypatch.context() as patch:
            patch.setattr(llama.model, "copy_cache", lambda *_: exec("raise KeyboardInterrupt"))
            with pytest.raises(KeyboardInterrupt):
                greedy(llama, longer)
        found = greedy(llama, longer * 4)
        llama.reset_cache()
        assert greedy(llama, longer * 4) == found

    def test_scores_of_a_prompt_are_all_there(self, llama: Llama) -> None:
        greedy(llama, [PROMPT])
        tokens, logprobs = llama.generate([PROMPT], 3, temperature=0, logprobs=True, echo=True)
        assert logprobs is not None
        assert len(tokens[0]) == len(logprobs[0]) > len(PROMPT)
