"""Added pieces: found, written out and taken for control pieces as transformers does."""

import json
import shutil
import time
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from added_files import FLAGS, decoder, with_model, write
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from json_tokenizers import byte_level, like_llama2
from transformers import AutoTokenizer

from llama.chat.formats import choose_chat
from llama.engine.detokenizer import Detokenizer
from llama.structure.vocabulary import piece_bytes
from llama.tokenizers import load_tokenizer
from llama.tokenizers.added import AddedPiece, AddedWords

# One word for each combination of flags. One that begins another has to be looked for after it.
WORDS = [
    *("Wq", "xWq", "Wqx", "Zé", "<w>", " lead", "tail ", "語"),
    *("q q", "naïve", "õ", "--", "_u", "Ⓐb", "a1", "🙂🙂"),
]
SPECS: list[dict[str, Any]] = [
    {"content": text, "special": False, **dict(zip(FLAGS, flags, strict=True))}
    for text, flags in zip(WORDS, product([False, True], repeat=4), strict=True)
]
PARTS = [*WORDS, *WORDS, "W", "q", "x", " ", "  ", "\n", "\t", "a", "the cat", "é", "_", "1", "-"]
TEXTS = st.lists(st.sampled_from([*PARTS, "\u00a0", "\x1c", "\u0301", "Ⓐ"]), max_size=9)
LEGACY: dict[str, dict[str, Any]] = {
    "unsaid": {},
    "new": {"legacy": False},
    "old": {"legacy": True},
}


def with_json(directory: Path, data: dict[str, Any], n_own: int, **config: Any) -> dict[str, Path]:
    """A directory with a tokenizer.json, which has the first of the words, and the others."""
    first = 1 + max(
        *data["model"]["vocab"].values(), *(spec["id"] for spec in data["added_tokens"])
    )
    data["added_tokens"] += [{"id": first + i, **spec} for i, spec in enumerate(SPECS[:n_own])]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    config["added_tokens_decoder"] = decoder(SPECS[n_own:], first + n_own)
    return write(directory, tokenizer__json=data, tokenizer_config__json=config)


