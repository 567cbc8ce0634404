"""Several answers to a prompt, which is read once."""

import json
from typing import Any

import pytest
from engine_client import Client

from llama import Llama
from llama.sampling import SamplingParams
from llama.server.workers import _describe, _restore

PROMPTS = [[10, 20, 300, 21], [*range(40, 60)], [*range(100, 300)]]


def test_each_prompt_has_its_answers_in_a_row(tiny: Llama) -> None:
    """A failure means that answers go to other prompts, or draw alike."""
    how: dict[str, Any] = {"temperature": 1.0, "seed": 5}
    found, _ = tiny.generate(PROMPTS, 8, n=3, **how)
    # Sequence i of a call draws by the seed and i.
    one, _ = tiny.generate([prompt for prompt in PROMPTS for _ in range(3)], 8, **how)
    assert found == one
    assert all(
        len({tuple(ids) for ids in found[i : i + 3]}) > 1 for i in (0, 3)
    )  # the last is sure


def test_every_task_has_them(tiny: Llama) -> None:
    """A failure means that a result holds another one's prompt."""
    how: dict[str, Any] = {"temperature": 1.0, "seed": 5, "max_gen_len": 6}
    texts = ["The cow", "One day"]
    for results, one in (
        (tiny.text_completion(texts, n=2, **how), tiny.text_completion(texts[:1] * 2, **how)),
        (
            tiny.text_infilling(texts, ["a", "b"], n=2, **how),
            tiny.text_infilling(texts[:1] * 2, ["a", "a"], **how),
        ),
    ):
        assert len(results) == 4 and results[:2] == one
    infilled = tiny.text_infilling(texts, ["a", "b"], n=2, **how)
    assert [each["full_text"][:3] + each["full_text"][-1] for each in infilled] == [
        *["Thea"] * 2,
        *["Oneb"] * 2,
    ]
    dialogs: list[Any] = [
        [{"role": "user", "content": "Hi"}],
        [{"role": "user", "content": "[INST] Hi"}],  # which isn't answered
    ]
    answers = [each["generation"]["content"] for each in tiny.chat_completion(dialogs, n=2, **how)]
    assert answers[2] == answers[3] and "Error" in answers[2] and answers[0] != answers[2]


@pytest.mark.parametrize("n_slots", [8, 3])
def test_a_prompt_is_read_once(n_slots: int, tiny: Llama) -> None:
    """A failure means that n answers cost n prompts."""
    llama = Llama.build(max_batch_size=n_slots, device="cpu")
    llama.generate(PROMPTS, 4, temperature=1.0, n=3)
    n_tokens = sum(map(len, PROMPTS))
    assert llama.engine.counts.prompt_tokens == n_tokens + 2 * len(PROMPTS)  # the last one again


def test_prompts_are_read_beside_each_other(tiny: Llama) -> None:
    """A failure means that each prompt waits for the answers of the one before to begin."""
    client = Client(tiny)
    client.engine.submit(tiny.tasks.generate(PROMPTS[:2], SamplingParams(max_gen_len=9, n=2)))
    client.engine.step()
    assert (client.engine.n_running, client.engine.n_waiting) == (2, 2)
    client.engine.step()
    assert (client.engine.n_running, client.engine.n_waiting) == (4, 0)


def test_a_stream_has_one_answer(tiny: Llama) -> None:
    """A failure means that a stream mixes several texts."""
    for stream in (
        lambda: tiny.text_completion_stream("The cow", n=2),
        lambda: tiny.chat_completion_stream([{"role": "user", "content": "Hi"}], n=2),
        lambda: tiny.text_infilling_stream("The cow", "!", n=2),
    ):
        with pytest.raises(ValueError, match="n is 2: a stream has one answer, leave n out"):
            stream()


def test_other_ranks_get_all_parameters(tiny: Llama) -> None:
    """A failure means that ranks draw from other logits, or one stops alone."""
    how: dict[str, Any] = {
        **{"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 1.0},
        **{"frequency_penalty": 1.0, "logit_bias": {5: 1.5, 7: -100}, "min_tokens": 2},
        **{"stop_token_ids": [9], "stop": ["x"]},
    }
    [sequence] = tiny.tasks.generate([[1, 5]], SamplingParams(**how))
    restored = _restore(json.loads(json.dumps(_describe(sequence))), tiny.engine)
    assert restored.params == sequence.params and restored.seed == sequence.seed
