"""Byte-level vocabularies of GGUF files split texts as llama.cpp does, by the rule that they name.

Three tests are skipped unless ``llama_cpp`` is installed, or the environment variable
``LLAMA_CPP_VOCABULARIES`` names the folder ``models`` of llama.cpp's source, with its vocabularies.
"""

import os
import random
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf_files import write_gguf

from llama.checkpoint.gguf_file import open_file
from llama.tokenizer import BaseTokenizer
from llama.tokenizers import load_tokenizer
from llama.tokenizers.gguf_tokenizer import tokenizer_files
from llama.tokenizers.json_tokenizer import BYTE_LEVEL
from llama.tokenizers.pre_tokenizers import ALIASES, RULES

# The tokens that llama.cpp makes of one text under each rule.
EXPECTED = {
    "llama3": (
        "I¦'ll¦ say¦ it¦'s¦ '¦Dwhat¦ THEY¦'VE¦ ¦ said¦:¦ ¦123¦45¦x¦²¦ HäuserBau¦"
        "!?\n\n¦\t你好¦，世界か¦3¦.¦14¦…(¦ab¦|c¦)¦ /¦a¦<=¦b¦+$`¦x¦`¦ \u0294\u01c5o¦\n¦"
        "한국어¦…¦  \r\n¦ ¦ !\r\n¦//¦end¦\n¦\u3000¦.a¦！😀¦  "
    ),
    "tekken": (
        "I¦'ll¦ say¦ it¦'s¦ '¦Dwhat¦ THEY¦'VE¦ ¦ said¦:¦ ¦1¦2¦3¦4¦5¦x¦²¦ Häuser¦"
        "Bau¦!?\n\n¦\t你好¦，世界か¦3¦.¦1¦4¦…(¦ab¦|c¦)¦ /¦a¦<=¦b¦+$`¦x¦`¦"
        " \u0294\u01c5o¦\n¦한국어¦…¦  \r\n¦ ¦ !\r\n//¦end¦\n¦\u3000¦.a¦！😀¦  "
    ),
    "qwen2": (
        "I¦'ll¦ say¦ it¦'s¦ '¦Dwhat¦ THEY¦'VE¦ ¦ said¦:¦ ¦1¦2¦3¦4¦5¦x¦²¦"
        " HäuserBau¦!?\n\n¦\t你好¦，世界か¦3¦.¦1¦4¦…(¦ab¦|c¦)¦ /¦a¦<=¦b¦+$`¦x¦`¦"
        " \u0294\u01c5o¦\n¦한국어¦…¦  \r\n¦ ¦ !\r\n¦//¦end¦\n¦\u3000¦.a¦！😀¦  "
    ),
    "seed-coder": (
        "I¦'ll¦ say¦ it¦'s¦ '¦Dwhat¦ THEY¦'VE¦ ¦ said¦:¦ ¦1¦2¦3¦4¦5¦x¦²¦"
        " HäuserBau¦!?¦\n\n¦\t你好¦，世界か¦3¦.¦1¦4¦…(¦ab¦|c¦)¦ /¦a¦<=¦b¦+$`¦x¦`¦"
        " \u0294\u01c5o¦\n¦한국어¦…¦  \r\n¦ ¦ !¦\r\n¦//¦end¦\n¦\u3000¦.a¦！😀¦  "
    ),
    "gpt-2": (
        "I¦'ll¦ say¦ it¦'s¦ '¦Dwhat¦ THEY¦'¦VE¦ ¦ said¦:¦ 12345¦x¦²¦ HäuserBau¦"
        "!?¦\n\n¦\t¦你好¦，¦世界か¦3¦.¦14¦…(¦ab¦|¦c¦)¦ /¦a¦<=¦b¦+$`¦x¦`¦ \u0294\u01c5o¦"
        "\n¦한국어¦…¦  \r\n ¦ !¦\r¦\n¦//¦end¦\n¦\u3000¦.¦a¦！😀¦  "
    ),
    "starcoder": (
        "I¦'ll¦ say¦ it¦'s¦ '¦Dwhat¦ THEY¦'¦VE¦ ¦ said¦:¦ ¦1¦2¦3¦4¦5¦x¦²¦"
        " HäuserBau¦!?¦\n\n¦\t¦你好¦，¦世界か¦3¦.¦1¦4¦…(¦ab¦|¦c¦)¦ /¦a¦<=¦b¦+$`¦x¦`¦"
        " \u0294\u01c5o¦\n¦한국어¦…¦  \r\n ¦ !¦\r¦\n¦//¦end¦\n¦\u3000¦.¦a¦！😀¦  "
    ),
    "deepseek-llm": (
        "I¦'¦ll¦ say¦ it¦'¦s¦ '¦Dwhat¦ THEY¦'¦VE¦ ¦ said¦:¦ ¦12345¦x¦²¦ H¦ä¦"
        "userBau¦!?¦\n¦\n¦\t¦你好¦，¦世界か¦3¦.¦14¦…¦(¦ab¦|¦c¦)¦ /¦a¦<=¦b¦+$`¦x¦`¦"
        " \u0294¦\u01c5¦o¦\n¦한국어¦…¦  ¦\r¦\n¦ ¦ !¦\r¦\n¦//¦end¦\n¦\u3000¦.¦a¦！¦😀¦"
        "  "
    ),
    "deepseek-coder": (
        "I¦'¦ll¦ say¦ it¦'¦s¦ '¦Dwhat¦ THEY¦'¦VE¦ ¦ said¦:¦ ¦1¦2¦3¦4¦5¦x¦²¦"
        " HäuserBau¦!?¦\n¦\n¦\t¦你好¦，¦世界か¦3¦.¦1¦4¦…¦(¦ab¦|¦c¦)¦ /¦a¦<=¦b¦+$`¦x¦`¦"
        " \u0294\u01c5o¦\n¦한국어¦…¦  ¦\r¦\n¦ ¦ !¦\r¦\n¦//¦end¦\n¦\u3000¦.¦a¦！¦😀  "
    ),
    "viking": (
        "I'll¦ say¦ it's¦ 'Dwhat¦ THEY'VE¦ ¦ said:¦ ¦1¦2¦3¦4¦5¦x¦²¦ HäuserBau¦"
        "!?\n\n\t¦你好¦，¦世界か¦3¦.¦1¦4¦…(¦ab¦|¦c¦)¦ /a<=b+$`x`¦ \u0294\u01c5o¦\n¦한국어¦"
        "…  \r\n  !\r\n¦//end¦\n\u3000.¦a¦！😀¦  "
    ),
    "default": (
        "I¦'¦ll¦ say¦ it¦'¦s¦ ¦'¦Dwhat¦ THEY¦'¦VE¦ ¦ said¦:¦ ¦123¦45¦x¦²¦"
        " HäuserBau¦!?¦\n\n¦\t¦你好¦，¦世界か¦3¦.¦14¦…(¦ab¦|¦c¦)¦ ¦/¦a¦<=¦b¦+$¦`¦x¦`¦"
        " \u0294\u01c5o¦\n¦한국어¦…¦  \r\n¦  ¦!¦\r\n¦//¦end¦\n\u3000¦.¦a¦！¦😀¦  "
    ),
}

