"""Transport: methods, paths, headers, hosts, proxies, and comments in streams that wait."""

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import torch
from processes import wait_until
from servers import idle, serve

from llama import Llama
from llama.guards import Verdict
from llama.server import events
from llama.server.config import ServerConfig

COW = [{"role": "user", "content": "What does the cow say?"}]
BODIES: dict[str, Any] = {
    "completions": {"prompt": "Once", "max_tokens": 3},
    "chat/completions": {"messages": COW, "max_tokens": 3},
    "responses": {"input": "What does the cow say?", "max_output_tokens": 16},
    "embeddings": {"input": "The cow"},
}


def build(**settings: Any) -> Llama:
    return Llama.build(
        dtype=torch.float32, device="cpu", **{"max_seq_len": 256, "max_batch_size": 2, **settings}
    )


def with_page(app: Any, service: Any) -> Any:
    from llama.server.page import mount_page

    return mount_page(app, service)


@pytest.fixture(scope="module", params=["alone", "with the page"])
def client(request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    """Of the API; the page must not take anything from it."""
    mount = None if request.param == "alone" else with_page
    with serve(build(), mount=mount) as (url, _), httpx.Client(base_url=url, timeout=60) as client:
        yield client


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    """An answer's error, which must be in OpenAI's form."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_head(client: httpx.Client) -> None:
    """Monitors that ask by HEAD would take the server for dead."""
    for path in ("/health", "/v1/models", "/v1/models/tiny", "/docs", "/openapi.json", "/metrics"):
        head, whole = client.head(path), client.get(path)
        assert head.status_code == 200 and head.content == b"", path
        assert head.headers["content-type"] == whole.headers["content-type"]
        if path != "/metrics":  # which have changed in the meantime
            assert head.headers["content-length"] == str(len(whole.content))
    assert client.head("/v1/models/gpt-4o").status_code == 404


def test_wrong_methods(client: httpx.Client) -> None:
    """A client that mixes methods up would be told that there is no such path."""
    for method, path, allowed in (
        ("GET", "/v1/chat/completions", "POST"),
        ("HEAD", "/v1/chat/completions", "POST"),
        ("PUT", "/v1/responses/", "POST"),
        ("OPTIONS", "/v1/completions", "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("DELETE", "/v1/models/tiny", "GET, HEAD"),
        ("POST", "/health", "GET, HEAD"),
    ):
        answer = client.request(method, path)
        assert answer.status_code == 405 and answer.headers["allow"] == allowed, (method, path)
        if method != "HEAD":
            error = error_of(answer, 405)
            assert error["code"] == "method_not_allowed"
            assert method in error["message"] and allowed in error["message"]


def test_unknown_paths(client: httpx.Client) -> None:
    """Clients parse errors as JSON, and fail by another error where a file answers with text."""
    for path in ("/nothing", "/v1/nothing", "/v1", "/page/nothing", "/static-offline-docs/x"):
        error = error_of(client.get(path), 404)
        assert error["code"] == "not_found" and f"'{path}'" in error["message"]
    for path in ("/nothing", "/v1/nothing", "/v1", "/page"):
        error_of(client.post(path, json={}), 404)
    error = error_of(client.post("/chat/completions/", json=BODIES["chat/completions"]), 404)
    assert "'/chat/completions'" in error["message"] and "/v1" in error["message"]
    found = client.get(f"/{'a' * 5000}%00%0aevil").json()["error"]["message"]
    assert len(found) < 300 and "\n" not in found and "\0" not in found


def test_slashes_at_the_end(client: httpx.Client) -> None:
    """Many clients send no body again, or none at all, to where they are redirected."""
    for path, body in BODIES.items():
        for slashes in ("/", "//"):
            assert client.post(f"/v1/{path}{slashes}", json=body).status_code == 200, path
    for path in ("/health/", "/v1/models/", "/v1/models/tiny/", "/docs/", "/metrics/"):
        assert client.get(path).status_code == 200, path
    assert client.get("/v1/models/").json()["object"] == "list"


def test_the_page_takes_its_own_methods_only() -> None:
    """A client with a wrong address gets the API's errors, and the page goes on working."""
    with serve(build(), mount=with_page) as (url, _), httpx.Client(base_url=url) as client:
        for method, path, status, allowed in (
            ("GET", "/", 200, None),
            ("HEAD", "/", 200, None),
            ("GET", "/page/style.css", 200, None),
            ("HEAD", "/page/style.css", 200, None),
            ("POST", "/", 405, "GET, HEAD"),
            ("POST", "/page/style.css", 405, "GET, HEAD"),
            ("GET", "/render", 405, "POST"),
            ("POST", "/page", 404, None),
        ):
            answer = client.request(method, path)
            assert answer.status_code == status, (method, path)
            assert answer.headers.get("allow") == allowed
            if status > 400:
                error_of(answer, status)
            elif method == "HEAD":
                assert answer.content == b""


def exchange(client: httpx.Client, request: str) -> str:
    """The answer to a request as it stands, up to the connection's end."""
    address = ("127.0.0.1", client.base_url.port or 0)
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(request.encode())
        return b"".join(iter(lambda: connection.recv(10_000), b"")).decode()


def test_http_1_0(client: httpx.Client) -> None:
    """Load balancers check by HTTP/1.0 without a host, and nginx passes requests on in it."""
    assert exchange(client, "GET /health HTTP/1.0\r\n\r\n").startswith("HTTP/1.1 200")
    named = "GET /health HTTP/1.0\r\nHost: {}\r\n\r\n"
    assert exchange(client, named.format("localhost")).startswith("HTTP/1.1 200")
    for host in ("evil.example", ""):
        assert exchange(client, named.format(host)).startswith("HTTP/1.1 403"), host
    assert exchange(client, "GET /health HTTP/1.1\r\n\r\n").startswith("HTTP/1.1 400")
    body = json.dumps({"prompt": "Once", "max_tokens": 3, "stream": True})
    head = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    answer = exchange(client, f"POST /v1/completions HTTP/1.0\r\n{head}\r\n{body}")
    assert answer.startswith("HTTP/1.1 200") and answer.endswith("data: [DONE]\n\n")


def test_the_content_type_is_named(client: httpx.Client) -> None:
    """Who sends JSON as a form, as curl does by default, can't guess the header from the error."""
    text = json.dumps(BODIES["chat/completions"]).encode()
    for headers, content, found in (
        ({}, text, "has no Content-Type"),
        ({"Content-Type": "text/plain"}, text, "has the Content-Type 'text/plain'"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, text, "'application/x-www-form-"),
        ({"Content-Type": "a" * 1000}, text, "'aaa"),
        ({"Content-Type": "application/json"}, b"", "has no body"),
        ({}, b"", "has no body"),
    ):
        for path in ("chat/completions", "responses", "embeddings"):
            answer = client.post(f"/v1/{path}", headers=headers, content=content)
            error = error_of(answer, 400)
            assert found in error["message"] and len(error["message"]) < 250
            assert "'Content-Type: application/json'" in error["message"]
            assert error["param"] is None
    for kind in ("application/json; charset=utf-8", "Application/JSON", "application/x+json"):
        answer = client.post("/v1/chat/completions", headers={"Content-Type": kind}, content=text)
        assert answer.status_code == 200, kind


def test_too_long_a_prompt(client: httpx.Client) -> None:
    """Frameworks shorten a dialog and try again if they recognise OpenAI's words and code."""
    long = "cow " * 400
    for path, body, field in (
        ("chat/completions", {"messages": [{"role": "user", "content": long}]}, "messages"),
        ("responses", {"input": long}, "input"),
        ("completions", {"prompt": long}, "prompt"),
        ("completions", {"prompt": [5] * 256, "stream": True}, "prompt"),
        ("embeddings", {"input": long}, "input"),
    ):
        error = error_of(client.post(f"/v1/{path}", json=body), 400)
        assert error["code"] == "context_length_exceeded" and error["param"] == field
        assert error["type"] == "invalid_request_error"
        told = re.fullmatch(
            r"This model's maximum context length is 256 tokens\. However, your (\w+) resulted in "
            r"(\d+) tokens\. Please reduce the length of the \1, .*--max_seq_len\.",
            error["message"],
        )
        assert told and told[1] == field and int(told[2]) >= 256
    package = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError) as caught:
        package.completions.create(model="tiny", prompt=long)
    assert caught.value.code == "context_length_exceeded"


