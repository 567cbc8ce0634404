"""A sequence's grammar: exactly the right tokens are allowed, at every place of the text."""

import itertools
import logging
import random
import re

import pytest
import torch
from conftest import data_tokenizer
from json_tokenizers import byte_level, like_llama2

from llama import Llama, Tokenizer
from llama.generation import TINY
from llama.structure import compile_format
from llama.structure.grammar import TokenGrammar
from llama.structure.vocabulary import Vocabulary, unpack
from llama.structure.worker import compile_grammar
from llama.tokenizer import BaseTokenizer
from llama.tokenizers.control import with_marks
from llama.tokenizers.json_tokenizer import JsonTokenizer

CHOICES = ["the cat", "the dog", " the", "  a", "é1", "", "日本", '{"a":1}']


def tokenizer_of(kind: str) -> BaseTokenizer:
    if kind == "tiny":
        return Tokenizer(TINY / "tokenizer.model")
    if kind == "llama2":
        return data_tokenizer(kind)
    data = byte_level() if kind == "bytes" else like_llama2(kind)
    return JsonTokenizer(data, "tokenizer.json", lambda text: False, lambda text: False)


def allowed(grammar: TokenGrammar, n_words: int) -> set[int]:
    (mask,) = grammar.masks([])
    return set(unpack(mask)[:n_words].nonzero()[:, 0].tolist())


def as_bytes(text: str) -> bytes:
    """The bytes of a decoded text, up to a character that isn't whole."""
    return text.partition("\ufffd")[0].encode()


@pytest.mark.parametrize("in_context", [False, True])
@pytest.mark.parametrize("kind", ["tiny", "llama2", "bytes", "first", "never"])
def test_a_token_is_allowed_if_the_text_as_decoded_goes_on_to_a_choice(
    kind: str, in_context: bool
) -> None:
    """A failure means that right answers are forbidden, or wrong ones allowed."""
    tokenizer = tokenizer_of(kind)
    end = max(tokenizer.control_ids.values())
    decode = tokenizer.decode_infilling if in_context else tokenizer.decode
    form = {"type": "choice", "choice": CHOICES}
    compiled = compile_format(form, tokenizer, [end], in_context)
    assert compiled is not None
    ids = range(tokenizer.n_words)
    silent = {end, *tokenizer.control_ids.values(), 0}
    for seed in range(5):
        rng, grammar, taken = random.Random(seed), compiled.copy(), []
        while not grammar.is_finished:
            found = allowed(grammar, tokenizer.n_words)
            text = decode(taken)
            assert (end in found) == (text in CHOICES), taken
            for token in ids if kind != "llama2" else rng.sample(ids, 500):
                if token not in silent and "\ufffd" not in decode([*taken, token]):
                    goes_on = any(c.startswith(decode([*taken, token])) for c in CHOICES)
                    assert (token in found) == goes_on, (taken, token)
            assert not found & (silent - {end})
            taken.append(rng.choice(sorted(found)))
            grammar.push(taken[-1])
        assert decode([i for i in taken if i != end]) in CHOICES


