"""The page as a whole, in a headless Chromium: several tabs, broken connections, devices, people.

The tests of its parts are in ``test_page_core.py`` and ``test_page_more.py``.
"""

import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser_page import Site, Window, answers, button, message_box, questions, ready, say

pytestmark = pytest.mark.slow

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("fastapi", reason="FastAPI is not installed")
expect = sync_api.expect

from fake_api import Answer  # noqa: E402 (it needs FastAPI)

MARKDOWN = """Adds **two** numbers:

```python
def add(a: int, b: int) -> int:
    return a + b  # of any size
```

| a | b | a + b |
|---|---|---|
| 1 | 2 | 3 |

It is $\\sqrt{a^2 + b^2}$ that isn't meant, and [not this](https://example.com/) either:

$$\\sum_{i=1}^{n} i = \\frac{n(n+1)}{2}$$
"""
CUT = "This answer was cut."
PHONE = {"viewport": {"width": 360, "height": 640}, "is_mobile": True, "has_touch": True}


def alert(page: Any) -> Any:
    return page.get_by_role("alert")


def exported(n: int, title: str = "A long talk", **more: Any) -> str:
    """A file of one conversation with ``n`` messages, as the page exports it."""
    ids = [f"m{i}" for i in range(n)]
    found = {
        name: {
            "id": name,
            "parent": ids[i - 1] if i else None,
            "role": ("user", "assistant")[i % 2],
            "content": f"Message {i} of **many**, with `code` and a few more words.",
            "state": "complete",
        }
        for i, name in enumerate(ids)
    }
    talk = {"id": "c1", "title": title, "messages": found, "leaf": ids[-1], **more}
    return json.dumps({"format": "llama-conversations", "version": 1, "conversations": [talk]})


def load(page: Any, text: str, tmp_path: Path) -> None:
    """Import a file of conversations."""
    path = tmp_path / "conversations.json"
    path.write_text(text)
    with page.expect_file_chooser() as chooser:
        button(page.get_by_role("navigation", name="Conversations"), "Import").click()
    chooser.value.set_files(path)


def open_talk(page: Any, title: str) -> None:
    button(page.get_by_role("navigation", name="Conversations"), title).click()


def open_settings(page: Any) -> Any:
    button(page, "Settings").click()
    sheet = page.get_by_role("dialog", name="Settings")
    expect(sheet).to_be_visible()
    return sheet


def eventually(page: Any, script: str) -> None:
    """Wait until a script is true."""
    end = time.monotonic() + 20
    while not page.evaluate(f"Boolean({script})"):
        assert time.monotonic() < end, f"{script} never became true"
        page.wait_for_timeout(50)


# Tabs and broken connections


def test_two_tabs_write_at_once(page: Any, site: Site) -> None:
    """A tab that opens marks an answer that another one is writing as cut, ends it, or doesn't see
    its text; or what one tab makes isn't in the other's list."""
    site.api.answers.append(Answer(["The cow ", "says ", "moo."], waits_at=2))
    say(page, "What does the cow say?")
    expect(answers(page)).to_contain_text("The cow says")
    other = page.context.new_page()
    other.goto(site.url)
    open_talk(other, "What does the cow say?")
    expect(answers(other)).to_contain_text("The cow says")
    expect(other.get_by_text(CUT)).to_have_count(0)
    button(other, "New conversation").click()
    say(other, "Hello?")
    expect(answers(other)).to_contain_text("as text.")
    assert not site.api.closed.is_set(), "one tab's answer ended the other's"
    expect(button(page, "Hello?")).to_be_visible()
    site.api.go.set()
    expect(answers(page)).to_contain_text("The cow says moo.")
    ready(page)
    open_talk(other, "What does the cow say?")
    expect(answers(other)).to_contain_text("The cow says moo.")
    button(answers(other), "Delete").click()
    expect(answers(page)).to_have_count(0)


