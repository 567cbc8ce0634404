"""The fields that say what to generate do what the library's arguments do."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from servers import post, serve

from llama import Llama
from llama.chat.options import ChatOptions
from llama.guards import Verdict
from llama.logits.recommended import Recommended
from llama.server.answers import Piece
from llama.server.config import ServerConfig
from llama.server.dialogs import Turn
from llama.server.schemas_chat import ChatRequest
from llama.server.service import Service
from llama.structure import trial

pytest.importorskip("llguidance", reason="needs llguidance")

U: Any = {"role": "user", "content": "What does the cow say?"}
SYSTEM = {"role": "system", "content": "Be nice."}
GREETING = {"role": "assistant", "content": "Hello!"}
COLORS = {"enum": ["red", "blue"]}
SCHEMA = {
    "type": "object",
    "properties": {"color": COLORS, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["color", "n"],
    "additionalProperties": False,
}
FUNCTION = {"name": "paint", "description": "Paint it", "parameters": SCHEMA}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"id": "1", "type": "function", "function": {"name": "paint", "arguments": "{}"}}


def build(**options: Any) -> Llama:
    return Llama.build(
        dtype=torch.float32, device="cpu", max_seq_len=1024, max_batch_size=4, **options
    )


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serve(build()) as (found, _):
        yield f"{found}/v1"


@pytest.fixture(scope="module")
def tools_url() -> Iterator[str]:
    with serve(build(tool_format="hermes"), max_queue=128) as (found, _):
        yield f"{found}/v1"


def ask(url: str, **body: Any) -> Any:
    """The choices of an answer to messages, or to a prompt."""
    path = "completions" if "prompt" in body else "chat/completions"
    answer = post(f"{url}/{path}", {"temperature": 0, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"temperature": 3.5, "seed": 3, "top_k": 5}, {"top_k": 5}),
        ({"temperature": 3.5, "seed": 3, "top_k": -1}, {}),
        ({"temperature": 3.5, "seed": 3, "min_p": 0.3}, {"min_p": 0.3}),
        ({"temperature": 3.5, "seed": 3, "top_p": None, "min_p": None, "n": None}, {}),
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"presence_penalty": 1.5}, {"presence_penalty": 1.5}),
        ({"frequency_penalty": -1}, {"frequency_penalty": -1}),
        ({"logit_bias": {"325": -100, "29": 4.5}}, {"logit_bias": {325: -100, 29: 4.5}}),
        ({"min_tokens": 12}, {"min_tokens": 12}),
        ({"ignore_eos": True}, {"ignore_eos": True}),
        (
            {"stop": "ow", "include_stop_str_in_output": True},
            {"stop": ["ow"], "include_stop": True},
        ),
        ({"max_tokens": 7.0}, {"max_gen_len": 7}),
        (
            {"response_format": {"type": "regex", "regex": "[0-9]{3}"}},
            {"response_format": {"type": "regex", "regex": "[0-9]{3}"}},
        ),
    ],
)
def test_fields_are_the_library_s(
    url: str, tiny: Llama, fields: dict[str, Any], options: dict[str, Any]
) -> None:
    """A text and a chat have the library's answers, where the field has made a difference."""
    sampling = {"temperature": fields.get("temperature", 0), "seed": fields.get("seed")}
    options = {"max_gen_len": 32, **options, **sampling}
    prompt = "1, 2, 3, 4"
    [text] = ask(url, prompt=prompt, **{"max_tokens": 32, **fields})
    alone = tiny.text_completion([prompt], echo=True, **options)[0]
    assert text["text"] == alone["generation"][len(prompt) :]
    [answer] = ask(url, messages=[U], **{"max_tokens": 32, **fields})
    answered = tiny.chat_completion([[U]], **options)[0]["generation"]["content"]
    assert answer["message"]["content"] == answered
    plain = {"max_gen_len": 32, **sampling}
    if options != plain:
        text = tiny.text_completion([prompt], echo=True, **plain)[0]["generation"]
        answer = tiny.chat_completion([[U]], **plain)[0]["generation"]["content"]
        assert (text, answer) != (alone["generation"], answered), "it makes no difference here"


