"""Strangers at the door: each attack is refused, and a neighbour's stream hardly notices."""

import contextlib
import gc
import gzip
import json
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from processes import wait_until
from servers import idle, serve

from llama import Llama
from llama.server import connections
from llama.server.service import Service

JSON = {"Content-Type": "application/json"}
PAUSE = 0.02  # seconds between the requests of an attack, whose clients share this process
LEAST = 1 / 3  # of its speed is left to the neighbour
Attack = Callable[[str, threading.Event], None]


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Service]]:
    llama = Llama.build(dtype=torch.float32, device="cpu", max_seq_len=256, max_batch_size=4)
    llama.tokenizer.stop_ids = frozenset()
    forward = llama.model.hidden_states

    def as_slow_as_a_large_model(*args: Any) -> torch.Tensor:
        time.sleep(0.02)
        return forward(*args)

    llama.model.hidden_states = as_slow_as_a_large_model  # type: ignore[method-assign]
    with serve(llama) as found:
        yield found


def repeated(
    url: str,
    ended: threading.Event,
    bodies: list[Any],
    statuses: set[int],
    path: str = "completions",
    headers: dict[str, str] | None = None,
) -> None:
    """Send bodies, again and again; each answer must have one of the statuses."""
    contents = [body if isinstance(body, bytes) else json.dumps(body).encode() for body in bodies]
    with httpx.Client(headers={**JSON, **(headers or {})}, timeout=30) as client:
        while not ended.is_set():
            for content in contents:
                answer = client.post(f"{url}/v1/{path}", content=content)
                assert answer.status_code in statuses, (content[:40], answer.text[:200])
                assert answer.json()["error"]["message"]
                ended.wait(PAUSE)


def huge_stops(url: str, ended: threading.Event) -> None:
    stops = ["a" * 90_000, ["a" * 1000] * 90, ["a"] * 15_000]
    repeated(url, ended, [{"prompt": "a", "stop": stop} for stop in stops], {400})


def deep_json(url: str, ended: threading.Event) -> None:
    deep = b'{"a":' * 9000 + b"1" + b"}" * 9000
    schema = b'{"prompt": "a", "response_format": {"type": "json_object", "schema": ' + deep + b"}}"
    lists = b'{"prompt": ' + b"[" * 45_000 + b"]" * 45_000 + b"}"
    repeated(url, ended, [b"[" * 90_000, lists, schema], {400})


def many_ids(url: str, ended: threading.Event) -> None:
    biases = {str(i): 1 for i in range(7000)}
    fields = [
        {"stop_token_ids": [1] * 30_000},
        {"logit_bias": biases},
        {f"a{i}": 1 for i in biases},
    ]
    bodies = [{"prompt": [1] * 30_000}, {"prompt": [[1]] * 9000}]
    repeated(url, ended, [*bodies, *({"prompt": "a", **more} for more in fields)], {400})


def compressed_bombs(url: str, ended: threading.Event) -> None:
    bomb = gzip.compress(b"[" * 20_000_000)
    for coding in ("gzip", "deflate"):
        headers = {"Content-Encoding": coding}
        repeated(url, ended, [bomb], {400, 413, 415}, headers=headers)


def foreign_hosts(url: str, ended: threading.Event) -> None:
    body = [{"prompt": "a", "max_tokens": 1}]
    repeated(url, ended, body, {403}, headers={"Host": "evil.example"})


def foreign_origins(url: str, ended: threading.Event) -> None:
    """A page elsewhere may send text without asking; it isn't read as JSON."""
    headers = {"Origin": "https://evil.example", "Content-Type": "text/plain"}
    repeated(url, ended, [{"prompt": "a", "max_tokens": 1}], {400, 415}, headers=headers)


def large_requests(url: str, ended: threading.Event) -> None:
    """Of a client that never waits for the answer."""
    bodies = [
        ("embeddings", {"input": ["The cow and the duck"] * 2048}),
        ("completions", {"prompt": ["The cow"] * 2048, "n": 16, "max_tokens": 200}),
    ]
    with httpx.Client(timeout=httpx.Timeout(30, read=0.2)) as client:
        while not ended.is_set():
            for path, body in bodies:
                with contextlib.suppress(httpx.ReadTimeout):
                    client.post(f"{url}/v1/{path}", json=body)


