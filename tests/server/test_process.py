"""The server as a command: how it starts, how it ends, and several ranks of it."""

import contextlib
import json
import re
import signal
import socket
import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager

import httpx
import pytest
import torch
from processes import (
    Started,
    free_port,
    lose_one_machine,
    started,
    two_machines,
    two_ranks,
    wait_until,
)
from servers import post

from llama import Llama
from llama.server.config import ServerConfig
from llama.server.serve import main

pytestmark = pytest.mark.slow

COW = [{"role": "user", "content": "What does the cow say?"}]


def running(*flags: str, **environment: str) -> AbstractContextManager[Started]:
    """The command, forked from a process that has imported all that it needs."""
    command = ("-m", "llama.server", "--port", "0", *flags)
    return started(*command, module="llama.server.page", **environment)


def wait_for(server: Started, text: str) -> None:
    wait_until(lambda: text in server.output, 60)


def url_of(server: Started) -> str:
    wait_for(server, "Press CTRL+C to quit")
    return re.findall(r"running on (http://\S+)", server.output)[0]


LONG = {"prompt": "Once", "max_tokens": 1900, "temperature": 3.0, "seed": 1, "stream": True}


def finish_reason(lines: Iterable[str]) -> str | None:
    """Of a stream's events, which must have come to their end."""
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    return json.loads(events[-2])["choices"][0]["finish_reason"]


def test_sigterm_lets_answers_finish() -> None:
    """The command serves the embedded model; on SIGTERM a stream comes to its end, and so does
    the process, with 0; a new request gets 503."""
    with running("--page=False") as server, httpx.Client(timeout=60) as client:
        url = url_of(server)
        body = {"messages": COW, "temperature": 0}
        answer = client.post(f"{url}/v1/chat/completions", json=body)
        assert answer.json()["choices"][0]["message"]["content"] == "The cow says moo."
        with client.stream("POST", f"{url}/v1/completions", json=LONG) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            wait_until(lambda: httpx.get(f"{url}/health").status_code == 503)
            assert client.post(f"{url}/v1/completions", json={}).status_code == 503
            assert finish_reason(lines) in (
                "stop",
                "length",
            )
        assert server.wait(60) == 0, server.output