def test_forms(url: str) -> None:
    """Each form of an answer is OpenAI's or near to it, whole and streamed."""
    named = {"name": "answer", "schema": SCHEMA, "strict": True, "description": "It"}
    for form, begin in (
        ({"type": "json_schema", "json_schema": named}, '{"color":'),
        ({"type": "json_object", "schema": SCHEMA}, '{"color":'),
        ({"type": "choice", "choice": ["moo", "meow"]}, "m"),
        ({"type": "regex", "regex": "[a-c]{4}z"}, ""),
        ({"type": "grammar", "grammar": 'start: "x" /[0-9]/ "y"'}, "x"),
        ({"type": "grammar", "grammar": 'root ::= "x" [0-9] "y"'}, "x"),
    ):
        [found] = ask(url, messages=[U], response_format=form)
        text = found["message"]["content"]
        assert text.startswith(begin) and found["finish_reason"] == "stop", (form, text)
        assert ask(url, prompt="It is", response_format=form, max_tokens=60)[0]["text"].strip()
    free = ask(url, messages=[U], response_format={"type": "text"})
    assert free[0]["message"]["content"] == "The cow says moo."


def test_what_ended_an_answer(url: str) -> None:
    """The text, or the token's id, of the request; null for the model's own end or a limit."""
    [text] = ask(url, messages=[U], stop=["cow", "moo"])
    assert (text["finish_reason"], text["stop_reason"]) == ("stop", "cow")
    [text] = ask(url, messages=[U])
    assert (text["finish_reason"], text["stop_reason"]) == ("stop", None)
    [text] = ask(url, messages=[U], max_tokens=2)
    assert (text["finish_reason"], text["stop_reason"]) == ("length", None)
    found = post(f"{url}/completions", {"prompt": "The cow", "temperature": 0, "logprobs": 0})
    first = found.json()["choices"][0]["logprobs"]["tokens"][0]
    ids = build().tokenizer.encode(f"The cow{first}", bos=True, eos=False)
    [text] = ask(url, prompt="The cow", stop_token_ids=ids[-1:])
    assert (text["finish_reason"], text["stop_reason"], text["text"]) == ("stop", ids[-1], "")


def test_answers_to_a_prompt(url: str) -> None:
    """Each is another one; their prompt is read, and counted, once."""
    body = {"prompt": "The", "n": 4, "temperature": 1.5, "seed": 1, "max_tokens": 9}
    answer = post(f"{url}/completions", body).json()
    assert len({choice["text"] for choice in answer["choices"]}) == 4
    one = post(f"{url}/completions", {**body, "n": 1}).json()
    assert answer["usage"]["prompt_tokens"] == one["usage"]["prompt_tokens"]
    assert answer["choices"][0]["text"] == one["choices"][0]["text"]


def test_orders_of_roles(url: str) -> None:
    """Clients send all of these; the format holds none of them as they are."""
    for messages in (
        [SYSTEM, SYSTEM, U],
        [GREETING, U],
        [SYSTEM, GREETING, U],
        [U, U],
        [U, GREETING, SYSTEM, U],
        [SYSTEM, {"role": "developer", "content": "x"}, U],
        [U, GREETING, GREETING, U],
        [SYSTEM],
    ):
        assert ask(url, messages=messages, max_tokens=2)


