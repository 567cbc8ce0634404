"""Control pieces in generated texts: which of them end one, and which are written out."""

import json
from typing import Any

import pytest
from json_tokenizers import BEGIN, END, THINK, TURN, byte_level, structure_ids

from llama import Tokenizer
from llama.generation import TINY
from llama.sampling import SamplingParams
from llama.tokenizer import BaseTokenizer
from llama.tokenizers import load_tokenizer
from llama.tokenizers.control import END_PIECES, with_ends, with_marks
from llama.tokenizers.gguf_tokenizer import tokenizer_files


def with_pieces(*pieces: str, special: bool = True, **files: Any) -> BaseTokenizer:
    """A byte-level tokenizer with added pieces from id 400 on."""
    data = byte_level()
    specs = [
        {**data["added_tokens"][0], "id": 400 + i, "content": text, "special": special}
        for i, text in enumerate(pieces)
    ]
    gap = [  # ids of a vocabulary have no gaps
        {**data["added_tokens"][0], "id": i, "content": f"<gap{i}>"} for i in range(346, 400)
    ]
    data["added_tokens"] += gap + specs
    named = {f"{name}.json": json.dumps(value).encode() for name, value in files.items()}
    return load_tokenizer({"tokenizer.json": json.dumps(data).encode(), **named})


class TestEndPieces:
    @pytest.mark.parametrize("special", [True, False])
    @pytest.mark.parametrize("name", sorted(END_PIECES - {END, TURN}))
    def test_they_end_texts_by_name(self, name: str, special: bool) -> None:
        """A failure means that an answer runs on into a turn that the model makes up."""
        tokenizer = with_pieces(name, special=special)
        assert 400 in tokenizer.stop_ids and tokenizer.decode([400]) == ""
        assert 400 not in tokenizer.encode(f"a {name} b", bos=False, eos=False)

    def test_other_control_pieces_end_none(self) -> None:
        """A failure means that a text ends in the middle."""
        tokenizer = with_pieces("<|im_start|>", "<|python_tag|>", "<tool_call>", "▁<EOT>")
        assert tokenizer.stop_ids == {tokenizer.control_ids[END], tokenizer.control_ids[TURN]}

    def test_a_word_with_such_a_name_ends_none(self) -> None:
        """A failure means that ordinary tokens, which no file adds, end a text."""
        data = byte_level()
        last = data["model"]["vocab"].pop("".join(data["model"]["merges"].pop()))
        data["model"]["vocab"]["[EOS]"] = last
        tokenizer = load_tokenizer({"tokenizer.json": json.dumps(data).encode()})
        assert tokenizer.token_piece(last) == "[EOS]" and last not in tokenizer.stop_ids

    def test_the_beginning_of_texts_is_an_end_only_where_it_is_the_eos_too(self) -> None:
        """A failure means that models with one mark for both never end, or end at once."""
        begins = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
        tokenizer = with_pieces("<|endoftext|>", "<|im_end|>", tokenizer_config=begins)
        assert 400 not in tokenizer.stop_ids and 401 in tokenizer.stop_ids
        both = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
        tokenizer = with_pieces("<|endoftext|>", "<|im_end|>", tokenizer_config=both)
        assert {400, 401} <= tokenizer.stop_ids

    def test_ids_that_configurations_name(self) -> None:
        """A failure means that a checkpoint's own ends are lost, or that a stale one ends texts."""
        tokenizer = with_pieces(
            *("<|a|>", "<|b|>", "<|c|>", "<|d|>"),
            tokenizer_config={"eos_token": "<|a|>", "bos_token": BEGIN},
            generation_config={"eos_token_id": [401, 30]},  # meant for this tokenizer: even a word
            config={"eos_token_id": [402, 31], "text_config": {"eos_token_id": 403}},
        )
        by_name = {tokenizer.control_ids[END], tokenizer.control_ids[TURN]}
        assert tokenizer.stop_ids == {400, 401, 402, 403, 30} | by_name

    @pytest.mark.parametrize("config", [{}, {"text_config": 3}, {"eos_token_id": "x"}])
    def test_odd_configurations_name_none(self, config: dict[str, Any]) -> None:
        tokenizer = with_pieces(config=config)
        assert tokenizer.stop_ids == {tokenizer.control_ids[END], tokenizer.control_ids[TURN]}


