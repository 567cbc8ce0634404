"""What a caller or a file gets wrong is answered in one clear sentence, for every public door."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama import Llama, Tokenizer
from llama.chat.prompts import dialog_prompt_tokens, infilling_prompt_tokens
from llama.checkpoint.save import reshard, save
from llama.generation import TINY

USER = {"role": "user", "content": "Hi"}
NAN = float("nan")

# (call, exception, what its message says)
TABLE: dict[str, tuple[Callable[[Llama], Any], type[Exception], str]] = {
    "generate: one prompt": (lambda m: m.generate([1, 2], 3), TypeError, "prompt 0 is 1"),
    "generate: text": (lambda m: m.generate(["abc"], 3), TypeError, "prompt 0 is 'abc'"),
    "generate: no int": (lambda m: m.generate([[1, 2.5]], 3), TypeError, "holds 2.5"),
    "generate: None": (lambda m: m.generate(None, 3), TypeError, "prompt_tokens is None"),
    "generate: empty": (lambda m: m.generate([[]], 3), ValueError, "no tokens"),
    "generate: id": (lambda m: m.generate([[768]], 3), ValueError, "outside the vocabulary"),
    "generate: length": (lambda m: m.generate([[1]], -1), ValueError, "max_gen_len is -1"),
    "generate: float": (lambda m: m.generate([[1]], 1.5), ValueError, "max_gen_len is 1.5"),
    "generate: warm": (lambda m: m.generate([[1]], 1, "hot"), TypeError, "temperature is 'hot'"),
    "generate: cold": (lambda m: m.generate([[1]], 1, -1), ValueError, "temperature is -1"),
    "generate: nan": (lambda m: m.generate([[1]], 1, NAN), ValueError, "temperature is nan"),
    "generate: top_p": (lambda m: m.generate([[1]], 1, 1, 2), ValueError, "top_p is 2"),
    "generate: top": (
        lambda m: m.generate([[1]], 1, top_logprobs=-1),
        ValueError,
        "top_logprobs is -1",
    ),
    "stream: echo": (lambda m: m.text_completion_stream("a", echo=True), TypeError, "echo"),
    "generate: stop": (lambda m: m.generate([[1]], 1, stop="a"), TypeError, "stop is one str"),
    "generate: stop None": (lambda m: m.generate([[1]], 1, stop=None), TypeError, "stop is None"),
    "generate: stop id": (lambda m: m.generate([[1]], 1, stop=[1]), ValueError, "stop is"),
    "text: one": (lambda m: m.text_completion("a"), TypeError, "prompts is one str"),
    "text: bytes": (lambda m: m.text_completion([b"a"]), TypeError, "encodes str, not bytes"),
    "text: None": (lambda m: m.text_completion(None), TypeError, "prompts is None"),
    "text: surrogate": (lambda m: m.text_completion(["\ud800"]), ValueError, "surrogate"),
    "text: long": (lambda m: m.text_completion(["a " * 999]), ValueError, "more than max_seq_len"),
    "chat: one": (lambda m: m.chat_completion([USER]), TypeError, "a dialog is a list"),
    "chat: text": (lambda m: m.chat_completion(["Hi"]), TypeError, "a dialog is a list"),
    "chat: empty": (lambda m: m.chat_completion([[]]), ValueError, "dialog is empty"),
    "chat: twice": (lambda m: m.chat_completion([[USER, USER]]), ValueError, "message 1"),
    "infill: pairs": (lambda m: m.text_infilling(["a"], []), ValueError, "1 prefixes but 0"),
    "infill: one": (lambda m: m.text_infilling("a", "b"), TypeError, "prefixes is one str"),
    "infill: None": (lambda m: m.text_infilling([None], ["b"]), TypeError, "not NoneType"),
    "stream: list": (lambda m: m.text_completion_stream(["a"]), TypeError, "str, not list"),
    "stream: dialogs": (lambda m: m.chat_completion_stream([[USER]]), TypeError, "a dialog is"),
    "stream: suffix": (lambda m: m.text_infilling_stream("a", 1), TypeError, "str, not int"),
    "encode: None": (lambda m: m.tokenizer.encode(None, True, True), TypeError, "not NoneType"),
    "decode: id": (lambda m: m.tokenizer.decode([10**9]), ValueError, "outside the vocabulary"),
    "decode: text": (lambda m: m.tokenizer.decode("abc"), TypeError, "decodes token ids"),
    "piece: id": (lambda m: m.tokenizer.token_piece(-1), ValueError, "outside the vocabulary"),
    "model: position": (
        lambda m: m.model(torch.ones(1, 3, dtype=torch.long), 0, [3]),
        ValueError,
        "position 3 of 3",
    ),
    "model: ids": (
        lambda m: m.model(torch.tensor([[768]])),
        ValueError,
        "outside the vocabulary of 768",
    ),
    "model: float": (lambda m: m.model(torch.ones(1, 3)), TypeError, "expected token ids"),
    "decode: float": (lambda m: m.tokenizer.decode([1.5]), TypeError, "token ids are int"),
    "model: start": (
        lambda m: m.model(torch.ones(1, 3, dtype=torch.long), 511),
        ValueError,
        "max_seq_len of 512",
    ),
    "model: rows": (
        lambda m: m.model(torch.ones(9, 3, dtype=torch.long)),
        ValueError,
        "max_batch_size of 8",
    ),
    "model: starts": (
        lambda m: m.model(torch.ones(2, 3, dtype=torch.long), [0]),
        ValueError,
        "1 start positions for 2 sequences",
    ),
    "model: shape": (
        lambda m: m.model(torch.ones(3, dtype=torch.long)),
        ValueError,
        r"shape \(bsz, seqlen\)",
    ),
    "build: length": (lambda m: Llama.build(max_seq_len=0), ValueError, "max_seq_len is 0"),
    "build: batch": (lambda m: Llama.build(max_batch_size="8"), ValueError, "max_batch_size is"),
    "build: dtype": (lambda m: Llama.build(dtype="bf16"), TypeError, "dtype is 'bf16'"),
    "build: whole": (lambda m: Llama.build(dtype=torch.int8), TypeError, "dtype is torch.int8"),
    "build: device": (lambda m: Llama.build(device="gpu"), ValueError, "device is 'gpu'"),
    "build: meta": (lambda m: Llama.build(device="meta"), ValueError, "doesn't offer"),
    "build: float": (lambda m: Llama.build(device=1.5), ValueError, "device is 1.5"),
    "build: None": (lambda m: Llama.build(None), TypeError, "ckpt_dir is None"),
    "generate: end": (
        lambda m: m.generate([[1]], 1, stop_token="x"),
        TypeError,
        "stop_token is 'x'",
    ),
    "generate: seed": (lambda m: m.generate([[1]], 1, seed=[1]), TypeError, r"seed is \[1\]"),
    "build: nowhere": (lambda m: Llama.build("/nowhere"), FileNotFoundError, "/nowhere"),
    "build: tokenizer": (
        lambda m: Llama.build(tokenizer_path="/nowhere"),
        FileNotFoundError,
        "no tokenizer at /nowhere",
    ),
    "build: processes": (
        lambda m: Llama.build(model_parallel_size=2),
        ValueError,
        "model_parallel_size is 2",
    ),
    "save: there": (
        lambda m: save([m.model.state_dict()], m.model.params, TINY),
        FileExistsError,
        "already exists",
    ),
    "save: parts": (
        lambda m: save([m.model.state_dict()], m.model.params, Path("/tmp/out"), 3),
        ValueError,
        "3 parts can't be made",
    ),
    "reshard: none": (
        lambda m: reshard("/nowhere", "/tmp/out"),
        FileNotFoundError,
        "/nowhere",
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_mistakes(name: str, tiny: Llama) -> None:
    call, error, message = TABLE[name]
    with pytest.raises(error, match=message) as caught:
        call(tiny)
    assert "\n" not in str(caught.value)
    assert tiny.text_completion(["Sam"], 0, max_gen_len=2)  # and the next call works


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
FEW = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FEW
@given(value=JSON)
def test_any_json_for_a_message_is_a_dialog_or_a_clear_error(
    value: object, tiny_tokenizer: Tokenizer
) -> None:
    for dialog in (value, [value], [{"role": value, "content": value}], [USER, value]):
        try:
            dialog_prompt_tokens(tiny_tokenizer, dialog)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            assert str(error)


@FEW
@given(value=JSON)
def test_any_json_for_a_fill_is_a_prompt_or_a_clear_error(
    value: object, tiny_tokenizer: Tokenizer
) -> None:
    try:
        infilling_prompt_tokens(tiny_tokenizer, value, "a")  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        assert str(error)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("small")
    model = make_model(vocab_size=768, n_layers=1)
    target = directory / "model"
    tokenizer = TINY / "tokenizer.model"
    save([model.state_dict()], model.params, target, files={"tokenizer.model": tokenizer})
    return target


@pytest.mark.slow
@FEW
@given(key=st.sampled_from(["dim", "n_layers", "n_kv_heads", "norm_eps", "x"]), value=JSON)
def test_any_value_in_params_json_loads_or_is_a_clear_error(
    small: Path, key: str, value: object
) -> None:
    original = (small / "params.json").read_text()
    try:
        (small / "params.json").write_text(json.dumps({**json.loads(original), key: value}))
        Llama.build(small, max_seq_len=16, device="cpu")
    except ValueError as error:
        assert "params.json" in str(error) or "consolidated" in str(error) or "shape" in str(error)
    finally:
        (small / "params.json").write_text(original)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["params.json", "consolidated.00.pth", "tokenizer.model"])
def test_any_bytes_in_a_file_are_a_clear_error(small: Path, name: str) -> None:
    original = (small / name).read_bytes()

    @FEW
    @given(st.binary(max_size=200), st.integers(0, len(original)))
    def check(noise: bytes, at: int) -> None:
        for content in (noise, original[:at] + noise + original[at + len(noise) :]):
            (small / name).write_bytes(content)
            try:
                llama = Llama.build(small, max_seq_len=16, device="cpu")
                llama.text_completion(["a"], 0, max_gen_len=2)
            except (ValueError, FileNotFoundError) as error:
                assert str(error)
            except RuntimeError as error:
                assert "not finite" in str(error)

    try:
        check()
    finally:
        (small / name).write_bytes(original)