def test_a_last_answer_is_continued(url: str) -> None:
    begun = {"role": "assistant", "content": "The cow"}
    [found] = ask(url, messages=[U, begun])
    assert found["message"]["content"] == " says moo."
    for fields in ({"continue_final_message": True}, {"add_generation_prompt": False}):
        assert ask(url, messages=[U, begun], **fields) == [found]
    for fields in ({"continue_final_message": False}, {"add_generation_prompt": True}):
        answer = post(f"{url}/chat/completions", {"messages": [U, begun], **fields})
        assert answer.status_code == 400, "Llama 2's format has no place for this"
        assert "end with the user's" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"tools": None},
        {"tools": []},
        {"tools": [TOOL], "tool_choice": "none"},
        {"tool_choice": None},
        {"tool_choice": "none"},
        {"parallel_tool_calls": None},
        {"functions": None},
        {"functions": []},
        {"function_call": "none"},
        {"response_format": None},
        {"logit_bias": None},
        {"logit_bias": {}},
        {"logprobs": False, "top_logprobs": 0},
        {"top_k": 0, "min_p": 0, "repetition_penalty": 1.0, "min_tokens": None},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": U["content"]}]}]},
        {"messages": [{**U, "tool_calls": None, "function_call": None, "name": "Ann"}]},
    ],
)
def test_fields_that_ask_for_nothing(url: str, body: dict[str, Any]) -> None:
    [found] = ask(url, **{"messages": [U], **body})
    assert found["message"] == {
        "role": "assistant",
        "content": "The cow says moo.",
        "refusal": None,
    }


def test_answers_that_clients_send_back(url: str) -> None:
    """With null contents, empty lists of calls, refusals and keys of other servers."""
    for message in (
        {"content": None, "refusal": "no"},
        {"content": "Moo", "tool_calls": []},
        {"content": "Moo", "tool_calls": None, "provider_specific_fields": {"refusal": None}},
        {"content": "Moo", "reasoning_content": "hm", "reasoning": None, "annotations": []},
        {"content": [{"type": "text", "text": "Moo"}, {"type": "refusal", "refusal": "no"}]},
    ):
        messages = [U, {"role": "assistant", **message}, U]
        assert ask(url, messages=messages, max_tokens=2), message


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"tools": [TOOL]}, "tools", "no place for tools: start it with --tool_format hermes"),
        ({"messages": [U, {"role": "tool", "content": "x"}]}, "messages", "no place"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", ""),
        ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name", "required"),
        ({"tools": [TOOL, TOOL]}, "tools", "'paint' twice"),
        ({"tools": [TOOL] * 129}, "tools", "at most 128"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice", ""),
        (
            {
                "tools": [TOOL],
                "tool_choice": {"type": "function", "function": {"name": "draw"}},
            },
            "tool_choice",
            "draw",
        ),
        ({"tool_choice": "required"}, "tool_choice", "required"),
        ({"functions": [FUNCTION]}, "functions", "send them as tools"),
        ({"function_call": {"name": "paint"}}, "function_call", ""),
        ({"messages": [{**U, "content": None}]}, "messages.0", "content is missing"),
        ({"messages": [{**U, "tool_calls": [CALL]}]}, "messages.0", "are the assistant's"),
        ({"messages": [{**U, "pictures": ["x"]}]}, "messages.0.pictures", "no such parameter"),
        (
            {"messages": [{**U, "content": [{"type": "text", "text": "x", "cache": 1}]}]},
            "messages.0.content.0.cache",
            "no such parameter",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content.0",
            "image_url",
        ),
        ({"continue_final_message": True}, None, "the assistant's message as the last"),
        ({"response_format": {"type": "xml"}}, "response_format", "xml"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
        (
            {"response_format": {"type": "json_object", "schema": {"type": "cow"}}},
            "response_format",
            "cow",
        ),
        ({"response_format": {"type": "regex", "regex": "("}}, "response_format", ""),
        ({"response_format": {"type": "choice", "choice": []}}, "response_format.choice", ""),
        ({"stop_token_ids": [10**6]}, "stop_token_ids", "end with 767"),
    ],
)
def test_mistakes_name_the_field(
    url: str, body: dict[str, Any], param: str | None, message: str
) -> None:
    answer = post(f"{url}/chat/completions", {"messages": [U], **body})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and message in error["message"], error


def test_schemas_without_end(url: str) -> None:
    """One that is nested too deep is refused before anything reads it."""
    schema: dict[str, Any] = {}
    for _ in range(100):
        schema = {"items": schema}
    for body in (
        {"response_format": {"type": "json_object", "schema": schema}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]},
    ):
        answer = post(f"{url}/chat/completions", {"messages": [U], **body})
        assert answer.status_code == 400 and "64 levels" in answer.text


