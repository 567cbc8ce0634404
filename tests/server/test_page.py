"""The server's web page in a real browser, headless: what a user does, and where it connects to."""

import asyncio
import os
import re
import shutil
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from llama.sampling import SamplingParams

pytestmark = pytest.mark.slow

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect, Page, Browser = sync_api.expect, sync_api.Page, sync_api.Browser
expect.set_options(timeout=10_000)

CODE = '''Adds **two** numbers:

```python
def add(a: int, b: int) -> int:
    """The sum of two numbers."""
    return a + b  # of any size
```

It is called as `add(1, 2)`.
'''


def changed(options: Any) -> dict[str, Any]:
    """The options that differ from the defaults."""
    params, default = SamplingParams(**options), SamplingParams()
    names = {name for name in options if getattr(params, name) != getattr(default, name)}
    return {name: options[name] for name in names}


class FakeTalk:
    """Answers at once, but for messages that ask for something else; notes all that it is asked."""

    name = "tiny-llama"
    chat_format = "turn-based"
    infills = True
    max_tokens = 2048
    defaults = SamplingParams()

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.closed = threading.Event()  # a generation ended before its time

    async def chat(self, dialog: list[Any], options: Any) -> AsyncIterator[str]:
        self.asked.append(([(m["role"], m["content"]) for m in dialog], changed(options)))
        last = dialog[-1]["content"]
        if "refuse" in last:
            raise ValueError("The prompt has <9,000> tokens, and 2,048 fit.")
        if "fail" in last:
            raise RuntimeError("a secret of the server")
        if "code" in last or "picture" in last:
            yield CODE if "code" in last else "![elsewhere](https://example.com/picture.png)"
            return
        yield f"Answer {len(self.asked)}, "
        yield "as text."
        if "wait" in last:
            try:
                await asyncio.Event().wait()
            finally:
                self.closed.set()

    async def complete(self, prompt: str, options: Any) -> AsyncIterator[str]:
        self.asked.append((prompt, changed(options)))
        for word in (" there", " was", " a", " llama."):
            yield word

    async def infill(self, prefix: str, suffix: str, options: Any) -> AsyncIterator[str]:
        self.asked.append((prefix, suffix, changed(options)))
        yield "a +"
        yield " b"


@pytest.fixture(scope="module")
def talk() -> FakeTalk:
    return FakeTalk()