TEXT = EXPECTED["gpt-2"].replace("¦", "")

_LETTERS = {byte: letter for letter, byte in BYTE_LEVEL.items()}


def letters(text: str) -> str:
    """A text as a byte-level vocabulary spells it."""
    return "".join(_LETTERS[byte] for byte in text.encode())


@cache
def vocabulary() -> tuple[list[str], list[str]]:
    """The tokens and the merges of a vocabulary that has every token above, and those before it.

    The longest are merged first, so that a split piece becomes one token.
    """
    words = {word for line in EXPECTED.values() for word in line.split("¦")} | set(TEXT)
    words.add(TEXT[-3:])  # which no rule leaves whole
    tokens, merges = [_LETTERS[byte] for byte in range(256)], []
    for word in sorted(map(letters, words), key=lambda word: (-len(word), word)):
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                tokens.append(word[:end])
                merges.append(f"{word[: end - 1]} {word[end - 1]}")
    return tokens, merges


def metadata(rule: str | None, tokens: list[str], merges: list[str], **more: Any) -> dict[str, Any]:
    found = {"model": "gpt2", "tokens": tokens, "merges": merges, "bos_token_id": 0}
    found |= {"token_type": [1] * len(tokens), "eos_token_id": 0, **more}
    found |= {"pre": rule} if rule is not None else {}
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()}


