"""Adapters as models of the server: a request chooses one by its name."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
import torch
from hf_files import as_transformers, write_adapter
from servers import post, serve

from llama import Llama
from llama.adapters import Adapter
from llama.cli import COMMANDS
from llama.sampling import SamplingParams
from llama.server import serve as serving
from llama.server import workers
from llama.server.config import ServerConfig
from llama.server.loop import EngineLoop, Job
from llama.server.service import Service

PROMPT = "Once upon a time"
DIALOG: Any = [{"role": "user", "content": "What does the cow say?"}]
LINEAR = ["q_proj", "v_proj", "o_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny: Llama) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed, name in enumerate(("red", "blue")):
            reference = as_transformers(tiny.model)
            write_adapter(reference, folder / name, {"target_modules": LINEAR}, seed=seed)
    return folder


def load(folder: Path, **how: Any) -> Llama:
    sizes = {"max_seq_len": 256, "max_batch_size": 4}
    llama = Llama.build(dtype=torch.float32, device="cpu", **{**sizes, **how})
    for name in ("red", "blue"):
        llama.load_adapter(name, folder / name)
    return llama


@pytest.fixture(scope="module")
def llama(folder: Path) -> Llama:
    return load(folder)


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[tuple[str, Service]]:
    flags = tuple(f"{name}={folder / name}" for name in ("red", "blue"))
    with serve(load(folder), lora_modules=flags) as found:
        yield found


@pytest.fixture
def url(served: tuple[str, Service]) -> str:
    return served[0]


@pytest.mark.parametrize("name", [None, "tiny", "red", "blue"])
def test_a_requests_model_chooses(name: str | None, url: str, llama: Llama) -> None:
    """An endpoint that ignores the adapter's name, or answers in another's."""
    adapter = name if name in ("red", "blue") else None
    how: Any = {"temperature": 0, "max_gen_len": 8, "adapter": adapter}
    [text] = llama.text_completion([PROMPT], **how)
    [chat] = llama.chat_completion([DIALOG], **how)
    fields = {"temperature": 0, "max_tokens": 8, "model": name}
    answer = post(f"{url}/v1/completions", {"prompt": PROMPT, **fields}).json()
    assert answer["choices"][0]["text"].strip() == text["generation"].strip()
    assert answer["model"] == (name or "tiny")
    answer = post(f"{url}/v1/chat/completions", {"messages": DIALOG, **fields}).json()
    content = chat["generation"]["content"]
    assert (answer["choices"][0]["message"]["content"], answer["model"]) == (
        content,
        name or "tiny",
    )
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    response = client.responses.create(
        model=name or "tiny", input=DIALOG, temperature=0, max_output_tokens=8
    )
    assert (response.output_text, response.model) == (content, name or "tiny")
    answer = post(f"{url}/v1/embeddings", {"input": PROMPT, "model": name}).json()
    vector = torch.nn.functional.normalize(llama.embed([PROMPT], adapter=adapter)[0], dim=0)
    assert answer["model"] == (name or "tiny")
    assert answer["data"][0]["embedding"] == pytest.approx(vector.tolist(), abs=1e-5)
    pieces = [
        chunk.choices[0].delta.content
        for chunk in client.chat.completions.create(
            model=name or "tiny", messages=DIALOG, temperature=0, max_tokens=8, stream=True
        )
        if chunk.choices and chunk.model == (name or "tiny")
    ]
    assert "".join(filter(None, pieces)) == content


def test_models_are_the_base_and_its_adapters(url: str, folder: Path) -> None:
    """A client can't find what it may ask for, or learns where files lie on this machine."""
    answer = httpx.get(f"{url}/v1/models")
    models = {model["id"]: (model["root"], model["parent"]) for model in answer.json()["data"]}
    assert models == {"tiny": ("tiny", None), "red": ("red", "tiny"), "blue": ("blue", "tiny")}
    assert str(folder) not in answer.text
    for name in models:
        assert httpx.get(f"{url}/v1/models/{name}").json()["id"] == name


