"""The page's files and POST /render: policy, paths, access, bounds; and what /v1/models tells."""

import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from servers import post, serve
from test_transport import error_of

from llama import Llama
from llama.generation import TINY
from llama.guards import Verdict
from llama.server import page, threads
from llama.server.about import model_meta
from llama.server.page import STATIC, mount_page

NAMES = sorted(path.name for path in STATIC.iterdir())
KINDS = {"js": "text/javascript", "css": "text/css", "html": "text/html", "svg": "image/svg+xml"}
MAX_LINES = 1197  # of code, without blank lines and comments
POLICY = {
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "connect-src 'self'",
    "img-src 'self' data:",
    "form-action 'none'",
    "base-uri 'none'",
    "frame-ancestors 'none'",
}


def build(**more: Any) -> Llama:
    return Llama.build(device="cpu", dtype=torch.float32, max_seq_len=256, **more)


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with serve(build(), mount=mount_page) as (url, _), httpx.Client(base_url=url) as client:
        yield client


def test_the_script_stays_small() -> None:
    """Script is what has to be read before one trusts the page."""
    lines = [
        line.strip()
        for path in STATIC.glob("*.js")
        for line in path.read_text("utf-8").splitlines()
    ]
    code = [line for line in lines if line and not line.startswith(("//", "/*", "*"))]
    assert len(code) <= MAX_LINES


def test_the_files_are_whole() -> None:
    """The page loads nothing from elsewhere, and each file that it needs is there."""
    for name in NAMES:
        text = (STATIC / name).read_text("utf-8")
        others = set(re.findall(r"https?://[^\s\"'<>)`]+", text)) - {"http://www.w3.org/2000/svg"}
        assert not others, f"{name} names {others}"
        for imported in re.findall(r'(?:from|import) "([^"]+)"', text):
            assert imported.removeprefix("./") in NAMES, f"{name} imports {imported}"


@pytest.mark.parametrize("path", ["", *(f"page/{name}" for name in NAMES)])
def test_each_file_has_the_policy(client: httpx.Client, path: str) -> None:
    """Without it a defect of the page would let a text run as a script, or send texts elsewhere."""
    for answer in (client.get(f"/{path}"), client.head(f"/{path}")):
        assert answer.status_code == 200
        assert set(answer.headers["content-security-policy"].split("; ")) == POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert (
            answer.headers["content-type"].split(";")[0] == KINDS[path.rpartition(".")[2] or "html"]
        )
        assert "set-cookie" not in answer.headers
    assert client.get(f"/{path}").content and not client.head(f"/{path}").content


def test_a_new_version_is_noticed(client: httpx.Client) -> None:
    """Browsers ask each time, so that scripts of two versions never meet, and load what changed."""
    first = client.get("/page/main.js")
    assert first.headers["cache-control"] == "no-cache"
    again = client.get("/page/main.js", headers={"If-None-Match": first.headers["etag"]})
    assert again.status_code == 304 and not again.content
    other = client.get("/page/main.js", headers={"If-None-Match": '"other"'})
    assert other.status_code == 200 and other.content == first.content


def test_no_other_file_is_served(client: httpx.Client) -> None:
    """No path leads out of the folder."""
    for path in (
        *("nothing.js", "", "%2e", "%2e%2e", "static/main.js", "main.js/x"),
        *("%2e%2e/__init__.py", "%2e%2e%2f__init__.py", "..%5c__init__.py", "%00", "/etc/passwd"),
        *("%2fetc%2fpasswd", "a" * 5000),
    ):
        raw = httpx.Request("GET", client.base_url.join("/page/"))
        raw.url = raw.url.copy_with(raw_path=f"/page/{path}".encode())
        answer = client.send(raw)
        assert answer.status_code == 404, path
        error_of(answer, 404)


def test_below_a_path_and_with_a_key() -> None:
    """The page comes without a key, and asks for it; its files are found below a proxy's path."""
    with (
        serve(build(), mount=mount_page, root_path="/llama", api_key="secret") as (url, _),
        httpx.Client(base_url=url) as client,
    ):
        for prefix in ("", "/llama"):
            for path in ("/", "/page/main.js", "/page/style.css"):
                assert client.get(prefix + path).status_code == 200, path
                assert client.head(prefix + path).status_code == 200, path
            assert client.get(f"{prefix}/page/nothing").status_code == 404
            for path in ("/v1/models", "/docs", "/page", "/pages/x"):
                assert client.get(prefix + path).status_code == 401, path
            refused = client.post(f"{prefix}/render", json={"text": "*a*"})
            assert error_of(refused, 401)["code"] == "invalid_api_key"
            key = {"Authorization": "Bearer secret"}
            html = client.post(f"{prefix}/render", json={"text": "*a*"}, headers=key).json()
            assert html == {"html": '<p dir="auto"><em>a</em></p>\n'}
        assert client.get("/llama").headers["location"] == "/llama/"