@pytest.fixture(scope="module")
def url(talk: FakeTalk) -> Iterator[str]:
    """The address of a server with the page; nothing that it does may look up another host."""
    fastapi = pytest.importorskip("fastapi", reason="FastAPI is not installed")
    uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed")
    pytest.importorskip("gradio", reason="Gradio is not installed")
    lookups: list[object] = []
    lookup = socket.getaddrinfo

    def noted(host: Any, *more: Any, **options: Any) -> Any:
        lookups.append(host)
        return lookup(host, *more, **options)

    with pytest.MonkeyPatch.context() as patch, socket.socket() as listening:
        patch.setattr(socket, "getaddrinfo", noted)
        from llama.server.page import mount_page

        listening.bind(("127.0.0.1", 0))
        app = mount_page(fastapi.FastAPI(), talk)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        server.should_exit = True
        thread.join(10)
    foreign = [host for host in lookups if host not in ("127.0.0.1", "localhost", None)]
    assert not foreign, f"the server looked up {foreign}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, (shutil.which(name) for name in names if name)), None)
    if program is None:
        pytest.skip("no Chromium: install one, or name it in CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    """The page, opened in a window of its own; none may request anything of another host."""
    foreign: list[str] = []

    def refuse(route: Any) -> None:
        foreign.append(route.request.url)
        route.abort()

    context = browser.new_context(viewport={"width": 1200, "height": 800}, service_workers="block")
    context.route(lambda address: urlsplit(address).hostname != "127.0.0.1", refuse)
    page = context.new_page()
    page.goto(url)
    yield page
    context.close()
    assert not foreign, f"the page requested {foreign}"


def say(page: Any, text: str) -> None:
    box = page.get_by_placeholder("Message")
    box.fill(text)
    box.press("Enter")


def answers(page: Any) -> Any:
    return page.get_by_test_id("bot")


def ready(page: Any) -> None:
    """Wait until an answer is whole, or stopped."""
    expect(page.get_by_test_id("submit-button").first).to_be_visible()


def slide(page: Any, label: str, value: str) -> None:
    number = page.get_by_label(f"number input for {label}")
    number.fill(value)
    number.press("Tab")
    expect(number).to_have_value(value)


def test_a_second_turn_sees_the_first(page: Any, talk: FakeTalk) -> None:
    expect(page).to_have_title("tiny-llama")
    expect(page.locator("body")).to_contain_text("turn-based")
    say(page, "First?")
    expect(answers(page)).to_have_text([re.compile("as text")])
    ready(page)
    page.get_by_label("System prompt").fill("Be brief.")
    slide(page, "Temperature", "0")
    slide(page, "Top-p", "0.5")
    slide(page, "Length", "64")
    n = len(talk.asked)
    say(page, "Second?")
    expect(answers(page)).to_have_text([f"Answer {n}, as text.", f"Answer {n + 1}, as text."])
    assert talk.asked[-2] == ([("user", "First?")], {}), "the defaults have changed"
    dialog = [
        ("system", "Be brief."),
        ("user", "First?"),
        ("assistant", f"Answer {n}, as text."),
        ("user", "Second?"),
    ]
    options = {"temperature": 0, "top_p": 0.5, "max_gen_len": 64}
    assert talk.asked[-1] == (dialog, options), "the dialog or the settings did not arrive"


def test_more_settings(page: Any, talk: FakeTalk) -> None:
    """They are closed away, reach every task, and a schema or a seed that can't be read is told."""
    expect(page.get_by_label("JSON schema")).not_to_be_visible()
    page.get_by_text("More", exact=True).click()
    expect(page.get_by_label("JSON schema")).to_be_visible()
    slide(page, "Top-k", "40")
    slide(page, "Min-p", "0.1")
    slide(page, "Repetition penalty", "1.2")
    slide(page, "Presence penalty", "-0.5")
    slide(page, "Frequency penalty", "0.5")
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Stop strings").fill("###\n\nUser:")
    page.get_by_label("JSON schema").fill('{"type": "object"}')
    say(page, "All of it?")
    expect(answers(page)).to_have_text([re.compile("as text")])
    ready(page)
    schema = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}
    options = {
        "top_k": 40,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.5,
        "seed": 7,
        "stop": ["###", "User:"],
        "response_format": schema,
    }
    assert talk.asked[-1] == ([("user", "All of it?")], options)
    page.get_by_role("tab", name="Completion").click()
    page.get_by_label("Text to continue").fill("Once")
    page.get_by_role("button", name="Continue").click()
    expect(page.locator("textarea:disabled:visible")).to_have_value(" there was a llama.")
    assert talk.asked[-1] == ("Once", options)
    page.get_by_role("tab", name="Chat").click()
    shown = page.get_by_test_id("toast-text")
    for label, text, message in (
        ("JSON schema", "{", "The JSON schema isn't JSON"),
        ("Seed", "seven", "The seed is 'seven': expected a whole number."),
    ):
        before = page.get_by_label(label).input_value()
        page.get_by_label(label).fill(text)
        say(page, "And then?")
        expect(shown.filter(has_text=message)).to_be_visible()
        ready(page)
        page.get_by_label(label).fill(before)


def test_stop_ends_the_generation_and_keeps_what_was_said(page: Any, talk: FakeTalk) -> None:
    say(page, "Please wait.")
    expect(answers(page)).to_have_text([re.compile("as text")])
    assert not talk.closed.is_set()
    page.get_by_test_id("stop-button").click()
    assert talk.closed.wait(10), "Stop did not close the generator"
    talk.closed.clear()
    ready(page)
    partial = f"Answer {len(talk.asked)}, as text."
    say(page, "And then?")
    expect(answers(page)).to_have_text([partial, re.compile("as text")])
    dialog = [("user", "Please wait."), ("assistant", partial), ("user", "And then?")]
    assert talk.asked[-1][0] == dialog, "the stopped answer is no part of the dialog"


