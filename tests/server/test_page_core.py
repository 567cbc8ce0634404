"""The page's conversations: their list, messages, branches, files, errors, and what is kept."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from browser_page import Site, Window, answers, button, message_box, messages, questions, ready, say

pytestmark = pytest.mark.slow

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("fastapi", reason="FastAPI is not installed")
expect = sync_api.expect

from fake_api import Answer  # noqa: E402 (it needs FastAPI)

from llama.server.errors import ApiError  # noqa: E402

CUT = "This answer was cut."


def conversations(page: Any) -> Any:
    return page.get_by_role("navigation", name="Conversations")


def titles(page: Any) -> Any:
    return conversations(page).locator(".items .title")


def alert(page: Any) -> Any:
    return page.get_by_role("alert")


def talk(page: Any, *texts: str) -> None:
    """Send messages, each when the answer to the one before has ended."""
    n = answers(page).count()
    for i, text in enumerate(texts, 1):
        say(page, text)
        expect(answers(page)).to_have_count(n + i)
        ready(page)


def downloaded(page: Any, within: Any, name: str) -> tuple[str, str]:
    """The name and the text of the file that a button gives."""
    with page.expect_download() as download:
        button(within, name).click()
    return download.value.suggested_filename, Path(download.value.path()).read_text()


def import_file(page: Any, path: Path) -> None:
    with page.expect_file_chooser() as chooser:
        button(conversations(page), "Import").click()
    chooser.value.set_files(path)


def run(page: Any, script: str, module: str = "tree") -> Any:
    """Run JavaScript with a module of the page."""
    return page.evaluate(
        f"""async () => {{
          const {module} = await import("./page/{module}.js");
          {script}
        }}"""
    )


# The list of conversations


def test_conversations_are_listed_searched_and_renamed(page: Any, site: Site) -> None:
    """A conversation can't be found again by its title or by what was said in it."""
    site.api.answers += [Answer(["The bee hums."]), Answer(["Moo."])]
    talk(page, "Who hums?")
    button(page, "New conversation").click()
    expect(messages(page)).to_have_count(0)
    talk(page, "And the cow?")
    expect(titles(page)).to_have_text(["And the cow?", "Who hums?"])
    search = page.get_by_role("searchbox", name="Search conversations")
    search.fill("THE BEE")
    expect(titles(page)).to_have_text(["Who hums?"])
    search.fill("wolf")
    expect(titles(page)).to_have_count(0)
    expect(conversations(page)).to_contain_text("Nothing has “wolf”")
    search.fill("")
    button(page, "Who hums?").click()
    expect(answers(page)).to_contain_text(["The bee hums."])
    item = conversations(page).get_by_role("listitem").filter(has_text="Who hums?")
    button(item, "Rename").click()
    box = page.get_by_role("textbox", name="Title")
    box.fill("Bees")
    box.press("Enter")
    expect(titles(page)).to_have_text(["And the cow?", "Bees"])
    page.reload()
    expect(titles(page)).to_have_text(["And the cow?", "Bees"])
    expect(answers(page)).to_contain_text(["The bee hums."])
    page.go_back()
    expect(answers(page)).to_contain_text(["Moo."])


def test_a_deleted_conversation_returns(page: Any, site: Site) -> None:
    """A wrong click loses a conversation; or one that was deleted stays in the browser."""
    talk(page, "Keep me")
    button(conversations(page), "Delete").click()
    expect(titles(page)).to_have_count(0)
    expect(messages(page)).to_have_count(0)
    button(page, "Undo").click()
    expect(titles(page)).to_have_text(["Keep me"])
    expect(answers(page)).to_contain_text(["as text."])
    button(conversations(page), "Delete").click()
    expect(titles(page)).to_have_count(0)
    page.reload()
    expect(message_box(page)).to_be_visible()
    expect(titles(page)).to_have_count(0)


