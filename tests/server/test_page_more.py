"""The page's settings, meter, figures of answers, tools, and its tabs without a dialog."""

import re
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from browser_page import Site, answers, button, message_box, ready, say  # noqa: E402
from fake_api import Answer  # noqa: E402

from llama.server.errors import ApiError  # noqa: E402

pytestmark = pytest.mark.slow
expect = sync_api.expect


def settings(page: Any) -> Any:
    """Open the sheet."""
    sheet = page.get_by_role("dialog", name="Settings", exact=True)
    if not sheet.is_visible():
        button(page, "Settings").click()
    return sheet


def close(page: Any) -> None:
    button(settings(page), "Close").click()
    expect(page.get_by_role("dialog")).to_have_count(0)


def asked(site: Site, path: str = "/v1/chat/completions") -> dict[str, Any]:
    """The last request, without what all have."""
    same = ("model", "stream", "stream_options", "messages")
    return {key: value for key, value in site.api.bodies(path)[-1].items() if key not in same}


def answer(page: Any, site: Site, question: str, *given: Any) -> Any:
    """Ask, and return the answer when it has ended."""
    site.api.answers.extend(given)
    n = answers(page).count()
    say(page, question)
    expect(answers(page)).to_have_count(n + 1)
    ready(page)
    return answers(page).last


def test_settings_are_fields_of_the_request(page: Any, site: Site) -> None:
    """A setting that a person chooses would not reach the model, or one that nobody chose would."""
    answer(page, site, "With the defaults?")
    assert asked(site) == {}
    sheet = settings(page)
    for label, text in {
        "System prompt": "Be brief.",
        "Temperature": "0,5",
        "Top-p": "0.9",  # the server's own
        "Top-k": "40",
        "Min-p": "0.05",
        "Repetition penalty": "1.1",
        "Presence penalty": "-0.5",
        "Frequency penalty": "0.25",
        "Seed": "7",
        "Longest answer": "64",
        "Shortest answer": "2",
        "Stop strings": "###\n\nUser:\\n",
        "Stop token ids": "[2, 13]",
        "Token biases": '{"13": -100}',
        "Response schema": '{"type": "object"}',
    }.items():
        sheet.get_by_label(label, exact=True).fill(text)
    sheet.get_by_label("Show probabilities").check()
    sheet.get_by_label("Go on after the model's own end").check()
    close(page)
    answer(page, site, "And now?")
    expected = {
        "temperature": 0.5,
        "top_k": 40,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.25,
        "seed": 7,
        "max_tokens": 64,
        "min_tokens": 2,
        "stop": ["###", "User:\n"],
        "stop_token_ids": [2, 13],
        "logit_bias": {"13": -100},
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": {"type": "object"}},
        },
        "logprobs": True,
        "top_logprobs": 5,
        "ignore_eos": True,
    }
    assert asked(site) == expected
    assert site.api.dialogs()[-1][0] == ("system", "Be brief.")
    page.reload()
    expect(answers(page)).to_have_count(2)
    answer(page, site, "After a reload?")
    assert asked(site) == expected


def test_a_wrong_setting_is_told_beside_it_and_stays(page: Any, site: Site) -> None:
    """A typing error would be lost, or be sent, or be ignored."""
    wrong = {
        "Temperature": ("hot", "expected a number from 0 to 100"),
        "Top-p": ("1.5", "expected a number from 0 to 1"),
        "Seed": ("seven", "expected a whole number"),
        "Longest answer": ("0", "expected a whole number, 1 or more"),
        "Token biases": ("[13]", "expected an object"),
        "Response schema": ("{", "this is no JSON"),
    }
    for label, (text, told) in wrong.items():
        box = settings(page).get_by_label(label, exact=True)
        box.fill(text)
        expect(box).to_have_accessible_description(re.compile(told))
        expect(settings(page).get_by_text(f"{label}: {told}")).to_be_visible()
    close(page)
    page.reload()
    say(page, "Do you answer?")
    told = "Temperature: expected a number from 0 to 100. Change it in the settings."
    expect(page.get_by_role("alert").filter(has_text=told)).to_be_visible()
    for label, (text, _) in wrong.items():
        box = settings(page).get_by_label(label, exact=True)
        expect(box).to_have_value(text)
        box.fill("" if label != "Response schema" else text)
    close(page)
    say(page, "Do you answer?")
    told = "Response schema: this is no JSON"
    expect(page.get_by_role("alert").filter(has_text=told)).to_be_visible()
    assert not site.api.bodies()