def test_a_server_that_dies_and_returns(page: Any, site: Site) -> None:
    """Text written before the server died is lost, isn't marked, can't be continued when it has
    returned; or what was sent meanwhile is lost."""
    site.api.answers.append(Answer(["The cow ", "says "], waits_at=2))
    say(page, "What does the cow say?")
    expect(answers(page)).to_contain_text("The cow says")
    site.stop()
    expect(answers(page)).to_contain_text(CUT)
    expect(answers(page)).to_contain_text("The cow says")
    expect(alert(page)).to_contain_text(re.compile("continue|retry|try again"))
    button(answers(page), "Continue").click()
    expect(alert(page).filter(has_text="can't be reached")).to_be_visible()
    expect(answers(page)).to_contain_text("The cow says")
    site.start()
    site.api.answers.append(Answer(["moo."]))
    button(answers(page), "Continue").click()
    expect(answers(page)).to_contain_text("The cow says moo.")
    expect(page.get_by_text(CUT)).to_have_count(0)
    body = site.api.bodies()[-1]
    assert body["messages"][-1] == {"role": "assistant", "content": "The cow says "}
    assert body.get("continue_final_message") is not False
    site.stop()
    say(page, "And the bee?")
    expect(alert(page).filter(has_text="can't be reached").first).to_be_visible()
    expect(message_box(page)).to_have_value("And the bee?")
    site.start()
    page.reload()
    expect(answers(page).first).to_contain_text("The cow says moo.")
    expect(message_box(page)).to_have_value("And the bee?")


def test_a_reload_in_mid_answer_loses_nothing(page: Any, site: Site) -> None:
    """Text that was there before a reload is lost, or not marked as cut; the server goes on writing
    for nobody; or the answer can't be continued."""
    site.api.answers.append(Answer(["The cow ", "says "], waits_at=2))
    say(page, "What does the cow say?")
    expect(answers(page)).to_contain_text("The cow says")
    message_box(page).fill("A draft")
    page.reload()
    assert site.api.closed.wait(10), "the answer goes on though its reader has gone"
    expect(answers(page)).to_contain_text("The cow says")
    expect(answers(page)).to_contain_text(CUT)
    expect(message_box(page)).to_have_value("A draft")
    site.api.answers.append(Answer(["moo."]))
    button(answers(page), "Continue").click()
    expect(answers(page)).to_contain_text("The cow says moo.")
    expect(page.get_by_text(CUT)).to_have_count(0)
    ready(page)
    page.reload()
    expect(answers(page)).to_contain_text("The cow says moo.")


def test_an_error_in_mid_answer_is_told(page: Any, site: Site) -> None:
    """An answer that the server gave up looks whole, or nobody learns why."""
    site.api.answers.append(Answer(["The cow "], fails_at=1))
    say(page, "What does the cow say?")
    expect(answers(page)).to_contain_text(CUT)
    expect(alert(page)).to_contain_text("the server failed")
    page.wait_for_timeout(200)
    expect(alert(page)).to_be_visible()


def test_500_messages_stay_fluid(window: Window, site: Site, tmp_path: Path) -> None:
    """A long conversation takes seconds to open, has the server render what nobody sees, or each
    new piece of an answer costs as much as the whole."""
    rendered: list[str] = []
    site.api.max_model_len = 100_000
    page = window()
    page.on("request", lambda found: rendered.extend([found.url] * found.url.endswith("/render")))
    load(page, exported(500), tmp_path)
    # Roles and snapshots of 500 messages take the browser longer than showing them.
    last = "document.querySelector('.list > article:last-child')"
    eventually(page, "document.querySelectorAll('article').length === 500")
    eventually(page, f"{last}.querySelector('code')")
    expect(page.locator("article").last).to_be_in_viewport()
    assert len(rendered) < 60, f"{len(rendered)} of 500 messages were rendered at once"
    page.evaluate(
        """() => {
          globalThis.longest = 0;
          const note = (list) => list.getEntries().forEach(
            (entry) => (longest = Math.max(longest, entry.duration)));
          new PerformanceObserver(note).observe({ type: "longtask" });
        }"""
    )
    rendered.clear()
    site.api.answers.append(Answer([f"word{i} " for i in range(200)], pause=0.005))
    say(page, "And then?")
    message_box(page).press_sequentially("typed while it answers")
    eventually(page, f"{last}.textContent.includes('word199')")
    eventually(page, "!document.querySelector('.composer.running')")
    expect(message_box(page)).to_have_value("typed while it answers")
    expect(page.locator("article").last).to_be_in_viewport()
    assert len(rendered) < 10, f"{len(rendered)} texts were rendered for one answer"
    longest = page.evaluate("longest")
    assert longest < 500, f"the page stood still for {longest} ms"


# Devices