def test_a_foreign_host_is_told_what_to_set(client: httpx.Client) -> None:
    """Whoever puts a proxy in front would search for the reason of a bare 403."""
    answer = client.get("/v1/models", headers={"Host": "llm.example"})
    error = error_of(answer, 403)
    assert error["code"] == "forbidden_host"
    for part in ("'llm.example'", "--api_key", "LLAMA_API_KEY", "'Host: localhost'"):
        assert part in error["message"]
    answer = client.get("/v1/models", headers={"Host": "x" * 3000})
    assert len(error_of(answer, 403)["message"]) < 400


def test_x_api_key() -> None:
    """Clients that send their key in this header would be refused; a wrong key opens nothing."""
    with (
        serve(build(), api_key="secret-é") as (url, _),
        httpx.Client(base_url=url) as client,
    ):
        key = "secret-é".encode()
        for headers, status in (
            ({b"X-API-Key": key}, 200),
            ({b"x-api-key": key, b"Authorization": b"Bearer none"}, 200),
            ({b"x-api-key": b"none", b"Authorization": b"Bearer " + key}, 200),
            ({b"x-api-key": b"secret"}, 401),
            ({b"x-api-key": b""}, 401),
            ({b"x-api-key": b"Bearer " + key}, 401),
            ({}, 401),
        ):
            assert client.get("/v1/models/", headers=headers).status_code == status, headers
        assert "X-API-Key" in client.get("/v1/models").json()["error"]["message"]
        # No spelling of a public path opens another one.
        assert client.get("/health/").status_code == 200
        assert client.head("/health").status_code == 200
        for path in ("/health/x", "/v1/models/health", "/x/health", "/health//x"):
            assert client.get(path).status_code == 401, path


