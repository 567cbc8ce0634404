"""Tool calls in answers: every notation, whole and in pieces, and the grammars that hold to it."""

import json
import random
import re
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.chat.grammar import calls_grammar
from llama.chat.notations import (
    HERMES,
    LLAMA,
    MISTRAL,
    MISTRAL_NAMES,
    Notation,
    find_notation,
)
from llama.chat.options import ChatOptions, split_options
from llama.chat.tools import AnswerDelta, AnswerParser, ToolCallDelta, answer_message

NAMES = ["get_weather", "add"]
PARIS = '{"city": "Paris"}'
WEATHER = ("get_weather", PARIS)
ADD = ("add", '{"a": 1, "b": [2, {"c": "}"}]}')

# Notation, answer, its content and its calls.
ANSWERS: list[tuple[Notation, str, str | None, list[tuple[str, str]]]] = [
    (HERMES, "Hello there. ", "Hello there. ", []),
    (
        HERMES,
        f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>',
        None,
        [WEATHER],
    ),
    (
        HERMES,
        f'Let me see.\n<tool_call>{{"arguments": {PARIS}, "name": "get_weather"}}</tool_call>\n'
        f'<tool_call>\n{{"name": "add", "arguments": {ADD[1]}}}\n</tool_call>\nDone. ',
        "Let me see.\n\n\nDone.",
        [WEATHER, ADD],
    ),
    (HERMES, '<tool_call>{"name": "add"}</tool_call>', None, [("add", "{}")]),
    (HERMES, '<tool_call>{"name": "add", "arguments": null}', None, [("add", "{}")]),
    (
        HERMES,
        '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}',
        None,
        [("add", '{"a": 1}')],
    ),
    (
        HERMES,
        '<tool_call>{"name": "add", "arguments": {"a": "\\\\\\"}"}',
        None,
        [("add", '{"a": "\\\\\\"}"}')],
    ),
    # A brace that was forgotten, and an answer that was cut off.
    (
        HERMES,
        '<tool_call>{"name": "add", "arguments": {}\n</tool_call><tool_call>{"name": "add"}',
        None,
        [("add", "{}"), ("add", "{}")],
    ),
    (HERMES, '<tool_call>{"name": "add", "arguments": {"a": "x', None, [("add", '{"a": "x')]),
    (HERMES, '<tool_call>{"name": "ad', '<tool_call>{"name": "ad', []),
    # No calls of known functions.
    (HERMES, '{"name": "add", "arguments": {}}', '{"name": "add", "arguments": {}}', []),
    (
        HERMES,
        '<tool_call>{"name": "drop", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "drop", "arguments": {}}</tool_call>',
        [],
    ),
    (HERMES, "a <tool_call> b <tool_", "a <tool_call> b <tool_", []),
    (
        HERMES,
        '<tool_call>{"name": ["add"], "arguments": {}}',
        '<tool_call>{"name": ["add"], "arguments": {}}',
        [],
    ),
    (
        HERMES,
        '<tool_call>{"name": "add", "arguments": [1]}',
        '<tool_call>{"name": "add", "arguments": [1]}',
        [],
    ),
    (LLAMA, "The sky is {blue}.", "The sky is {blue}.", []),
    (LLAMA, f'{{"name": "get_weather", "parameters": {PARIS}}}', None, [WEATHER]),
    (
        LLAMA,
        f'\n{{"type": "function", "name": "get_weather", "parameters": {PARIS}}}',
        None,
        [WEATHER],
    ),
    (
        LLAMA,
        f'{{"name": "get_weather", "parameters": {PARIS}}}; '
        f'{{"name": "add", "parameters": {ADD[1]}}}',
        None,
        [WEATHER, ADD],
    ),
    (LLAMA, f'<|python_tag|>{{"name": "get_weather", "arguments": {PARIS}}}', None, [WEATHER]),
    (LLAMA, 'I see. <|python_tag|>get_weather.call(city="Paris")', "I see.", [WEATHER]),
    (LLAMA, "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    (LLAMA, '<|python_tag|>add.call(open("x"))', '<|python_tag|>add.call(open("x"))', []),
    (LLAMA, "<|python_tag|>add.call(a=1).call(b=2)", "<|python_tag|>add.call(a=1).call(b=2)", []),
    (LLAMA, "<|python_tag|>add.call(**{'a': 1})", "<|python_tag|>add.call(**{'a': 1})", []),
    (LLAMA, "<|python_tag|>add.call(a=1e999)", "<|python_tag|>add.call(a=1e999)", []),
    (LLAMA, r"<|python_tag|>add.call(a='\ud800')", None, [("add", '{"a": "?"}')]),
    (HERMES, r'<tool_call>{"name": "add", "arguments": "\ud800"}', None, [("add", "?")]),
    (LLAMA, '{"answer": {"name": "add"}} ', '{"answer": {"name": "add"}} ', []),
    (LLAMA, '{"name": "Tom", "parameters": 3}', '{"name": "Tom", "parameters": 3}', []),
    (LLAMA, '{"name": 12', '{"name": 12', []),
    (LLAMA, '{"name": "add", "parameters": {}} and more', "and more", [("add", "{}")]),
    (MISTRAL, f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {PARIS}}}]', None, [WEATHER]),
    (
        MISTRAL,
        f'Well: [TOOL_CALLS][{{"name": "get_weather", "arguments": {PARIS}, "id": "abc"}}, '
        f'{{"name": "add", "arguments": {ADD[1]}}}] ',
        "Well:",
        [WEATHER, ADD],
    ),
    (MISTRAL, "[TOOL_CALLS] none [1]", "[TOOL_CALLS] none [1]", []),
    (
        MISTRAL,
        f'[TOOL_CALLS] [1] [TOOL_CALLS] {{"name": "get_weather", "arguments": {PARIS}}}]',
        "[TOOL_CALLS] [1] ]",
        [WEATHER],
    ),
    (
        MISTRAL_NAMES,
        f"[TOOL_CALLS]get_weather[ARGS]{PARIS}[TOOL_CALLS]add{ADD[1]}",
        None,
        [WEATHER, ADD],
    ),
    (MISTRAL_NAMES, f"[TOOL_CALLS]get_weather[CALL_ID]a1b2[ARGS]{PARIS}", None, [WEATHER]),
    (MISTRAL_NAMES, "[TOOL_CALLS]drop[ARGS]{}", "[TOOL_CALLS]drop[ARGS]{}", []),
    (MISTRAL_NAMES, "[TOOL_CALLS]add what", "[TOOL_CALLS]add what", []),
]


