"""The web page in a headless Chromium, for the tests of the page.

``tests/conftest.py`` has pytest find the fixtures:

    def test_an_answer_is_shown(page, site):
        site.api.answers.append(Answer(["Moo", "."]))
        say(page, "What does the cow say?")
        expect(answers(page)).to_contain_text(["Moo."])
        assert site.api.dialogs() == [[("user", "What does the cow say?")]]
"""

import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

Window = Callable[..., Any]


class Site:
    """A running server with the page and a scripted API (``fake_api.FakeApi``).

    It can die and return, at the same address.
    """

    def __init__(self) -> None:
        from fake_api import FakeApi, fake_app

        from llama.server.page import mount_page

        self.api = FakeApi()
        self.app = mount_page(fake_app(self.api), self.api)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self.is_running = False

    def start(self) -> None:
        import uvicorn
        from processes import wait_until

        config = uvicorn.Config(self.app, port=self.port, log_level="critical", ws="none")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        wait_until(lambda: self._server.started)
        self.is_running = True

    def stop(self) -> None:
        """Die: all connections break, and there are no new ones."""
        server = self._server
        for connection in list(server.server_state.connections):
            connection.loop.call_soon_threadsafe(connection.transport.abort)
        server.should_exit = server.force_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive(), "the server doesn't end"
        self.is_running = False


@pytest.fixture(scope="session")
def server() -> Iterator[Site]:
    for package in ("fastapi", "uvicorn", "markdown_it", "pygments", "latex2mathml"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    site = Site()
    yield site
    if site.is_running:
        site.stop()


@pytest.fixture
def site(server: Site) -> Site:
    """The server, which has forgotten all that other tests asked it."""
    if not server.is_running:
        server.start()
    server.api.reset()
    return server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser; while it runs, this thread has an event loop, and no test can run another."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    # The one that has no windows to show takes half of the time.
    names = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
    named = os.environ.get("CHROMIUM")
    program = next(filter(None, map(shutil.which, (named,) if named else names)), None)
    if program is None:
        pytest.skip("no Chromium: install one, or name it in CHROMIUM")
    sync_api.expect.set_options(timeout=10_000)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def window(browser: Any, request: pytest.FixtureRequest) -> Iterator[Window]:
    """Opens the page in a browser profile of its own: ``window(viewport=..., color_scheme=...)``.

    The test fails if a page asks another host for anything, writes an error to the console (as a
    breach of the content policy does), raises one, or lacks one of its files. ``url`` is another
    page's than the scripted server's, and ``script`` runs before its own.
    """
    faults: list[str] = []
    contexts: list[Any] = []

    def open_window(url: str = "", script: str = "", **options: Any) -> Any:
        address = url or request.getfixturevalue("site").url
        options = {"viewport": {"width": 1200, "height": 800}, "locale": "en-US", **options}
        context = browser.new_context(service_workers="block", **options)
        contexts.append(context)
        watch(context, urlsplit(address).netloc, faults)
        context.add_init_script(script or ";")
        page = context.new_page()
        page.goto(address)
        return page

    yield open_window
    for context in contexts:
        context.close()
    assert not faults, "\n".join(faults)


def watch(context: Any, host: str, faults: list[str]) -> None:
    """Note what pages do that they must not."""

    def refuse(route: Any) -> None:
        faults.append(f"the page requested {route.request.url}")
        route.abort()

    def read(message: Any) -> None:
        # The browser's own line about a refused request, of which tests have many.
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            faults.append(f"the console has: {message.text}")

    def check(response: Any) -> None:
        kind = response.request.resource_type
        if response.status >= 400 and kind not in ("fetch", "xhr"):
            faults.append(f"{response.url} has the status {response.status}")

    context.route(lambda address: urlsplit(address).netloc != host, refuse)
    context.on("console", read)
    context.on("weberror", lambda error: faults.append(f"the page raised {error.error}"))
    context.on("response", check)


@pytest.fixture
def page(window: Window) -> Any:
    """The page of the scripted server, in a window of 1200 by 800 pixels."""
    return window()


def message_box(page: Any) -> Any:
    return page.get_by_role("textbox", name="Message", exact=True)


def say(page: Any, text: str) -> None:
    """Write a message and send it by Enter."""
    message_box(page).fill(text)
    message_box(page).press("Enter")


def messages(page: Any) -> Any:
    return page.get_by_role("log", name="Messages").get_by_role("article")


def answers(page: Any) -> Any:
    return page.get_by_role("article", name="Assistant", exact=True)


def questions(page: Any) -> Any:
    return page.get_by_role("article", name="You", exact=True)


def ready(page: Any) -> None:
    """Wait until no answer is being written."""
    page.get_by_role("button", name="Send", exact=True).wait_for(state="visible")


def button(within: Any, name: str) -> Any:
    return within.get_by_role("button", name=name, exact=True)
