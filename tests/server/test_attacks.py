"""Strangers at the door: each attack is refused, and a neighbour's stream hardly notices."""

import contextlib
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE

import httpx
import pytest
import torch
from attacks import ATTACKS, HEAD, Attack, connect
from processes import wait_until
from servers import idle, serve, slow

from llama import Llama
from llama.server import connections
from llama.server.page import mount_page
from llama.server.service import Service

ATTACKS_FILE = str(Path(__file__).parents[1] / "attacks.py")
LEAST = 1 / 3  # of its speed is left to the neighbour


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Service]]:
    llama = Llama.build(dtype=torch.float32, device="cpu", max_seq_len=256, max_batch_size=4)
    slow(llama, 0.02)
    with serve(llama, mount=mount_page) as found:
        yield found


@contextlib.contextmanager
def strangers(url: str, attacks: list[Attack]) -> Iterator[Callable[[], None]]:
    """Yield what begins attacks on a server, which end with the block.

    Raises:
        AssertionError: one of the answers was wrong.
    """
    names = [attack.__name__ for attack in attacks]
    command = [sys.executable, ATTACKS_FILE, url, *names]
    with subprocess.Popen(command, text=True, stdin=PIPE, stdout=PIPE, stderr=PIPE) as process:
        assert process.stdin and process.stdout
        try:
            assert process.stdout.readline() == "ready\n"
            yield lambda: print(file=process.stdin, flush=True)
        finally:
            _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors[-2000:]


def neighbours_speed(url: str, attacks: list[Attack], n_tokens: int = 30) -> float:
    """The tokens per second of a stream during attacks."""
    body = {"prompt": "The cow", "max_tokens": 240, "stream": True, "temperature": 1.5}
    with (
        strangers(url, attacks) if attacks else contextlib.nullcontext(lambda: None) as begin,
        httpx.Client(timeout=30) as client,
        client.stream("POST", f"{url}/v1/completions", json=body) as answer,
    ):
        lines = (line for line in answer.iter_lines() if line.startswith("data: "))
        next(lines)
        begin()
        next(lines)
        start = time.monotonic()
        for _ in range(n_tokens):
            next(lines)
        return n_tokens / (time.monotonic() - start)


def resident() -> int:
    """The server's memory in bytes, which is this process's."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_a_neighbour_goes_on_beside_all_attacks(served: tuple[str, Service]) -> None:
    """A failure means that one stranger ends everybody's answers, or gets one for nonsense."""
    url, service = served
    neighbours_speed(url, ATTACKS, 10)
    wait_until(lambda: idle(service))
    assert httpx.get(f"{url}/health").json()["status"] == "ok"


@pytest.mark.soak
def test_a_neighbour_keeps_its_speed(served: tuple[str, Service]) -> None:
    """A failure means that strangers together slow everybody's answers, or leave something behind
    in memory each time.

    They share the machine with the server, so nothing else may run on it.
    """
    url, service = served
    alone = neighbours_speed(url, [])
    beside = neighbours_speed(url, ATTACKS)
    wait_until(lambda: idle(service))
    before = resident()
    again = neighbours_speed(url, ATTACKS)
    wait_until(lambda: idle(service))
    assert min(beside, again) > LEAST * alone, (alone, beside, again)
    wait_until(lambda: resident() - before < 30e6, 10)


@pytest.mark.soak
@pytest.mark.parametrize("attack", ATTACKS, ids=[attack.__name__ for attack in ATTACKS])
def test_a_neighbour_beside_one_attack(served: tuple[str, Service], attack: Attack) -> None:
    """The same for each attack alone, for longer: a failure names the one that does harm."""
    url, service = served
    alone = neighbours_speed(url, [], 50)
    neighbours_speed(url, [attack], 100)
    wait_until(lambda: idle(service))
    before = resident()
    assert neighbours_speed(url, [attack], 200) > LEAST * alone
    wait_until(lambda: idle(service))
    wait_until(lambda: resident() - before < 10e6, 10)


def test_connections_without_a_request_are_closed(
    served: tuple[str, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure means that strangers' open connections stay for ever, or that patience ends for
    clients that have sent what they ask."""
    url, _ = served
    monkeypatch.setattr(connections, "PATIENCE", 0.2)
    with connect(url) as silent, connect(url) as slow, connect(url) as begun:
        begun.sendall(HEAD + b"Content-Length: 100\r\n\r\n")
        slow.sendall(HEAD)
        begin = time.monotonic()
        for client in (silent, slow, begun):
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(10_000) == b""
        assert 0.1 < time.monotonic() - begin < 5
    body = {"prompt": "The cow", "max_tokens": 30, "stream": True}
    with httpx.Client() as client:
        for _ in range(2):  # 0.6 seconds each
            answer = client.post(f"{url}/v1/completions", json=body)
            assert answer.text.endswith("data: [DONE]\n\n")


def test_strangers_do_not_take_all_connections(
    served: tuple[str, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure means that idle connections lock everybody out until their patience ends, or that
    one with a stream is closed for theirs."""
    url, _ = served
    monkeypatch.setattr(connections.Connection, "most", 20)
    body = {"prompt": "The cow", "max_tokens": 60, "stream": True}
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(httpx.Client(timeout=30))
        answer = stack.enter_context(client.stream("POST", f"{url}/v1/completions", json=body))
        upload = stack.enter_context(connect(url))
        upload.sendall(HEAD + b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{")
        clients = [stack.enter_context(connect(url)) for _ in range(60)]
        assert httpx.get(f"{url}/health").json()["status"] == "ok"
        assert clients[0].recv(10) == b"", "the oldest wasn't closed"
        clients[-1].sendall(HEAD.replace(b"POST", b"GET") + b"Connection: close\r\n\r\n")
        assert clients[-1].recv(10) == b"HTTP/1.1 4"
        assert [*answer.iter_lines()][-2] == "data: [DONE]"
        upload.sendall(b" " * 999)
        assert upload.recv(12) == b"HTTP/1.1 400"


def test_a_client_that_reads_nothing_is_disconnected(
    served: tuple[str, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure means that answers which nobody reads stay in memory, with their connections."""
    url, _ = served
    monkeypatch.setattr(connections, "PATIENCE", 0.2)
    host = url.removeprefix("http://")
    size = len(httpx.get(f"{url}/openapi.json").content)
    n = 30_000_000 // size  # more than the system's buffers hold
    with connect(url) as client:
        client.sendall(f"GET /openapi.json HTTP/1.1\r\nHost: {host}\r\n\r\n".encode() * n)
        time.sleep(2)
        n_bytes = 0
        with contextlib.suppress(ConnectionResetError):
            while some := client.recv(1 << 20):
                n_bytes += len(some)
        assert 0 < n_bytes < n * size / 2


def test_more_files_may_be_opened() -> None:
    """A failure means that a system's first limit, often 1,024, is one of connections too."""
    code = (
        "import resource as r; n = r.RLIMIT_NOFILE; r.setrlimit(n, (256, 1500))\n"
        "from llama.server.connections import allow_files; print(allow_files(), r.getrlimit(n))"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, text=True, stdout=PIPE).stdout
    assert found == "750 (1500, 1500)\n"
