"""Errors that code reacts to, and what they quote: one short line, whatever was found."""

import json
import sys

import pytest

from llama.errors import (
    LARGEST,
    NotFinite,
    PromptTooLong,
    checked_list,
    listed,
    need,
    printable,
    short,
)


def test_too_long_a_prompt_says_how_long_it_may_be() -> None:
    """A failure means that the server can't tell a client what fits."""
    error = PromptTooLong(3, 600, 512)
    assert isinstance(error, ValueError)
    assert (error.n_tokens, error.max_seq_len) == (600, 512)
    assert str(error).startswith("prompt 3 has 600 tokens, more than max_seq_len=512: shorten it")


def test_logits_that_are_not_finite_suggest_a_remedy() -> None:
    """A failure means that code which catches RuntimeError misses it, or that no remedy is told."""
    assert isinstance(NotFinite(), RuntimeError)
    assert "dtype=torch.float32" in str(NotFinite())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        ("a\n", r"'a\n'"),
        (LARGEST, str(LARGEST)),
        (-LARGEST - 1, "larger than any model's"),
        (10**5000, "larger than any model's"),  # whose repr Python refuses
        ([0] * 1000, "[" + "0, " * 13 + "..."),
    ],
    ids=["small", "text", "largest", "negative", "huge", "long"],
)
def test_short_quotes_any_value(value: object, text: str) -> None:
    """A failure means an error of megabytes, or another error on the way to it."""
    assert short(value) == text


def test_printable_is_one_line_without_control_characters() -> None:
    """A failure means that a file can write to the terminal through an error."""
    assert printable("a\n\x1b[31mé") == "a??[31mé"
    assert printable("x" * 80) == "x" * 80
    assert printable("x" * 81) == "x" * 80 + "..."
    assert printable("abcdef", 3) == "abc..."


def test_listed_names_the_first_and_counts_the_rest() -> None:
    """A failure means that an error lists every tensor of a checkpoint."""
    assert listed([]) == ""
    assert listed(list("abcde")) == "a, b, c, d, e"
    assert listed(list("abcdefg")) == "a, b, c, d, e and 2 more"
    assert listed(["a", "b"], 1) == "a and 1 more"


def test_checked_list_returns_what_it_got() -> None:
    """A failure means that a generator is used up before it is read."""
    for values in ([], (1,), iter([2]), range(3)):
        assert checked_list(values, "texts") is values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("ab", "texts is one str: give a list of them"),
        (b"ab", "texts is one bytes: give a list of them"),
        ({"role": "user"}, "texts is one dict: give a list of them"),
        (None, "texts is None: give a list"),
    ],
)
def test_one_thing_is_no_list(values: object, message: str) -> None:
    """A failure means that a text is taken for a list of letters."""
    with pytest.raises(TypeError, match=f"^{message}$"):
        checked_list(values, "texts")


@pytest.mark.parametrize(
    ("module", "package"),
    [("jinja2", "jinja2"), ("google.protobuf", "protobuf"), ("safetensors.torch", "safetensors")],
)
def test_a_missing_package_is_named_as_the_index_names_it(
    module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure means an advice that installs nothing, or something else."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"package {package}: pip install 'llama\[formats\]'"):
        need(module)


def test_need_returns_the_module() -> None:
    """A failure means that a package that is there isn't found."""
    assert need("json") is json