def called(message: Any) -> list[tuple[str, str]]:
    calls = [call["function"] for call in message.get("tool_calls", [])]
    return [(call["name"], call["arguments"]) for call in calls]


@pytest.mark.parametrize(("notation", "text", "content", "calls"), ANSWERS)
def test_answers_are_parsed(notation: Notation, text: str, content: Any, calls: Any) -> None:
    """A failure means that a call is missed, or that something else is taken for one."""
    message = answer_message(text, AnswerParser(notation, NAMES))
    assert (message["content"], called(message)) == (content, calls)
    ids = [call["id"] for call in message.get("tool_calls", [])]
    form = "[a-zA-Z0-9]{9}" if "mistral" in notation.name else "call_[a-zA-Z0-9]{24}"
    assert len(set(ids)) == len(calls) and all(re.fullmatch(form, i) for i in ids)


def streamed(parser: AnswerParser, pieces: list[str]) -> list[AnswerDelta]:
    return [*(parser.push(piece) for piece in pieces), parser.finish()]


def joined(deltas: list[AnswerDelta]) -> tuple[str, list[tuple[str, str]]]:
    """Put deltas together as OpenAI's clients do."""
    calls: list[list[str]] = []
    for call in (call for delta in deltas for call in delta.calls):
        if call.index == len(calls):
            assert call.id and call.name, "a call begins without its id and name"
            calls.append([call.name, ""])
        else:
            assert call.index == len(calls) - 1 and call.id is call.name is None
        calls[call.index][1] += call.arguments
    return "".join(delta.content for delta in deltas), [(name, text) for name, text in calls]