def test_presets_of_system_prompts(page: Any, site: Site) -> None:
    """A system prompt would have to be typed again for each conversation."""
    sheet = settings(page)
    for name, text in (("brief", "Be brief."), ("pirate", "Talk like a pirate.")):
        sheet.get_by_label("System prompt").fill(text)
        sheet.get_by_label("Name of the preset").fill(name)
        button(sheet, "Save as preset").click()
        expect(sheet.get_by_label("Preset", exact=True)).to_have_value(name)
    close(page)
    page.reload()
    sheet = settings(page)
    sheet.get_by_label("Preset", exact=True).select_option("brief")
    expect(sheet.get_by_label("System prompt")).to_have_value("Be brief.")
    close(page)
    answer(page, site, "Hello?")
    assert site.api.dialogs()[-1] == [("system", "Be brief."), ("user", "Hello?")]
    sheet = settings(page)
    sheet.get_by_label("Preset", exact=True).select_option("pirate")
    button(sheet, "Delete preset").click()
    expect(sheet.get_by_label("Preset", exact=True).locator("option")).to_have_text(
        ["none", "brief"]
    )
    expect(sheet.get_by_label("System prompt")).to_have_value("Talk like a pirate.")


def test_the_theme_is_chosen_and_kept(page: Any) -> None:
    """The page would be dark, or light, against a person's choice."""
    root, paper = page.locator("html"), "background-color"
    light = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    settings(page).get_by_label("Theme").select_option("Dark")
    expect(root).not_to_have_css(paper, light)
    page.reload()
    expect(root).to_have_css("color-scheme", "dark")
    settings(page).get_by_label("Theme").select_option("Auto")
    expect(root).to_have_css(paper, light)


def test_the_meter_counts_what_is_sent(page: Any, site: Site) -> None:
    """A person would not see how much room is left, or each key would have all counted again."""
    meter = page.get_by_role("meter", name="Context used")
    expect(meter).to_have_text("0 of 2,048 tokens used, 2,048 left")
    answer(page, site, "One two three?", Answer(["Four ", "five."]))
    expect(meter).to_have_text("13 of 2,048 tokens used, 2,035 left")
    expect(meter).to_have_attribute("aria-valuenow", "13")
    settings(page).get_by_label("System prompt").fill("Be brief.")
    close(page)
    expect(meter).to_have_text("19 of 2,048 tokens used, 2,029 left")
    page.reload()
    expect(meter).to_have_text("19 of 2,048 tokens used, 2,029 left")
    held: list[Any] = []
    page.route("**/tokenize", lambda route: held.append(route))
    settings(page).get_by_label("System prompt").press_sequentially("a b c d e")
    close(page)
    page.wait_for_timeout(300)
    assert len(held) == 1
    page.unroute("**/tokenize")  # lets it go on
    expect(meter).to_have_text("23 of 2,048 tokens used, 2,025 left")


def test_a_full_context_offers_to_drop_the_oldest_turns(page: Any, site: Site) -> None:
    """A long conversation would end, or forget without being told to."""
    site.api.max_model_len = 37
    page.reload()
    for word in ("first", "second", "third"):
        answer(page, site, f"The {word} question?", Answer([f"The {word} answer."]))  # 14 tokens
    say(page, "The fourth question?")  # 42 + 7 of 37
    dialog = page.get_by_role("alertdialog", name="The context is full")
    # Without the first turn 35 fit, but an eighth of the context is to be free for the answer.
    turns = [re.compile(f"The {word} question.*1 that followed") for word in ("first", "second")]
    expect(dialog.get_by_role("listitem")).to_have_text(turns)
    button(dialog, "Cancel").click()
    expect(dialog).to_have_count(0)
    assert len(site.api.bodies()) == 3
    expect(message_box(page)).to_have_value("The fourth question?")
    message_box(page).press("Enter")
    button(dialog, "Drop them and go on").click()
    expect(answers(page)).to_have_count(4)
    ready(page)
    texts = [text for _, text in site.api.dialogs()[-1]]
    assert (len(texts), texts[0], texts[-1]) == (3, "The third question?", "The fourth question?")
    expect(page.get_by_text("The model isn't sent this any more.")).to_have_count(4)


