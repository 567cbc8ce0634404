"""Infilling as editors ask for it: llama.cpp's /infill, and Mistral's form."""

import itertools
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from servers import idle, post, serve

from llama import Llama
from llama.chat.prompts import infilling_prompt_tokens
from llama.guards import Verdict
from llama.server.answers import Piece
from llama.server.infill import GrowingInfill, fitting_prompt
from llama.server.schemas_infill import InfillRequest
from llama.server.service import Service

PREFIX, SUFFIX = "def add(a, b):\n    return ", "\n"
MIDDLE = "a + b"
GREEDY = {"temperature": 0}
# As llama.vim sends it.
EDITOR = {
    "id_slot": 0,
    "input_prefix": "def add(a, b):\n",
    "input_suffix": SUFFIX,
    "input_extra": [{"filename": "b.py", "text": "x = 1\n", "time": [1, 2]}],
    "prompt": "    return ",
    "n_predict": 128,
    "stop": [],
    "n_indent": 4,
    "top_k": 40,
    "top_p": 0.9,
    "stream": False,
    "samplers": ["top_k", "top_p", "infill"],
    "cache_prompt": True,
    "t_max_prompt_ms": 500,
    "t_max_predict_ms": 1000,
    "response_fields": ["content", "timings/prompt_n", "timings/predicted_ms", "truncated", "no"],
    "model": "",
}


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Service]]:
    llama = Llama.build(dtype=torch.float32, device="cpu", max_seq_len=256, max_batch_size=4)
    with serve(llama) as found:
        yield found


@pytest.fixture(scope="module")
def url(served: tuple[str, Service]) -> str:
    return served[0]