def test_conversations_are_exported_and_imported(
    page: Any, window: Window, site: Site, tmp_path: Path
) -> None:
    """A conversation can't be carried to another browser whole, or be read without one."""
    site.api.answers += [Answer(["Moo."], finish="length"), Answer(["Oink."])]
    talk(page, "What does the cow say?")
    button(answers(page), "Retry").click()
    expect(answers(page)).to_contain_text("Oink.")
    ready(page)
    name, text = downloaded(page, conversations(page), "Export as Markdown")
    assert name == "What-does-the-cow-say-.md"
    assert text == (
        "# What does the cow say?\n\n## You\n\nWhat does the cow say?\n\n## Assistant\n\nOink.\n"
    )
    name, exported = downloaded(page, conversations(page), "Export as JSON")
    assert name.endswith(".json")
    assert exported == downloaded(page, conversations(page), "Export all")[1]
    file = tmp_path / name
    file.write_text(exported)
    other = window()
    import_file(other, file)
    expect(answers(other)).to_contain_text("2 of 2")
    button(answers(other), "Previous version").click()
    expect(answers(other)).to_contain_text("Moo.")
    expect(answers(other)).to_contain_text(CUT)
    import_file(other, file)
    expect(titles(other)).to_have_count(2)


NO_TALK = {"title": "x", "messages": {}}
WRONG = {
    "isn't JSON": "{",
    "format": "{}",
    "no list": '{"format": "llama-conversations"}',
    "conversation 1 has title": [{"title": 5}],
    "conversation 1 has settings": [NO_TALK | {"settings": []}],
    "message m1 has role": [NO_TALK | {"messages": {"m1": {"role": "root", "content": ""}}}],
    "message m1 has content": [NO_TALK | {"messages": {"m1": {"role": "user", "content": 5}}}],
    "message __proto__ has id": [
        NO_TALK | {"messages": {"__proto__": {"role": "user", "content": ""}}}
    ],
    "message m1 has logprobs": [
        NO_TALK | {"messages": {"m1": {"role": "user", "content": "", "logprobs": [1]}}}
    ],
    "lacks the message constructor": [
        NO_TALK
        | {"messages": {"m1": {"role": "user", "content": "", "parent": "constructor"}}}
        | {"leaf": "m1"}
    ],
    "follows itself": [
        NO_TALK
        | {"messages": {"m1": {"role": "user", "content": "", "parent": "m1"}}}
        | {"leaf": "m1"}
    ],
    "shows none": [NO_TALK | {"messages": {"m1": {"role": "user", "content": ""}}}],
}


def test_a_wrong_file_is_refused(page: Any, tmp_path: Path) -> None:
    """A file that isn't an export breaks the page, now or at each start, or isn't told apart."""
    expect(message_box(page)).to_be_visible()
    for expected, found in WRONG.items():
        file = {"format": "llama-conversations", "version": 1, "conversations": found}
        text = found if isinstance(found, str) else json.dumps(file)
        script = f"""
          try {{ return imports.fromJson({json.dumps(text)}); }}
          catch (error) {{ return error.message; }}"""
        said = run(page, script, "imports")
        assert expected in said, f"{expected!r}: {said}"
        assert "no file of exported conversations" in said
    path = tmp_path / "wrong.json"
    path.write_text("[]")
    import_file(page, path)
    expect(alert(page)).to_contain_text("wrong.json can't be added. This is no file")
    expect(titles(page)).to_have_count(0)


# Messages


def test_either_side_is_edited_and_the_branches_walked(page: Any, site: Site) -> None:
    """An edited message isn't the one that is sent, or takes away what it replaced."""
    talk(page, "One?", "Two?")
    button(questions(page).first, "Edit").click()
    page.get_by_role("textbox", name="New text").fill("Three?")
    button(page, "Save").click()
    expect(answers(page)).to_contain_text(["Answer 3"])
    ready(page)
    assert site.api.dialogs()[-1] == [("user", "Three?")]
    expect(questions(page).first).to_contain_text("2 of 2")
    button(questions(page).first, "Previous version").click()
    expect(answers(page)).to_contain_text(["Answer 1", "Answer 2"])
    next_version = button(questions(page).first, "Next version")
    expect(next_version).to_be_focused()
    next_version.press("Enter")
    expect(answers(page)).to_contain_text(["Answer 3"])
    button(answers(page), "Edit").click()
    page.get_by_role("textbox", name="New text").fill("As I **say**.")
    button(page, "Save").click()
    expect(answers(page).locator("strong")).to_have_text("say")
    expect(answers(page)).to_contain_text("2 of 2")
    assert len(site.api.bodies()) == 3, "an edited answer is answered"
    talk(page, "So?")
    assert site.api.dialogs()[-1] == [
        ("user", "Three?"),
        ("assistant", "As I **say**."),
        ("user", "So?"),
    ]
    button(questions(page).first, "Edit").click()
    page.get_by_role("textbox", name="New text").fill("Never")
    button(page, "Cancel").click()
    expect(questions(page).first).to_contain_text("Three?")