def test_pieces_of_any_lengths_give_what_the_whole_gives() -> None:
    """A failure means that a stream's content or calls depend on where tokens end."""
    rng = random.Random(0)
    for notation, text, content, calls in ANSWERS:
        for size in [1, *(rng.randint(2, 9) for _ in range(12))]:
            pieces, left = [], text
            while left:
                n = size if size == 1 else rng.randint(1, size)
                pieces.append(left[:n])
                left = left[n:]
            parser = AnswerParser(notation, NAMES)
            assert joined(streamed(parser, pieces)) == (content or "", calls), (text, pieces)
            assert parser.has_calls == bool(calls)


PARTS = [
    *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    *('{"name": "add", "arguments": {"a": 1}}', '{"name": "get_weather", "parameters": {}}'),
    *('{"name": "x"', '{"arguments": {"', '"name"', ": ", "{", "}", "[", "]", ",", ";", '"', "\\"),
    *("add", "add.call(a=1)", "<", "<tool", "[TOOL", " ", "\n", "text", "0", "null", "é😀"),
]


@pytest.mark.parametrize("notation", [HERMES, LLAMA, MISTRAL, MISTRAL_NAMES])
@settings(max_examples=300, deadline=None, database=None)
@given(st.lists(st.sampled_from(PARTS), max_size=12), st.randoms(use_true_random=False))
def test_any_text_is_parsed_the_same_in_pieces(
    notation: Notation, parts: list[str], rng: random.Random
) -> None:
    text = "".join(parts)
    whole = answer_message(text, AnswerParser(notation, NAMES))
    cuts = sorted(rng.randint(0, len(text)) for _ in range(rng.randint(0, 8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    deltas = streamed(AnswerParser(notation, NAMES), pieces)
    assert joined(deltas) == (whole["content"] or "", called(whole))
    if not called(whole):
        assert whole["content"] == text, "text is lost although nothing was called"


def test_deltas_come_as_early_as_they_can() -> None:
    """A failure means that a stream waits for more than it needs, or shows half a mark."""
    parser = AnswerParser(HERMES, NAMES)
    assert parser.push("Hi <to") == AnswerDelta("Hi")
    assert parser.push("day") == AnswerDelta(" <today")
    assert parser.push(" <tool_call>") == AnswerDelta()
    assert parser.push('{"name": "add", "argu') == AnswerDelta()
    first = parser.push('ments": {"a": ')
    assert first.calls[0]._replace(id=None) == ToolCallDelta(0, None, "add", '{"a": ')
    assert parser.push("1").calls == (ToolCallDelta(0, arguments="1"),)
    assert parser.push("}}\n").calls == (ToolCallDelta(0, arguments="}"),)
    assert parser.push("</tool_") == parser.finish()._replace(content="") == AnswerDelta()


def test_without_parallel_calls_the_first_is_the_only_one() -> None:
    text = '<tool_call>{"name": "add"}</tool_call>\n<tool_call>{"name": "add"}</tool_call> More'
    message = answer_message(text, AnswerParser(HERMES, NAMES, parallel=False))
    assert (message["content"], called(message)) == (None, [("add", "{}")])


def test_long_answers_take_linear_time() -> None:
    """A failure means that an answer's pieces take longer, the longer it is."""
    parser = AnswerParser(HERMES, NAMES)
    parser.push('<tool_call>{"name": "add", "arguments": {"a": "')
    texts = [delta.calls[0].arguments for delta in (parser.push("x" * 10) for _ in range(50_000))]
    assert len("".join(texts)) == 500_000


@pytest.mark.parametrize(
    ("notation", "begin", "piece"),
    [
        (HERMES, '<tool_call>{"name": "add", "arguments": "', "abcd"),
        (HERMES, '<tool_call>{"arguments": {"a": "', "\\n {"),
        (HERMES, '<tool_call>{"id": 1', "1111"),
        (HERMES, "<tool_call>", "    "),
        (LLAMA, "<|python_tag|>add.call(", "abcd"),
    ],
)
def test_what_isnt_understood_is_read_a_few_times(
    notation: Notation, begin: str, piece: str
) -> None:
    """A failure means that a long text which may become a call takes quadratic time: minutes."""
    parser = AnswerParser(notation, NAMES)
    text = begin + piece * 100_000
    start = time.perf_counter()
    assert parser.push(begin) == AnswerDelta()
    for _ in range(100_000):
        assert parser.push(piece) == AnswerDelta()
    assert parser.finish().content == text
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    ("template", "notation"),
    [
        ("{{ tools }}<tool_call>\n{'name': 1}</tool_call>", HERMES),
        ("<tool_call><function=f></function></tool_call>", None),
        ('{"name": function name, "parameters": dictionary} "parameters"', LLAMA),
        ("<|python_tag|>", LLAMA),
        ("[AVAILABLE_TOOLS][TOOL_CALLS]", MISTRAL),
        ("[TOOL_CALLS]{{ name }}[ARGS]", MISTRAL_NAMES),
        ("{{ tools }}", None),
    ],
)
def test_notations_are_found_in_templates(template: str, notation: Notation | None) -> None:
    assert find_notation(template) is notation


def tool(name: str, strict: bool | None = None, **properties: Any) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    function = {"name": name, "parameters": schema}
    return {"type": "function", "function": function | ({"strict": strict} if strict else {})}


CITY = {"city": {"$ref": "#/$defs/City"}}
TOOLS = [tool("get_weather", True, **CITY), tool("add", a={"type": "integer"})]
TOOLS[0]["function"]["parameters"]["$defs"] = {"City": {"enum": ["Paris", "Rome"]}}


def accepts(grammar: str, text: str) -> bool:
    """Whether a whole text is in a grammar, by llguidance."""
    llguidance = pytest.importorskip("llguidance")
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), grammar)
    assert not matcher.is_error(), matcher.get_error()
    data = list(text.encode())
    return matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()


