"""The ends of answers: what formats name, and what templates write after an answer."""

import json
from typing import Any

import pytest
from json_tokenizers import BEGIN, END, TURN, byte_level

from llama import Tokenizer
from llama.chat.ends import answer_ends
from llama.chat.formats import FORMATS, ChatFormat, choose_chat
from llama.generation import TINY
from llama.tokenizers import load_tokenizer

MARK = "<|done|>"


def of_template(template: str, **config: Any) -> set[str | int]:
    """The ends by their spelling, for a byte-level tokenizer with one more control piece."""
    data = byte_level()
    data["added_tokens"].append({**data["added_tokens"][0], "id": 346, "content": MARK})
    config = {"chat_template": template, "bos_token": BEGIN, "eos_token": END, **config}
    files = {"tokenizer.json": data, "tokenizer_config.json": config}
    packed = {name: json.dumps(value).encode() for name, value in files.items()}
    tokenizer = load_tokenizer(packed)
    spellings = {i: piece for piece, i in tokenizer.control_ids.items()}
    found = answer_ends(choose_chat(None, packed, tokenizer), tokenizer)
    return {spellings[end] if isinstance(end, int) else end for end in found}


LOOP = "{%% for m in messages %%}%s{%% endfor %%}"


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ("{{ m.role + m.content + '<|done|>' }}", {MARK}),
        ("{{ m.content | trim }}\n<|done|>\n<|eot_id|>", {MARK}),
        ("<|done|>{{ m.role }}: {{ m.content }}", {MARK}),  # the next turn begins
        ("{{ m.content }}{{ eos_token }}", {END}),
        ("<|done|>{{ m.role }}{{ m.content }} and more<|eot_id|>", set()),
        ("{{ bos_token }}{{ m.role }}: {{ m.content }}", set()),
        ("{{ m.role }}: {{ m.content }}\n", set()),
        ("{{ m.content | upper }}<|done|>", set()),
        ("{{ raise_exception('no') }}", set()),
        ("{{ m.nothing.at.all }}", set()),
        ("{% broken", set()),
    ],
)
def test_the_control_piece_after_an_answer_ends_it(turn: str, expected: set[str]) -> None:
    """A failure means that an answer runs on after its end, or ends at another piece."""
    assert of_template(LOOP % turn) == expected


def test_a_mark_that_both_begins_and_ends_texts_ends_an_answer() -> None:
    """A failure means that models with one mark for both never stop."""
    template = LOOP % "{{ m.content }}<|done|>"
    assert of_template(template, bos_token=MARK) == set()
    assert of_template(template, bos_token=MARK, eos_token=MARK) == {MARK}


def test_what_formats_name_stays(tiny_tokenizer: Tokenizer) -> None:
    """A failure means that a format's stop strings are forgotten."""
    korani = FORMATS["korani"]
    assert answer_ends(korani, tiny_tokenizer) == set(korani.stop)
    assert answer_ends(FORMATS["inst"], tiny_tokenizer) == {tiny_tokenizer.eos_id}


def test_code_llama_70b_ends_turns_with_its_step(codellama_70b_tokenizer: Tokenizer) -> None:
    ends = answer_ends(FORMATS["turn-based"], codellama_70b_tokenizer)
    assert ends == {codellama_70b_tokenizer.step_id}
    # In whatever format it is asked.
    assert ends < answer_ends(FORMATS["alpaca"], codellama_70b_tokenizer)


def test_a_missing_package_is_told_to_the_caller_of_a_chat_only() -> None:
    """A failure means that Tasks can't be asked for its ends where templates can't be read."""

    def prompt(*_: Any) -> list[int]:
        raise ImportError("jinja2")

    assert answer_ends(ChatFormat(prompt, ("x",)), Tokenizer(TINY / "tokenizer.model")) == {"x"}
    assert TURN not in of_template("")
