"""The names that a request may give to the served model."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from servers import post, serve

from llama import Llama
from llama.adapters import Adapter
from llama.cli import help_text
from llama.server.config import ServerConfig
from llama.server.serve import main

BODY: dict[str, Any] = {"prompt": "The cow", "temperature": 0, "max_tokens": 2}
PATHS = ("completions", "chat/completions", "embeddings", "responses")


@pytest.fixture(scope="module")
def llama() -> Llama:
    found = Llama.build(dtype=torch.float32, device="cpu", max_seq_len=128, max_batch_size=2)
    found.tasks.adapters.add(Adapter("red", {}))
    return found


@pytest.fixture(scope="module")
def url(llama: Llama) -> Iterator[str]:
    with serve(llama, alias=("gpt-4o", " org/small ")) as (found, _):
        yield f"{found}/v1"


def body_of(path: str, model: str) -> dict[str, Any]:
    prompts = {"completions": "prompt", "embeddings": "input", "responses": "input"}
    prompt = "What does the cow say?"
    if path == "chat/completions":
        return {"messages": [{"role": "user", "content": prompt}], "model": model}
    return {prompts[path]: prompt, "model": model}


@pytest.mark.parametrize("path", PATHS)
def test_aliases(url: str, path: str) -> None:
    """A name that a client is set to is refused, at some endpoint."""
    for name in ("tiny", "gpt-4o", "org/small", ""):
        answer = post(f"{url}/{path}", body_of(path, name))
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == "tiny"
    answer = post(f"{url}/{path}", body_of(path, "gpt-5" * 1000))
    message = answer.json()["error"]["message"]
    assert answer.status_code == 404 and len(message) < 300
    assert "this server has 'tiny', 'gpt-4o', 'org/small', 'red'" in message


def test_aliases_are_listed(url: str) -> None:
    """A client that offers what the list has doesn't offer an alias, or finds none by its name."""
    listed = httpx.get(f"{url}/models").json()["data"]
    found = [(model["id"], model["parent"]) for model in listed]
    assert found == [("tiny", None), ("gpt-4o", None), ("org/small", None), ("red", "tiny")]
    assert len({model["root"] for model in listed[:3]}) == 1
    for name, _ in found:
        assert httpx.get(f"{url}/models/{name}").json()["id"] == name
    assert httpx.get(f"{url}/models/gpt-5").status_code == 404


def test_any_model(llama: Llama) -> None:
    """A client with a fixed name is refused, or an adapter's name chooses the model itself."""
    with serve(llama, any_model=True) as (found, _):
        url = f"{found}/v1"
        for path in PATHS:
            assert post(f"{url}/{path}", body_of(path, "gpt-4o")).json()["model"] == "tiny"
            assert post(f"{url}/{path}", body_of(path, "red")).json()["model"] == "red"
        assert [m["id"] for m in httpx.get(f"{url}/models").json()["data"]] == ["tiny", "red"]
        named = httpx.get(f"{url}/models/gpt-4o").json()
        assert (named["id"], named["parent"]) == ("gpt-4o", None)
        assert httpx.get(f"{url}/models/red").json()["parent"] == "tiny"


@pytest.mark.parametrize(
    "alias", ["base", "red", ("a", "a"), ("a", ""), (" a", "a "), ("b", "base")]
)
def test_flags_are_checked(alias: Any) -> None:
    """A name that means two models, or none, is found out by a request."""
    with pytest.raises(ValueError, match="--alias has the name"):
        ServerConfig(model_name="base", lora_modules="red=x", alias=alias)


def test_flags_are_described() -> None:
    """A failure means that --help has no word on how to name the model."""
    text = help_text(main, "llama serve")
    assert all(f"--{flag}" in text for flag in ("alias", "any_model", "lenient"))