def test_below_a_path_of_a_proxy() -> None:
    """Behind a proxy that shows the server below a path, and cuts it off or doesn't, the API
    answers, and documentation and page find their own files."""
    with serve(build(), mount=with_page, root_path="/llama", api_key="secret") as (url, _):
        with httpx.Client(base_url=url, headers={"x-api-key": "secret"}) as client:
            for prefix in ("", "/llama"):
                models = client.get(f"{prefix}/v1/models/")
                assert models.json()["data"][0]["id"] == "tiny"
                answer = client.post(f"{prefix}/v1/completions", json=BODIES["completions"])
                assert answer.status_code == 200
                assert client.get(f"{prefix}/v1/completions").headers["allow"] == "POST"
                assert "'/nothing'" in client.get(f"{prefix}/nothing").json()["error"]["message"]
                document = client.get(f"{prefix}/openapi.json").json()
                assert document["servers"] == [{"url": "/llama"}]
                docs = client.get(f"{prefix}/docs").text
                files = re.findall(r'(?:src|href|url)(?:=|: )["\']([^"\']+)', docs)
                assert len(files) > 2 and all(file.startswith("/llama/") for file in files)
                assert all(client.get(file).status_code == 200 for file in files)
                page = client.get(f"{prefix}/")
                assert "default-src 'none'" in page.headers["content-security-policy"]
                files = re.findall(r'(?:src|href)="([^"]+)"', page.text)
                files = [file for file in files if not file.startswith("data:")]
                assert "page/main.js" in files
                assert all(client.get(f"{prefix}/{file}").status_code == 200 for file in files)
            assert client.get("/llama").headers["location"] == "/llama/"
            assert client.get("/llamas/v1/models").status_code == 404
            told = client.post("/llama/render", json={"text": "*a*"})
            assert told.json() == {"html": '<p dir="auto"><em>a</em></p>\n'}
        assert httpx.get(f"{url}/llama/health").status_code == 200
        assert httpx.get(f"{url}/health").status_code == 200
        for path in ("/llama/v1/models", "/v1/models", "/llama/llama/health", "/llama/x"):
            assert httpx.get(url + path).status_code == 401, path


def test_the_flag_root_path() -> None:
    """A whole address, or a path with a query, would make addresses that lead nowhere."""
    for given, path in (("/a", "/a"), ("a/", "/a"), ("/a/b-1/", "/a/b-1"), ("", ""), ("/", "")):
        assert ServerConfig(root_path=given).root_path == path
    for given in ("https://llm.example/a", "/a?b", "/a b", "/a//b", "/%61", "/é"):
        with pytest.raises(ValueError, match=r"--root_path is .* expected a path alone"):
            ServerConfig(root_path=given)