def test_users_are_served_at_once_and_may_leave(page: Any, url: str, talk: FakeTalk) -> None:
    say(page, "Please wait.")
    expect(answers(page)).to_have_count(1)
    other = page.context.new_page()
    other.goto(url)
    say(other, "Hello?")
    expect(answers(other)).to_have_text([re.compile("as text")])
    assert not talk.closed.is_set(), "one user's generation ended with another's"
    page.close()
    assert talk.closed.wait(10), "a generation goes on though its reader has gone"
    talk.closed.clear()


def test_retry_edit_and_clear(page: Any, talk: FakeTalk) -> None:
    say(page, "One?")
    expect(answers(page)).to_have_count(1)
    ready(page)
    say(page, "Two?")
    expect(answers(page)).to_have_count(2)
    ready(page)
    asked = talk.asked[-1]
    first = answers(page).first.inner_text()

    again = f"Answer {len(talk.asked) + 1}, as text."
    page.get_by_role("button", name="Retry").click()
    expect(answers(page)).to_have_text([first, again])
    ready(page)
    assert talk.asked[-1] == asked, "Retry does not ask the same again"
    assert talk.asked[-2] == asked, "Retry did not ask"

    page.get_by_role("button", name="Edit").first.click()
    page.locator("textarea.edit-textarea").fill("Three?")
    third = f"Answer {len(talk.asked) + 1}, as text."
    page.get_by_role("button", name="Submit", exact=True).click()
    expect(answers(page)).to_have_text([third])
    ready(page)
    expect(page.get_by_test_id("user")).to_have_text(["Three?"])
    assert talk.asked[-1][0] == [("user", "Three?")], "Edit does not ask from there on"

    page.get_by_role("button", name="Clear").click()
    expect(answers(page)).to_have_count(0)
    say(page, "Four?")
    expect(answers(page)).to_have_count(1)
    assert talk.asked[-1][0] == [("user", "Four?")], "Clear did not forget the dialog"


def test_an_error_is_shown_and_loses_nothing(page: Any, talk: FakeTalk) -> None:
    say(page, "Hello?")
    expect(answers(page)).to_have_count(1)
    ready(page)
    shown = page.get_by_test_id("toast-text")
    for text, message in (
        ("refuse me", "The prompt has <9,000> tokens, and 2,048 fit."),
        ("fail for me", "The server failed. See its log."),
    ):
        say(page, text)
        expect(shown.filter(has_text=message)).to_be_visible()
        expect(page.get_by_placeholder("Message")).to_have_value(text)
        expect(page.get_by_test_id("user")).to_have_text(["Hello?"])
        expect(answers(page)).to_have_count(1)
        ready(page)


def test_markdown_and_code_are_rendered(page: Any) -> None:
    say(page, "Show me code, please.")
    answer = answers(page)
    expect(answer.locator("strong")).to_have_text("two")
    expect(answer.locator("pre .token.keyword")).to_have_text(["def", "return"])
    ready(page)
    say(page, "And a picture?")
    expect(answers(page).locator("img")).to_have_count(1)  # and the page must not load it
    ready(page)


def test_a_text_is_completed(page: Any, talk: FakeTalk) -> None:
    page.get_by_role("tab", name="Completion").click()
    page.get_by_label("Text to continue").fill("Once upon a time")
    page.get_by_role("button", name="Continue").click()
    expect(page.locator("textarea:disabled:visible")).to_have_value(" there was a llama.")
    expect(page.get_by_role("button", name="Continue")).to_be_visible()
    assert talk.asked[-1] == ("Once upon a time", {})


def test_a_gap_is_filled_in(page: Any, talk: FakeTalk) -> None:
    page.get_by_role("tab", name="Infilling").click()
    page.get_by_label("Before").fill("def add(a, b):\n    return ")
    page.get_by_label("After").fill("\n")
    page.get_by_role("button", name="Fill in").click()
    expect(page.locator("textarea:disabled:visible")).to_have_value("a + b")
    assert talk.asked[-1] == ("def add(a, b):\n    return ", "\n", {})


def test_a_narrow_window_needs_no_scrolling(page: Any) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    say(page, "Show me code, please.")
    expect(answers(page).locator("pre")).to_be_visible()
    ready(page)
    expect(page.get_by_placeholder("Message")).to_be_in_viewport(ratio=1)
    for tab in ("Chat", "Completion", "Infilling"):
        page.get_by_role("tab", name=tab).click()
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 390, f"{tab} is {width} pixels wide"