def test_a_narrow_window(window: Window, site: Site) -> None:
    """On a phone the message box is off the screen, the page is wider than it, or the settings
    aren't a sheet that can be closed."""
    page = window(**PHONE)
    site.api.answers.append(Answer([MARKDOWN]))
    for opened in (False, True):
        if opened:
            say(page, "Show me code, please, and_a_word_that_is_longer_than_any_line_of_a_phone_is")
            expect(answers(page).locator("table")).to_be_visible()
            ready(page)
        expect(message_box(page)).to_be_in_viewport(ratio=1)
        expect(button(page, "Send")).to_be_in_viewport(ratio=1)
        for tab in ("Completion", "Infilling", "Chat"):
            page.get_by_role("tab", name=tab).click()
            width = page.evaluate("document.documentElement.scrollWidth")
            assert width <= 360, f"{tab} is {width} pixels wide"
    sheet = open_settings(page)
    box = sheet.bounding_box()
    assert box["width"] >= 355, "the sheet isn't as wide as the screen"
    assert box["y"] + box["height"] == pytest.approx(640, abs=2), "the sheet isn't at the bottom"
    sheet.get_by_label("Seed").scroll_into_view_if_needed()
    expect(sheet.get_by_label("Seed")).to_be_in_viewport(ratio=1)
    assert sheet.evaluate("e => e.scrollWidth <= e.clientWidth"), "the sheet scrolls sideways"
    size = message_box(page).evaluate("e => parseFloat(getComputedStyle(e).fontSize)")
    assert size >= 16, "iPhones zoom into text boxes with smaller letters"
    page.keyboard.press("Escape")
    expect(sheet).not_to_be_visible()


LUMINANCE = """() => {
  const shown = [document.body, document.documentElement].map(
    (element) => getComputedStyle(element).backgroundColor);
  const [r, g, b] = shown.find((color) => color !== "rgba(0, 0, 0, 0)").match(/[\\d.]+/g);
  return (0.2126 * r + 0.7152 * g + 0.0722 * b) / 255;
}"""


def test_dark_and_light(window: Window) -> None:
    """The page is bright in the dark, or the choice of a theme is forgotten."""
    page = window(color_scheme="dark")
    expect(message_box(page)).to_be_visible()
    assert page.evaluate(LUMINANCE) < 0.2
    page.emulate_media(color_scheme="light")
    assert page.evaluate(LUMINANCE) > 0.8
    open_settings(page).get_by_label("Theme").select_option("Dark")
    eventually(page, f"({LUMINANCE})() < 0.2")  # as soon as the choice is kept
    page.reload()
    expect(message_box(page)).to_be_visible()
    eventually(page, f"({LUMINANCE})() < 0.2")  # otherwise the choice is forgotten
    scheme = page.evaluate("getComputedStyle(document.documentElement).colorScheme")
    assert "dark" in scheme, "the browser's own controls and scrollbars stay bright"


# People


def test_composing_sends_nothing(page: Any, site: Site) -> None:
    """The Enter that chooses Chinese or Japanese characters sends a half-written message."""
    devices = page.context.new_cdp_session(page)
    enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}

    def press(**more: Any) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            devices.send("Input.dispatchKeyEvent", {"type": kind, **enter, **more})

    message_box(page).focus()
    composed = {"text": "にほん", "selectionStart": 3, "selectionEnd": 3}
    devices.send("Input.imeSetComposition", composed)
    press()
    expect(message_box(page)).to_have_value("にほん")
    devices.send("Input.insertText", {"text": "日本"})
    press(windowsVirtualKeyCode=229)  # as Safari has it, after the composition's end
    expect(message_box(page)).to_have_value("日本")
    page.wait_for_timeout(200)
    assert site.api.bodies() == [], "the message was sent while it was being composed"
    page.keyboard.press("Enter")
    expect(questions(page)).to_contain_text("日本")
    expect(answers(page)).to_contain_text("as text.")
    assert site.api.dialogs() == [[("user", "日本")]]


def test_text_from_right_to_left(page: Any, site: Site) -> None:
    """Arabic and Hebrew are written from the wrong side, or code in them is."""
    site.api.answers.append(Answer(["البقرة تقول مو.\n\n```python\nx = 1\n```\n\nEnglish too.\n"]))
    message_box(page).fill("ماذا تقول البقرة؟")
    direction = "e => getComputedStyle(e).direction"
    assert message_box(page).evaluate(direction) == "rtl"
    message_box(page).press("Enter")
    ready(page)
    expect(answers(page).locator("pre")).to_be_visible()
    for within in (questions(page), answers(page)):
        text = within.get_by_text(re.compile("البقرة")).last
        assert text.evaluate(direction) == "rtl", within
    assert answers(page).locator("pre").evaluate(direction) == "ltr"
    assert answers(page).get_by_text("English too.").evaluate(direction) == "ltr"
    item = button(page, "ماذا تقول البقرة؟")
    assert item.evaluate(direction) == "rtl"