def ids_of(rule: str) -> list[int]:
    tokens, _ = vocabulary()
    return [tokens.index(letters(word)) for word in EXPECTED[rule].split("¦")]


def load(rule: str | None) -> BaseTokenizer:
    tokens, merges = vocabulary()
    return load_tokenizer(tokenizer_files(metadata(rule, list(tokens), merges)))


@pytest.mark.parametrize("rule", EXPECTED)
def test_each_rule_splits_a_text_as_llama_cpp_does(rule: str) -> None:
    """A model whose file names this rule would read other tokens than it has learnt."""
    assert set(EXPECTED) == set(RULES)
    tokenizer = load(rule)
    ids = tokenizer.encode(TEXT, bos=False, eos=False)
    assert ids == ids_of(rule)
    assert tokenizer.decode(ids) == TEXT


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("midm-2.0", "llama3"),
        ("pixtral", "llama3"),
        ("smaug-bpe", "llama3"),
        ("trillion", "gpt-2"),
        ("mellum", "gpt-2"),
        ("megrez", "qwen2"),
        ("smollm", "starcoder"),
        ("command-r", "starcoder"),
    ],
)
def test_names_that_share_a_rule(name: str, rule: str) -> None:
    """Files of the model of this name would be refused, or split by another's rule."""
    assert load(name).encode(TEXT, bos=False, eos=False) == ids_of(rule)


def test_a_file_that_names_no_rule_is_read_by_the_default_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Files from before rules had names would be refused, or read with no word of doubt."""
    for missing in (None, ""):
        caplog.clear()
        assert load(missing).encode(TEXT, bos=False, eos=False) == ids_of("default")
        assert "no tokenizer.ggml.pre: texts are split by llama.cpp's rule 'def" in caplog.text
    caplog.clear()
    load("default")
    assert not caplog.text


@pytest.mark.parametrize("rule", ["llama-bpe", "midm-2.0", "pixtral", "tekken", "smaug-bpe", None])
def test_rules_that_keep_whole_tokens_begin_texts_too(rule: str | None) -> None:
    """Words that no merge makes would be cut, and prompts lack the token that begins them."""
    tokens = [*(_LETTERS[byte] for byte in range(256)), "zq"]
    found = metadata(rule, tokens, [], token_type=[3] + [1] * 256)
    tokenizer = load_tokenizer(tokenizer_files(found))
    is_whole = rule not in ("smaug-bpe", None)
    assert (tokenizer.encode("zq", bos=False, eos=False) == [256]) == is_whole
    assert tokenizer.add_bos == is_whole


def test_added_words_are_decoded_as_they_are_spelled() -> None:
    """DeepSeek Coder's file adds letters of bytes that UTF-8 lacks, ü for one: they'd be lost."""
    tokens = [_LETTERS[byte] for byte in range(256)]
    words = {"ü": 0xFC, "ÿ": 0xFF, "Größe": 256}
    types = [4 if i in words.values() else 1 for i in range(257)]
    found = metadata("deepseek-coder", [*tokens, "Größe"], [], token_type=types)
    tokenizer = load_tokenizer(tokenizer_files(found))
    text = "über die Größe ÿ, ñ und é"
    ids = tokenizer.encode(text, bos=False, eos=False)
    assert [ids.count(i) for i in words.values()] == [1, 1, 1]
    assert tokenizer.decode(ids) == text
    assert [tokenizer.piece_bytes()[i].decode() for i in words.values()] == list(words)


# Texts that rules split in different ways, beside those of all characters.
_PARTS = [
    *(
        "'s",
        "'LL",
        "’s",
        " ",
        "  ",
        "    ",
        "\t",
        "\n",
        "\r\n",
        "\n\n",
        "\u00a0",
        "1",
        "12",
        "12345",
    ),
    *(
        "½",
        "你好",
        "。",
        "，",
        "!",
        "?!",
        "...",
        "==",
        "<=",
        "//",
        "$",
        "^",
        "`",
        "|",
        "~",
        "a",
        "Ab",
        "ABC",
    ),
    *(
        "hello",
        "ß",
        "ﬁ",
        "ʔ",
        "ª",
        "я",
        "ÿ",
        "ა",
        "한국",
        "ひら",
        "ー",
        "ไทย",
        "ع",
        "،",
        "😀",
        "(",
        "]",
        "_",
    ),
]


def texts(rule: str | None) -> list[str]:
    """Random texts, less what llama.cpp and the models' own tokenizers read in two ways."""
    rule = ALIASES.get(rule or "default", rule or "default")
    rng = random.Random(0)

    def is_apart(char: str) -> bool:
        if rule == "tekken":  # to llama.cpp marks are no parts of words
            return unicodedata.category(char).startswith("M")
        # To llama.cpp these are in no range of characters.
        return rule.startswith("deepseek") and char.isspace() and not char.isascii()

    def part() -> str:
        if rng.random() < 0.8:
            return rng.choice(_PARTS)
        char = chr(rng.choice([rng.randrange(0x3000), rng.randrange(0xE000, 0x20000)]))
        return "" if unicodedata.category(char) in ("Cn", "Co") else char

    found = ["".join(part() for _ in range(rng.randint(1, 14))) for _ in range(300)]
    kept = ["".join(char for char in text if not is_apart(char)) for text in found]
    # llama.cpp leaves out what Qwen's own tokenizer does before.
    return [unicodedata.normalize("NFC", text) if rule == "qwen2" else text for text in kept]


