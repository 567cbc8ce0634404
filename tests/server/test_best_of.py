"""``best_of`` returns the most probable of several answers, ``truncate_prompt_tokens`` cuts."""

from collections.abc import Iterator
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from servers import post, serve

from llama import Llama
from llama.adapters import Adapter
from llama.chat.options import ChatOptions
from llama.guards import Verdict
from llama.server.answers import Piece
from llama.server.config import ServerConfig
from llama.server.service import Service
from llama.server.tasks import best, n_last

DRAWN: dict[str, Any] = {"temperature": 1.5, "top_p": 1, "seed": 1, "max_tokens": 12}
U: Any = {"role": "user", "content": "What does the cow say?"}
LONG = "The cow says moo. " * 60


@pytest.fixture(scope="module")
def llama() -> Llama:
    return Llama.build(dtype=torch.float32, device="cpu", max_seq_len=128, max_batch_size=4)


@pytest.fixture(scope="module")
def url(llama: Llama) -> Iterator[str]:
    with serve(llama) as (found, _):
        yield f"{found}/v1"


def complete(url: str, **body: Any) -> Any:
    answer = post(f"{url}/completions", body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_best_are_returned(url: str) -> None:
    """Of each prompt's answers others than the most probable are returned, or in another order."""
    prompts = ["The", "Once upon a time"]
    every = complete(url, prompt=prompts, n=6, logprobs=0, **DRAWN)
    expected = []
    for i in range(0, 12, 6):
        means = {
            choice["index"]: fmean(choice["logprobs"]["token_logprobs"])
            for choice in every["choices"][i : i + 6]
        }
        assert len(set(means.values())) > 3, "the answers are too much alike for a test"
        expected += sorted(means, key=lambda index: -means[index])[:2]
    assert expected not in ([0, 1, 6, 7], sorted(expected))
    texts = [every["choices"][index]["text"] for index in expected]
    found = complete(url, prompt=prompts, n=2, best_of=6, **DRAWN)
    assert [choice["text"] for choice in found["choices"]] == texts
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    assert all(choice["logprobs"] is None for choice in found["choices"])
    for kind in ("prompt_tokens", "completion_tokens"):
        assert found["usage"][kind] == every["usage"][kind], "usage counts all answers"
    scored = complete(url, prompt=prompts, best_of=6, logprobs=1, echo=True, **DRAWN)
    assert [choice["text"] for choice in scored["choices"]] == [
        prompt + text for prompt, text in zip(prompts, texts[::2], strict=True)
    ]
    assert len(scored["choices"][1]["logprobs"]["tokens"]) > 12


def test_as_many_as_asked_for_are_not_sorted(url: str) -> None:
    """A field that asks for nothing changes the order of the answers, or forbids a stream."""
    plain = complete(url, prompt="The", n=3, **DRAWN)
    assert complete(url, prompt="The", n=3, best_of=3, **DRAWN)["choices"] == plain["choices"]
    answer = post(f"{url}/completions", {"prompt": "The", "best_of": 1, "stream": True, **DRAWN})
    assert answer.status_code == 200 and "[DONE]" in answer.text


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"best_of": 2, "stream": True}, "best_of", "stream=false"),
        ({"best_of": 1, "n": 2}, "best_of", "2 of 1"),
        ({"best_of": 21}, "best_of", "20"),
        ({"best_of": 0}, "best_of", "1"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "or -1"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "-1"),
        ({"truncate_prompt_tokens": 3, "suffix": "x"}, None, "doesn't go with suffix"),
        ({"truncate_prompt_tokens": 300, "prompt": LONG}, "prompt", "300"),
    ],
)
def test_mistakes(url: str, fields: dict[str, Any], param: str | None, message: str) -> None:
    """A request that can't be met gets an answer as if it were, or an error that names nothing."""
    answer = post(f"{url}/completions", {"prompt": "The", **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert message in error["message"]


def test_empty_and_refused_answers_come_last() -> None:
    """The best answer is none, or a guard's refusal, though another could be returned."""
    scores = {0: [-9.0], 1: [], 2: [-0.1], 3: [-1.0, -3.0]}
    jobs: Any = [SimpleNamespace(sequence=SimpleNamespace(logprobs=scores[i])) for i in range(4)]
    pieces = [Piece(i, "", 0, "content_filter" if i == 2 else "stop") for i in range(4)]
    found = [piece.number for piece in best(pieces, jobs, 3, 4)]
    assert found == [3, 0, 1]
    assert best(pieces, jobs, 4, 4) == pieces


def test_best_of_with_a_guard(llama: Llama) -> None:
    """A refused answer is chosen for its probability, or a guard is asked for nothing."""
    guarded = Llama(llama.model, llama.tokenizer)
    refused: list[str] = []

    def guard(_: Any, answer: str) -> Verdict:
        if len(refused) < 2:
            refused.append(answer)
            return Verdict(False, reason="noise")
        return Verdict(True)

    guarded.output_guard = guard
    with serve(guarded) as (found, _):
        answer = complete(f"{found}/v1", prompt="The", best_of=4, n=2, **DRAWN)
    assert len(refused) == 2
    assert {choice["finish_reason"] for choice in answer["choices"]} <= {"stop", "length"}


def test_the_prompt_s_end_is_kept(url: str, llama: Llama) -> None:
    """Another part of a prompt is read than its last tokens, or another number of them."""
    ids = llama.tokenizer.encode("Once upon a time there was a cow", bos=True, eos=False)
    fixed = {"temperature": 0, "max_tokens": 6}
    expected = complete(url, prompt=ids[-4:], **fixed)
    text = llama.tokenizer.decode(ids)
    for prompt in (ids, text, [text]):
        found = complete(url, prompt=prompt, truncate_prompt_tokens=4, **fixed)
        assert found["choices"] == expected["choices"]
        assert found["usage"]["prompt_tokens"] == 4
    whole = complete(url, prompt=text, **fixed)
    for n in (100, -1, None):
        found = complete(url, prompt=text, truncate_prompt_tokens=n, **fixed)
        assert found["choices"] == whole["choices"]
    assert complete(url, prompt="", truncate_prompt_tokens=1, **fixed)["choices"]
    of_end = post(f"{url}/embeddings", {"input": ids[-4:]}).json()["data"][0]["embedding"]
    for texts in ([text, "moo"], [ids, ids[:2]]):
        body = {"input": texts, "truncate_prompt_tokens": 4}
        vectors = post(f"{url}/embeddings", body).json()["data"]
        assert vectors[0]["embedding"] == pytest.approx(of_end, abs=1e-5)
        assert vectors[1]["embedding"] != pytest.approx(of_end, abs=1e-2)


def test_as_many_as_fit(url: str) -> None:
    """-1 leaves no room for the answer, or cuts too much of the prompt."""
    assert post(f"{url}/completions", {"prompt": LONG}).status_code == 400
    for max_tokens, n_new in ((10, 10), (1000, 32), (None, 32)):
        sent = {"max_tokens": max_tokens, "temperature": 0, "truncate_prompt_tokens": -1}
        expected = (128 - n_new, n_new)
        used = complete(url, prompt=LONG, ignore_eos=True, **sent)["usage"]
        assert (used["prompt_tokens"], used["completion_tokens"]) == expected
        chat = {"messages": [{"role": "user", "content": LONG}], "ignore_eos": True, **sent}
        answer = post(f"{url}/chat/completions", chat)
        assert answer.status_code == 200, answer.text
        used = answer.json()["usage"]
        assert (used["prompt_tokens"], used["completion_tokens"]) == expected
    embedded = post(f"{url}/embeddings", {"input": LONG, "truncate_prompt_tokens": -1}).json()
    assert embedded["usage"]["prompt_tokens"] == 128


def test_room_for_virtual_tokens(llama: Llama) -> None:
    """A prompt behind an adapter's virtual tokens is cut to more than there is room for."""
    shared = Llama(llama.model, llama.tokenizer)
    shared.tasks.adapters.add(Adapter("soft", {}, range(768, 773)))
    service = Service(shared, ServerConfig())
    assert n_last(service, -1, "soft", 10) == 128 - 5 - 10
    assert n_last(service, -1, "soft", 0) == 123
    assert n_last(service, -1, None, 10) == 118


def test_a_dialog_s_end_is_kept(url: str, llama: Llama) -> None:
    """A dialog's prompt is cut elsewhere than at its beginning."""
    chat = {"messages": [U], "temperature": 0, "max_tokens": 8}
    body = {**chat, "truncate_prompt_tokens": 9}
    answer = post(f"{url}/chat/completions", body).json()
    prompt = llama.chat.prompt(llama.tokenizer, [U])
    assert len(prompt) > 9 == answer["usage"]["prompt_tokens"]
    [expected] = llama.chat_completion([[U]], 0, max_gen_len=8, max_prompt_tokens=9)
    assert answer["choices"][0]["message"]["content"] == expected["generation"]["content"]
    text = complete(url, prompt=prompt[-9:], temperature=0, max_tokens=8)["choices"][0]["text"]
    assert text.strip() == expected["generation"]["content"].strip()
    with pytest.raises(ValueError, match="max_prompt_tokens is 0: expected 1 or more"):
        ChatOptions(max_prompt_tokens=0)
