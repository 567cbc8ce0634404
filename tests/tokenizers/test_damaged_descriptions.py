"""Files of text that make a library fail are refused by name, and none brings the program down."""

import copy
import json
from typing import Any

import pytest
from json_tokenizers import byte_level

from llama.generation import TINY
from llama.tokenizers import chat_templates, load_tokenizer


def tokenizer(**parts: Any) -> dict[str, bytes]:
    """A checkpoint's files with other parts of a tokenizer.json."""
    return {"tokenizer.json": json.dumps({**copy.deepcopy(byte_level()), **parts}).encode()}


EMPTY_REPLACE = {"type": "Replace", "pattern": {"String": ""}, "content": "xx"}


def test_a_tokenizer_that_panics_is_refused() -> None:
    """A failure means that a file ends a server with an error that no Exception catches."""
    found = load_tokenizer(tokenizer(normalizer=EMPTY_REPLACE))
    with pytest.raises(ValueError, match=r"tokenizer\.json can't encode a text: ") as error:
        found.encode("Once upon a", bos=False, eos=False)
    assert str(error.value).isprintable()


def test_an_interrupt_is_not_taken_for_a_panic(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure means that Ctrl-C while a text is encoded is swallowed."""
    found = load_tokenizer(tokenizer())

    class Interrupted:
        def encode(self, *_: object, **__: object) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(found, "_whole", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        found.encode("Once", bos=False, eos=False)


def test_a_post_processor_may_give_nothing() -> None:
    """A failure means that a post-processor without pieces is an error of a list's index."""
    nothing = {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}
    assert not load_tokenizer(tokenizer(post_processor=nothing)).add_bos


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/x.jinja"])
def test_a_template_that_is_not_utf_8_is_named(name: str) -> None:
    """A failure means that nobody learns which file has the strange byte."""
    with pytest.raises(ValueError, match=rf"{name} is not UTF-8: "):
        chat_templates({"chat_template.jinja": b"{{ x }}", name: b"\xff"})


def test_a_gap_before_an_added_piece_is_named() -> None:
    """A failure means that a piece silently has another id than in training."""
    spec = {"content": "<far>", "special": True}
    config = json.dumps({"added_tokens_decoder": {"400": spec}}).encode()
    with pytest.raises(ValueError, match="the piece <far> has the id 400, but 346 in tokenizer"):
        load_tokenizer({**tokenizer(), "tokenizer_config.json": config})


def test_an_id_of_thousands_of_digits_is_none() -> None:
    """A failure means that an error is Python's own, and names no file."""
    config = json.dumps({"added_tokens_decoder": {"9" * 5000: {"content": "<far>"}}}).encode()
    model = (TINY / "tokenizer.model").read_bytes()
    assert load_tokenizer({"tokenizer.model": model, "tokenizer_config.json": config}).n_words


def test_a_piece_that_is_no_text_is_refused() -> None:
    """A failure means that half of a surrogate pair in a JSON file is an error of protobuf."""
    model = (TINY / "tokenizer.model").read_bytes()
    files = {"tokenizer.model": model, "added_tokens.json": b'{"\\ud800": 768}'}
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        load_tokenizer(files)