def test_a_draft_is_masked_as_its_tokens_one_by_one(tiny_tokenizer: Tokenizer) -> None:
    """A failure means that drafts change answers."""
    form = {"type": "json_schema", "schema": {"type": "object", "required": ["cat"]}}
    grammar = compile_format(form, tiny_tokenizer, [2], in_context=False)
    assert grammar is not None
    draft = tiny_tokenizer.encode('{"cat":[1, the', False, False)
    rest = draft
    while rest:
        n_accepted = grammar.accepted(rest)
        assert tiny_tokenizer.decode(draft)[:8] == '{"cat":['
        rows, alone = grammar.masks(rest), grammar.copy()
        assert rows.shape == (1 + len(rest), -(-tiny_tokenizer.n_words // 32))
        assert rows.dtype == torch.int32
        for row, token in itertools.zip_longest(rows[: n_accepted + 1], rest[:n_accepted]):
            assert torch.equal(alone.masks([])[0], row)
            if token is not None:
                alone.push(token)
        # Whatever stands behind a wrong token, the rows there are never used: they aren't empty.
        assert all(row.any() for row in rows)
        if not n_accepted:
            break
        grammar.push(rest[0])
        rest = rest[1:]
    assert grammar.error is None
    assert rest, "the draft's end is no JSON"


def test_drafts_end_at_an_end(tiny_tokenizer: Tokenizer) -> None:
    grammar = compile_format({"type": "regex", "regex": "[0-9]+"}, tiny_tokenizer, [2], True)
    assert grammar is not None
    digits = tiny_tokenizer.encode_infilling("1234")
    assert grammar.accepted([*digits, 2, *digits]) == len(digits)
    assert grammar.accepted([1]) == grammar.accepted([0]) == 0  # control pieces
    assert grammar.accepted([]) == 0
    grammar.push(2)
    assert grammar.is_finished
    assert grammar.accepted(digits) == 0


def test_copies_are_apart(tiny_tokenizer: Tokenizer) -> None:
    compiled = compile_format({"type": "choice", "choice": ["ab", "b"]}, tiny_tokenizer, [2], True)
    assert compiled is not None
    first, second = compiled.copy(), compiled.copy()
    a, b = (tiny_tokenizer.encode_infilling(c)[0] for c in "ab")
    first.push(b)
    assert first.is_finished and not second.is_finished and not compiled.is_finished
    second.push(a)
    second.push(b)
    assert second.is_finished and second.error is None


def test_all_stops_are_allowed_where_the_text_may_end_and_nowhere_else(
    tiny_tokenizer: Tokenizer,
) -> None:
    """A failure means that a stop token of the caller's, which may be a word, cuts an answer."""
    comma = tiny_tokenizer.encode_infilling(",")[-1]
    form = {"type": "regex", "regex": "1(,2)?"}
    grammar = compile_format(form, tiny_tokenizer, [2, 1, comma], in_context=True)
    assert grammar is not None
    one = tiny_tokenizer.encode_infilling("1")[-1]
    assert allowed(grammar, tiny_tokenizer.n_words).isdisjoint([1, 2, comma])
    grammar.push(one)
    assert allowed(grammar, tiny_tokenizer.n_words) >= {1, 2, comma}


def test_without_a_stop_nothing_is_forbidden_at_the_end(tiny_tokenizer: Tokenizer) -> None:
    grammar = compile_format({"type": "choice", "choice": ["1"]}, tiny_tokenizer, [], True)
    assert grammar is not None
    grammar.push(tiny_tokenizer.encode_infilling("1")[-1])
    assert grammar.is_finished
    assert len(allowed(grammar, tiny_tokenizer.n_words)) == tiny_tokenizer.n_words


def test_without_a_stop_a_text_that_may_end_goes_on(tiny: Llama) -> None:
    """A failure means that an answer with ``ignore_eos`` leaves its form."""
    form = {"type": "regex", "regex": "[a-z]+"}
    how = {"temperature": 1.5, "seed": 1, "max_gen_len": 20}
    (answer,) = tiny.text_completion(["Tom"], ignore_eos=True, response_format=form, **how)
    assert answer["finish_reason"] == "length"
    assert re.fullmatch("[a-z]{20,}", answer["generation"])


def test_a_token_that_isnt_allowed_ends_the_answer(
    tiny_tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """A failure means that one bad sequence stops the engine, or goes on without its grammar."""
    grammar = compile_format({"type": "json_object"}, tiny_tokenizer, [2], in_context=False)
    assert grammar is not None
    with caplog.at_level(logging.WARNING):
        grammar.push(tiny_tokenizer.encode("x", False, False)[0])
    assert grammar.error and "x" in grammar.error
    assert "given up" in caplog.text
    assert grammar.is_finished
    assert allowed(grammar, tiny_tokenizer.n_words) == {2}
    assert grammar.accepted([5]) == 0
    grammar.push(5)  # still no exception
    assert grammar.copy().error == grammar.error


def test_what_the_vocabulary_cant_spell_ends_the_answer() -> None:
    for pieces, stops in ([b"a", b"", b"c"], {1}), ([b"a", b"", b"b"], {1, 2}):
        vocabulary = Vocabulary(pieces, ())
        matcher = compile_grammar(vocabulary.tokenizer, 'start: "ab"')
        grammar = TokenGrammar(matcher, vocabulary, stops, is_opening=False)
        grammar.push(0)
        assert allowed(grammar, 3) == stops
        assert grammar.error


def test_limits_per_token_end_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure means that a grammar can hold up all sequences for as long as it likes."""
    from llama.structure import worker

    vocabulary = Vocabulary([bytes([i]) for i in range(256)], ())
    monkeypatch.setitem(worker._LIMITS, "step_max_items", 3)
    matcher = compile_grammar(vocabulary.tokenizer, 'start: a\na: "x" | "(" a ")" | a "+" a')
    grammar = TokenGrammar(matcher, vocabulary, [0], is_opening=False)
    grammar.push(ord("x"))
    assert allowed(grammar, 256) == {0}
    assert grammar.error


@pytest.mark.parametrize("spaced", [True, False])
def test_marks_are_text_and_what_follows_them_opens_again(
    tiny_tokenizer: Tokenizer, spaced: bool
) -> None:
    """A failure means that calls of tools are held to another text than the parser reads."""
    tokenizer = Tokenizer(TINY / "tokenizer.model")
    tokenizer.spaced = spaced
    marks = {3: "<call>", 4: "</call>"}
    form = {"type": "choice", "choice": ["<call>go</call> on", "stay"]}
    compiled = compile_format(form, tokenizer, [2], False, marks)
    assert compiled is not None
    decode = with_marks(tokenizer.decode, tokenizer, marks)
    for seed in range(12):
        grammar, taken, rng = compiled.copy(), [], random.Random(seed)
        while not grammar.is_finished:
            found = allowed(grammar, tokenizer.n_words)
            token = rng.choice(sorted(found & {3, 4} or found))
            taken.append(token)
            grammar.push(token)
        assert grammar.error is None
        assert decode([i for i in taken if i != 2]) in form["choice"], taken
    assert 3 in allowed(compiled, tokenizer.n_words)