@pytest.mark.parametrize("rule", [*RULES, *ALIASES, None])
def test_ids_are_llama_cpp_s_own(tmp_path: Path, rule: str | None) -> None:
    """A rule would differ from llama.cpp's, whatever the text above shows of it."""
    llama_cpp = pytest.importorskip("llama_cpp")
    tokens, merges = vocabulary()

    def add(writer: gguf.GGUFWriter) -> None:
        for key, value in metadata(rule, tokens, merges).items():
            if isinstance(value, list):
                writer.add_array(key, value)
            else:
                (writer.add_uint32 if isinstance(value, int) else writer.add_string)(key, value)

    path = tmp_path / "model.gguf"
    write_gguf(path, change=add, n_layers=0, vocab_size=len(tokens))
    tokenizer = load_tokenizer(tokenizer_files(open_file(path)[0]))
    reference = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    for text in [TEXT, *texts(rule)]:
        ids = tokenizer.encode(text, bos=False, eos=False)
        assert ids == reference.tokenize(text.encode(), add_bos=False, special=False), text
        assert tokenizer.decode(ids) == reference.detokenize(ids).decode() == text
    reference.close()


PUBLISHED = "deepseek-coder deepseek-llm llama-bpe llama-spm gpt-2 starcoder refact command-r mpt"


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PUBLISHED.split(), "qwen2", "phi-3"])
def test_published_vocabularies_give_the_published_ids(name: str) -> None:
    """A model with such a vocabulary would read other tokens than it has learnt."""
    folder = os.environ.get("LLAMA_CPP_VOCABULARIES")
    if folder is None:
        pytest.skip("LLAMA_CPP_VOCABULARIES is not set")
    path = Path(folder) / f"ggml-vocab-{name}.gguf"
    tokenizer = load_tokenizer(tokenizer_files(open_file(path)[0]))
    inputs = Path(f"{path}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    outputs = Path(f"{path}.out").read_text().splitlines()
    for text, expected in zip(inputs, outputs, strict=False):  # the last input is empty
        ids = tokenizer.encode(text, bos=False, eos=False)
        assert ids == [int(i) for i in expected.split()], text
        assert tokenizer.decode(ids) == text
    assert len(inputs) - 1 <= len(outputs) > 40