def is_focused(locator: Any) -> bool:
    return locator.count() == 1 and locator.evaluate("e => e === document.activeElement")


def tab_to(page: Any, locator: Any, key: str = "Tab") -> None:
    """Go on by a key to an element; each one on the way shows that it has the focus."""
    shown = """() => {
      const element = document.activeElement;
      const { outlineStyle, outlineWidth, boxShadow } = getComputedStyle(element);
      const has = (outlineStyle !== "none" && outlineWidth !== "0px") || boxShadow !== "none";
      const around = element.parentElement?.matches(":focus-within") &&
        getComputedStyle(element.parentElement).outlineStyle !== "none";
      return has || around || element === document.body ? "" : element.outerHTML.slice(0, 200);
    }"""
    for _ in range(60):
        if is_focused(locator):
            return
        page.keyboard.press(key)
        hidden = page.evaluate(shown)
        assert not hidden, f"nobody sees that this has the focus: {hidden}"
    raise AssertionError(f"{key} doesn't reach {locator}")


def test_the_keyboard_is_enough(page: Any, site: Site) -> None:
    """Something can be reached by a mouse alone, the focus is lost or invisible, or a dialog keeps
    it."""
    expect(message_box(page)).to_be_visible()
    tab_to(page, message_box(page))
    page.keyboard.type("Two")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("lines")
    page.keyboard.press("Enter")
    expect(answers(page)).to_contain_text("as text.")
    ready(page)
    assert site.api.dialogs() == [[("user", "Two\nlines")]]
    assert is_focused(message_box(page)), "the focus left the message box"
    tab_to(page, button(answers(page), "Retry"), "Shift+Tab")
    page.keyboard.press("Enter")
    expect(answers(page)).to_contain_text("Answer 2")
    ready(page)
    previous = button(answers(page), "Previous version")
    expect(previous).to_be_visible()
    tab_to(page, previous)
    page.keyboard.press("Enter")
    expect(answers(page)).to_contain_text("Answer 1")
    tab_to(page, button(page, "Settings"))
    page.keyboard.press("Enter")
    sheet = page.get_by_role("dialog", name="Settings")
    tab_to(page, sheet.get_by_label("Temperature"))
    page.keyboard.type("0")
    page.keyboard.press("Escape")
    expect(sheet).not_to_be_visible()
    assert is_focused(button(page, "Settings")), "closing the settings loses the focus"
    tab_to(page, page.get_by_role("tab", name="Chat"))
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Completion")).to_have_attribute("aria-selected", "true")
    assert is_focused(page.get_by_role("tab", name="Completion"))
    page.keyboard.press("ArrowLeft")
    tab_to(page, message_box(page))
    page.keyboard.type("Again")
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_count(2)
    ready(page)
    assert site.api.bodies()[-1]["temperature"] == 0


@pytest.fixture(scope="module")
def axe() -> str:
    """The accessibility checker's source."""
    file = Path(os.environ.get("LLAMA_AXE", "node_modules/axe-core/axe.min.js"))
    if not file.is_file():
        pytest.skip("no axe-core: npm install --no-save axe-core, or name its file in LLAMA_AXE")
    return file.read_text()