def test_other_hosts_are_refused(client: httpx.Client) -> None:
    """A web page elsewhere that gives its name to this address gets neither page nor HTML."""
    headers = {"Host": "evil.example"}
    for answer in (
        client.get("/", headers=headers),
        client.get("/page/main.js", headers=headers),
        client.post("/render", json={"text": "a"}, headers=headers),
    ):
        assert error_of(answer, 403)["code"] == "forbidden_host"


def test_without_the_page() -> None:
    """--page=False leaves neither files nor /render."""
    with serve(build()) as (url, _):
        for path in ("/", "/page/main.js"):
            error_of(httpx.get(url + path), 404)
        error_of(post(f"{url}/render", {"text": "a"}), 404)


def test_what_is_rendered(client: httpx.Client) -> None:
    answer = client.post("/render", json={"text": "**a** <b>", "kind": "markdown"})
    assert answer.json() == {"html": '<p dir="auto"><strong>a</strong> &lt;b&gt;</p>\n'}
    for body, param in (
        ({}, "text"),
        ({"text": 1}, "text"),
        ({"text": "a", "kind": "html"}, "kind"),
        ({"text": "a", "more": 1}, "more"),
        ({"text": "a" * (page.MAX_TEXT + 1)}, "text"),
    ):
        # The bound of texts lies above the bound of bodies that these tests' servers have.
        assert error_of(client.post("/render", json=body), 413 if len(str(body)) > 99_999 else 400)
        if len(str(body)) < 99_999:
            assert client.post("/render", json=body).json()["error"]["param"] == param
    assert "/render" in client.get("/openapi.json").json()["paths"]


def test_a_text_that_is_too_long() -> None:
    with serve(build(), mount=mount_page, max_body=1_000_000) as (url, _):
        error = error_of(post(f"{url}/render", {"text": "a" * 100_001}), 400)
        assert error["param"] == "text" and "100000" in error["message"]
        assert post(f"{url}/render", {"text": "a\n" * 50_000}).status_code == 200


def test_many_at_once_are_bounded(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts to render neither pile up without end nor hold up other requests."""
    begun, released = threading.Event(), threading.Event()

    def slow(text: str) -> str:
        begun.set()
        assert released.wait(30)
        return text

    monkeypatch.setattr(page, "render_markdown", slow)
    monkeypatch.setattr(threads, "_MAX_WAITING", 1)
    url, first = str(client.base_url), []
    ask = threading.Thread(target=lambda: first.append(post(f"{url}/render", {"text": "a"})))
    ask.start()
    try:
        assert begun.wait(30)
        refused = post(f"{url}/render", {"text": "b"})
        assert "try again later" in error_of(refused, 429)["message"]
        assert refused.headers["Retry-After"]
        assert post(f"{url}/tokenize", {"content": "a"}).status_code == 200
    finally:
        released.set()
        ask.join(30)
    assert first[0].json() == {"html": "a"}


def meta(llama: Llama, **flags: object) -> dict[str, Any]:
    with serve(llama, **flags) as (url, _):
        [model] = httpx.get(f"{url}/v1/models").json()["data"]
    assert model["max_model_len"] == 256
    return dict(model["meta"])


def test_what_a_model_can_do() -> None:
    """The page offers tasks and settings by it, and shows the rest to people."""
    assert meta(build()) == {
        "description": "Llama, 1.9 million parameters",
        "chat_format": "inst",
        "precision": "float32",
        "n_params": 1_918_656,
        "infills": True,
        "chats": True,
        "tools": False,
        "top_logprobs": 20,
        "sampling": {
            "temperature": 0.6,
            "top_p": 0.9,
            "top_k": 0,
            "min_p": 0,
            "repetition_penalty": 1,
            "presence_penalty": 0,
            "frequency_penalty": 0,
        },
    }
    assert meta(build(tool_format="hermes"))["tools"]
    assert meta(build(quantize="int8"))["precision"] == "8 bits, some float32"
    guarded = build()
    guarded.output_guard = lambda dialog, answer: Verdict(True)
    assert meta(guarded)["top_logprobs"] == 0, "a guarded server returns none"


def test_the_precision_of_a_file(tmp_path: Path) -> None:
    """People tell by it that a quantised file is served as it is."""
    gguf_files = pytest.importorskip("gguf_files", reason="gguf is not installed")
    path = tmp_path / "model.gguf"
    sizes = {"dim": 64, "hidden_dim": 64, "vocab_size": 768}
    gguf_files.write_gguf(path, gguf_files.Kind.Q4_0, **sizes)
    llama = build(ckpt_dir=path, tokenizer_path=TINY / "tokenizer.model")
    found = meta(llama, ckpt_dir=str(path))
    assert found["precision"].startswith("4 bits in groups of 32")
    assert found["precision"].endswith(", of a GGUF file")


def test_a_classifier_writes_nothing() -> None:
    """The page would offer tasks that the model answers with an error."""
    llama = build()
    llama.model.params.labels = ["good", "bad"]
    with serve(llama) as (_, service):
        found = model_meta(service)
    assert not found.chats and not found.infills
    assert "classifier of 2 labels" in found.description
