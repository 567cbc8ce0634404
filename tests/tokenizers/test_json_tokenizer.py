"""Tokenizers from Hugging Face's files: the ids are the library's, and text never commands."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from conftest import data_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from json_tokenizers import (
    BEGIN,
    CONTROLS,
    END,
    INDENT,
    LINES,
    THINK,
    TURN,
    WORD,
    byte_level,
    like_llama2,
    structure_ids,
)

from llama import Llama, Tokenizer
from llama.chat.marks import Marks, clean
from llama.engine.detokenizer import Detokenizer
from llama.generation import TINY
from llama.tokenizer import BaseTokenizer
from llama.tokenizers import load_tokenizer
from llama.tokenizers.json_tokenizer import JsonTokenizer

TEMPLATE = (
    "{%- for message in messages %}\n"
    "    {{- message['content'] + '<|eot_id|>' }}\n"
    "{%- endfor %}{{ 'assistant<think>' }}"
)
SPACES = st.sampled_from(["", " ", "  ", "\n", "\t", "    "])
WORDS = st.sampled_from(["the", "cat", "assistant", "1", "é", "語", "😀", "<", "|", ">", "think"])
MARKS = st.sampled_from(
    [*CONTROLS, THINK, "<s>", "</s>", "<unk>", "[INST]", "<0x0A>", "<|im_end|>"]
)
PLAIN = st.text() | st.lists(SPACES | WORDS).map("".join)
ANY = PLAIN | st.lists(SPACES | WORDS | MARKS).map("".join)


def nothing(text: str) -> bool:
    return False


def json_tokenizer(data: dict[str, Any]) -> JsonTokenizer:
    return JsonTokenizer(data, "tokenizer.json", nothing, nothing)


def files(data: object, **others: object) -> dict[str, bytes]:
    """The contents of files next to a checkpoint; ``__`` in a name stands for a dot."""
    named = {name.replace("__", "."): value for name, value in others.items()}
    return {n: json.dumps(v).encode() for n, v in {"tokenizer.json": data, **named}.items()}


def sentencepiece_files(**others: object) -> dict[str, Path | bytes]:
    named = {name.replace("__", "."): json.dumps(value).encode() for name, value in others.items()}
    return {"tokenizer.model": TINY / "tokenizer.model", **named}


KINDS = {
    "byte-level": byte_level,
    "prepend": lambda: like_llama2("prepend"),
    "always": lambda: like_llama2("always"),
    "first": lambda: like_llama2("first"),
    "never": lambda: like_llama2("never"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_any_text_are_those_of_the_library(kind: str) -> None:
    data = KINDS[kind]()
    ours, library = json_tokenizer(data), tokenizers.Tokenizer.from_str(json.dumps(data))
    controls = set(ours.control_ids.values())

    @settings(max_examples=150, deadline=None, database=None)
    @example("")
    @example(" a  b")
    @given(ANY)
    def check(text: str) -> None:
        ids = ours.encode(text, bos=False, eos=False)
        assert controls.isdisjoint(ids)
        if not any(control in text for control in ours.control_ids):
            assert ids == library.encode(text, add_special_tokens=False).ids
        if "▁" not in text:
            assert ours.decode_infilling(ours.encode_infilling(text)) == text
            # Metaspace adds no space to a text that begins with one, but takes one away.
            if kind in ("byte-level", "prepend") or not text.startswith(" "):
                assert ours.decode(ids) == text

    check()


def test_ids_like_llama_2s_are_those_of_sentencepiece(tiny_tokenizer: Tokenizer) -> None:
    ours = json_tokenizer(like_llama2("prepend"))
    assert ours.control_ids == {"<s>": 1, "</s>": 2, "<unk>": 0}
    for text in [*LINES, " a", "  b", "\n", "é😀"]:
        assert ours.encode(text, False, False) == tiny_tokenizer.encode(text, False, False)
        assert ours.encode_infilling(text) == tiny_tokenizer.encode_infilling(text)


def test_ids_of_llama_2s_published_tokenizer() -> None:
    published = data_tokenizer("llama2")
    ours = json_tokenizer(like_llama2("prepend", published))
    for text in [*LINES, " a", "  b", "\n", "é😀 語", ""]:
        ids = ours.encode(text, False, False)
        assert ids == published.encode(text, False, False)
        assert ours.decode(ids) == text


@pytest.mark.parametrize("kind", ["byte-level", "prepend"])
def test_characters_of_several_bytes_arrive_whole(kind: str) -> None:
    ours = json_tokenizer(KINDS[kind]())

    @settings(max_examples=60, deadline=None, database=None)
    @example("a€😀語é b")
    @given(ANY)
    def check(text: str) -> None:
        if "▁" in text or "\ufffd" in text:
            return
        stream = Detokenizer(ours.decode)
        pieces = [stream.push(i) for i in ours.encode(text, False, False)]
        assert not any("\ufffd" in piece for piece in pieces)
        assert "".join([*pieces, stream.flush()]) == text

    check()


def test_added_pieces_that_the_template_names_are_structure_and_are_decoded() -> None:
    data = byte_level()
    config = {"eos_token": TURN, "chat_template": TEMPLATE}
    ours = load_tokenizer(files(data, tokenizer_config__json=config))
    library = tokenizers.Tokenizer.from_str(json.dumps(data))
    think, turn, indent, word = (library.token_to_id(t) for t in (THINK, TURN, INDENT, WORD))
    for name in (THINK, TURN):
        assert ours.control_ids[name] not in ours.encode(f"a{name}b", False, False)
        assert ours.decode(ours.encode(f"a{name}b", False, False)) == f"a{name}b"
    assert structure_ids(ours, f"{TURN}{THINK}") == [turn, think]
    assert Marks(ours).encode(clean(f"{TURN}{THINK}")) == ours.encode(
        f"{TURN}{THINK}", False, False
    )
    # What a model writes: the mark is a part of its text, the end of a turn isn't.
    assert ours.decode([think, turn]) == THINK
    # White space and words of the template's source are no structure.
    assert ours.encode(f"a{INDENT}b", False, False)[1] == indent
    assert ours.decode([indent, word]) == INDENT + WORD


def test_an_added_piece_that_ends_texts_is_a_control_piece_although_it_is_not_marked() -> None:
    data = byte_level()
    config = {"eos_token": {"content": THINK, "special": False}}
    ours = load_tokenizer(files(data, tokenizer_config__json=config))
    ends = {ours.control_ids[text] for text in (THINK, END, TURN)}
    assert ours.eos_id == ours.control_ids[THINK] and ours.stop_ids == ends
    assert ours.eos_id not in ours.encode(THINK, False, False)
    assert ours.decode([ours.eos_id]) == ""


IDS = {text: 340 + i for i, text in enumerate(CONTROLS)}
ROLES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "post-processor": ({}, {"bos": BEGIN, "add_bos": True}),
    "configuration": (
        {"tokenizer_config__json": {"bos_token": BEGIN, "eos_token": END, "pad_token": TURN}},
        {"bos": BEGIN, "eos": END, "pad": TURN, "add_bos": True},
    ),
    "objects": (
        {"tokenizer_config__json": {"eos_token": {"content": END, "lstrip": False}}},
        {"bos": BEGIN, "eos": END, "add_bos": True},
    ),
    "map": (
        {
            "tokenizer_config__json": {"eos_token": None, "pad_token": END},
            "special_tokens_map__json": {"eos_token": TURN, "pad_token": {"content": TURN}},
        },
        {"bos": BEGIN, "eos": TURN, "pad": END, "add_bos": True},
    ),
    "generation, one": (
        {"generation_config__json": {"eos_token_id": 342}},
        {"bos": BEGIN, "eos": TURN, "add_bos": True},
    ),
    "generation, several": (
        {
            "tokenizer_config__json": {"eos_token": END},
            "generation_config__json": {"eos_token_id": [342]},
        },
        {"bos": BEGIN, "eos": END, "add_bos": True},
    ),
    "generation, absurd": (
        {"generation_config__json": {"eos_token_id": [-1, "x", None, 10**20, True, [3]]}},
        {"bos": BEGIN, "add_bos": True},
    ),
    "no begin": (
        {"tokenizer_config__json": {"add_bos_token": False, "bos_token": BEGIN}},
        {"bos": BEGIN, "add_bos": False},
    ),
    "unknown": (
        {"tokenizer_config__json": {"eos_token": "<nowhere>", "pad_token": 3, "bos_token": [1]}},
        {"bos": BEGIN, "add_bos": True},
    ),
}


@pytest.mark.parametrize("name", ROLES)
def test_ids_of_begin_end_and_padding(name: str) -> None:
    others, expected = ROLES[name]
    ours = load_tokenizer(files(byte_level(), **others))
    for role in ("bos", "eos", "pad"):
        assert getattr(ours, f"{role}_id") == IDS.get(expected.get(role, ""), -1)
    assert ours.stop_ids == {IDS[END], IDS[TURN]}, "the vocabulary names both"
    assert ours.add_bos is expected["add_bos"]


def test_without_a_begin_none_is_put_in_front() -> None:
    data = {**byte_level(), "post_processor": None}
    assert load_tokenizer(files(data)).add_bos is False
    config = {"bos_token": BEGIN, "add_bos_token": True}
    assert load_tokenizer(files(data, tokenizer_config__json=config)).add_bos is True
    config = {"add_bos_token": True}
    assert load_tokenizer(files(data, tokenizer_config__json=config)).add_bos is False


def test_added_pieces_beyond_the_models_vocabulary_are_dropped() -> None:
    data = byte_level()
    assert load_tokenizer(files(data)).n_words == 346
    ours = load_tokenizer(files(data), vocab_size=343)
    assert ours.n_words == 343 and THINK not in ours.control_ids
    ids = ours.encode(f"{THINK}{INDENT}{WORD}", False, False)
    assert max(ids) < 340
    assert ours.decode(ids) == f"{THINK}{INDENT}{WORD}"


class TestNextToSentencePiece:
    """``tokenizer.model`` with pieces that other files add."""

    def test_added_pieces_have_their_ids_in_prompts_and_never_in_texts(self) -> None:
        added = {"<|im_end|>": 769, "<|im_start|>": 768}
        ours = load_tokenizer(sentencepiece_files(added_tokens__json=added))
        assert ours.n_words == 770 and ours.control_ids.items() >= added.items()
        assert structure_ids(ours, "<|im_end|><|im_start|>") == [769, 768]
        self._never(ours, ["<|im_end|>", "<|im_start|>", "<s>", "</s>"])

    @pytest.mark.parametrize("special", [True, False])
    def test_pieces_of_the_decoder(self, special: bool) -> None:
        specs = {
            "0": {"content": "<unk>", "special": True},
            "1": {"content": "<s>", "special": True},
            "768": {"content": "<|im_start|>", "special": special},
            "769": {"content": "<|im_end|>", "special": special},
            "770": {"content": "Schmetterling", "special": False},
        }
        config = {
            "added_tokens_decoder": specs,
            "eos_token": "<|im_end|>",
            "chat_template": "{{ '<|im_start|>' }} Schmetterling",
        }
        ours = load_tokenizer(sentencepiece_files(tokenizer_config__json=config))
        assert ours.eos_id == 769 and ours.stop_ids == {2, 769}
        assert structure_ids(ours, "<|im_end|><|im_start|>") == [769, 768]
        self._never(ours, ["<|im_end|>", "<|im_start|>"])
        ids = ours.encode("ein Schmetterling fliegt", False, False)  # an ordinary word
        assert 770 in ids and ours.decode(ids) == "ein Schmetterling fliegt"

    @staticmethod
    def _never(ours: BaseTokenizer, names: list[str]) -> None:
        controls = set(ours.control_ids.values())
        parts = st.sampled_from([*names, "<", "|", " ", "im_end|>", "<|im", "a", "s>"])

        @settings(max_examples=80, deadline=None, database=None)
        @given(st.lists(parts).map("".join))
        def check(text: str) -> None:
            ids = ours.encode(text, False, False)
            assert controls.isdisjoint(ids)
            assert ours.decode(ids) == text
            assert controls.isdisjoint(Marks(ours).encode(clean(text)))

        check()

    def test_other_texts_keep_their_ids(self, tiny_tokenizer: Tokenizer) -> None:
        ours = load_tokenizer(sentencepiece_files(added_tokens__json={"<pad>": 768}))
        for text in [*LINES, " <pa d>"]:
            assert ours.encode(text, True, True) == tiny_tokenizer.encode(text, True, True)

    def test_a_named_padding(self) -> None:
        added, config = {"[PAD]": 768}, {"pad_token": "[PAD]"}
        files_next_to_it = {"added_tokens__json": added, "tokenizer_config__json": config}
        assert load_tokenizer(sentencepiece_files(**files_next_to_it)).pad_id == 768

    def test_pieces_beyond_the_models_vocabulary_are_dropped(self) -> None:
        added = {"<a>": 768, "<b>": 769, "<far>": 10**12}
        ours = load_tokenizer(sentencepiece_files(added_tokens__json=added), vocab_size=769)
        assert ours.n_words == 769 and "<a>" in ours.control_ids and "<b>" not in ours.control_ids

    def test_a_gap_is_refused(self) -> None:
        files_next_to_it = sentencepiece_files(added_tokens__json={"<a>": 770})
        with pytest.raises(ValueError, match="piece <a> has the id 770, but 768 pieces"):
            load_tokenizer(files_next_to_it)

    def test_settings(self) -> None:
        def load(**config: object) -> BaseTokenizer:
            return load_tokenizer(sentencepiece_files(tokenizer_config__json=config))

        assert load().spaced and load(legacy=True).spaced and not load(legacy=False).spaced
        assert load().add_bos and not load(add_bos_token=False).add_bos

    def test_a_missing_package_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        load_tokenizer(sentencepiece_files())  # which needs nothing more
        monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
        with pytest.raises(ImportError, match=r"package protobuf: pip install 'llama\[formats\]'"):
            load_tokenizer(sentencepiece_files(added_tokens__json={"<a>": 768}))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"package tokenizers: pip install 'llama\[formats\]'"):
        load_tokenizer(files(byte_level()))


def malformed(**changes: object) -> bytes:
    return json.dumps({**byte_level(), **changes}).encode()


MALFORMED: dict[str, tuple[Any, str]] = {
    "no JSON": (lambda: {"tokenizer.json": b"{"}, "tokenizer.json is not JSON"),
    "no object": (lambda: {"tokenizer.json": b"[]"}, "tokenizer.json holds a list, not an object"),
    "nothing": (lambda: {"tokenizer.json": b"{}"}, "tokenizer.json is no tokenizer.json: "),
    "no model": (lambda: {"tokenizer.json": malformed(model=None)}, "is no tokenizer.json: "),
    "no vocabulary": (
        lambda: {
            "tokenizer.json": malformed(
                model={"type": "BPE", "vocab": {}, "merges": []},
                added_tokens=[],
                post_processor=None,
            )
        },
        "has an empty vocabulary",
    ),
    "added": (lambda: {"tokenizer.json": malformed(added_tokens={"a": 1})}, "is no tokenizer.json"),
    "added piece": (
        lambda: {"tokenizer.json": malformed(added_tokens=[{"id": 1}])},
        "is no tokenizer.json: ",
    ),
    "configuration": (
        lambda: {**files(byte_level()), "tokenizer_config.json": b"\xff"},
        "tokenizer_config.json is not JSON",
    ),
    "map": (
        lambda: {**files(byte_level()), "special_tokens_map.json": b"3"},
        "special_tokens_map.json holds a int, not an object",
    ),
    "added to no model": (
        lambda: {"tokenizer.model": b"nothing"},
        "tokenizer.model is not a SentencePiece model",
    ),
    "same piece twice": (
        lambda: sentencepiece_files(added_tokens__json={"<s>": 768}),
        "the piece <s> has the ids 1 and 768",
    ),
    "another name": (
        lambda: sentencepiece_files(
            tokenizer_config__json={"added_tokens_decoder": {"0": {"content": "<zero>"}}}
        ),
        "tokenizer.model lacks one of the pieces <s>, </s> and <unk>",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_are_refused(name: str) -> None:
    make, message = MALFORMED[name]
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(make())
    assert str(error.value).isprintable() and len(str(error.value)) < 400


def test_missing_files_are_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.model or tokenizer.json in here: "):
        load_tokenizer({}, where="here")


def test_sentencepiece_is_unchanged_by_what_was_loaded() -> None:
    assert isinstance(load_tokenizer(sentencepiece_files()), Tokenizer)
    assert sentencepiece.SentencePieceProcessor(str(TINY / "tokenizer.model")).vocab_size() == 768


def test_a_checkpoint_with_this_tokenizer_generates(checkpoint_dir: Any) -> None:
    path = checkpoint_dir(vocab_size=346)
    (path / "tokenizer.model").unlink()
    (path / "tokenizer.json").write_text(json.dumps(byte_level()))
    llama = Llama.build(path, device="cpu", max_seq_len=32)
    whole = llama.text_completion(["the cat"], temperature=0, max_gen_len=12)[0]["generation"]
    streamed = llama.text_completion_stream("the cat", temperature=0, max_gen_len=12)
    assert "".join(streamed) == whole