class TestWords:
    @pytest.mark.parametrize("legacy", LEGACY)
    def test_next_to_sentencepiece_they_are_found_as_by_transformers(
        self, legacy: str, tmp_path: Path
    ) -> None:
        """A failure means that a fine-tuned model reads or writes other words than it learned."""
        config = {**LEGACY[legacy], "added_tokens_decoder": decoder(SPECS)}
        ours = load_tokenizer(with_model(tmp_path, config))
        library = AutoTokenizer.from_pretrained(tmp_path)

        @settings(max_examples=300, deadline=None, database=None)
        @example("Wq b")
        @example("aWqb --\tthe cat")
        @given(TEXTS.map("".join))
        def check(text: str) -> None:
            # transformers puts no space before a text that has one, SentencePiece does.
            assume(not text.startswith(" "))
            ids = library(text, add_special_tokens=False).input_ids
            assert ours.encode(text, bos=False, eos=False) == ids
            assert ours.decode(ids) == library.decode(ids)

        check()

    @pytest.mark.parametrize("kind", ["byte-level", "prepend", "always", "first", "never"])
    def test_of_tokenizer_json_and_the_config_they_are_found_as_by_transformers(
        self, kind: str, tmp_path: Path
    ) -> None:
        """A failure means that pieces that one of the two files lacks are lost."""
        data = byte_level() if kind == "byte-level" else like_llama2(kind)
        ours = load_tokenizer(with_json(tmp_path, data, 7))
        library = AutoTokenizer.from_pretrained(tmp_path)

        @settings(max_examples=150, deadline=None, database=None)
        @given(TEXTS.map("".join))
        def check(text: str) -> None:
            ids = library(text, add_special_tokens=False).input_ids
            assert ours.encode(text, bos=False, eos=False) == ids
            if kind != "byte-level":  # transformers takes the letters of "õ" for bytes
                assert ours.decode(ids) == library.decode(ids)

        check()

    def test_their_letters_are_no_bytes(self, tmp_path: Path) -> None:
        """A failure means that an answer has U+FFFD for each umlaut that is a piece."""
        ours = load_tokenizer(with_json(tmp_path, byte_level(), 16))
        for text in ("naïve", "xõy", "eine naïve Idee.", "Zé"):
            ids = ours.encode(text, bos=False, eos=False)
            assert ours.decode(ids) == text
            assert b"".join(piece_bytes(ours)[i] for i in ids) == text.encode()

    def test_pieces_of_bytes_stay_bytes(self) -> None:
        """A failure means that a letter that a file lists again is no longer part of others."""
        data = byte_level()
        flags = dict.fromkeys((*FLAGS, "special"), False)
        data["added_tokens"] += [{"id": data["model"]["vocab"]["Ã"], "content": "Ã", **flags}]
        ours = load_tokenizer({"tokenizer.json": json.dumps(data).encode()})
        assert ours.decode(ours.encode("é", bos=False, eos=False)) == "é"

    @pytest.mark.parametrize("kind", ["sentencepiece", "byte-level"])
    def test_streams_and_grammars_know_them(self, kind: str, tmp_path: Path) -> None:
        """A failure means that words are missing in streamed or in structured answers."""
        ours = load_tokenizer(
            with_model(tmp_path, {"added_tokens_decoder": decoder([*SPECS, {"content": " Vk"}])})
            if kind == "sentencepiece"
            else with_json(tmp_path, byte_level(), 16)
        )
        pieces = piece_bytes(ours)
        found = {ours.token_piece(i): pieces[i] for i in range(ours.n_words)}
        assert all(found[text] == text.encode() for text in WORDS)

        @settings(max_examples=80, deadline=None, database=None)
        @example("é語🙂🙂 Zé lead")
        @example("x  Vk")
        @given(TEXTS.map("".join))
        def check(text: str) -> None:
            ids = ours.encode(text, bos=False, eos=False)
            stream = Detokenizer(ours.decode)
            streamed = "".join([*map(stream.push, ids), stream.flush()])
            assert streamed == ours.decode(ids)
            assert b"".join(pieces[i] for i in ids) == ours.decode_infilling(ids).encode()

        check()

    def test_of_older_directories(self, tmp_path: Path) -> None:
        """A failure means that words are taken for control pieces, which no text becomes."""
        files = with_model(tmp_path, {}, added_tokens__json={"Schmetterling": 768})
        ours = load_tokenizer(files)
        ids = ours.encode("ein Schmetterling fliegt", bos=False, eos=False)
        assert 768 in ids and ours.decode(ids) == "ein Schmetterling fliegt"
        assert "Schmetterling" not in ours.control_ids

    def test_the_flags_of_the_config_outrank_those_of_tokenizer_json(self, tmp_path: Path) -> None:
        """A failure means that white space goes that transformers keeps, or the other way round."""
        data = byte_level()
        word = next(spec for spec in data["added_tokens"] if spec["content"] == "assistant")
        config = {"added_tokens_decoder": decoder([{**word, "lstrip": True}], word["id"])}
        del config["added_tokens_decoder"][str(word["id"])]["id"]
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        ours = load_tokenizer(write(tmp_path, tokenizer__json=data, tokenizer_config__json=config))
        library = AutoTokenizer.from_pretrained(tmp_path)
        ids = ours.encode("a \n assistant", bos=False, eos=False)
        assert ids == library.encode("a \n assistant", add_special_tokens=False) and len(ids) == 2

    def test_the_config_outranks_added_tokens_json(self, tmp_path: Path) -> None:
        """A failure means that a file that transformers no longer reads is in the way of others."""
        config = {"added_tokens_decoder": decoder([{"content": "<w>"}])}
        ours = load_tokenizer(with_model(tmp_path, config, added_tokens__json={"<w>": 769}))
        assert ours.n_words == 769 and 768 in ours.encode("<w>", bos=False, eos=False)

    def test_a_word_that_the_model_has_as_its_own(self, tmp_path: Path) -> None:
        """A failure means that SentencePiece finds a word where its flags forbid it."""
        spec = {"content": "Wqq", "single_word": True}
        config = {"added_tokens_decoder": decoder([spec])}
        ours = load_tokenizer(with_model(tmp_path, config, {"Wqq": "USER_DEFINED"}))
        assert 768 in ours.encode("a Wqq", bos=False, eos=False)
        assert 768 not in ours.encode("aWqq", bos=False, eos=False)

    @pytest.mark.parametrize("word", [" the", "  "])
    def test_a_word_that_the_model_has_with_its_space(self, word: str, tmp_path: Path) -> None:
        """A failure means that a directory that transformers reads is refused."""
        config = {"legacy": False, "added_tokens_decoder": decoder([{"content": word}])}
        ours = load_tokenizer(with_model(tmp_path, config))
        library = AutoTokenizer.from_pretrained(tmp_path)
        ids = ours.encode("a the  cat", bos=False, eos=False)
        assert ids == library.encode("a the  cat", add_special_tokens=False) and 768 in ids
        assert ours.decode(ids) == "a the  cat" and word not in ours.control_ids

    def test_thousands_of_lengths_take_no_longer(self) -> None:
        """A failure means that a small hostile file makes each request take minutes."""
        words = AddedWords({i: AddedPiece("a" * i + "b") for i in range(1, 3000)})
        begin = time.process_time()
        assert words.split("ac" * 2500 + "aab") == ["ac" * 2500, 2]
        assert time.process_time() - begin < 2

    def test_the_longest_of_nested_words(self) -> None:
        """A failure means that a word is found in the place of a longer one."""
        texts = ["a", "ab", "abcd", "abce", "b", "abd"]
        words = AddedWords({i: AddedPiece(text) for i, text in enumerate(texts)})
        assert words.split("abcfabcdabceabzzb") == [1, "cf", 2, 3, 1, "zz", 4]


