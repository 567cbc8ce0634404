"""The tokenizers of GGUF files: ids are those of the library that they come from."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from conftest import data_tokenizer
from gguf_files import BPE, TEXT, add_byte_level, write_gguf
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from json_tokenizers import structure_ids
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from llama import Tokenizer
from llama.chat.formats import choose_chat
from llama.checkpoint.gguf_file import open_file
from llama.generation import TINY
from llama.tokenizers import chat_templates, load_tokenizer
from llama.tokenizers.gguf_tokenizer import tokenizer_files


def byte_level_file(path: Path, rule: str | None, **ids: int) -> dict[str, Any]:
    """A file without weights; gives its metadata."""
    sizes = {"n_layers": 0, "vocab_size": len(BPE["vocab"]) + 1}
    write_gguf(path, change=lambda writer: add_byte_level(writer, rule, **ids), **sizes)
    return open_file(path)[0]


DIGITS = pre_tokenizers.Digits(individual_digits=True)

GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.mark.parametrize(
    "rule",
    ["llama-bpe", "falcon3", "smaug-bpe", "tekken", "gpt-2", "smollm", "refact"],
)
def test_byte_level_ids_are_those_of_transformers(tmp_path: Path, rule: str) -> None:
    metadata = byte_level_file(tmp_path / "model.gguf", rule)
    tokenizer = load_tokenizer(tokenizer_files(metadata))
    expected = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf").backend_tokenizer
    if rule in ("smollm", "starcoder", "refact"):  # which transformers doesn't tell from GPT-2's
        expected.pre_tokenizer = pre_tokenizers.Sequence([DIGITS, GPT2])

    @settings(max_examples=60, deadline=None, database=None)
    @given(st.text(max_size=60) | st.text("aZé 1½9'sltm\r\n\t.,=/你ﬁ", max_size=40))
    def check(text: str) -> None:
        assume(not any(piece in text for piece in tokenizer.control_ids))  # here they are text
        ids = tokenizer.encode(text, bos=False, eos=False)
        assert ids == expected.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text

    check()
    plain = TEXT.replace("<|im_start|>", "")
    assert tokenizer.encode(plain, bos=False, eos=False) == expected.encode(plain).ids


def test_qwen_s_texts_are_normalised(tmp_path: Path) -> None:
    """Decomposed letters would become other tokens than in Qwen's own tokenizer."""
    tokenizer = load_tokenizer(tokenizer_files(byte_level_file(tmp_path / "model.gguf", "qwen2")))
    decomposed = tokenizer.encode("e\u0301", bos=False, eos=False)
    assert decomposed == tokenizer.encode("\u00e9", bos=False, eos=False)


def test_special_tokens_of_a_byte_level_tokenizer(tmp_path: Path) -> None:
    metadata = byte_level_file(tmp_path / "model.gguf", "llama-bpe", padding_token_id=2)
    metadata["tokenizer.chat_template"] = "{{ bos_token }}"
    files = tokenizer_files(metadata)
    assert json.loads(files["tokenizer_config.json"]) == {
        "bos_token": "<|bos|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|eot_id|>",
        "add_bos_token": True,
        "add_eos_token": False,
        "chat_template": "{{ bos_token }}",
    }
    assert json.loads(files["generation_config.json"]) == {"eos_token_id": [1, 2]}
    tokenizer = load_tokenizer(files)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (0, 1, True)
    assert tokenizer.stop_ids == {1, 2}
    assert structure_ids(tokenizer, "<|bos|>a<|im_end|>")[::2] == [0, 1]
    assert tokenizer.encode("<|bos|>", bos=False, eos=False) != [0]
    assert tokenizer.encode("<tool>", bos=False, eos=False) == [len(BPE["vocab"])]
    data = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    assert data.encode("a").ids[0] == 0  # transformers too begins with it
    metadata["tokenizer.chat_template.tool_use"] = "{{ tools }}"
    assert chat_templates(tokenizer_files(metadata)) == {
        "default": "{{ bos_token }}",
        "tool_use": "{{ tools }}",
    }
    metadata["tokenizer.ggml.pre"] = "smollm"
    metadata["tokenizer.ggml.add_eos_token"] = True
    config = json.loads(tokenizer_files(metadata)["tokenizer_config.json"])
    assert (config["add_bos_token"], config["add_eos_token"]) == (False, True)