def written(notation: Notation, *calls: tuple[str, str]) -> str:
    """Calls as the notation's models write them."""
    if notation is MISTRAL_NAMES:
        return "".join(f"[TOOL_CALLS]{name}[ARGS]{arguments}" for name, arguments in calls)
    key = notation.arguments
    texts = [f'{{"name": "{name}", "{key}": {arguments}}}' for name, arguments in calls]
    if notation is MISTRAL:
        return f"[TOOL_CALLS][{', '.join(texts)}]"
    if notation is LLAMA:
        return "; ".join(texts)
    return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts)


@pytest.mark.parametrize("notation", [HERMES, LLAMA, MISTRAL, MISTRAL_NAMES])
def test_required_calls_are_held_to_their_schemas(notation: Notation) -> None:
    """A failure means that a required call may have other arguments, or that none fit."""
    options = ChatOptions(tools=TOOLS, tool_choice="required")
    grammar = calls_grammar(notation, options, {"type": "json_object"})
    assert grammar is not None
    assert accepts(grammar, written(notation, WEATHER))
    assert accepts(grammar, written(notation, ("add", '{"a": 3}')))
    several = written(notation, WEATHER, ("add", '{"a": 3}'), WEATHER)
    assert accepts(grammar, several) == (notation is not LLAMA)
    assert len(called(answer_message(several, AnswerParser(notation, NAMES)))) == 3
    for wrong in (
        "Hello",
        "",
        written(notation, ("get_weather", '{"city": "Oslo"}')),
        written(notation, ("add", '{"a": "3"}')),
        written(notation, ("drop", "{}")),
        f"Hello {written(notation, WEATHER)}",
    ):
        assert not accepts(grammar, wrong), wrong
    single = ChatOptions(tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    grammar = calls_grammar(notation, single, None)
    assert grammar is not None
    assert accepts(grammar, written(notation, WEATHER)) and not accepts(grammar, several)


@pytest.mark.parametrize("notation", [HERMES, LLAMA, MISTRAL, MISTRAL_NAMES])
def test_a_named_function_is_the_only_one(notation: Notation) -> None:
    for choice in ("add", {"type": "function", "function": {"name": "add"}}):
        grammar = calls_grammar(notation, ChatOptions(tools=TOOLS, tool_choice=choice), None)
        assert grammar is not None and accepts(grammar, written(notation, ("add", '{"a": 3}')))
        assert not accepts(grammar, written(notation, WEATHER))


@pytest.mark.parametrize("notation", [HERMES, LLAMA, MISTRAL, MISTRAL_NAMES])
def test_strict_functions_hold_calls_but_leave_text_free(notation: Notation) -> None:
    grammar = calls_grammar(notation, ChatOptions(tools=TOOLS), None)
    assert grammar is not None
    for text in ("", "Hello.", "a < b, [TOOL and <tool", written(notation, WEATHER)):
        assert accepts(grammar, text), text
    before = f"I look.\n{written(notation, WEATHER)}"
    assert notation is LLAMA or accepts(grammar, before)
    assert not accepts(grammar, written(notation, ("get_weather", '{"city": "Oslo"}')))
    assert accepts(grammar, written(notation, ("add", '{"anything": true}')))  # isn't strict
    assert calls_grammar(notation, ChatOptions(tools=TOOLS[1:]), None) is None
    assert calls_grammar(notation, ChatOptions(tools=TOOLS[1:]), {"type": "text"}) is None


def test_an_answer_may_have_a_form_beside_calls() -> None:
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    grammar = calls_grammar(HERMES, ChatOptions(tools=TOOLS[1:]), form)
    assert grammar is not None and accepts(grammar, '{"x": 3}')
    assert accepts(grammar, written(HERMES, ("add", '{"a": 3}')))
    assert not accepts(grammar, "Hello") and not accepts(grammar, '{"x": "3"}')
    with pytest.raises(ValueError, match="response_format of the type 'regex' can't stand beside"):
        calls_grammar(HERMES, ChatOptions(tools=TOOLS), {"type": "regex", "regex": "a"})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tools": "x"}, TypeError, "tools is one str"),
        ({"tools": [3]}, TypeError, "tool 0 is 3: expected"),
        ({"tools": [{"type": "retrieval"}]}, TypeError, "tool 0 is"),
        ({"tools": [{"type": "function"}]}, ValueError, "tool 0 has no function with a name"),
        ({"tools": [{"function": {"name": "a", "parameters": 3}}]}, TypeError, "no JSON Schema"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, ValueError, "has the function 'get_weather' twice"),
        ({"tool_choice": "required"}, ValueError, "tool_choice is 'required': expected 'auto'"),
        ({"tools": TOOLS, "tool_choice": "drop"}, ValueError, "are 'get_weather', 'add'"),
        ({"tools": TOOLS, "tool_choice": {"x": 1}}, ValueError, "tool_choice is"),
        ({"documents": [3]}, TypeError, "documents holds something else"),
    ],
)
def test_wrong_options_are_named(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ChatOptions(**options)


def test_a_name_that_begins_another_chooses_one() -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in ("get", "get_more")]
    assert ChatOptions(tools=tools, tool_choice="get").offered == (tools[0],)


def test_options_are_told_from_sampling() -> None:
    chat, rest = split_options({"tools": TOOLS, "stop": ["a"], "merge_roles": True})
    assert chat == ChatOptions(tools=TOOLS, merge_roles=True) and rest == {"stop": ["a"]}
    assert json.dumps(chat.offered) == json.dumps(TOOLS)
    assert ChatOptions(tools=TOOLS, tool_choice="none").offered == ()