def cancelled_streams(url: str, ended: threading.Event) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 200, "stream": True, "temperature": 1.5}
    with httpx.Client(timeout=30) as client:
        while not ended.is_set():
            with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
                next(answer.iter_lines())
            ended.wait(PAUSE)


def connect(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10)


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"


def slow_bodies(url: str, ended: threading.Event) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(url)) for _ in range(50)]
        for client in clients:
            client.sendall(
                HEAD + b"Content-Type: application/json\r\nContent-Length: 50000\r\n\r\n"
            )
        while not ended.wait(PAUSE):
            for client in clients:
                client.sendall(b" ")


def idle_connections(url: str, ended: threading.Event) -> None:
    """Two thousand, half of which have begun a request."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    n = min(2000, (hard if hard > 0 else 10_000) // 2 - 200)
    if soft < 2 * n + 200:
        resource.setrlimit(resource.RLIMIT_NOFILE, (2 * n + 200, hard))
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(url)) for _ in range(n)]
        for client in clients[::2]:
            client.sendall(HEAD)
        ended.wait()


def endless_headers(url: str, ended: threading.Event) -> None:
    """Many, or one without an end: the connection is closed before it has taken much memory."""
    while not ended.is_set():
        for part in (b"X-Header: a\r\n" * 1000, b"a" * 13_000):
            with connect(url) as client:
                client.sendall(HEAD)
                with contextlib.suppress(ConnectionError):
                    for _ in range(20):
                        client.sendall(part)
                    assert client.recv(1000).startswith(b"HTTP/1.1 400")
            ended.wait(PAUSE)


def smuggled_lengths(url: str, ended: threading.Event) -> None:
    """Nothing is answered behind what a proxy may take for another end of the request."""
    heads = (
        b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
        b"Content-Length: 4\r\nContent-Length: 5\r\n",
        b"Content-Length: +4\r\n",
        b"Content-Length: -4\r\n",
        b"Content-Length: 4, 5\r\n",
        b"Content-Length : 4\r\n",
        b"Transfer-Encoding: chunked, identity\r\n",
        b"Transfer-Encoding: x\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
    )
    behind = b"0\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    while not ended.is_set():
        for head in heads:
            with connect(url) as client:
                client.sendall(HEAD + head + b"\r\n" + behind)
                with contextlib.suppress(ConnectionResetError):
                    answer = b"".join(iter(lambda c=client: c.recv(1000), b""))  # type: ignore[misc]
                    assert answer.count(b"HTTP/1.1 ") == 1, head
                    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 501")), head
            ended.wait(PAUSE)


ATTACKS: list[Attack] = [
    *(huge_stops, deep_json, many_ids, compressed_bombs, foreign_hosts, foreign_origins),
    *(large_requests, cancelled_streams, slow_bodies, idle_connections, endless_headers),
    smuggled_lengths,
]


def neighbours_speed(url: str, attacks: list[Attack], n_tokens: int = 30) -> float:
    """The tokens per second of a stream during attacks."""
    body = {"prompt": "The cow", "max_tokens": 240, "stream": True, "temperature": 1.5}
    ended = threading.Event()
    with (
        httpx.Client(timeout=30) as client,
        client.stream("POST", f"{url}/v1/completions", json=body) as answer,
        ThreadPoolExecutor(len(attacks) or 1) as threads,
    ):
        lines = (line for line in answer.iter_lines() if line.startswith("data: "))
        next(lines)
        try:
            running = [threads.submit(attack, url, ended) for attack in attacks]
            next(lines)
            begin = time.monotonic()
            for _ in range(n_tokens):
                next(lines)
            seconds = time.monotonic() - begin
        finally:
            ended.set()
        for each in running:
            each.result()
    return n_tokens / seconds


def resident() -> int:
    """This process's memory in bytes, which the server and its clients share."""
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