class TestGguf:
    """Files whose metadata name one end, or a wrong one."""

    @staticmethod
    def load(*added: tuple[str, int], **ids: int) -> tuple[BaseTokenizer, dict[str, bytes]]:
        model = Tokenizer(TINY / "tokenizer.model").sp_model
        n = model.vocab_size()
        checks = ((2, model.is_unknown), (3, model.is_control), (6, model.is_byte))
        kinds = [next((k for k, check in checks if check(i)), 1) for i in range(n)]
        metadata = {
            "model": "llama",
            "tokens": [*(model.id_to_piece(i) for i in range(n)), *(text for text, _ in added)],
            "scores": [*(model.get_score(i) for i in range(n)), *(0.0 for _ in added)],
            "token_type": [*kinds, *(kind for _, kind in added)],
            **{f"{role}_token_id": i for role, i in ids.items()},
        }
        files = tokenizer_files({f"tokenizer.ggml.{key}": v for key, v in metadata.items()})
        return load_tokenizer(files), files

    @pytest.mark.parametrize("kind", [1, 3, 4])
    def test_ends_are_found_by_name_whatever_their_type(self, kind: int) -> None:
        """A failure means that ChatML models converted with </s> as their end never stop."""
        tokenizer, files = self.load(("<|im_start|>", 3), ("<|im_end|>", kind))
        assert tokenizer.stop_ids == {2, 769} and tokenizer.eos_id == 2
        assert tokenizer.control_ids["<|im_end|>"] == 769
        # transformers, which doesn't know them by name, is told too.
        assert json.loads(files["generation_config.json"]) == {"eos_token_id": [2, 769]}

    def test_the_end_of_infilling_ends_no_other_text(self) -> None:
        """A failure means that Code Llama ends otherwise from a GGUF file than from Meta's."""
        tokenizer, files = self.load(eot=6)
        assert tokenizer.eot_id == 6 and tokenizer.stop_ids == {2}
        assert "generation_config.json" not in files

    def test_the_beginning_isnt_an_end(self) -> None:
        """A failure means that transformers ends a text that the file's own model goes on with."""
        tokenizer, files = self.load(("<|endoftext|>", 3), ("<|end|>", 3), bos=768, eos=2)
        assert tokenizer.stop_ids == {2, 769}
        assert json.loads(files["generation_config.json"]) == {"eos_token_id": [2, 769]}


class TestWithEnds:
    TOKENIZER = with_pieces("<|a|>", tokenizer_config={"eos_token": END})
    OWN = frozenset(TOKENIZER.stop_ids)

    def test_the_tokenizers_ends_are_added_and_are_its_own(self) -> None:
        """A failure means that texts don't end, or that an end seems to be the caller's."""
        params, own = with_ends(SamplingParams(stop=["x"], stop_token_ids=[5]), self.TOKENIZER)
        assert params.stop == ("x",) and params.stop_token_ids == {5, *self.OWN}
        assert own == self.OWN

    def test_a_spelling_is_an_id_too(self) -> None:
        """A failure means that ``stop=["<|eot_id|>"]`` stops nothing."""
        params, own = with_ends(SamplingParams(stop=["<|a|>"]), self.TOKENIZER, ["<|gap|>"])
        assert params.stop_token_ids == {400, *self.OWN} and own == {"<|gap|>", *self.OWN}
        assert params.stop == ("<|a|>", "<|gap|>")
        params, own = with_ends(SamplingParams(), self.TOKENIZER, ["<|a|>"])
        assert params.stop_token_ids == {400, *self.OWN} and own == {400, "<|a|>", *self.OWN}

    def test_what_the_caller_names_is_the_callers(self) -> None:
        """A failure means that the result doesn't say that the caller's stop was met."""
        eot = self.TOKENIZER.control_ids[TURN]
        for stops in ({"stop": [TURN]}, {"stop_token_ids": [eot]}):
            params, own = with_ends(SamplingParams(**stops), self.TOKENIZER, [TURN])
            assert eot in params.stop_token_ids and eot not in own

    def test_without_its_ends_the_callers_remain(self) -> None:
        """A failure means that ``ignore_eos`` ignores too little, or too much."""
        params = SamplingParams(stop=["x", TURN], stop_token_ids=[5], ignore_eos=True)
        params, own = with_ends(params, self.TOKENIZER, ["y", 400])
        assert own == frozenset() and params.stop == ("x", TURN)
        assert params.stop_token_ids == {5, self.TOKENIZER.control_ids[TURN]}


class TestWithMarks:
    def test_without_marks_nothing_is_wrapped(self, tiny_tokenizer: Tokenizer) -> None:
        """A failure means that every token of every text pays for it."""
        decode = tiny_tokenizer.decode
        assert with_marks(decode, tiny_tokenizer, {}) is decode

    @pytest.mark.parametrize("spaced", [True, False])
    @pytest.mark.parametrize("text", ["a▁<EOT>b", "▁<EOT> b c▁<MID>▁<EOT>", "a ▁<EOT>\nb", "é"])
    def test_texts_are_those_that_the_prompt_was_made_of(self, text: str, spaced: bool) -> None:
        """A failure means that what a model writes differs from what it has read."""
        tokenizer = Tokenizer(TINY / "tokenizer.model")
        tokenizer.spaced = spaced
        marks = {i: piece for piece, i in tokenizer.control_ids.items()}
        decode = with_marks(tokenizer.decode, tokenizer, marks)
        assert decode(structure_ids(tokenizer, text)) == text

    def test_other_control_pieces_stay_silent(self) -> None:
        tokenizer = with_pieces("<|a|>", "<|b|>", tokenizer_config={"eos_token": THINK})
        ids = structure_ids(tokenizer, "x<|a|>y<|b|>z")
        assert with_marks(tokenizer.decode, tokenizer, {401: "<|b|>"})(ids) == "xy<|b|>z"
