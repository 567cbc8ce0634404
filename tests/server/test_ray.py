"""Copies of a model on a cluster. Here Ray's part is pretended, but for the last test."""

import asyncio
import contextlib
import json
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from processes import free_port, wait_until
from servers import post
from starlette.types import Message, Scope

from llama import Llama, heartbeat
from llama.cli import UsageError
from llama.server.config import ServerConfig

PROMPT = {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 8}
LONG = {"prompt": "Once", "max_tokens": 1900, "temperature": 3.0, "seed": 1, "stream": True}


@pytest.fixture(scope="module", autouse=True)
def ray() -> Any:
    """Imported by the process that runs these tests alone, for it takes a second."""
    pytest.importorskip("ray.serve")
    import ray

    return ray


class Call:
    """A call of a replica, as Ray's handles return it."""

    def __init__(self, messages: AsyncIterator[Message]):
        self._messages = messages
        self.is_cancelled = False

    def __aiter__(self) -> AsyncIterator[Message]:
        return self._messages

    def cancel(self) -> None:
        self.is_cancelled = True


class Handle:
    """A handle to replicas, each of which answers one call."""

    def __init__(self, *replicas: Callable[[Scope, bytes], AsyncIterator[Message]]):
        self.answer = self
        self._replicas = iter(replicas)
        self.calls: list[Call] = []

    def remote(self, scope: Scope, body: bytes) -> Call:
        self.calls.append(Call(next(self._replicas)(scope, body)))
        return self.calls[-1]


def dying(*messages: Message, error: Exception | None = None) -> Callable[..., Any]:
    """A replica that sends messages, and then dies."""
    from ray.exceptions import RayActorError

    async def answer(scope: Scope, body: bytes) -> AsyncIterator[Message]:
        for message in messages:
            yield message
        raise error or RayActorError()

    return answer


def start(kind: str) -> Message:
    headers = [(b"content-type", kind.encode())]
    return {"type": "http.response.start", "status": 200, "headers": headers}


def ask(handle: Handle, body: object = None, path: str = "/v1/completions") -> httpx.Response:
    """An answer of the front."""
    from llama.server.ray import Front

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(Front(1000, handle))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post(path, json=body)

    return asyncio.run(send())


@pytest.fixture(scope="module")
def replica() -> Iterator[Any]:
    from llama.server.ray import Replica

    config = ServerConfig(dtype="float32", device="cpu", model_name="tiny", max_body=1000)
    made = Replica(config, 1, 1, 0)
    yield made
    heartbeat.at_loss.clear()
    made._service.loop.drain()


def test_a_replica_answers_as_the_library_does(replica: Any, tiny: Llama) -> None:
    """A failure means that Ray Serve answers other requests, or answers otherwise."""
    handle = Handle(*[replica.answer] * 4)
    found = ask(handle, PROMPT).json()["choices"][0]["text"]
    expected = tiny.text_completion([PROMPT["prompt"]], temperature=0, max_gen_len=8)
    assert found == expected[0]["generation"]
    streamed = ask(handle, PROMPT | {"stream": True}).text.split("\n\n")
    pieces = [json.loads(event.removeprefix("data: ")) for event in streamed[:-2]]
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == found
    assert streamed[-2:] == ["data: [DONE]", ""]
    assert ask(handle, {"prompt": "x" * 2000}).status_code == 413
    assert ask(handle, {"temperature": "hot"}).json()["error"]["param"] == "temperature"
    replica.check_health()


def test_a_client_that_disconnects_frees_its_slot(replica: Any) -> None:
    """Ray cancels the call. A failure means that replicas write for nobody until they are full."""

    async def leave() -> None:
        body = json.dumps(LONG).encode()
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b""}
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        messages = replica.answer({**scope, "http_version": "1.1", "headers": headers}, body)
        async for message in messages:
            if message.get("body"):
                break
        assert replica._service.loop.n_active == 1
        await messages.aclose()
        while replica._service.loop.n_active:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(leave(), 20))