def test_a_turn_is_deleted(page: Any, site: Site) -> None:
    """A deleted question or its answer is still sent, what came after it is lost, or it can't be
    taken back."""
    talk(page, "One?", "Zero?", "Two?")
    button(questions(page).nth(1), "Delete").click()
    expect(answers(page)).to_contain_text(["Answer 1", "Answer 3"])
    expect(questions(page)).to_contain_text(["One?", "Two?"])
    button(page, "Undo").click()
    expect(answers(page)).to_contain_text(["Answer 1", "Answer 2", "Answer 3"])
    button(questions(page).nth(1), "Delete").click()
    button(answers(page).last, "Delete").click()
    expect(answers(page)).to_contain_text(["Answer 1"])
    button(questions(page).last, "Retry").click()
    expect(answers(page)).to_contain_text(["Answer 1", "Answer 4"])
    ready(page)
    assert site.api.dialogs()[-1] == [
        ("user", "One?"),
        ("assistant", "Answer 1, as text."),
        ("user", "Two?"),
    ]


def test_an_answer_is_stopped_and_continued(page: Any, site: Site) -> None:
    """Stop doesn't reach the server or loses what was written; or a continued answer begins
    from its start, or stays marked."""
    site.api.answers += [Answer(["The **cow ", "says** "], waits_at=2), Answer(["moo."])]
    say(page, "Well?")
    expect(answers(page)).to_contain_text("says")
    button(page, "Stop").click()
    assert site.api.closed.wait(10), "the server goes on"
    expect(answers(page)).to_contain_text(CUT)
    expect(answers(page)).to_contain_text("2 tokens ·")
    expect(alert(page)).to_have_count(0)
    button(answers(page), "Continue").click()
    ready(page)
    expect(answers(page).locator(".block")).to_have_text("The cow says moo.")
    expect(answers(page)).not_to_contain_text(CUT)
    body = site.api.bodies()[-1]
    assert body["messages"][-1] == {"role": "assistant", "content": "The **cow says** "}
    assert body["continue_final_message"] is True
    site.api.answers += [Answer(["One ", "two "], finish="length"), Answer(["three."])]
    say(page, "Count.")
    button(answers(page).last, "Continue").click()
    expect(answers(page).last).to_contain_text("One two three.")
    expect(answers(page).last).to_contain_text("3 tokens ·")


def test_finished_blocks_are_rendered_once(page: Any, site: Site) -> None:
    """A growing answer is rendered again and again, before its blocks have ended, or never."""
    asked: list[str] = []
    page.on(
        "request",
        lambda sent: asked.append(sent.post_data_json["text"]) if "render" in sent.url else None,
    )
    fence = "```py\nx = 1\n\ny = 2\n```\n"
    numbered = "1. one\n\n2. two\n\n   still two\n\n"
    blocks = ["A **b**.\n\n", fence, numbered, "$$\nx\n\ny\n$$\n\n"]
    text = "".join(blocks) + "The end"
    pieces = [text[i : i + 3] for i in range(0, len(text), 3)]
    site.api.answers.append(Answer(pieces, waits_at=len(pieces)))
    say(page, "Well?")
    expect(answers(page).locator("ol li")).to_have_count(2)
    expect(answers(page).locator("pre")).to_contain_text("y = 2")
    expect(answers(page).locator(".plain")).to_have_text(["The end"])
    site.api.go.set()
    ready(page)
    expect(answers(page).locator(".block").last).to_have_text("The end")
    assert asked == [*blocks, "The end"]
    page.reload()
    expect(answers(page).locator("ol li")).to_have_count(2)
    assert asked[5:] == [text], "a whole answer is rendered in pieces"


def test_what_cannot_be_rendered_stays_readable(page: Any, site: Site) -> None:
    """An answer vanishes where the server doesn't render it."""
    page.route("**/render", lambda route: route.fulfill(status=500, json={}))
    site.api.answers.append(Answer(["A **b** <i>c</i>"]))
    with page.expect_response("**/render"):
        talk(page, "Well?")
    page.wait_for_timeout(200)
    expect(answers(page)).to_contain_text("A **b** <i>c</i>")
    expect(alert(page)).to_have_count(0)