def check_accessible(page: Any, axe: str, where: str) -> None:
    page.evaluate(axe)
    # What moves is checked when it stands.
    page.evaluate("Promise.all(document.getAnimations().map((one) => one.finished))")
    found = page.evaluate('axe.run({rules: {"target-size": {enabled: true}}})')
    told = [
        f"{where}: {fault['id']}: {fault['help']}: {node['html'][:200]} {node['failureSummary']}"
        for fault in found["violations"]
        for node in fault["nodes"]
    ]
    assert not told, "\n".join(told)
    assert len(found["passes"]) > 15, f"axe saw almost nothing of {where}"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(window: Window, site: Site, axe: str, scheme: str) -> None:
    """People who use a screen reader, a magnifier or a keyboard meet a fault that axe knows."""
    page = window(color_scheme=scheme, **(PHONE if scheme == "dark" else {}))
    expect(message_box(page)).to_be_visible()
    check_accessible(page, axe, "the empty page")
    sheet = open_settings(page)
    check_accessible(page, axe, "the settings")
    sheet.get_by_label("Seed").fill("seven")
    sheet.get_by_label("Show probabilities").check()
    check_accessible(page, axe, "a wrong setting")
    sheet.get_by_label("Seed").fill("")
    button(sheet, "Close").click()
    site.api.answers += [Answer([MARKDOWN]), Answer(["Let me see."], [("sound", '{"a": "cow"}')])]
    for i, text in enumerate(("Show me code, please.", "And a tool?")):
        say(page, text)
        expect(answers(page)).to_have_count(i + 1)
        ready(page)
    expect(answers(page).locator("math").first).to_be_visible()
    button(answers(page).first, "Probabilities").click()
    page.mouse.move(0, 0)  # off the tokens, whose alternatives would lie above
    check_accessible(page, axe, "a conversation")
    site.stop()
    say(page, "Are you there?")
    expect(alert(page).first).to_be_visible()
    check_accessible(page, axe, "an error")
    button(page, "Dismiss").click()
    site.start()
    for tab in ("Completion", "Infilling"):
        page.get_by_role("tab", name=tab).click()
        check_accessible(page, axe, tab)
    site.api.key = "secret"
    page.reload()
    expect(page.get_by_role("dialog")).to_be_visible()
    check_accessible(page, axe, "the question for the key")


# The host, and the whole server