def test_a_stream_whose_replica_dies_ends_with_an_error_event() -> None:
    """A failure means that clients take half an answer for a whole one, or wait for the rest."""
    event = b'data: {"choices": []}\n\n'
    handle = Handle(
        dying(
            start("text/event-stream"),
            {"type": "http.response.body", "body": event, "more_body": True},
        )
    )
    events = ask(handle).text.split("\n\n")
    assert events[0] == event.decode().strip()
    assert json.loads(events[1].removeprefix("data: "))["error"]["code"] == "replica_lost"
    assert events[2:] == ["data: [DONE]", ""]
    assert len(handle.calls) == 1 and handle.calls[0].is_cancelled
    with pytest.raises(ConnectionAbortedError, match="replica"):  # JSON that is cut off
        ask(Handle(dying(start("application/json"))))


def test_what_has_not_begun_is_answered_by_another_replica(replica: Any) -> None:
    from ray.serve.exceptions import BackPressureError

    handle = Handle(dying(), dying(), replica.answer)
    assert ask(handle, PROMPT).status_code == 200
    answer = ask(Handle(dying(), dying(), dying()), PROMPT)
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "replica_lost"
    answer = ask(Handle(dying(error=BackPressureError(8, 8))), PROMPT)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")


def test_arguments_are_the_servers_flags() -> None:
    from llama.server import ray as serving

    with pytest.raises(UsageError, match="there is no flag --num_replica: did you mean --num_repl"):
        serving.app({"num_replica": "2"})
    with pytest.raises(ValueError, match="port isn't the application's"):
        serving.app({"port": "80"})
    with pytest.raises(UsageError, match="--model_parallel_size is 'x'"):
        serving.app({"model_parallel_size": "x"})


@pytest.fixture(scope="module")
def cluster(ray: Any) -> Iterator[tuple[str, str]]:
    """The address of Ray Serve on a cluster of this machine alone, and a mark of its processes."""
    port, mark = free_port(), f"LLAMA_CLUSTER={os.getpid()}"
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setenv(*mark.split("="))
        flags = {"include_dashboard": False, "log_to_driver": False, "_temp_dir": folder}
        ray.init(address="local", num_cpus=8, **flags)
        ray.serve.start(http_options={"port": port})
        yield f"http://127.0.0.1:{port}", mark
        ray.serve.shutdown()
        ray.shutdown()


def processes(mark: str, title: str) -> list[int]:
    """The ids of a cluster's processes with a title."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if process.joinpath("cmdline").read_text().startswith(f"ray::{title}"):
                found += [int(process.name)] * (mark in process.joinpath("environ").read_text())
    return found


@pytest.mark.soak
@pytest.mark.parametrize(("n_ranks", "victims"), [(1, "ServeReplica:default:replica"), (2, "Rank")])
def test_on_a_cluster(
    n_ranks: int, victims: str, ray: Any, cluster: tuple[str, str], tiny: Llama
) -> None:
    """Two replicas answer as the library does; a stream whose processes are killed ends with an
    error event, and later requests are answered by those that Ray starts in their place."""
    from llama.server import ray as serving

    url, mark = cluster
    flags = {"num_replicas": 2, "model_parallel_size": n_ranks, "page": False}
    ray.serve.run(serving.app({**flags, "device": "cpu", "dtype": "float32"}))
    expected = tiny.text_completion([PROMPT["prompt"]], temperature=0, max_gen_len=8)
    expected_text = expected[0]["generation"]
    for _ in range(4):
        answer = post(f"{url}/v1/completions", PROMPT).json()
        assert answer["choices"][0]["text"] == expected_text
    pids = processes(mark, victims)
    assert len(pids) == 2
    with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as stream:
        lines = (line for line in stream.iter_lines() if line)
        next(lines)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        *_, last, done = lines
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
    assert done == "data: [DONE]"
    wait_until(lambda: len({*processes(mark, victims)} - {*pids}) == 2, 120)
    answer = post(f"{url}/v1/completions", PROMPT).json()
    assert answer["choices"][0]["text"] == expected_text