def test_a_text_is_copied(page: Any, site: Site) -> None:
    """Copied code or answers aren't what the model wrote."""
    from processes import wait_until

    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    text = "A *b*\n\n```py\nx = 1\n```\n"
    site.api.answers.append(Answer([text]))
    talk(page, "Well?")
    button(answers(page), "Copy code").click()
    copied = "navigator.clipboard.readText()"
    wait_until(lambda: page.evaluate(copied) == "x = 1\n")
    button(answers(page), "Copy").click()
    wait_until(lambda: page.evaluate(copied) == text)


def test_calls_are_answered_by_pasted_results(page: Any, site: Site) -> None:
    """A call's result isn't sent as the call's, or before all calls have one."""
    calls = [("sound", '{"of": "cow"}'), ("sound", '{"of": "bee"}')]
    site.api.answers += [Answer([], calls), Answer(["Moo and hum."])]
    talk(page, "Well?")
    boxes = page.get_by_role("textbox", name="Result of sound")
    boxes.last.fill("hum")
    boxes.first.fill("moo")
    button(page, "Send result").first.click()
    expect(page.get_by_role("article", name="Tool")).to_contain_text("moo")
    expect(boxes).to_have_value("hum")
    assert len(site.api.bodies()) == 1, "the answer goes on before all results are there"
    button(page, "Send result").click()
    expect(answers(page).last).to_contain_text("Moo and hum.")
    sent = site.api.bodies()[-1]["messages"]
    ids = [call["id"] for call in sent[1]["tool_calls"]]
    assert [(m["tool_call_id"], m["content"]) for m in sent[2:]] == [
        (ids[0], "moo"),
        (ids[1], "hum"),
    ]
    assert json.loads(sent[1]["tool_calls"][1]["function"]["arguments"]) == {"of": "bee"}


# The message box


def test_files_go_along(page: Any, site: Site, tmp_path: Path) -> None:
    """An attached text isn't sent, ends its fence itself, or can't be taken away; or what is no
    text, or too long a one, is taken."""
    names = {
        "a.py": b"x = '```'\n",
        "b.txt": b"b",
        "no.bin": b"\xff\x00",
        "long.txt": b"x" * 200_001,
    }
    for name, content in names.items():
        (tmp_path / name).write_bytes(content)
    with page.expect_file_chooser() as chooser:
        button(page, "Attach files").click()
    chooser.value.set_files([tmp_path / name for name in names])
    chips = page.get_by_role("list", name="Attached files").get_by_role("listitem")
    expect(chips).to_have_count(2)
    expect(alert(page)).to_have_count(2)
    expect(alert(page).first).to_contain_text("no.bin can't be added. It is no text")
    expect(alert(page).last).to_contain_text(
        "long.txt can't be added. It has 201 kB, and 200 are taken."
    )
    button(page, "Remove b.txt").click()
    page.evaluate(
        """() => {
          const dataTransfer = new DataTransfer();
          dataTransfer.items.add(new File(["dropped"], "c.md"));
          const event = { dataTransfer, bubbles: true, cancelable: true };
          document.querySelector("[role=log]").dispatchEvent(new DragEvent("drop", event));
        }"""
    )
    expect(chips).to_have_text([re.compile("a.py"), re.compile("c.md")])
    page.wait_for_timeout(400)
    page.reload()
    expect(chips).to_have_count(2)
    talk(page, "Look.")
    fence = "````"
    expected = f"Look.\n\na.py:\n{fence}\nx = '```'\n{fence}\n\nc.md:\n```\ndropped\n```"
    assert site.api.dialogs() == [[("user", expected)]]
    expect(chips).to_have_count(0)
    expect(questions(page).locator("summary")).to_have_text(["a.py", "c.md"])


def test_each_conversation_keeps_its_draft(page: Any, site: Site) -> None:
    """A draft is lost or sent elsewhere when another conversation is opened."""
    talk(page, "One")
    message_box(page).fill("for one")
    button(page, "New conversation").click()
    expect(message_box(page)).to_have_value("")
    message_box(page).fill("for the new one")
    button(page, "One").click()
    expect(message_box(page)).to_have_value("for one")
    button(page, "New conversation").click()
    expect(message_box(page)).to_have_value("for the new one")
    message_box(page).press("Enter")
    expect(questions(page)).to_contain_text(["for the new one"])
    ready(page)
    button(page, "New conversation").click()
    expect(message_box(page)).to_have_value("")