def test_streams_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proxies cut off a stream that is silent while its request waits in the queue or its prompt
    is read; comments keep it, and no client takes them for events."""
    monkeypatch.setattr(events, "FIRST_COMMENT", 0.02)
    monkeypatch.setattr(events, "COMMENT_INTERVAL", 0.02)
    llama, go = build(max_batch_size=1), threading.Event()
    forward = llama.model.hidden_states

    def hidden_states(*given: Any) -> torch.Tensor:
        go.wait(20)
        return forward(*given)

    llama.model.hidden_states = hidden_states  # type: ignore[method-assign]
    paths = ("completions", "chat/completions", "responses")  # the first is read, the others wait
    with serve(llama) as (url, _), httpx.Client(timeout=20) as http:
        streams = [
            http.stream("POST", f"{url}/v1/{path}", json={**BODIES[path], "stream": True})
            for path in paths
        ]
        lines = [stream.__enter__().iter_lines() for stream in streams]
        try:
            for each in lines:
                seen = [next(line for line in each if line.startswith(":")) for _ in range(3)]
                assert seen == [": waiting"] * 3
            go.set()
            for path, each in zip(paths, lines, strict=True):
                data = [line[6:] for line in each if line.startswith("data: ")]
                assert (data.pop() == "[DONE]") == (path != "responses")
                assert all(map(json.loads, data))
        finally:
            go.set()
            for stream in streams:
                stream.__exit__(None, None, None)
        go.clear()
        threading.Timer(0.1, go.set).start()
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as package:
            chunks = package.chat.completions.create(
                model="tiny", messages=COW, temperature=0, stream=True
            )
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            assert text == "The cow says moo."
            go.clear()
            threading.Timer(0.1, go.set).start()
            found = package.responses.create(model="tiny", input="Hi", stream=True)
            assert [event.type for event in found][-1] in (
                "response.completed",
                "response.incomplete",
            )


def test_comments_keep_out_of_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that came while an event is sent to a slow client, or after the last, breaks the
    connection."""
    monkeypatch.setattr(events, "FIRST_COMMENT", 0.002)
    monkeypatch.setattr(events, "COMMENT_INTERVAL", 0.002)
    sent: list[Any] = []
    is_sending = False

    async def send(message: Any) -> None:
        nonlocal is_sending
        assert not is_sending and (not sent or sent[-1].get("more_body", True))
        is_sending = True
        await asyncio.sleep(0.01)
        is_sending = False
        sent.append(message)

    async def blocks() -> Any:
        for number in range(3):
            await asyncio.sleep(0.005)
            yield b"data: %d\n\n" % number

    async def run() -> list[Any]:
        await events.EventResponse(blocks(), lambda: None).stream_response(send)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        return [
            error
            for error in await asyncio.gather(*others, return_exceptions=True)
            if not isinstance(error, asyncio.CancelledError)
        ]

    assert asyncio.run(run()) == []
    body = b"".join(message.get("body", b"") for message in sent)
    assert body.replace(events.COMMENT, b"") == b"data: 0\n\ndata: 1\n\ndata: 2\n\n"
    assert body.count(events.COMMENT) >= 2 and not sent[-1]["more_body"]


def test_a_stream_that_flows_has_no_comments(client: httpx.Client) -> None:
    """Scripts that split a stream by lines and parse them all would fail, for nothing."""
    assert events.FIRST_COMMENT <= 3 and 2 <= events.COMMENT_INTERVAL <= 10
    for path in ("completions", "chat/completions", "responses"):
        answer = client.post(f"/v1/{path}", json={**BODIES[path], "stream": True})
        assert not re.search("^:", answer.text, re.MULTILINE)


@pytest.mark.parametrize("path", ["completions", "chat/completions", "responses"])
def test_streams_that_wait_for_a_guard(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proxies cut off a stream that is silent while its prompt is judged; or its error, or that
    its client has left, goes unnoticed."""
    monkeypatch.setattr(events, "FIRST_COMMENT", 0.02)
    monkeypatch.setattr(events, "COMMENT_INTERVAL", 0.05)
    llama, go = build(), threading.Event()

    def guard(dialog: Any) -> Verdict:
        return Verdict(go.wait(20))

    llama.input_guard = guard
    body = {**BODIES[path], "stream": True}
    with serve(llama) as (url, service), httpx.Client(timeout=20) as http:
        with http.stream("POST", f"{url}/v1/{path}", json=body) as answer:
            lines = answer.iter_lines()
            assert answer.status_code == 200
            assert [next(line for line in lines if line) for _ in range(3)] == [": waiting"] * 3
            go.set()
            data = [line[6:] for line in lines if line.startswith("data: ")]
            assert len(data) > 2 and (data[-1] == "[DONE]") == (path != "responses")
        go.clear()
        with http.stream("POST", f"{url}/v1/{path}", json={**body, "timeout": 0.3}) as answer:
            [error] = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
            assert json.loads(error)["error"]["code"] == "timeout"
        written = service.loop.counts.generated_tokens
        limit = "max_output_tokens" if path == "responses" else "max_tokens"
        long = {**body, limit: 200, "ignore_eos": True}
        with http.stream("POST", f"{url}/v1/{path}", json=long) as answer:
            assert next(answer.iter_lines()) == ": waiting"
        time.sleep(0.2)
        go.set()
        whole = http.post(f"{url}/v1/{path}", json=BODIES[path])
        assert whole.status_code == 200
        wait_until(lambda: idle(service))
        assert service.loop.counts.generated_tokens - written < 20, "it went on without its client"
        late = {**body, "model": "other"}
        assert http.post(f"{url}/v1/{path}", json=late).status_code == 404
