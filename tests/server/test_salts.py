"""Bytes of partial characters in log-probabilities, and the prompts that a request may reuse."""

from typing import Any

import pytest
import torch
from engine_client import Client
from json_tokenizers import byte_level, like_llama2
from servers import post, serve

from llama import Llama, SamplingParams, Tokenizer
from llama.engine.sequence import Sequence
from llama.generation import TINY
from llama.server import workers
from llama.server.scores import token_bytes
from llama.tokenizer import BaseTokenizer
from llama.tokenizers.json_tokenizer import JsonTokenizer

PROMPT = "Once upon a time there was a little duck. It went to the river and saw a cow. " * 2


def json_tokenizer(data: dict[str, Any]) -> JsonTokenizer:
    return JsonTokenizer(data, "tokenizer.json", lambda text: False, lambda text: False)


@pytest.mark.parametrize("kind", ["tiny", "bytes", "first"])
def test_the_bytes_of_tokens_join_to_the_text(kind: str) -> None:
    """A failure means that a client can't put characters of several tokens together."""
    tokenizer: BaseTokenizer = Tokenizer(TINY / "tokenizer.model")
    if kind != "tiny":
        tokenizer = json_tokenizer(byte_level() if kind == "bytes" else like_llama2(kind))
    text = "a 😀🇩🇪 \ufffd é 漢字"
    ids = tokenizer.encode_infilling(text)
    parts = [token_bytes(tokenizer, i) for i in ids]
    assert None not in parts
    assert b"".join(bytes(part or []) for part in parts) == text.encode()
    assert any("\ufffd" in bytes(part or []).decode(errors="replace") for part in parts)


def test_bytes_that_no_one_knows() -> None:
    """A failure means that an unusual tokenizer ends an answer with an error."""

    class Other(BaseTokenizer):
        n_words, control_ids, stop_ids = 1, {}, frozenset()
        bos_id = eos_id = pad_id = -1

        def token_piece(self, t: int) -> str:
            return "?"

        def _to_text(self, ids: list[int], continued: bool) -> str:
            return "\ufffd" * len(ids)

    assert token_bytes(Other(), 0) is None


@pytest.fixture
def llama() -> Llama:
    return Llama.build(dtype=torch.float32, device="cpu", max_seq_len=256, max_batch_size=4)


def test_prompts_of_another_salt_are_read_again(llama: Llama) -> None:
    """A failure means that tenants learn from the time to the first token, or from the count of
    cached tokens, what others have asked."""
    client = Client(llama)

    def n_reused(salt: str | None, prompt: str = PROMPT) -> int:
        sequence = client.submit(prompt, temperature=0, max_gen_len=3, cache_salt=salt)
        client.run()
        return sequence.n_reused

    n = len(llama.tokenizer.encode(PROMPT, bos=True, eos=False))
    salts: list[str | None] = [None, "a", "b", "\ud800"]
    assert [n_reused(salt) for salt in salts] == [0] * 4
    assert [n_reused(salt) for salt in salts] == [n - 1] * 4
    assert n_reused("") == n - 1, "as without one"
    assert n_reused("c", "Once") == 0, "not even the first token"


def test_a_salted_prompt_waits_for_no_other(llama: Llama) -> None:
    """A failure means that the time of a prompt tells that another tenant sends the same now."""
    client = Client(llama)
    salts = ["a", "b", None, "a"]
    sequences = [client.submit(PROMPT, temperature=0, cache_salt=salt) for salt in salts]
    client.step()
    assert [sequence.slot is not None for sequence in sequences] == [True, True, True, False]
    client.run()
    assert len({client.texts[sequence] for sequence in sequences}) == 1
    assert sequences[3].n_reused > 0 == sequences[1].n_reused


def test_other_ranks_keep_them_apart_too(llama: Llama) -> None:
    """A failure means that ranks disagree about what the cache holds, and compute different
    passes."""
    sequence = Sequence([1, 2], SamplingParams(cache_salt="a"))
    restored = workers._restore(workers._describe(sequence), llama.engine)
    assert restored.salt == sequence.salt != 0
    assert restored.keyed([1, 2]) == sequence.keyed([1, 2]) != [1, 2]


def test_the_field(llama: Llama) -> None:
    """Each way to ask for text has it."""
    message = {"role": "user", "content": PROMPT}
    with serve(llama) as (url, _):

        def n_cached(path: str, **body: Any) -> int:
            answer = post(f"{url}/v1/{path}", body)
            assert answer.status_code == 200, answer.text
            usage = answer.json()["usage"]
            details = usage.get("prompt_tokens_details") or usage["input_tokens_details"]
            return details["cached_tokens"]

        for path, body in (
            ("completions", {"prompt": PROMPT, "max_tokens": 1}),
            ("chat/completions", {"messages": [message], "max_tokens": 1}),
            ("responses", {"input": PROMPT, "max_output_tokens": 1}),
            ("fim/completions", {"prompt": PROMPT, "suffix": "", "max_tokens": 1}),
        ):
            n_cached(path, **body)
            assert n_cached(path, **body) > 30
            assert n_cached(path, **body, cache_salt=path) == 0
            assert n_cached(path, **body, cache_salt=path) > 30
            assert n_cached(path, **body, cache_salt=None) > 30
        long = post(f"{url}/v1/completions", {"prompt": "a", "cache_salt": "a" * 1001})
        assert long.status_code == 400 and "cache_salt" in long.text