def test_an_answer_goes_on_behind_another_conversation(page: Any, site: Site) -> None:
    """An answer is lost, or shown in the wrong place, when another conversation is opened."""
    site.api.answers += [Answer(["Slow ", "answer."], waits_at=1), Answer(["Quick."])]
    say(page, "One")
    expect(answers(page)).to_contain_text("Slow")
    button(page, "New conversation").click()
    talk(page, "Two")
    expect(answers(page)).to_contain_text(["Quick."])
    site.api.go.set()
    button(page, "One").click()
    expect(answers(page)).to_contain_text(["Slow answer."])
    ready(page)
    expect(page.get_by_text(CUT)).to_have_count(0)


# Errors


def test_errors_say_what_to_do(page: Any, site: Site) -> None:
    """An error vanishes, says nothing of use, or takes away what was typed."""
    busy = ApiError(429, "the queue is full", headers={"Retry-After": "7"})
    site.api.answers.append(busy)
    say(page, "Hello?")
    expect(alert(page)).to_contain_text("The server is busy: try again in 7 seconds.")
    expect(questions(page)).to_contain_text(["Hello?"])
    page.wait_for_timeout(500)
    expect(alert(page)).to_be_visible()
    button(alert(page), "Dismiss").click()
    expect(alert(page)).to_have_count(0)
    button(answers(page), "Retry").click()
    expect(answers(page)).to_contain_text("as text.")
    ready(page)
    assert site.api.dialogs()[-1] == [("user", "Hello?")]


def test_a_key_is_asked_for(page: Any, site: Site) -> None:
    """A server with a key can't be used, a wrong key isn't told, or the key outlives the tab."""
    expect(message_box(page)).to_be_visible()
    site.api.key = "secret"
    say(page, "Hello?")
    asked = page.get_by_role("dialog", name="API key")
    asked.get_by_label("Key", exact=True).fill("wrong")
    button(asked, "Use this key").click()
    expect(asked).to_contain_text("wrong")
    button(asked, "Cancel").click()
    expect(alert(page)).to_contain_text("key")
    expect(message_box(page)).to_have_value("Hello?")
    message_box(page).press("Enter")
    asked.get_by_label("Key", exact=True).fill("secret")
    asked.get_by_label("Key", exact=True).press("Enter")
    expect(answers(page)).to_contain_text("as text.")
    ready(page)
    page.reload()
    expect(answers(page)).to_contain_text("as text.")
    expect(asked).to_have_count(0)


def test_a_full_context_drops_old_turns_by_consent(page: Any, site: Site) -> None:
    """When the context is full the conversation ends, forgets without asking, or loses what was
    typed."""
    site.api.max_model_len = 34
    page.reload()
    talk(page, "One two three four five six seven eight nine ten")
    say(page, "Eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty")
    asked = page.get_by_role("alertdialog", name="The context is full")
    expect(asked).to_contain_text("One two three")
    button(asked, "Cancel").click()
    expect(message_box(page)).to_have_value(re.compile("^Eleven"))
    expect(questions(page)).to_have_count(1)
    message_box(page).press("Enter")
    button(asked, "Drop them and go on").click()
    expect(answers(page)).to_have_count(2)
    ready(page)
    assert [text[:6] for _, text in site.api.dialogs()[-1]] == ["Eleven"]
    expect(questions(page).first).to_contain_text("isn't sent this any more")
    expect(questions(page).last).not_to_contain_text("isn't sent this any more")


# The model


def test_the_model_is_told_in_plain_words(window: Window, site: Site) -> None:
    """A person doesn't learn which model answers, or is offered what it can't do."""
    page = window()
    expect(page.get_by_role("heading", name="tiny-llama")).to_be_visible()
    words = (
        "Llama, 1.1 billion parameters · bfloat16 · chat format “inst” · 2,048 tokens of context"
    )
    expect(page.get_by_role("main")).to_contain_text(words)
    site.api.meta |= {"chats": False, "infills": False, "chat_format": None}
    page = window()
    expect(page.get_by_role("tab")).to_have_text(["Completion"])
    expect(page.get_by_label("Text to continue")).to_be_visible()
    expect(message_box(page)).to_have_count(0)
    expect(conversations(page)).to_have_count(0)


def test_a_server_that_is_not_ready_is_asked_again(page: Any, site: Site) -> None:
    """A page that is opened too early stays empty, and says nothing."""
    site.api.refusals["/v1/models"] = ApiError(503, "the server is shutting down")
    page.reload()
    expect(alert(page)).to_contain_text("Try again when the server has been restarted")
    del site.api.refusals["/v1/models"]
    button(page, "Try again").click()
    expect(message_box(page)).to_be_visible()
    expect(alert(page)).to_have_count(0)
