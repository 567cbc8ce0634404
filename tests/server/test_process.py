"""The server as a command: how it starts, how it ends, and several ranks of it."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import httpx
import pytest
import torch
from processes import free_port
from servers import post, wait_until

from llama import Llama
from llama.server.config import ServerConfig

pytestmark = pytest.mark.slow

COW = [{"role": "user", "content": "What does the cow say?"}]


class Process:
    """A server's process and what it prints."""

    def __init__(self, *command: str, **environment: str):
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command, "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **environment},
        )
        self.output = ""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in iter(self.process.stdout.readline, ""):
            self.output += line

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in self.output or self.process.poll() is not None, 60)
        wait_until(lambda: text in self.output, 10)

    @property
    def url(self) -> str:
        self.wait_for("Press CTRL+C to quit")
        return re.findall(r"running on (http://\S+)", self.output)[0]


@contextlib.contextmanager
def running(*command: str, **environment: str) -> Iterator[Process]:
    found = Process(*command, **environment)
    try:
        yield found
    finally:
        # A launcher that is killed leaves its processes behind; one that is asked ends them.
        found.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            found.process.wait(15)
        found.process.kill()
        found.process.wait(10)


LONG = {"prompt": "Once", "max_tokens": 1900, "temperature": 3.0, "seed": 1, "stream": True}


def finish_reason(lines: list[str]) -> str | None:
    """Of a stream's events, which must have come to their end."""
    assert lines[-1] == "data: [DONE]"
    return json.loads(lines[-2].removeprefix("data: "))["choices"][0]["finish_reason"]


def test_sigterm_lets_answers_finish() -> None:
    """The command serves the embedded model; on SIGTERM a stream comes to its end, and so does
    the process, with 0; a new request gets 503."""
    with running("llama.server", "--page=False") as server, httpx.Client(timeout=60) as client:
        answer = client.post(
            f"{server.url}/v1/chat/completions", json={"messages": COW, "temperature": 0}
        )
        assert answer.json()["choices"][0]["message"]["content"] == "The cow says moo."
        with client.stream("POST", f"{server.url}/v1/completions", json=LONG) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 503)
            assert client.post(f"{server.url}/v1/completions", json={}).status_code == 503
            assert finish_reason([line for line in lines if line]) in ("stop", "length")
        assert server.process.wait(60) == 0, server.output


def test_a_second_sigterm_ends_at_once() -> None:
    with (
        running("llama.server", "--page=False") as server,
        httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=60) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("shutting down: 1 sequences are running")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == -signal.SIGTERM


def test_half_a_body_is_not_waited_for() -> None:
    """SIGTERM ends at once what hasn't arrived; neither that nor a client that leaves fails."""
    with running("llama.server") as server, contextlib.ExitStack() as open_sockets:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        head = "Host: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n"
        halves = []
        for path in ("v1/completions", "gradio_api/queue/join", "gradio_api/cancel"):
            for leaves in (True, False):
                client = open_sockets.enter_context(socket.create_connection(address, timeout=20))
                client.sendall(f'POST /{path} HTTP/1.1\r\n{head}\r\n{{"prompt"'.encode())
                if leaves:
                    client.close()
                else:
                    halves.append(client)
        httpx.get(f"{server.url}/health")
        server.process.send_signal(signal.SIGTERM)
        for client in halves:
            assert client.recv(1000).startswith(b"HTTP/1.1 503")
        assert server.process.wait(20) == 0, server.output
        assert not re.search(r"Traceback|ERROR|\b500\b", server.output), server.output


def test_the_page_and_the_api_from_one_command() -> None:
    with running("llama.server", "--model_name", "1e5", LLAMA_API_KEY="secret") as server:
        assert httpx.get(server.url).status_code == 401
        page = httpx.get(server.url, auth=("anyone", "secret")).text
        assert re.search(r'"title": ?"1e5"', page), "the page doesn't name the model"
        headers = {"Authorization": "Bearer secret"}
        models = httpx.get(f"{server.url}/v1/models", headers=headers).json()
        assert models["data"][0]["id"] == "1e5"


def test_a_key_for_other_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What others can reach doesn't start without a key, before anything is loaded."""
    monkeypatch.delenv("LLAMA_API_KEY", raising=False)
    monkeypatch.setattr(Llama, "build", lambda *_: pytest.fail("loaded"))
    for host in ("0.0.0.0", "::", "192.168.1.1", "somewhere.example"):
        for key in (None, ""):
            with pytest.raises(ValueError, match="set the environment variable LLAMA_API_KEY"):
                ServerConfig(host=host, api_key=key)


@pytest.mark.parametrize("victim", [1, 0])
def test_two_ranks(tiny: Llama, victim: int) -> None:
    """Two ranks answer as one does; when one of them dies, though no request comes and no launcher
    looks after them, the other one ends within 30 seconds, with a status other than 0."""
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = ("llama.server", "--page=False", "--dtype", "float32")
    with (
        running(*command, RANK="1", LOCAL_RANK="1", **together) as other,
        running(*command, RANK="0", LOCAL_RANK="0", **together) as server,
    ):
        server.wait_for("Press CTRL+C to quit")
        if victim == 1:
            _check_answers(server, tiny)
        processes = [server, other]
        processes[victim].process.kill()
        left = processes[1 - victim]
        assert left.process.wait(30) != 0
        left.wait_for("the engine failed" if victim == 1 else "rank 0 has ended")


def _check_answers(server: Process, tiny: Llama) -> None:
    """Streams side by side, and vectors."""
    answers: list[str] = []

    def ask(system: str) -> None:
        body = {"messages": [{"role": "system", "content": system}, *COW], "temperature": 0}
        found = post(f"{server.url}/v1/chat/completions", body).json()
        answers.append(found["choices"][0]["message"]["content"])

    # Longer than a piece, and begun alike: read in several passes, and copied between rows.
    system = "You are a pirate. " * 12
    expected = tiny.chat_completion([[{"role": "system", "content": system}, *COW]], 0)
    expected = expected[0]["generation"]["content"]
    threads = [threading.Thread(target=ask, args=[system]) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [expected] * 5
    vector = post(f"{server.url}/v1/embeddings", {"input": "The cow"}).json()
    found = torch.tensor(vector["data"][0]["embedding"])
    wanted = torch.nn.functional.normalize(tiny.embed(["The cow"]))[0]
    assert torch.allclose(found, wanted, atol=1e-4)


def test_two_ranks_drain() -> None:
    """SIGTERM to the launcher lets a running answer finish, and ends both ranks in order."""
    with running(
        "torch.distributed.run", "--nproc_per_node", "2", "-m", "llama.server", "--page=False"
    ) as server:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            server.wait_for("shutting down: 1 sequences are running")
            assert finish_reason([line for line in lines if line]) in ("stop", "length")
        server.process.wait(60)
        server.wait_for("Finished server process")
        assert "the engine failed" not in server.output and "is gone" not in server.output