def test_nothing_leaves_the_host(page: Any, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's answer makes a browser or the server ask another host for something, which learns
    of a private conversation by that."""
    looked_up: list[Any] = []
    lookup = socket.getaddrinfo

    def noted(host: Any, *more: Any, **options: Any) -> Any:
        looked_up.append(host)
        return lookup(host, *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", noted)
    text = (
        "![a picture](https://example.com/a.png) <img src=https://example.com/b.png> "
        "<script>fetch('https://example.com/c')</script> <style>@import 'https://example.com/d';"
        "</style> $\\href{https://example.com/e}{x}$ $\\includegraphics{https://example.com/f}$ "
        "[a link](https://example.com/g) [another](javascript:alert(1)) https://example.com/h\n"
    )
    site.api.answers.append(Answer([text]))
    say(page, text)
    expect(answers(page).get_by_role("link").first).to_be_visible()
    ready(page)
    for within in (questions(page), answers(page)):
        expect(within).to_contain_text("<script>fetch")
        expect(within.locator("img, script, style, iframe, object")).to_have_count(0)
    for link in answers(page).get_by_role("link").all():
        assert link.get_attribute("href").startswith("https://example.com/")
        assert {"noopener", "noreferrer"} <= set(link.get_attribute("rel").split())
    page.wait_for_timeout(300)
    foreign = [host for host in looked_up if host not in ("127.0.0.1", "localhost", None)]
    assert not foreign, f"the server looked up {foreign}"
    assert page.context.cookies() == []


FORBIDDEN = """for (const name of ["indexedDB", "localStorage", "sessionStorage"]) {
  const get = () => { throw new DOMException("forbidden", "SecurityError"); };
  Object.defineProperty(window, name, { get });
}"""


def test_a_browser_that_forbids_to_keep_anything(window: Window, site: Site) -> None:
    """People whose browser blocks all data of sites see an empty page, and don't learn why."""
    page = window(script=FORBIDDEN)
    expect(alert(page)).to_contain_text("allow it to store data of this site")
    expect(button(alert(page), "Try again")).to_be_visible()


@pytest.fixture(scope="module")
def llama() -> Any:
    from llama import Llama

    return Llama.build(device="cpu", max_seq_len=2048)


@pytest.fixture
def slow(llama: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """While it is set, the model takes time for each step."""
    forward, event = llama.model.hidden_states, threading.Event()

    def hidden_states(*args: Any) -> Any:
        threading.Event().wait(0.05 if event.is_set() else 0)
        return forward(*args)

    monkeypatch.setattr(llama.model, "hidden_states", hidden_states)
    yield event
    event.clear()


def test_the_embedded_model_talks(window: Window, llama: Any, slow: threading.Event) -> None:
    """The whole server, under a path and with a key: the page asks for the key, holds a dialog of
    two turns of which the second reuses the first one's cache, fills in, and frees the row when
    it is stopped."""
    from processes import wait_until
    from servers import idle, serve

    from llama.server.page import mount_page

    flags = {"api_key": "secret", "root_path": "/llama"}
    with serve(llama, mount=mount_page, **flags) as (url, service):
        page = window(f"{url}/llama/")
        asks = page.get_by_role("dialog")
        asks.get_by_role("textbox").fill("wrong")
        asks.get_by_role("textbox").press("Enter")
        expect(asks).to_contain_text("wrong")
        asks.get_by_role("textbox").fill("secret")
        asks.get_by_role("textbox").press("Enter")
        expect(asks).to_have_count(0)
        sheet = open_settings(page)
        sheet.get_by_label("Temperature").fill("0")
        button(sheet, "Close").click()
        say(page, "What does the cow say?")
        expect(answers(page)).to_contain_text("The cow says moo.")
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
        expect(page.get_by_role("meter", name="Context used")).to_contain_text("of 2,048 tokens")
        page.get_by_role("tab", name="Infilling").click()
        page.get_by_label("Before", exact=True).fill("def add(a, b):\n    return ")
        page.get_by_label("After", exact=True).fill("\n")
        button(page, "Fill in").click()
        expect(page.get_by_role("region", name="Result").locator("visible=true")).to_have_text(
            "a + b"
        )
        slow.set()
        page.get_by_role("tab", name="Completion").click()
        page.get_by_label("Text to continue").fill("Once upon a time")
        button(page, "Continue").click()

        def is_busy() -> bool:
            page.wait_for_timeout(10)  # in which playwright lets requests pass
            return not idle(service)

        wait_until(is_busy)
        button(page, "Stop").click()
        wait_until(lambda: not is_busy())
        page.reload()
        page.get_by_role("tab", name="Chat").click()
        expect(answers(page)).to_have_count(2)
        kept = page.evaluate("JSON.stringify([localStorage, document.cookie])")
        assert "secret" not in kept, "the key outlives its tab"


TITLES = ("Adding 1 to n", "Rhymes of llama", "A letter to the landlord")
SUM = """It is $\\frac{n(n+1)}{2}$: add the first and the last number, the second and the last but
one, and so on. Each of these $\\frac{n}{2}$ pairs makes $n + 1$.

```python
def total(n: int) -> int:
    return n * (n + 1) // 2
```

For $n = 100$ that is **5,050**.
"""


def pictured() -> str:
    """The conversations of the pictures, with figures that are the same each time."""
    one, two, three = (json.loads(exported(2, title)) for title in TITLES)
    turn = one["conversations"][0]["messages"]
    turn["m0"]["content"] = "What is the sum of the numbers from 1 to n?"
    usage = {"prompt_tokens": 24, "completion_tokens": 121}
    turn["m1"] |= {"content": SUM, "usage": usage, "seconds": 4.7, "finish_reason": "stop"}
    for i, each in enumerate((three, two, one)):
        each["conversations"][0] |= {"id": f"c{i}", "created": i}
    one["conversations"] = [each["conversations"][0] for each in (three, two, one)]
    return json.dumps(one)


PICTURES = {
    "desktop": {"viewport": {"width": 1120, "height": 700}},
    "dark": {"viewport": {"width": 1120, "height": 700}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 760}, "is_mobile": True, "has_touch": True},
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(window: Window, site: Site, tmp_path: Path, name: str) -> None:
    """An answer isn't shown as README shows it. With LLAMA_PICTURES, a folder, the pictures are
    written there: ``LLAMA_PICTURES=docs/images python -m pytest tests/server -k pictures``."""
    page = window(**PICTURES[name])
    if name == "phone":
        button(page, "Conversations").click()
    load(page, pictured(), tmp_path)
    answer = answers(page).last
    expect(answer.locator("pre .k").first).to_have_text("def")
    expect(answer.locator("math")).to_have_count(4)
    expect(answer).to_contain_text("121 tokens · 25.7 tokens/s")
    expect(answer.locator("pre")).to_be_in_viewport()
    expect(page.get_by_role("meter")).not_to_contain_text(re.compile(r"\b0 of"))
    page.evaluate("document.activeElement.blur()")
    page.mouse.move(500, 500)  # off the button
    if folder := os.environ.get("LLAMA_PICTURES"):
        page.screenshot(path=Path(folder, f"{name}.png"), animations="disabled")