def test_a_message_that_fits_in_no_context_is_told(page: Any, site: Site) -> None:
    """Turns would be dropped to no effect."""
    site.api.max_model_len = 20
    page.reload()
    answer(page, site, "Short?", Answer(["Yes."]))
    say(page, "long " * 30)
    dialog = page.get_by_role("alertdialog", name="The context is full")
    expect(dialog).to_contain_text("The last message, with the system prompt and tools, has 34")
    expect(button(dialog, "Drop them and go on")).to_have_count(0)
    button(dialog, "Cancel").click()
    assert len(site.api.bodies()) == 1


def test_figures_are_under_an_answer(page: Any, site: Site) -> None:
    """A person would not learn how fast an answer was, or why it ended."""
    whole = answer(page, site, "Whole?", Answer(["It ", "is."], pause=0.05))
    expect(whole).to_contain_text(re.compile(r"2 tokens · \d+\.\d tokens/s"))
    expect(whole).to_contain_text("after 5 tokens of prompt · ended by itself")
    cut = answer(page, site, "Cut?", Answer(["It "], finish="length"))
    expect(cut).to_contain_text("cut: the longest answer was reached")
    refused = answer(page, site, "Bad?", Answer(["No."], finish="content_filter"))
    expect(refused).to_contain_text("refused by the server's guard")


def test_probabilities_on_hover_and_focus(page: Any, site: Site) -> None:
    """The model's alternatives would be hidden, or hidden from the keyboard."""
    settings(page).get_by_label("Show probabilities").check()
    close(page)
    found = answer(page, site, "Why?", Answer(["<b>", " that's", "\nwhy"]))
    button(found, "Probabilities").click()
    group = found.get_by_role("group", name="Probabilities")
    tokens = group.get_by_role("listitem")
    expect(tokens).to_have_count(3)
    expect(group.get_by_role("tooltip")).to_have_count(0)
    tokens.nth(1).hover()
    tip = group.get_by_role("tooltip")
    expect(tip).to_contain_text('" that\'s" 77.9 %')
    expect(tip).to_contain_text('"other 1" 28.7 %')
    page.mouse.move(0, 0)
    expect(tip).to_have_count(0)
    tokens.first.focus()
    expect(tip).to_contain_text('"<b>" 77.9 %')
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    expect(tokens.nth(1)).to_have_accessible_description(re.compile("that's.*77.9 %"))
    page.keyboard.press("Escape")
    expect(tip).to_have_count(0)


def test_a_tool_is_called_and_its_result_is_sent(page: Any, site: Site) -> None:
    """Tools could not be tried on the page."""
    sheet = settings(page)
    button(sheet, "Insert an example").click()
    expect(sheet.get_by_label("Tools")).to_have_value(re.compile('"name": "weather"'))
    close(page)
    site.api.answers.append(Answer([], calls=[("weather", '{"city":"Paris"}')]))
    say(page, "The weather in Paris?")
    call = page.get_by_role("group", name="Call of weather")
    expect(call.get_by_label("Arguments of weather")).to_have_text('{\n  "city": "Paris"\n}')
    expect(answers(page).first).to_contain_text("calls tools")
    site.api.answers.append(Answer(["It is ", "sunny."]))
    call.get_by_role("textbox", name="Result of weather").fill("sunny, 21 °C")
    button(call, "Send result").click()
    expect(answers(page).last).to_contain_text("It is sunny.")
    assert [tool["function"]["name"] for tool in asked(site)["tools"]] == ["weather"]
    called, result = site.api.bodies()[-1]["messages"][1:]
    assert called["tool_calls"][0]["function"]["arguments"] == '{"city":"Paris"}'
    assert result == {"role": "tool", "content": "sunny, 21 °C", "tool_call_id": "call_0"}
    expect(page.get_by_label("Result of weather")).to_have_text("sunny, 21 °C")


def test_tools_that_cannot_be_read_are_told(page: Any, site: Site) -> None:
    """A typing error in the tools would be ignored or lost."""
    for text, told in (
        ("{", "this is no JSON"),
        ("{}", "expected a list"),
    ):
        box = settings(page).get_by_label("Tools")
        box.fill(text)
        expect(box).to_have_accessible_description(re.compile(told))
    button(settings(page), "Insert an example").click()
    expect(box).to_have_value(text)
    close(page)
    say(page, "Do you answer?")
    expect(page.get_by_role("alert").filter(has_text="Tools: expected a list")).to_be_visible()
    assert not site.api.bodies()


