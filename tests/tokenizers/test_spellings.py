"""Control pieces that are spelled out on purpose become their ids, and are written out again."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from added_files import FLAGS, decoder, with_model, write
from conftest import data_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from json_tokenizers import byte_level, like_llama2
from tiktoken_files import small_tiktoken

from llama import Llama, Tokenizer
from llama.chat.formats import FORMATS
from llama.chat.prompts import infilling_prompt_tokens
from llama.generation import TINY
from llama.tokenizers import load_tokenizer
from llama.tokenizers.spellings import Spellings
from llama.tokenizers.tiktoken import TiktokenTokenizer

CONTROLS = ["<|a|>", "<|b|>", "<|c|>", "[D]", "<|ab|>"]
CONTENTS = st.sampled_from([*CONTROLS, "<|", "|>", "[", " ", "\n", "x", "the cat", "é", "_", "1"])
SIDES = st.text(st.sampled_from(" \nax<>_é▁"), max_size=8)


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level", "prepend", "first"])
def test_ids_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    """A failure means that a raw prompt is another one here than in the library that wrote it."""
    transformers = pytest.importorskip("transformers")
    flags = list(product([False, True], repeat=3))[:5]
    specs = [
        {"content": text, "special": True, **dict(zip(FLAGS, some, strict=False))}
        for text, some in zip(CONTROLS, flags, strict=True)
    ]
    if kind == "sentencepiece":
        config: dict[str, Any] = {"legacy": False, "added_tokens_decoder": decoder(specs)}
        files = with_model(tmp_path, config)
    else:
        data = byte_level() if kind == "byte-level" else like_llama2(kind)
        data["added_tokens"] = [s for s in data["added_tokens"] if s["special"]]
        used = [*data["model"]["vocab"].values(), *(s["id"] for s in data["added_tokens"])]
        config = {"added_tokens_decoder": decoder(specs, max(used) + 1)}
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        files = write(tmp_path, tokenizer__json=data, tokenizer_config__json=config)
    library = transformers.AutoTokenizer.from_pretrained(tmp_path)
    spellings = Spellings(load_tokenizer(files))

    @settings(max_examples=100, deadline=None, database=None)
    @given(st.sampled_from(["x", *CONTROLS]), st.lists(CONTENTS, max_size=8))
    def check(begin: str, contents: list[str]) -> None:
        text = begin + "".join(contents)
        assert spellings.encode(text, bos=False) == library.encode(text, add_special_tokens=False)

    check()


@pytest.mark.parametrize("name", ["tiny", "codellama"])
def test_code_llamas_prompt_as_text_is_its_prompt_for_infilling(name: str) -> None:
    """A failure means that editors which write the prompt themselves get nonsense."""
    tiny = Tokenizer(TINY / "tokenizer.model")
    tokenizer = tiny if name == "tiny" else data_tokenizer("codellama")
    spellings = Spellings(tokenizer)

    @settings(max_examples=100, deadline=None, database=None)
    @given(SIDES, SIDES, st.sampled_from(["", " ", "<s>", "<s> ", "▁"]))
    def check(prefix: str, suffix: str, begin: str) -> None:
        expected = infilling_prompt_tokens(tokenizer, prefix, suffix)
        text = f"{begin}<PRE> {prefix} <SUF>{suffix} <MID>"
        assert spellings.encode(text, bos=True) == expected
        expected = infilling_prompt_tokens(tokenizer, prefix, suffix, suffix_first=True)
        text = f"{begin}<PRE> <SUF>{suffix} <MID> {prefix}"
        assert spellings.encode(text, bos=True) == expected

    check()
    pieces = [tokenizer.prefix_id, tokenizer.suffix_id, tokenizer.middle_id]
    assert [i for i in spellings.encode("<PRE>a<SUF>b<MID>", bos=False) if i in pieces] == pieces


def test_other_texts_are_encoded_as_ever() -> None:
    """A failure means that the option changes prompts that have nothing to do with it."""
    tokenizer = Tokenizer(TINY / "tokenizer.model")
    spellings = Spellings(tokenizer)
    for text in ("", " ", "the cat", " the <PR E>", "<s", "▁", "\n<0x0A>"):
        for bos in (True, False):
            assert spellings.encode(text, bos=bos) == tokenizer.encode(text, bos=bos, eos=False)
    assert spellings.encode("<s>a", bos=True) == tokenizer.encode("a", bos=True, eos=False)
    with pytest.raises(ValueError, match="surrogate"):
        spellings.encode("<s>\ud800", bos=True)


@pytest.mark.parametrize("kind", ["inst", "llama3", "chatml"])
def test_what_is_written_out_is_read_as_the_same_prompt(kind: str, tmp_path: Path) -> None:
    """A failure means that a prompt as text, sent back by a client, is another one."""
    if kind == "inst":
        tokenizer: Any = Tokenizer(TINY / "tokenizer.model")
    elif kind == "llama3":
        tokenizer = TiktokenTokenizer(small_tiktoken(), "tokenizer.model")
    else:
        marks = [{"content": text, "special": True} for text in ("<|im_start|>", "<|im_end|>")]
        config = {"added_tokens_decoder": decoder(marks), "legacy": False}
        tokenizer = load_tokenizer(with_model(tmp_path, config))
    spellings = Spellings(tokenizer)
    dialog: Any = [
        {"role": "system", "content": "Be  nice."},
        {"role": "user", "content": "What's a cow?\n"},
        {"role": "assistant", "content": "It says moo."},
        {"role": "user", "content": "日本"},
    ]
    ids = FORMATS[kind].prompt(tokenizer, dialog)
    text = spellings.decode(ids)
    assert spellings.encode(text, bos=True) == ids
    assert "It says moo." in text and tokenizer.token_piece(ids[0]) in text[:17]


def test_a_piece_that_is_a_letter_stays_a_letter(tiny: Llama) -> None:
    """A failure means that a padding piece like "!" is taken out of every raw prompt."""
    tokenizer = Tokenizer(TINY / "tokenizer.model")
    [letter] = tokenizer.encode_infilling("!")
    tokenizer.control_ids = {**tokenizer.control_ids, "!": letter}
    assert Spellings(tokenizer).encode("a!b", bos=False) == tokenizer.encode("a!b", False, False)
