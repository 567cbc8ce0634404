"""The server as a command: how it starts, how it ends, and several ranks of it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
import torch
from servers import free_port, post, wait_until

from llama import Llama
from llama.server.__main__ import main

COW = [{"role": "user", "content": "What does the cow say?"}]


class Process:
    """A server's process and what it prints."""

    def __init__(self, *command: str, **environment: str):
        self.port = free_port()
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command, "--port", str(self.port), "--page=False"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
        self.output: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.port}"

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.output += iter(self.process.stdout.readline, "")

    def wait_ready(self) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, "".join(self.output)
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"{self.url}/health").status_code == 200
            return False

        wait_until(ready, 60)


@contextlib.contextmanager
def running(*command: str, **environment: str) -> Iterator[Process]:
    found = Process(*command, **environment)
    try:
        found.wait_ready()
        yield found
    finally:
        found.process.kill()
        found.process.wait(10)


def test_sigterm_lets_answers_finish() -> None:
    """The command serves the embedded model; on SIGTERM a stream comes to its end, and so does
    the process, with 0; a new request gets 503."""
    with running("llama.server", "--max_seq_len", "2000") as server:
        answer = post(f"{server.url}/v1/chat/completions", {"messages": COW, "temperature": 0})
        assert answer.json()["choices"][0]["message"]["content"] == "The cow says moo."
        body = {"prompt": "Once", "max_tokens": 300, "temperature": 3.0, "seed": 1, "stream": True}
        statuses = []
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(httpx.TransportError):
                for _ in range(3):
                    statuses.append(post(f"{server.url}/v1/completions", {}).status_code)
                    time.sleep(0.05)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"]
        assert statuses and statuses[-1] == 503, statuses
        assert server.process.wait(20) == 0, "".join(server.output)


def test_a_key_for_other_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What others can reach doesn't start without a key, before anything is loaded."""
    monkeypatch.delenv("LLAMA_API_KEY", raising=False)
    monkeypatch.setattr(Llama, "build", lambda *_: pytest.fail("loaded"))
    for host in ("0.0.0.0", "::", "192.168.1.1", "somewhere.example"):
        with pytest.raises(SystemExit, match="set the environment variable LLAMA_API_KEY"):
            main(host=host)


@pytest.mark.parametrize("victim", [1, 0])
def test_two_ranks(tiny: Llama, victim: int) -> None:
    """Two ranks answer as one does; when one of them dies, though no request comes and no launcher
    looks after them, the other one ends within 30 seconds, with a status other than 0."""
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    other = Process("llama.server", RANK="1", LOCAL_RANK="1", **together)
    with running("llama.server", RANK="0", LOCAL_RANK="0", **together) as server:
        try:
            if victim == 1:
                _check_answers(server, tiny)
            processes = [server.process, other.process]
            processes[victim].kill()
            assert processes[1 - victim].wait(30) != 0
            dead = "the engine failed" if victim == 1 else "rank 0 is gone"
            assert dead in "".join([server, other][1 - victim].output)
        finally:
            other.process.kill()


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
    assert torch.allclose(found, wanted, atol=0.05)  # in bfloat16


def test_two_ranks_drain() -> None:
    """SIGTERM to the launcher lets a running answer finish, and ends both ranks in order."""
    torchrun = ("torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()))
    with running(*torchrun, "-m", "llama.server") as server:
        body = {"prompt": "Once", "max_tokens": 400, "temperature": 3.0, "seed": 1, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        server.process.wait(30)
        wait_until(lambda: "Finished server process" in "".join(server.output), 5)
        assert "the engine failed" not in "".join(server.output)
        assert "is gone" not in "".join(server.output)
