"""What a checkpoint recommends: told while it is loaded, used on request only."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hf_files import make_hf, save_hf

from llama import Llama
from llama.logits.recommended import gguf_sampling, recommended_sampling
from llama.sampling import SamplingParams

LLAMA3 = {"do_sample": True, "temperature": 0.4, "top_p": 0.7, "eos_token_id": [2, 5]}
"""As the published Llama 3 files say it, with other numbers."""


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LLAMA3, {"temperature": 0.4, "top_p": 0.7}),
        ({"do_sample": True}, {"temperature": 1.0, "top_p": 1.0}),
        (
            {"do_sample": True, "top_k": 20, "min_p": 0.1, "top_p": None, "max_length": 9},
            {"temperature": 1.0, "top_p": 1.0, "top_k": 20, "min_p": 0.1},
        ),
        ({"eos_token_id": 2}, {"temperature": 0.0}),
        (
            {"do_sample": False, "temperature": 0.4, "repetition_penalty": 1.1},
            {"temperature": 0.0, "repetition_penalty": 1.1},
        ),
    ],
)
def test_what_a_file_says(config: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    """A failure means other values than transformers would take, but for its top_k of 50."""
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(config))
    assert recommended_sampling({path.name: path}, "").values == expected


def test_ids_of_another_file_recommend_nothing() -> None:
    """A failure means that a config.json's ids pass for a recommendation."""
    files = {"generation_config.json": b'{"bos_token_id": 1, "eos_token_id": [2]}'}
    for each in ({}, files):
        assert recommended_sampling(each, "").values == {}


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Llama]:
    save_hf(make_hf(), tmp_path)

    def make(config: dict[str, Any] | None) -> Llama:
        path = tmp_path / "generation_config.json"
        path.unlink(missing_ok=True)
        if config is not None:
            path.write_text(json.dumps(config))
        return Llama.build(tmp_path, max_seq_len=128, device="cpu")

    return make


def test_it_is_told_and_used_on_request(
    build: Callable[..., Llama], caplog: pytest.LogCaptureFixture
) -> None:
    """A failure means that a file changes texts unasked, or a request for it does nothing."""
    with caplog.at_level(logging.INFO, "llama.logits.recommended"):
        llama = build({**LLAMA3, "repetition_penalty": 1.1})
    told = "recommends temperature=0.4, top_p=0.7, repetition_penalty=1.1: sampling='checkpoint'"
    assert told in caplog.text and "generation_config.json" in caplog.text
    [usual] = llama.tasks.generate([[1, 5]], SamplingParams())
    assert (usual.params.temperature, usual.params.top_p) == (0.6, 0.9)
    [asked] = llama.tasks.generate([[1, 5]], SamplingParams(top_p=0.5, sampling="checkpoint"))
    found = asked.params.temperature, asked.params.top_p, asked.params.repetition_penalty
    assert found == (0.4, 0.5, 1.1)
    how: dict[str, Any] = {"seed": 1, "max_gen_len": 20}
    assert llama.text_completion(["The"], sampling="checkpoint", **how) == llama.text_completion(
        ["The"], 0.4, 0.7, repetition_penalty=1.1, **how
    )


def test_without_a_file_a_request_is_an_error(build: Callable[..., Llama], tiny: Llama) -> None:
    """A failure means that our own defaults pass for the checkpoint's."""
    for llama in (build(None), tiny):
        with pytest.raises(ValueError, match="this checkpoint has no generation_config"):
            llama.text_completion(["The"], sampling="checkpoint")


@pytest.mark.parametrize(
    ("value", "message"),
    [("hot", "temperature is 'hot': give a number"), (-1, "temperature is -1: expected 0")],
)
def test_nonsense_is_named_where_it_is_used(
    value: object, message: str, build: Callable[..., Llama]
) -> None:
    """A failure means that such a checkpoint can't be used at all, or that it is hard to mend."""
    llama = build({"do_sample": True, "temperature": value})
    assert llama.text_completion(["The"], max_gen_len=1)
    with pytest.raises(ValueError, match=rf"generation_config\.json: {message}"):
        llama.text_completion(["The"], sampling="checkpoint")


def test_gguf_files_say_it_by_llama_cpp_s_names() -> None:
    """A failure means that a converted checkpoint recommends nothing, or something else."""
    prefix = "general.sampling."
    metadata = {
        **{f"{prefix}temp": 0.5, f"{prefix}top_k": 30, f"{prefix}penalty_repeat": 1.2},
        **{f"{prefix}mirostat": 1, "general.name": "x"},
    }
    expected = {"temperature": 0.5, "top_k": 30, "repetition_penalty": 1.2}
    assert gguf_sampling(metadata) == {"do_sample": True, **expected}
    assert gguf_sampling({"general.name": "x", f"{prefix}mirostat": 1}) == {}
    files = {"generation_config.json": json.dumps(gguf_sampling(metadata)).encode()}
    found = recommended_sampling(files, "a.gguf")
    assert (found.source, found.values) == ("a.gguf", {"top_p": 1.0, **expected})