def test_only_what_the_page_needs_is_served(url: str) -> None:
    httpx = pytest.importorskip("httpx", reason="httpx is not installed")
    answer = httpx.get(url)
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    others = set(re.findall(r"https?://[^\"'/]+", answer.text)) - {url.rstrip("/")}
    assert not others, f"the page names {others}"
    for path in ("upload", "info", "run/answer", "file=/etc/hostname"):
        assert httpx.get(f"{url}gradio_api/{path}").status_code == 404, path
        assert httpx.post(f"{url}gradio_api/{path}").status_code == 404, path


def test_nothing_is_fetched_for_a_browser(url: str) -> None:
    """A value that names a file elsewhere, or a component to make, is neither fetched nor made."""
    from gradio import processing_utils
    from gradio.components.chatbot import ComponentMessage

    from llama.server.page import only_text

    with pytest.raises(ValueError, match="nothing is fetched"):
        processing_utils.async_ssrf_protected_download("http://example.com/x", "").send(None)
    made = ComponentMessage(component="html", value="<b>x</b>", constructor_args={}, props={})
    assert only_text(made) == {"type": "text", "text": ""}


def test_a_model_that_cannot_infill_says_so(url: str) -> None:
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    from llama.server.page import mount_page

    talk = FakeTalk()
    talk.infills = False
    client = TestClient(mount_page(FastAPI(), talk))
    assert "tiny-llama cannot infill" in client.get("/").text


def test_the_embedded_model_talks(browser: Any) -> None:
    """The whole server: a dialog of two turns, an infilling, and Stop, which frees the row. With
    LLAMA_SCREENSHOT the dialog's picture is written to that file."""
    from processes import wait_until
    from servers import idle, serve

    from llama import Llama
    from llama.server.page import mount_page

    llama = Llama.build(device="cpu", max_seq_len=2048)
    forward = llama.model.hidden_states
    slow = threading.Event()

    def hidden_states(*args: Any) -> Any:
        threading.Event().wait(0.05 if slow.is_set() else 0)
        return forward(*args)

    llama.model.hidden_states = hidden_states  # type: ignore[method-assign]
    with serve(llama, mount=mount_page) as (url, service):
        foreign: list[str] = []
        context = browser.new_context(viewport={"width": 1200, "height": 720})
        context.on("request", lambda request: foreign.append(request.url))
        page = context.new_page()
        page.goto(url)
        slide(page, "Temperature", "0")
        say(page, "What does the cow say?")
        expect(answers(page)).to_have_text(["The cow says moo."])
        ready(page)
        say(page, "And where does it live?")
        expect(answers(page)).to_have_count(2)
        ready(page)
        dialog = [
            {"role": "user", "content": "What does the cow say?"},
            {"role": "assistant", "content": "The cow says moo."},
            {"role": "user", "content": "And where does it live?"},
        ]
        expected = llama.chat.prompt(llama.tokenizer, dialog)
        assert service.loop.counts.reused_tokens > len(expected) // 2, "the cache wasn't reused"
        if path := os.environ.get("LLAMA_SCREENSHOT"):
            page.screenshot(path=path)
        page.get_by_role("tab", name="Infilling").click()
        page.get_by_label("Before").fill("def add(a, b):\n    return ")
        page.get_by_label("After").fill("\n")
        page.get_by_role("button", name="Fill in").click()
        expect(page.locator("textarea:disabled:visible")).to_have_value("a + b")
        slow.set()
        page.get_by_role("tab", name="Completion").click()
        page.get_by_label("Text to continue").fill("Once upon a time")
        page.get_by_role("button", name="Continue").click()
        wait_until(lambda: not idle(service))
        page.get_by_role("button", name="Stop").click()
        wait_until(lambda: idle(service))
        page.goto(f"{url}/docs")
        expect(page.get_by_text("/v1/chat/completions").first).to_be_visible()
        context.close()
        foreign = [
            address for address in foreign if not address.startswith((url, "data:", "blob:"))
        ]
        assert not foreign, f"the server's pages requested {foreign}"