def test_unknown_models_are_refused_as_ever(url: str, tiny: Llama) -> None:
    """A misspelled name that is answered by the base, or an error that names nothing."""
    for path, body in (("completions", {"prompt": "a"}), ("embeddings", {"input": "a"})):
        answer = post(f"{url}/v1/{path}", {**body, "model": "green"})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (404, "model")
        assert error["code"] == "model_not_found"
        assert error["message"] == (
            "there is no model 'green' here: this server has 'tiny', 'red', 'blue'; "
            "--any_model has it answer to any name"
        )
    with serve(Llama(tiny.model, tiny.tokenizer)) as (alone, _):
        error = post(f"{alone}/v1/completions", {"prompt": "a", "model": "red"}).json()["error"]
        assert "there is no model 'red' here: this server has 'tiny'; " in error["message"]


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ("red", "'red': expected name=directory"),
        ("=x", "expected name=directory"),
        ("red=", "expected name=directory"),
        (("red=a", "red=b"), "'red', which another adapter or the model has already"),
        ("base=a", "'base', which another"),
    ],
)
def test_flags_are_checked_before_anything_is_loaded(value: Any, match: str) -> None:
    """A failure means that a server starts with adapters that no request can reach."""
    with pytest.raises(ValueError, match=match):
        ServerConfig(model_name="base", lora_modules=value)


def test_flags_may_have_spaces() -> None:
    """A name that no request matches since it begins with a space."""
    config = ServerConfig(lora_modules=("red=a/x", " blue = b/. "))
    assert config.lora_directories() == {"red": "a/x", "blue": "b/."}


def test_an_adapters_model_tells_its_own_room(llama: Llama) -> None:
    """Clients that fill the room of the base get an error behind virtual tokens."""
    shared = Llama(llama.model, llama.tokenizer)
    shared.adapters.add(Adapter("soft", {}, range(768, 773)))
    with serve(shared, lora_modules=("soft=x/y/..",)) as (url, _):
        base, soft = httpx.get(f"{url}/v1/models").json()["data"]
    assert (base["max_model_len"], soft["max_model_len"]) == (256, 251)
    assert soft["root"] == "x"


def test_the_command_loads_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag that is described and does nothing, on some rank."""
    assert "serve" in COMMANDS
    for rank in (0, 1):
        loaded: list[tuple[str, str]] = []
        fake = SimpleNamespace(
            load_adapter=lambda *given, loaded=loaded: loaded.append(given),
            engine=None,
            adapters={name: Adapter(name, {}) for name in ("red", "blue")},
        )
        monkeypatch.setattr(Llama, "build", lambda *_, fake=fake, **__: fake)
        monkeypatch.setattr(serving, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(serving, "run_worker", lambda llama: None)

        def stop(*_: object) -> None:
            raise InterruptedError

        monkeypatch.setattr(serving, "Service", stop)
        config = ServerConfig(lora_modules=("red=a/b", "blue=c=d"))
        if rank == 0:
            with pytest.raises(InterruptedError):
                serving.main(config)
        else:
            serving.main(config)
        assert loaded == [("red", "a/b"), ("blue", "c=d")]


def test_other_ranks_have_the_adapter(
    folder: Path, llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that computes the base's part of an adapter's answer."""
    sent: list[bytes] = []
    with monkeypatch.context() as patch:
        patch.setattr(workers, "parallel", SimpleNamespace(world_size=lambda: 2))
        patch.setattr(workers, "broadcast_bytes", sent.append)
        loop = EngineLoop(llama.engine)
        sequences = [
            llama.tasks.text([PROMPT], SamplingParams(0, max_gen_len=6, adapter=name))[0]
            for name in ("red", None, "blue")
        ]
        sequences += llama.tasks.read([PROMPT], "mean", "red")
        loop.submit([Job(sequence, lambda update: None) for sequence in sequences])
        while loop.n_active or loop.n_waiting:
            loop.step()
    other = load(folder)
    submit, restored = other.engine.submit, []
    monkeypatch.setattr(other.engine, "submit", lambda some: (restored.extend(some), submit(some)))
    messages = iter([*sent, b"stop"])
    monkeypatch.setattr(workers, "broadcast_bytes", lambda *_: next(messages))
    workers.worker_loop(other.engine, other.adapters)
    assert [sequence.tokens for sequence in restored] == [s.tokens for s in sequences]
    names = [sequence.adapter and sequence.adapter.name for sequence in restored]
    assert names == ["red", None, "blue", "red"]
    # MKL adds up by where memory lies.
    torch.testing.assert_close(restored[3].pooled, sequences[3].pooled)
    with pytest.raises(ValueError, match="no adapter 'red'"):
        workers._restore(json.loads(json.dumps(workers._describe(sequences[0]))), other.engine)
