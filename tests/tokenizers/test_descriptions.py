"""Of several vocabularies side by side, the one that covers the embedding."""

import base64
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hf_files import make_hf
from json_tokenizers import byte_level, like_llama2

from llama import Llama, Tokenizer
from llama.generation import TINY
from llama.tokenizers import load_tokenizer
from llama.tokenizers.json_tokenizer import JsonTokenizer
from llama.tokenizers.tiktoken import TiktokenTokenizer

FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
TIKTOKEN = "".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)).encode()


def longer(n_added: int) -> bytes:
    """The embedded tokenizer as a tokenizer.json, with more pieces."""
    data = like_llama2("prepend")
    data["added_tokens"] += [
        {"id": 768 + i, "content": f"<{i}>", "special": True, **FLAGS} for i in range(n_added)
    ]
    return json.dumps(data).encode()


def both(n_added: int, **more: Any) -> dict[str, Path | bytes]:
    others = {f"{name}.json": json.dumps(value).encode() for name, value in more.items()}
    return {
        "tokenizer.model": TINY / "tokenizer.model",
        "tokenizer.json": longer(n_added),
        **others,
    }


@pytest.mark.parametrize(
    ("n_json", "vocab_size", "expected"),
    [
        (0, 768, Tokenizer),
        (0, 832, Tokenizer),  # padded
        (0, None, Tokenizer),
        (2, 770, JsonTokenizer),
        (2, 832, JsonTokenizer),
        (2, None, JsonTokenizer),
        (2, 768, Tokenizer),
        (2, 769, JsonTokenizer),  # without the last
    ],
)
def test_the_vocabulary_that_covers_more_of_the_embedding(
    n_json: int, vocab_size: int | None, expected: type
) -> None:
    """A failure means that pieces that the model was trained with aren't known."""
    tokenizer = load_tokenizer(both(n_json), vocab_size)
    assert type(tokenizer) is expected
    covered = 768 if expected is Tokenizer else min(770, vocab_size or 770)
    assert tokenizer.n_words == covered


def test_pieces_that_are_added_to_the_older_file_count() -> None:
    """A failure means that another package is needed although all pieces are known."""
    tokenizer = load_tokenizer(both(2, added_tokens={"<0>": 768, "<1>": 769}), 770)
    assert isinstance(tokenizer, Tokenizer) and tokenizer.n_words == 770
    tokenizer = load_tokenizer(both(3, added_tokens={"<0>": 768, "<2>": 770}), 771)
    assert isinstance(tokenizer, JsonTokenizer) and tokenizer.n_words == 771


def test_a_model_that_is_too_large_for_the_embedding() -> None:
    """A failure means that a directory with the right file is refused for the wrong one."""
    data = byte_level()
    files = {
        "tokenizer.model": TINY / "tokenizer.model",
        "tokenizer.json": json.dumps(data).encode(),
    }
    assert isinstance(load_tokenizer(files, 346), JsonTokenizer)
    assert isinstance(load_tokenizer(files, 768), Tokenizer)


@pytest.mark.parametrize(
    "content", [TIKTOKEN, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"]
)
def test_a_model_of_another_kind_beside_json(
    content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """A failure means that Llama 3's own files keep transformers' from being read."""
    files = {"tokenizer.model": content, "tokenizer.json": json.dumps(byte_level()).encode()}
    with caplog.at_level(logging.WARNING):
        assert load_tokenizer(files, 346).n_words == 346
    warned = "tokenizer.model is not a SentencePiece model: tokenizer.json " in caplog.text
    assert warned is (content is not TIKTOKEN)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize("ranks", [True, False])
def test_damaged_json_beside_a_model(ranks: bool, caplog: pytest.LogCaptureFixture) -> None:
    """A failure means that a directory is refused although its vocabulary is whole."""
    model = TIKTOKEN if ranks else TINY / "tokenizer.model"
    tokenizer = load_tokenizer({"tokenizer.model": model, "tokenizer.json": LFS}, 832)
    assert tokenizer.n_words == (512 if ranks else 768)
    assert "tokenizer.json is not JSON" in caplog.text and "tokenizer.model beside" in caplog.text


def test_tiktoken_beside_json_that_covers_less(caplog: pytest.LogCaptureFixture) -> None:
    """A failure means that the control pieces of prompts are unknown."""
    files = {
        "tokenizer.model": TIKTOKEN,
        "tokenizer.json": json.dumps(byte_level()).encode(),
        "tokenizer_config.json": b'{"add_bos_token": false}',
        "added_tokens.json": b'{"<x>": 512}',
    }
    tokenizer = load_tokenizer(files, 600)
    assert isinstance(tokenizer, TiktokenTokenizer) and not tokenizer.add_bos
    assert "no place for 1 pieces that the files beside it add, as <x>" in caplog.text
    # Cut off in a line, or in a letter
    damaged = {**files, "tokenizer.model": TIKTOKEN[:-9]}
    assert isinstance(load_tokenizer(damaged, 346), JsonTokenizer)
    assert "tokenizer.json beside it is read" in caplog.text


@pytest.mark.parametrize("has_json", [True, False])
def test_embeddings_padded_beyond_the_vocabulary(has_json: bool, tmp_path: Path) -> None:
    """A failure means that fine-tuned models with rows that stand for nothing don't load."""
    make_hf(vocab_size=832).save_pretrained(tmp_path)
    files = both(2) if has_json else {"tokenizer.model": TINY / "tokenizer.model"}
    files["added_tokens.json"] = b'{"<0>": 768, "<1>": 769}'
    for name, source in files.items():
        content = source if isinstance(source, bytes) else source.read_bytes()
        (tmp_path / name).write_bytes(content)
    llama = Llama.build(tmp_path, device="cpu", max_seq_len=32)
    assert (llama.tokenizer.n_words, llama.model.params.vocab_size) == (770, 832)
    result = llama.text_completion(["the cat"], max_gen_len=8, temperature=1.5, logprobs=True)[0]
    assert len(result["tokens"]) <= 8
