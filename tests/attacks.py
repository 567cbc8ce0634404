"""Strangers' clients, as a process of their own: they share no interpreter with the server.

    python tests/attacks.py URL NAME ...

They begin at the first line of the standard input, and end with it; the status is 1 if an answer
wasn't what it should be.
"""

import contextlib
import gzip
import json
import resource
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

JSON = {"Content-Type": "application/json"}
PAUSE = 0.02  # seconds between the requests of an attack
Attack = Callable[[str, threading.Event], None]


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


def texts_to_render(url: str, ended: threading.Event) -> None:
    """Each takes the page's parsers as long as they may take."""
    with httpx.Client(timeout=30) as client:
        while not ended.is_set():
            for text in ("[" * 90_000, "- a\n" * 15_000, r"$\frac{a}{b}$ " * 6000):
                if not ended.is_set():
                    assert client.post(f"{url}/render", json={"text": text}).status_code == 200


ATTACKS: list[Attack] = [
    *(huge_stops, deep_json, many_ids, compressed_bombs, foreign_hosts, foreign_origins),
    *(large_requests, cancelled_streams, slow_bodies, idle_connections, endless_headers),
    *(smuggled_lengths, texts_to_render),
]


def main(url: str, names: list[str]) -> None:
    """Run attacks at once, from the standard input's first line to its end."""
    attacks = [attack for attack in ATTACKS if attack.__name__ in names]
    ended = threading.Event()
    print("ready", flush=True)
    sys.stdin.readline()
    with ThreadPoolExecutor(len(attacks)) as threads:
        running = [threads.submit(attack, url, ended) for attack in attacks]
        sys.stdin.read()
        ended.set()
    for each in running:
        each.result()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