class TestTemplates:
    TEMPLATE = (
        "{% for m in messages %}{{ '<|a|>' + m['content'] + ' <|b|>\n' + '<c>\t' + m['role'] "
        "+ '[e]' + m['content'] + '<d>' }}{% endfor %}{{ '<|a|>' }}"
    )
    CONTROLS = ("<|a|>", "<|b|>", "<c>", "[e]", "<d>")

    @pytest.mark.parametrize("kind", ["sentencepiece", "byte-level", "prepend", "first"])
    def test_control_pieces_take_white_space_away_as_in_transformers(
        self, kind: str, tmp_path: Path
    ) -> None:
        """A failure means that a prompt has line breaks that the model never saw there."""
        flags = list(product([False, True], repeat=3))  # of eight, each control piece has one
        for chosen in (flags[:5], flags[3:]):
            specs = [
                {"content": text, "special": True, **dict(zip(FLAGS, some, strict=False))}
                for text, some in zip(self.CONTROLS, chosen, strict=True)
            ]
            specs += [{"content": "Wq", "rstrip": True}, {"content": "--", "single_word": True}]
            self._compare(tmp_path, kind, specs)

    def _compare(self, directory: Path, kind: str, specs: list[dict[str, Any]]) -> None:
        config: dict[str, Any] = {"chat_template": self.TEMPLATE}
        if kind == "sentencepiece":
            config |= {"legacy": False, "added_tokens_decoder": decoder(specs)}
            files = with_model(directory, config)
        else:
            data = byte_level() if kind == "byte-level" else like_llama2(kind)
            # The library finds pieces of white space in white space that was taken away, too.
            kept = [s for s in data["added_tokens"] if s["content"].strip()]
            first = data["added_tokens"][0]["id"]
            data["added_tokens"] = [{**s, "id": first + i} for i, s in enumerate(kept)]
            used = [*data["model"]["vocab"].values(), *(s["id"] for s in data["added_tokens"])]
            config["added_tokens_decoder"] = decoder(specs, max(used) + 1)
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
            files = write(directory, tokenizer__json=data, tokenizer_config__json=config)
        library = AutoTokenizer.from_pretrained(directory)
        ours = load_tokenizer(files)
        prompt = choose_chat(None, files, ours).prompt
        contents = st.lists(
            st.sampled_from(["Wq", "--", " ", "\n", "\t", "a", "the cat", "é", "_", "1", "-"]),
            max_size=6,
        )

        @settings(max_examples=60, deadline=None, database=None)
        @example(["\n", "the cat", " "], ["Wq", "\n"])
        @given(contents, contents)
        def check(first: list[str], second: list[str]) -> None:
            messages = [
                {"role": "user", "content": "".join(first)},
                {"role": "assistant", "content": "".join(second)},
            ]
            text = library.apply_chat_template(messages, tokenize=False)
            expected = library.encode(text, add_special_tokens=False)
            assert prompt(ours, messages) == expected

        check()
        shutil.rmtree(directory)
        directory.mkdir()


class TestSettings:
    @pytest.mark.parametrize("kind", ["sentencepiece", "prepend", "always", "first"])
    @pytest.mark.parametrize("adds", [True, False, None])
    def test_add_prefix_space(self, adds: bool | None, kind: str, tmp_path: Path) -> None:
        """A failure means that the first word of each text is another one."""
        config = {"add_prefix_space": adds, "legacy": False, "tokenizer_class": "LlamaTokenizer"}
        if kind == "sentencepiece":
            files = with_model(tmp_path, config)
        else:
            files = write(
                tmp_path, tokenizer__json=like_llama2(kind), tokenizer_config__json=config
            )
        ours, library = load_tokenizer(files), AutoTokenizer.from_pretrained(tmp_path)
        for text in ("the cat", "a", "\nb"):
            ids = library(text, add_special_tokens=False).input_ids
            assert ours.encode(text, bos=False, eos=False) == ids
            assert ours.decode(ids) == library.decode(ids) == text

    @pytest.mark.parametrize("in_front", [[], ["<|begin_of_text|>"]])
    def test_the_end_that_a_post_processor_appends_is_no_beginning(
        self, in_front: list[str]
    ) -> None:
        """A failure means that each prompt begins with the end of a text."""
        data = byte_level()
        text: dict[str, Any] = {"Sequence": {"id": "A", "type_id": 0}}
        names = ["<|begin_of_text|>", "<|end_of_text|>"]
        around = [{"SpecialToken": {"id": name, "type_id": 0}} for name in names]
        data["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [*around[: len(in_front)], text, around[1]],
            "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                n: {"id": n, "ids": [340 + i], "tokens": [n]} for i, n in enumerate(names)
            },
        }
        ours = load_tokenizer({"tokenizer.json": json.dumps(data).encode()})
        assert ours.add_bos is bool(in_front) and ours.bos_id == (340 if in_front else -1)