def test_a_form_that_takes_too_much_work(url: str) -> None:
    """It is the request's fault, which clients don't send again, and no failure of the server."""
    schema = {"type": "object", "properties": {f"p{i}": COLORS for i in range(700)}}
    form = {"type": "json_object", "schema": schema}
    answer = post(f"{url}/chat/completions", {"messages": [U], "response_format": form})
    assert answer.status_code == 400, answer.text
    assert "too much work" in answer.json()["error"]["message"]


def test_requests_do_not_wait_for_forms(tools_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure means that a few schemas that take long stop the server for everybody."""
    release, held = threading.Event(), threading.Semaphore(0)

    def error_of(*_: Any) -> str:
        held.release()
        release.wait(60)
        return "it takes long"

    monkeypatch.setattr(trial, "error_of", error_of)

    def ask_for_form(i: int) -> int:
        form = {"type": "regex", "regex": f"a{{{i}}}"}
        tool = {**TOOL, "function": {**FUNCTION, "name": f"f{i}"}}
        path, body = (
            ("completions", {"prompt": "a", "response_format": form}),
            ("chat/completions", {"messages": [U], "response_format": form}),
            ("chat/completions", {"messages": [U], "tools": [tool], "tool_choice": "required"}),
        )[i % 3]
        return post(f"{tools_url}/{path}", body).status_code

    n = min(32, (os.cpu_count() or 1) + 4)  # the threads that asyncio has for all
    with ThreadPoolExecutor(3 * n) as threads:
        asked = [threads.submit(ask_for_form, i) for i in range(3 * n)]
        try:
            for _ in range(n):
                assert held.acquire(timeout=30)
            assert ask(tools_url, messages=[U])[0]["message"]["content"] == "The cow says moo."
            body = {"prompt": "a", "response_format": {"type": "regex", "regex": "b"}}
            late = post(f"{tools_url}/completions", {**body, "timeout": 0.2})
            assert late.status_code == 504, late.text
        finally:
            release.set()
        assert {each.result() for each in asked} == {400}


def test_the_form_at_fault_is_named(tools_url: str) -> None:
    """The answer's, or that of a function's arguments."""
    wrong = {**TOOL, "function": {**FUNCTION, "parameters": {"type": 5}}}
    for body, param, message in (
        ({"tools": [wrong], "tool_choice": "required"}, "tools", "the form of a tool's arguments"),
        (
            {"tools": [TOOL], "response_format": {"type": "regex", "regex": "a"}},
            "response_format",
            "can't stand beside tools",
        ),
    ):
        error = post(f"{tools_url}/chat/completions", {"messages": [U], **body}).json()["error"]
        assert error["param"] == param and message in error["message"], error


@pytest.mark.parametrize(
    ("choice", "parallel", "several"),
    [
        ("auto", None, True),
        (None, True, True),
        ("auto", False, False),
        ("required", None, False),
        ("required", True, True),
        ({"type": "function", "function": {"name": "paint"}}, True, False),
    ],
)
def test_how_many_calls_an_answer_may_have(choice: Any, parallel: Any, several: bool) -> None:
    """A required one stands alone, unless more are asked for: small models repeat it for ever."""
    body = {"messages": [U], "tools": [TOOL], "tool_choice": choice}
    asked = ChatRequest.model_validate({**body, "parallel_tool_calls": parallel})
    assert asked.options["parallel_tool_calls"] is several


def test_tool_messages(tools_url: str) -> None:
    """Calls and results, in the forms that clients send, change the prompt that is read."""
    asked = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    older = {"name": "paint", "arguments": "{}"}
    lengths = []
    for messages in (
        [U],
        [U, asked, {"role": "tool", "tool_call_id": "1", "content": "moo"}],
        [U, asked, {"role": "tool", "tool_call_id": "1", "content": "moo"}, U],
        [U, {**asked, "content": "Wait."}, {"role": "tool", "tool_call_id": "1", "content": "m"}],
        [U, {"role": "assistant", "function_call": older}, {**U, "role": "function", "name": "f"}],
        [U, {"role": "tool", "content": "moo"}],
        [{"role": "tool", "content": "moo"}, asked, GREETING, U],
        [U, asked, {"role": "tool", "content": "moo"}, SYSTEM],
    ):
        body = {"messages": messages, "max_tokens": 2, "tools": [TOOL]}
        answer = post(f"{tools_url}/chat/completions", body)
        assert answer.status_code == 200, answer.text
        lengths.append(answer.json()["usage"]["prompt_tokens"])
    assert all(length > lengths[0] for length in lengths[1:]) and lengths[2] > lengths[1]


def test_recommended_sampling(url: str) -> None:
    """It stands for what a request leaves out or says null for, and for nothing else."""
    llama = build()
    with pytest.raises(ValueError, match=r"no generation_config.json"):
        Service(llama, ServerConfig(sampling="checkpoint"))
    llama.tasks.recommended = Recommended("its file", {"temperature": 0.0, "top_k": 1})
    body = {"prompt": "The", "seed": 1, "max_tokens": 20}
    greedy = ask(url, **body, temperature=0)
    usual = ask(url, **body, temperature=0.6, top_k=0)
    assert usual != greedy
    with serve(llama, sampling="checkpoint") as (base, _):
        assert ask(f"{base}/v1", **body, temperature=None, top_k=None) == greedy
        assert ask(f"{base}/v1", **body, temperature=0.6, top_k=0) == usual


def test_a_refusal_ends_a_call() -> None:
    """Its text is content, not more of the arguments that have been sent."""
    parser = build(tool_format="hermes").tasks.answer_parser(ChatOptions(tools=[TOOL]))
    turn = Turn(parser)
    text = '<tool_call>\n{"name": "paint", "arguments": {"color": "r'
    assert turn.push(Piece(0, text, 9, None)).calls
    assert (turn.reason("stop"), turn.reason("length")) == ("tool_calls", "length")
    delta = turn.push(Piece(0, "\n\nRefused: too red.", 9, "content_filter"))
    assert delta == ("\n\nRefused: too red.", ())
    assert turn.message().tool_calls[0].function.arguments == '{"color": "r'  # type: ignore[index]


def test_guards_read_calls() -> None:
    """What a guard refuses of a call is no call; what it reads of earlier ones is their text."""
    llama = build(tool_format="hermes")
    read: list[Any] = []

    def input_guard(dialog: Any) -> Verdict:
        read.append([(message["role"], message["content"]) for message in dialog])
        return Verdict("bark" not in dialog[-1]["content"], reason="noise")

    llama.input_guard = input_guard
    answers: list[str] = []

    def output_guard(_: Any, answer: str) -> Verdict:
        answers.append(answer)
        return Verdict("red" not in answer, reason="too red")

    llama.output_guard = output_guard
    calls: dict[str, Any] = {"tools": [TOOL], "tool_choice": "required", "max_tokens": 80}
    with serve(llama) as (base, _):
        url = f"{base}/v1"
        result = {"role": "tool", "tool_call_id": "1", "content": "bark"}
        asked = {"role": "assistant", "content": None, "tool_calls": [CALL]}
        [found] = ask(url, messages=[U, asked, result], tools=[TOOL])
        assert found["finish_reason"] == "content_filter" and "noise" in str(found["message"])
        user = ("user", U["content"])
        assert read[-1] == [user, ("assistant", "paint({})"), ("user", "bark")]
        [found] = ask(url, messages=[U, {"role": "assistant", "content": "I bark"}])
        assert found["finish_reason"] == "content_filter" and "I bark" in read[-1][-1][1]
        ask(url, messages=[U, {"role": "assistant", "content": "The cow"}])
        assert answers[-1] == "The cow says moo."
        for color in ("red", "blue"):
            only = {**SCHEMA, "properties": {**SCHEMA["properties"], "color": {"const": color}}}
            tool = {"type": "function", "function": {**FUNCTION, "parameters": only}}
            [found] = ask(
                url, messages=[U], **{**calls, "tools": [tool]}, parallel_tool_calls=False
            )
            assert ("tool_calls" in found["message"]) == (color == "blue")
            assert ("too red" in str(found["message"]["content"])) == (color == "red")
