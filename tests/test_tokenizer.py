"""Text to ids and back: nothing lost, no control id out of plain text."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama import Tokenizer
from llama.generation import TINY

# U+2581 is how SentencePiece writes a space, so it can't survive; surrogates are no characters.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁\0"))
CONTROL_WORDS = ["<PRE>", "<SUF>", "<MID>", "<EOT>", "<step>", "<s>", "</s>", "<unk>"]
FORGED = st.lists(
    st.sampled_from([*CONTROL_WORDS, *(f" {w}" for w in CONTROL_WORDS), "a", " ", "<"])
)


def control_ids(tokenizer: Tokenizer) -> set[int | None]:
    t = tokenizer
    infilling = {t.prefix_id, t.middle_id, t.suffix_id, t.eot_id}
    return {t.bos_id, t.eos_id, 0, t.step_id, *infilling} - {None}


def test_llama2_has_no_infilling_and_no_turns(llama2_tokenizer: Tokenizer) -> None:
    t = llama2_tokenizer
    assert (t.n_words, t.bos_id, t.eos_id, t.pad_id) == (32000, 1, 2, -1)
    assert (t.prefix_id, t.middle_id, t.suffix_id, t.eot_id, t.step_id) == (None,) * 5


def test_code_llama_has_the_published_infilling_ids(codellama_tokenizer: Tokenizer) -> None:
    t = codellama_tokenizer
    assert (t.n_words, t.prefix_id, t.suffix_id, t.middle_id, t.eot_id, t.step_id) == (
        32016,
        32007,
        32008,
        32009,
        32010,
        None,
    )


def test_code_llama_70b_has_the_published_turn_id(codellama_70b_tokenizer: Tokenizer) -> None:
    assert codellama_70b_tokenizer.step_id == 32015


def test_known_ids(llama2_tokenizer: Tokenizer) -> None:
    t = llama2_tokenizer
    assert t.encode("Hello world", bos=True, eos=True) == [1, 15043, 3186, 2]
    assert t.encode("", bos=True, eos=False) == [1]
    assert t.decode([1, 15043, 3186, 2]) == "Hello world"
    assert t.token_piece(3186) == "▁world"
    assert t.encode_infilling("world") == [11526]
    assert t.encode_infilling(" world") == [3186]
    assert t.decode_infilling([3186]) == " world"
    assert t.decode([3186]) == "world"


@pytest.mark.parametrize(
    "name", ["tiny_tokenizer", "llama2_tokenizer", "codellama_tokenizer", "codellama_70b_tokenizer"]
)
class TestEveryTokenizer:
    @pytest.fixture
    def tokenizer(self, name: str, request: pytest.FixtureRequest) -> Tokenizer:
        return request.getfixturevalue(name)

    def test_decoding_restores_any_text(self, tokenizer: Tokenizer) -> None:
        @settings(max_examples=150, deadline=None)
        @given(TEXT)
        def check(text: str) -> None:
            ids = tokenizer.encode(text, bos=True, eos=True)
            assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
            assert tokenizer.decode(ids) == text
            assert tokenizer.decode_infilling(tokenizer.encode_infilling(text)) == text

        check()

    def test_text_never_becomes_a_control_id(self, tokenizer: Tokenizer) -> None:
        @settings(max_examples=150, deadline=None)
        @given(FORGED.map("".join))
        def check(text: str) -> None:
            for ids in (tokenizer.encode(text, False, False), tokenizer.encode_infilling(text)):
                assert control_ids(tokenizer).isdisjoint(ids)
            assert tokenizer.decode(tokenizer.encode(text, False, False)) == text
            assert tokenizer.decode_infilling(tokenizer.encode_infilling(text)) == text

        check()

    def test_infilling_ids_equal_those_behind_another_character(self, tokenizer: Tokenizer) -> None:
        # Code Llama's training data was encoded behind a character that merges with nothing.
        sp = tokenizer.sp_model
        skip = len(sp.encode("☺"))

        @settings(max_examples=150, deadline=None)
        @given(st.text(st.sampled_from(" abcdef(:\n\t1é")))
        def check(text: str) -> None:
            assert tokenizer.encode_infilling(text) == sp.encode("☺" + text)[skip:]

        check()

    def test_ids_outside_the_vocabulary_are_refused(self, tokenizer: Tokenizer) -> None:
        for wrong in (-1, tokenizer.n_words):
            with pytest.raises(ValueError, match=f"token id {wrong} is outside"):
                tokenizer.decode([5, wrong])


def test_what_is_no_text_is_refused(tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(TypeError, match="encodes str, not bytes"):
        tiny_tokenizer.encode(b"abc", bos=True, eos=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="half of a surrogate pair at 1"):
        tiny_tokenizer.encode("a\ud800", bos=True, eos=False)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*none\.model"):
        Tokenizer(tmp_path / "none.model")
    good = (TINY / "tokenizer.model").read_bytes()
    for content in (b"", b"<!DOCTYPE html><html>", good[: len(good) // 2]):
        broken = tmp_path / "broken.model"
        broken.write_bytes(content)
        with pytest.raises(ValueError, match=r"broken\.model is not a SentencePiece model"):
            Tokenizer(broken)