def test_a_second_sigterm_ends_at_once() -> None:
    with (
        running("--page=False") as server,
        httpx.stream("POST", f"{url_of(server)}/v1/completions", json=LONG, timeout=60) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        server.send_signal(signal.SIGTERM)
        wait_for(server, "shutting down: 1 sequences are running")
        server.send_signal(signal.SIGTERM)
        assert server.wait(10) == -signal.SIGTERM


def test_half_a_body_is_not_waited_for() -> None:
    """SIGTERM ends at once what hasn't arrived; neither that nor a client that leaves fails."""
    with running() as server, contextlib.ExitStack() as open_sockets:
        url = url_of(server)
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        head = "Host: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n"
        halves = []
        for path in ("v1/completions", "render", "tokenize"):
            for leaves in (True, False):
                client = open_sockets.enter_context(socket.create_connection(address, timeout=20))
                client.sendall(f'POST /{path} HTTP/1.1\r\n{head}\r\n{{"prompt"'.encode())
                if leaves:
                    client.close()
                else:
                    halves.append(client)
        httpx.get(f"{url}/health")
        server.send_signal(signal.SIGTERM)
        for client in halves:
            assert client.recv(1000).startswith(b"HTTP/1.1 503")
        assert server.wait(20) == 0, server.output
        assert not re.search(r"Traceback|ERROR|\b500\b", server.output), server.output


def test_the_page_and_the_api_from_one_command() -> None:
    """The page comes without a key, which it asks for; nothing else does."""
    with running("--model_name", "1e5", LLAMA_API_KEY="secret") as server:
        url = url_of(server)
        assert "page/main.js" in httpx.get(url).text, "the page isn't there"
        assert httpx.get(f"{url}/v1/models").status_code == 401
        headers = {"Authorization": "Bearer secret"}
        models = httpx.get(f"{url}/v1/models", headers=headers).json()
        assert models["data"][0]["id"] == "1e5"


def test_a_key_for_other_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What others can reach doesn't start without a key, before anything is loaded."""
    monkeypatch.delenv("LLAMA_API_KEY", raising=False)
    monkeypatch.setattr(Llama, "build", lambda *_: pytest.fail("loaded"))
    for host in ("0.0.0.0", "::", "192.168.1.1", "somewhere.example"):
        for key in (None, ""):
            with pytest.raises(ValueError, match="set the environment variable LLAMA_API_KEY"):
                ServerConfig(host=host, api_key=key)


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """What can't listen says what to do, before anything is loaded."""
    monkeypatch.setattr(Llama, "build", lambda **_: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=rf"can't listen at 127.0.0.1:{port} \(.*--port"):
            main(ServerConfig(port=port))


@pytest.mark.parametrize("victim", [1, 0])
def test_two_ranks(tiny: Llama, victim: int) -> None:
    """Two ranks answer as one does; when one of them dies, though no request comes and no launcher
    looks after them, the other one ends within 30 seconds, with a status other than 0."""
    command = ("-m", "llama.server", "--port", "0", "--page=False", "--dtype", "float32")
    with two_ranks(*command, module="llama.server.page") as (server, other):
        wait_for(server, "Press CTRL+C to quit")
        if victim == 1:
            _check_answers(url_of(server), tiny)
        processes = [server, other]
        processes[victim].send_signal(signal.SIGKILL)
        left = processes[1 - victim]
        assert left.wait(30) != 0
        wait_for(left, "the engine failed" if victim == 1 else "rank 0 has ended")


@pytest.mark.soak
def test_two_machines_of_which_one_is_lost(tiny: Llama) -> None:
    port = str(free_port())
    flags = ("--page=False", "--port", port, "--dtype", "float32", "--device", "cpu")
    with two_machines("-m", "llama.server", *flags) as machines:
        wait_until(lambda: any("Press CTRL+C" in each.output for each in machines), 60)
        _check_answers(f"http://127.0.0.1:{port}", tiny)
        lose_one_machine(*machines)


# A short patience, for a server that is run by ``-c``.
IMPATIENT = """
import sys
from llama import heartbeat
from llama.cli import run
heartbeat.INTERVAL, heartbeat.LIMIT, heartbeat._GRACE = 0.2, 10, 1
run("llama.server.serve:main")
"""


def test_a_machine_that_hangs_ends_the_server() -> None:
    """A stopped process is as a machine without power: its connections stay open. A failure means
    that clients wait forever for the rest of an answer."""
    command = ("-c", IMPATIENT, "--page=False", "--port", "0")
    with (
        two_ranks(*command, module="llama.server.page") as (server, other),
        httpx.stream("POST", f"{url_of(server)}/v1/completions", json=LONG, timeout=60) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        try:
            other.send_signal(signal.SIGSTOP)
            events = [line for line in lines if line]
            assert json.loads(events[-2].removeprefix("data: "))["error"]["type"] == "server_error"
            assert events[-1] == "data: [DONE]"
            assert server.wait(30) == 1
            wait_for(server, f"rank 1 on {socket.gethostname()} has died, or can't be reached")
        finally:
            other.send_signal(signal.SIGKILL)


def _check_answers(url: str, tiny: Llama) -> None:
    """Streams side by side, and vectors."""
    answers: list[str] = []

    def ask(system: str) -> None:
        body = {"messages": [{"role": "system", "content": system}, *COW], "temperature": 0}
        found = post(f"{url}/v1/chat/completions", body).json()
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
    vector = post(f"{url}/v1/embeddings", {"input": "The cow"}).json()
    found = torch.tensor(vector["data"][0]["embedding"])
    wanted = torch.nn.functional.normalize(tiny.embed(["The cow"]))[0]
    assert torch.allclose(found, wanted, atol=1e-4)


def test_two_ranks_drain() -> None:
    """SIGTERM to the launcher lets a running answer finish, and ends both ranks in order."""
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2")
    with started(*launcher, "-m", "llama.server", "--page=False", "--port", "0") as server:
        url = url_of(server)
        with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            wait_for(server, "shutting down: 1 sequences are running")
            assert finish_reason(lines) in (
                "stop",
                "length",
            )
        server.wait(60)
        wait_for(server, "Finished server process")
        assert "the engine failed" not in server.output and "is gone" not in server.output