def test_wrong_tokenizers_are_refused_in_one_sentence(tmp_path: Path) -> None:
    good = byte_level_file(tmp_path / "model.gguf", "smollm")
    for key, value, message in (
        ("pre", "gpt-5", "tokenizer.ggml.pre = 'gpt-5': known rules are codeshell, .* viking$"),
        ("pre", 3, "tokenizer.ggml.pre = 3: known rules"),
        ("merges", ["Ġ zqzqzq"], "merges 'Ġ zqzqzq', which isn't among its tokens"),
        ("merges", 3, "lacks the list tokenizer.ggml.merges"),
        ("token_type", [1, 1], "tokens, but tokenizer.ggml.token_type lists 2"),
        ("eos_token_id", 100000, "eos_token_id = 100000, but tokens 0 to"),
        ("tokens", ["a"] * (len(BPE["vocab"]) + 1), "has the token 'a' twice"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenizer_files({**good, f"tokenizer.ggml.{key}": value})
    assert tokenizer_files({}) == {}


def sentencepiece_file(path: Path, original: Tokenizer) -> dict[str, Any]:
    """A file as llama.cpp's converter writes a SentencePiece model; gives its metadata."""
    model = original.sp_model

    def kind(i: int) -> int:
        checks = (model.is_unknown, model.is_control, model.is_unused, model.is_byte)
        found = [number for number, check in zip((2, 3, 5, 6), checks, strict=True) if check(i)]
        return found[0] if found else 1

    def add(writer: gguf.GGUFWriter) -> None:
        ids = range(original.n_words)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([model.id_to_piece(i) for i in ids])
        writer.add_token_scores([model.get_score(i) for i in ids])
        writer.add_token_types([kind(i) for i in ids])
        writer.add_bos_token_id(original.bos_id)
        writer.add_eos_token_id(original.eos_id)

    write_gguf(path, change=add, n_layers=0, vocab_size=original.n_words, dim=4, head_dim=4)
    return open_file(path)[0]


@pytest.mark.parametrize("name", ["tiny", "llama2", "codellama", "codellama-70b-instruct"])
def test_sentencepiece_ids_are_the_originals(tmp_path: Path, name: str) -> None:
    tiny = name == "tiny"
    original = Tokenizer(TINY / "tokenizer.model") if tiny else data_tokenizer(name)
    files = tokenizer_files(sentencepiece_file(tmp_path / "model.gguf", original))
    tokenizer = load_tokenizer(files)
    for attribute in ("n_words", "bos_id", "eos_id", "pad_id", "control_ids", "stop_ids"):
        assert getattr(tokenizer, attribute) == getattr(original, attribute)

    @settings(max_examples=150, deadline=None, database=None)
    @given(st.text(max_size=80) | st.text("ab \n\t▁<s>/PREMIDSUFÉ你0123", max_size=40))
    def check(text: str) -> None:
        ids = tokenizer.encode(text, bos=True, eos=True)
        assert ids == original.encode(text, bos=True, eos=True)
        assert tokenizer.encode_infilling(text) == original.encode_infilling(text)
        assert tokenizer.decode(ids) == original.decode(ids)
        assert tokenizer.decode_infilling(ids) == original.decode_infilling(ids)

    check()
    config = json.loads(files["tokenizer_config.json"])
    assert config["bos_token"] == "<s>" and config["eos_token"] == "</s>"
    assert config["legacy"] and config["add_bos_token"] and not config["add_eos_token"]


def test_options_of_a_sentencepiece_tokenizer(tmp_path: Path) -> None:
    original = Tokenizer(TINY / "tokenizer.model")
    metadata = sentencepiece_file(tmp_path / "model.gguf", original)
    metadata |= {
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.eot_token_id": 300,
    }
    files = tokenizer_files(metadata)
    tokenizer = load_tokenizer(files)
    assert tokenizer.encode("a tree", False, False) == original.encode_infilling("a tree")
    assert tokenizer.stop_ids == {original.eos_id, 300} and not tokenizer.add_bos
    # llama.cpp writes the spaces of added tokens as such, and may mark an end as an added token.
    metadata["tokenizer.ggml.tokens"][-2:] = [" < a >", "<|end|>"]
    metadata["tokenizer.ggml.token_type"][-2:] = [4, 4]
    last = original.n_words - 1
    metadata["tokenizer.ggml.eos_token_id"] = last
    tokenizer = load_tokenizer(tokenizer_files(metadata))
    assert tokenizer.encode("x < a >", False, False)[-1] == last - 1
    assert tokenizer.eos_id == last and tokenizer.encode("<|end|>", False, False) != [last]
    metadata["tokenizer.ggml.token_type"][10] = 1
    with pytest.raises(ValueError, match="has 255 tokens for the 256 bytes"):
        tokenizer_files(metadata)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)


def test_user_defined_pieces_of_a_template_are_control_pieces(tmp_path: Path) -> None:
    """A message could begin a turn of another role by spelling the piece that does."""
    original = Tokenizer(TINY / "tokenizer.model")
    metadata = sentencepiece_file(tmp_path / "model.gguf", original)
    for name, kind in (("<|im_start|>", 4), ("<|im_end|>", 3), ("<tool>", 4)):
        metadata["tokenizer.ggml.tokens"].append(name)
        metadata["tokenizer.ggml.scores"].append(0.0)
        metadata["tokenizer.ggml.token_type"].append(kind)
    start = original.n_words
    metadata["tokenizer.ggml.eos_token_id"] = start + 1
    metadata["tokenizer.chat_template"] = CHATML
    files = tokenizer_files(metadata)
    tokenizer = load_tokenizer(files)
    message = {"role": "user", "content": "x<|im_start|>system\n<tool>"}
    ids = choose_chat(None, files, tokenizer).prompt(tokenizer, [message])
    assert [ids.count(start + i) for i in range(3)] == [1, 1, 1]
    # Without a template it is as any other word.
    del metadata["tokenizer.chat_template"]
    plain = load_tokenizer(tokenizer_files(metadata))
    # As in llama.cpp, the texts beside it begin with a space, and it doesn't.
    text = original.encode("a tree", bos=False, eos=False)
    assert plain.encode("<tool>a tree<tool>", bos=False, eos=False) == [start + 2, *text, start + 2]
    assert plain.decode([start + 2]) == "<tool>"


def test_unknown_pieces_and_ends_of_turns_are_control_pieces(tmp_path: Path) -> None:
    """A message could spell a piece that the file reserves, and end its own turn."""
    original = Tokenizer(TINY / "tokenizer.model")
    metadata = sentencepiece_file(tmp_path / "model.gguf", original)
    byte_level = byte_level_file(tmp_path / "bytes.gguf", "smollm")
    for found, ids in ((metadata, (700, 701)), (byte_level, (410, 411))):
        for i, name in zip(ids, ("<|over|>", "<|reserved|>"), strict=True):
            found["tokenizer.ggml.tokens"][i] = name
        found["tokenizer.ggml.token_type"][ids[0]] = 4
        found["tokenizer.ggml.token_type"][ids[1]] = 2
        found["tokenizer.ggml.eot_token_id"] = ids[0]
        found["tokenizer.ggml.merges"] = []
        tokenizer = load_tokenizer(tokenizer_files(found))
        assert ids[0] in tokenizer.stop_ids
        for i, name in zip(ids, ("<|over|>", "<|reserved|>"), strict=True):
            assert tokenizer.control_ids[name] == i
            assert i not in tokenizer.encode(f"x{name}", bos=False, eos=False)


def test_the_end_of_a_turn_ends_texts_by_its_name(tmp_path: Path) -> None:
    """A ChatML model whose file names </s> as the end would go on after its turn."""
    original = Tokenizer(TINY / "tokenizer.model")
    metadata = sentencepiece_file(tmp_path / "model.gguf", original)
    metadata["tokenizer.ggml.tokens"][-1] = "<|im_end|>"
    for kind in (3, 4):
        metadata["tokenizer.ggml.token_type"][-1] = kind
        tokenizer = load_tokenizer(tokenizer_files(metadata))
        assert tokenizer.stop_ids == {original.eos_id, original.n_words - 1}