def test_a_model_without_a_place_for_tools_says_so(page: Any, site: Site) -> None:
    """A person would describe tools to a model that never reads them, or couldn't take them out."""
    button(settings(page), "Insert an example").click()
    close(page)
    site.api.meta["tools"] = False
    page.reload()
    settings(page).get_by_label("Tools").fill("")
    close(page)
    sheet = settings(page)
    expect(sheet).to_contain_text("--tool_format hermes")
    expect(sheet.get_by_label("Tools")).not_to_be_visible()


def tab(page: Any, name: str) -> Any:
    page.get_by_role("tab", name=name).click()
    return page.get_by_role("tabpanel", name=name)


def test_a_text_is_continued(page: Any, site: Site) -> None:
    """The completion tab would lose texts, settings or the way to stop."""
    settings(page).get_by_label("Temperature").fill("0")
    settings(page).get_by_label("Show probabilities").check()
    close(page)
    panel = tab(page, "Completion")
    site.api.answers.append(Answer([" there", " was"], waits_at=1))
    panel.get_by_label("Text to continue").fill("Once")
    button(panel, "Continue").click()
    result = panel.get_by_role("region", name="Result")
    expect(result).to_have_text("there")
    expect(button(panel, "Stop")).to_be_focused()
    site.api.go.set()
    expect(panel.get_by_role("status")).to_contain_text(re.compile(r"2 tokens · \d+\.\d tokens/s"))
    expect(result).to_have_text("there was")
    chosen = {"prompt": "Once", "temperature": 0, "max_tokens": None}
    assert asked(site, "/v1/completions") == chosen
    page.reload()
    panel = tab(page, "Completion")
    expect(panel.get_by_label("Text to continue")).to_have_value("Once")
    expect(panel.get_by_role("region", name="Result")).to_have_text("there was")


def test_a_continuation_is_stopped(page: Any, site: Site) -> None:
    """A text would be written on though nobody wants it."""
    panel = tab(page, "Completion")
    site.api.answers.append(Answer([" there", " was"], waits_at=1))
    panel.get_by_label("Text to continue").fill("Once")
    button(panel, "Continue").click()
    expect(panel.get_by_role("region", name="Result")).to_have_text("there")
    button(panel, "Stop").click()
    assert site.api.closed.wait(10), "the request goes on"
    expect(button(panel, "Continue")).to_be_visible()
    expect(panel.get_by_role("region", name="Result")).to_have_text("there")
    expect(panel.get_by_role("alert")).to_have_count(0)


def test_a_failed_continuation_is_told(page: Any, site: Site) -> None:
    """An error would look like a short text, or a reload lose what was being written."""
    panel = tab(page, "Completion")
    site.api.answers.append(ApiError(429, "full", headers={"Retry-After": "3"}))
    panel.get_by_label("Text to continue").fill("Once")
    button(panel, "Continue").click()
    expect(panel.get_by_role("alert")).to_contain_text("try again in 3 seconds")
    expect(panel.get_by_label("Text to continue")).to_have_value("Once")
    button(panel, "Continue").click()
    expect(panel.get_by_role("region", name="Result")).to_contain_text("as text.")
    expect(panel.get_by_role("alert")).to_have_count(0)
    site.api.answers.append(Answer([" there", " was"], waits_at=1))
    button(panel, "Continue").click()
    expect(panel.get_by_role("region", name="Result")).to_have_text("there")
    page.wait_for_timeout(700)  # it is kept every half second
    page.reload()
    panel = tab(page, "Completion")
    expect(panel.get_by_role("region", name="Result")).to_have_text("there")


def test_a_gap_is_filled_in(page: Any, site: Site) -> None:
    """Infilling would have no page, or one for a model that can't."""
    panel = tab(page, "Infilling")
    site.api.answers.append(Answer(["a +", " b"]))
    panel.get_by_label("Before").fill("def add(a, b):\n    return ")
    panel.get_by_label("After").fill("\n")
    button(panel, "Fill in").click()
    expect(panel.get_by_role("region", name="Result")).to_have_text("a + b")
    body = asked(site, "/v1/completions")
    assert (body["prompt"], body["suffix"]) == ("def add(a, b):\n    return ", "\n")
    site.api.meta["infills"] = False
    page.reload()
    expect(page.get_by_role("tab", name="Completion")).to_be_visible()
    expect(page.get_by_role("tab", name="Infilling")).to_have_count(0)
