"""A prompt that begins like an earlier one is prefilled from there on, with the same result."""

import random

import pytest
import torch
from conftest import passed_tokens

from llama import Llama


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

    def test_scores_of_a_prompt_are_all_there(self, llama: Llama) -> None:
        greedy(llama, [PROMPT])
        tokens, logprobs = llama.generate([PROMPT], 3, temperature=0, logprobs=True, echo=True)
        assert logprobs is not None
        assert len(tokens[0]) == len(logprobs[0]) > len(PROMPT)