def ask(url: str, **body: Any) -> Any:
    answer = post(f"{url}/infill", {**GREEDY, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_middle_is_the_librarys(url: str, tiny: Llama) -> None:
    """A failure means that another prompt is filled in than the one of ``text_infilling``."""
    expected = tiny.text_infilling([PREFIX], [SUFFIX], 0)[0]["generation"]
    assert expected == MIDDLE
    ids = infilling_prompt_tokens(tiny.tokenizer, PREFIX, SUFFIX)
    for body in (
        {"input_prefix": PREFIX},
        {"input_prefix": PREFIX[:15], "prompt": PREFIX[15:]},
        {"prompt": PREFIX, "n_predict": -1, "seed": -1, "repeat_penalty": 1.0},
    ):
        found = ask(url, input_suffix=SUFFIX, **body)
        assert found["content"] == expected and found["model"] == "tiny"
        assert found["stop"] is True and found["stop_type"] == "eos"
        assert found["tokens_evaluated"] == len(ids) and found["truncated"] is False
        assert found["tokens_predicted"] > 1 and found["tokens"] == []
        assert found["timings"]["prompt_n"] == len(ids) - found["tokens_cached"]
        assert found["timings"]["predicted_n"] == found["tokens_predicted"]


def test_an_editors_request_is_answered(url: str) -> None:
    """A failure means that plugins made for llama.cpp find no server here."""
    found = ask(url, **EDITOR)
    assert found.keys() == {"content", "timings/prompt_n", "timings/predicted_ms", "truncated"}
    assert found["content"].strip() and found["timings/predicted_ms"] >= 0
    warm = ask(url, **{**EDITOR, "n_predict": 0, "response_fields": [""]})
    assert warm == {}
    # As a client sends all that llama.cpp has, at its defaults.
    defaults = {
        **{"mirostat": 0, "mirostat_tau": 5.0, "mirostat_eta": 0.1, "typical_p": 1.0},
        **{"xtc_probability": 0.0, "xtc_threshold": 0.1, "top_n_sigma": -1.0, "min_keep": 0},
        **{"dynatemp_range": 0.0, "dynatemp_exponent": 1.0, "n_probs": 0, "n_discard": 0},
        **{"dry_multiplier": 0.0, "dry_base": 1.75, "dry_allowed_length": 2, "lora": []},
        **{"dry_penalty_last_n": -1, "dry_sequence_breakers": ["\n"], "repeat_last_n": 64},
        **{"grammar": "", "return_progress": False, "post_sampling_probs": False},
        **{"json_schema": {}},
    }
    assert ask(url, **EDITOR, **defaults)["content"] == found["content"]
    for name, value in (("mirostat", 2), ("typical_p", 0.5), ("repeat_last_n", 8), ("lora", [1])):
        wrong = post(f"{url}/infill", {**EDITOR, name: value}).json()["error"]
        assert wrong["message"].startswith(f"{name}: this server doesn't support {value}")
    assert ask(url, input_prefix=PREFIX, max_tokens=2)["tokens_predicted"] == 2
    both = post(f"{url}/infill", {"input_prefix": PREFIX, "max_tokens": 2, "n_predict": 3})
    assert both.status_code == 400 and "give one" in both.text


def test_how_a_middle_ends_is_told(url: str) -> None:
    """A failure means that an editor takes half a middle for a whole one."""
    sides = {"input_prefix": PREFIX, "input_suffix": SUFFIX, "return_tokens": True}
    short = ask(url, **sides, n_predict=2)
    assert short["stop_type"] == "limit" and short["tokens_predicted"] == 2
    assert len(short["tokens"]) == 2
    word = ask(url, **sides, stop=["+"])
    assert (word["stop_type"], word["stopping_word"]) == ("word", "+")
    assert word["content"] == "a "


def test_a_stream_ends_with_the_figures(url: str) -> None:
    """A failure means that clients of llama.cpp's streams wait for an end, or lose text."""
    body = {**GREEDY, "input_prefix": PREFIX, "input_suffix": SUFFIX, "stream": True}
    events = post(f"{url}/infill", body).text.split("\n\n")
    lines = [event for event in events if event and not event.startswith(":")]
    parts = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert "".join(part["content"] for part in parts) == MIDDLE and len(parts) > 2
    assert [part["stop"] for part in parts] == [False] * (len(parts) - 1) + [True]
    assert sum(len(part["tokens"]) for part in parts[:-1]) == parts[-1]["tokens_predicted"]
    assert parts[-1]["content"] == "" and parts[-1]["stop_type"] == "eos"
    only = {**body, "response_fields": ["tokens_predicted"]}
    last = post(f"{url}/infill", only).text.strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: ")) == {
        "tokens_predicted": parts[-1]["tokens_predicted"]
    }


@pytest.mark.parametrize("sides", ["prefix", "suffix", "both", "extra", "none"])
def test_texts_are_cut_around_the_middle(sides: str, tiny: Llama) -> None:
    """A failure means that in a large file the text next to the cursor is what gets lost."""
    tokenizer = tiny.tokenizer
    long = dict.fromkeys(("prefix", "suffix", "extra"), " the cat and the dog" * 60)
    chosen = ("prefix", "suffix") if sides == "both" else (sides,)
    texts = {name: long[name] if name in chosen else "the cow" for name in long}
    body = InfillRequest(
        input_prefix=texts["prefix"],
        input_suffix=texts["suffix"],
        input_extra=[{"text": texts["extra"]}],
    )
    ids, is_cut = fitting_prompt(tokenizer, body, 100)
    assert is_cut == (sides != "none") and len(ids) == (100 if is_cut else len(ids)) <= 100
    at = [ids.index(i) for i in (tokenizer.prefix_id, tokenizer.suffix_id, tokenizer.middle_id)]
    assert ids[0] == 1 and at[-1] == len(ids) - 1
    prefix = tokenizer.encode(texts["prefix"], bos=False, eos=False)
    suffix = tokenizer.encode_infilling(texts["suffix"])
    kept_prefix, kept_suffix = ids[at[0] + 1 : at[1]], ids[at[1] + 1 : -1]
    assert prefix[len(prefix) - len(kept_prefix) :] == kept_prefix
    assert suffix[: len(kept_suffix)] == kept_suffix
    if sides == "both":
        assert (len(kept_prefix), len(kept_suffix)) == (72, 24)
    else:
        assert sides == "prefix" or kept_prefix == prefix
        assert sides == "suffix" or kept_suffix == suffix
    extra = tokenizer.decode(ids[1 : at[0]])
    assert extra.endswith("and the dog") if sides == "extra" else sides != "none" or "cow" in extra
    assert len(fitting_prompt(tokenizer, body, 0)[0]) == 4


def test_a_file_larger_than_the_context_is_filled_in(url: str) -> None:
    """A failure means an error in the middle of a large file."""
    found = ask(url, input_prefix="x = 1\n" * 300 + PREFIX, input_suffix=SUFFIX * 300, n_predict=16)
    assert found["truncated"] is True and found["tokens_evaluated"] == 256 - 16
    assert found["tokens_predicted"] <= 16
    assert ask(url, input_prefix="x = 1\n" * 300)["tokens_evaluated"] == 256 - 128
    assert ask(url, input_prefix="x = 1\n" * 300, n_predict=999)["tokens_evaluated"] == 128


class _Job:
    def __init__(self) -> None:
        from llama.engine.sequence import Sequence

        self.sequence = Sequence([1, 2], tokens=[3, 4, 5])


@pytest.mark.parametrize(
    ("text", "n_indent", "expected"),
    [
        ("a\n    b\n  c\n", 4, "a\n    b"),
        ("a\n    b\n\n    c", 4, "a\n    b\n\n    c"),
        ("a\n  ", 4, "a\n  "),
        ("a\n\tb", 1, "a\n\tb"),
        ("a\nb", 0, "a\nb"),
    ],
)
def test_a_line_that_is_indented_less_ends_a_middle(
    text: str, n_indent: int, expected: str
) -> None:
    """A failure means that a middle goes on after its block, or ends within it."""
    growing = GrowingInfill(InfillRequest(n_indent=n_indent), "tiny", _Job(), 0.0, False)  # type: ignore[arg-type]
    growing.push(Piece(0, text, 1, None))
    assert growing.is_enough == (text != expected) and growing.text == expected


def test_time_ends_a_middle_after_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure means that an editor waits longer than it said it would."""
    clock = iter([9.0, 9.4, 9.6])
    monkeypatch.setattr("llama.server.infill.time", SimpleNamespace(monotonic=clock.__next__))
    growing = GrowingInfill(InfillRequest(t_max_predict_ms=500), "tiny", _Job(), 0.0, False)  # type: ignore[arg-type]
    for text, is_enough in (("a", False), ("\n", False), ("", True)):
        growing.push(Piece(0, text, 1, None))
        assert growing.is_enough == is_enough
    answer = growing.end(growing.text).model_dump()
    assert answer["stop_type"] == "limit" and answer["content"] == "a\n"
    assert answer["timings"]["prompt_ms"] == 9000
    assert answer["timings"]["predicted_ms"] == pytest.approx(600)


@pytest.mark.parametrize(
    ("pieces", "n_indent", "sent"),
    [
        # A newline and blanks are kept back until the line's first word says how it is indented.
        (["a\n", "    b", "\n  ", "c\n"], 4, ["a", "\n    b"]),
        (["a\n", "  ", "  ", "b"], 4, ["a", "\n    ", "b"]),
        (["a\n\n", "\n", "    c"], 4, ["a\n", "\n", "\n    c"]),
        (["a\n", "b"], 0, ["a\n", "b"]),
    ],
)
def test_streams_send_no_line_that_is_cut(
    pieces: list[str], n_indent: int, sent: list[str]
) -> None:
    """A failure means that an editor shows text and takes it back, or waits without need."""
    growing = GrowingInfill(InfillRequest(n_indent=n_indent), "tiny", _Job(), 0.0, False)  # type: ignore[arg-type]
    found = [
        part for n, text in enumerate(pieces) for part in growing.push(Piece(0, text, n, None))
    ]
    assert [part.content for part in found] == sent
    assert "".join(sent) == growing.text
    blank = GrowingInfill(InfillRequest(n_indent=2), "tiny", _Job(), 0.0, False)  # type: ignore[arg-type]
    ends = (Piece(0, "a\n", 1, None), Piece(0, "", 2, "stop"))
    assert [part.content for end in ends for part in blank.push(end)] == ["a", "\n"]
    assert not blank.is_enough
    refused = Piece(0, "\n\nno", 2, "content_filter")
    assert [part.content for part in blank.push(refused)] == ["\n\nno"]


def test_a_middle_that_is_long_enough_frees_its_row(
    served: tuple[str, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure means that the model goes on where nobody listens, in a stream or without one."""
    from processes import wait_until

    url, service = served
    clock = SimpleNamespace(monotonic=itertools.count().__next__)  # a second between two looks
    monkeypatch.setattr("llama.server.infill.time", clock)
    body: dict[str, Any] = {"input_prefix": "def f():\n", "ignore_eos": True, "n_predict": 200}
    body["t_max_predict_ms"] = 500
    found = ask(url, **body)
    assert found["stop_type"] == "limit" and found["tokens_predicted"] < 120
    wait_until(lambda: idle(service))
    text = post(f"{url}/infill", {**GREEDY, **body, "stream": True}).text
    parts = [json.loads(e[6:]) for e in text.split("\n\n") if e.startswith("data: ")]
    assert "".join(part["content"] for part in parts) == found["content"]
    assert parts[-1]["stop_type"] == "limit" and parts[-1]["tokens_predicted"] < 120
    wait_until(lambda: idle(service))


def test_mistrals_form(url: str, tiny: Llama) -> None:
    """A failure means that clients of Mistral's API get no middle, or in another form."""
    body = {**GREEDY, "prompt": PREFIX, "suffix": SUFFIX, "random_seed": 1, "min_tokens": 1}

    def fill_in(**more: Any) -> Any:
        answer = post(f"{url}/v1/fim/completions", {**body, **more})
        assert answer.status_code == 200, answer.text
        return answer

    whole = fill_in(model="tiny", max_tokens=30, stop=["\n\n"]).json()
    assert whole["object"] == "chat.completion" and whole["model"] == "tiny"
    [choice] = whole["choices"]
    assert choice["message"] == {"role": "assistant", "content": MIDDLE, "refusal": None}
    assert choice["finish_reason"] == "stop"
    ids = infilling_prompt_tokens(tiny.tokenizer, PREFIX, SUFFIX)
    assert whole["usage"]["prompt_tokens"] == len(ids)
    events = fill_in(stream=True, stream_options={"include_usage": True}).text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(e[6:]) for e in events if e.startswith("data: {")]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    assert "".join(delta["content"] for delta in deltas) == MIDDLE
    assert [delta.get("role") for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert chunks[-1]["usage"] == whole["usage"] | {
        "prompt_tokens_details": chunks[-1]["usage"]["prompt_tokens_details"]
    }
    alone = fill_in(prompt="Once upon a time", suffix=None, max_tokens=8).json()
    expected = tiny.text_completion(["Once upon a time"], 0, max_gen_len=8, echo=True)
    assert (
        "Once upon a time" + alone["choices"][0]["message"]["content"]
        == (expected[0]["generation"])
    )
    different = {"temperature": 3, "suffix": None, "prompt": "Once", "max_tokens": 12}
    drawn = [fill_in(**different, random_seed=s).json() for s in (1, 1, 2)]
    first, again, other = (each["choices"][0]["message"]["content"] for each in drawn)
    assert first == again != other


def test_a_model_that_cannot_infill_says_so(
    served: tuple[str, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure means a 500, or a middle from a model that never learned to fill in."""
    url, service = served
    monkeypatch.setitem(service.llama.tokenizer.__dict__, "prefix_id", None)
    for path, body in (
        ("/infill", {"input_prefix": "a"}),
        ("/v1/fim/completions", {"prompt": "a"}),
    ):
        answer = post(f"{url}{path}", {**body, "suffix": "b"} if "prompt" in body else body)
        assert answer.status_code == 400
        assert "no infilling pieces" in answer.json()["error"]["message"]


def test_guards_read_both() -> None:
    """A failure means that a guarded server can be asked by another path."""
    llama = Llama.build(dtype=torch.float32, device="cpu", max_seq_len=256, max_batch_size=2)
    llama.input_guard = lambda dialog: Verdict("secret" not in dialog[-1]["content"], ("words",))
    with serve(llama) as (url, _):
        refused = ask(url, input_prefix="secret", input_suffix="")
        assert "words" in refused["content"] and refused["tokens_predicted"] == 0
        body = {"prompt": "secret", "suffix": ""}
        found = post(f"{url}/v1/fim/completions", body).json()["choices"][0]
        assert found["finish_reason"] == "content_filter"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input_extra": "a"}, "input_extra"),
        ({"input_extra": [{"name": "a"}]}, "input_extra.0"),
        ({"input_extra": [{"text": ""}] * 2000}, "input_extra"),
        ({"n_predict": -2}, "n_predict"),
        ({"input_prefix": 3}, "input_prefix"),
        ({"response_fields": [1]}, "response_fields.0"),
    ],
)
def test_wrong_fields_are_named(body: dict[str, Any], param: str, url: str) -> None:
    """A failure means an answer that doesn't help."""
    answer: httpx.Response = post(f"{url}/infill", body)
    assert answer.status_code == 400 and answer.json()["error"]["param"].startswith(param)
