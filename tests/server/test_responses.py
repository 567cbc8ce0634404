"""/v1/responses: its shapes and events are those of the ``openai`` package's own types."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import httpx
import openai
import pytest
import torch
from openai.types.responses import Response
from processes import wait_until
from pydantic import BaseModel, ConfigDict, Field
from servers import post, serve

from llama import Llama
from llama.chat.options import ChatOptions
from llama.guards import Verdict
from llama.sampling import SamplingParams
from llama.server import responses
from llama.server.answers import Piece
from llama.server.dialogs import Turn
from llama.server.loop import Job

pytest.importorskip("llguidance", reason="needs llguidance")

QUESTION = "What does the cow say?"
SOUND: Any = {
    "type": "function",
    "name": "sound",
    "description": "The sound of an animal",
    "parameters": {
        "type": "object",
        "properties": {"animal": {"enum": ["cow", "bee"]}, "loud": {"type": "boolean"}},
        "required": ["animal", "loud"],
        "additionalProperties": False,
    },
    "strict": True,
}
FORCED: Any = {
    "tools": [SOUND],
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "temperature": 0,
}


class Animal(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Literal["cow", "bee"]
    legs: Annotated[int, Field(ge=2, le=6)]


@pytest.fixture(scope="module")
def llama() -> Llama:
    return Llama.build(
        dtype=torch.float32,
        device="cpu",
        max_seq_len=1024,
        max_batch_size=4,
        tool_format="hermes",
    )


@pytest.fixture(scope="module")
def url(llama: Llama) -> Iterator[str]:
    with serve(llama) as (found, _):
        yield f"{found}/v1"


@pytest.fixture(scope="module")
def client(url: str) -> Any:
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


def test_text(client: Any, url: str) -> None:
    """A whole response has all of the type's fields, and what was asked for in them."""
    settings = {"metadata": {"a": "b"}, "instructions": "Be kind.", "user": "Ann", "store": True}
    body = {"model": "tiny", "input": QUESTION, "temperature": 0, **settings}
    raw = post(f"{url}/responses", body).json()
    found = Response.model_validate(raw, strict=True)
    assert found.status == "completed" and found.error is None and found.completed_at
    assert found.output_text and found.output[0].content[0].annotations == []  # type: ignore[union-attr]
    assert found.metadata == {"a": "b"} and found.instructions == "Be kind."
    assert (found.temperature, found.top_p, found.max_output_tokens) == (0, 0.9, None)
    assert raw["store"] is False, "nothing is stored"
    assert found.usage and found.usage.total_tokens == (
        found.usage.input_tokens + found.usage.output_tokens
    )
    alone = client.responses.create(model="tiny", input=QUESTION, temperature=0)
    assert alone.output_text == "The cow says moo."
    assert found.usage.input_tokens > alone.usage.input_tokens, "the instructions aren't read"
    short = client.responses.create(
        model="tiny", input=QUESTION, max_output_tokens=2, temperature=0
    )
    assert short.status == "incomplete" and short.output_text == "The cow"
    assert short.incomplete_details.reason == "max_output_tokens"
    assert short.output[0].status == "incomplete" and short.completed_at is None


def test_events(client: Any) -> None:
    """A stream tells of everything in order, and its last event has the whole response."""
    create = client.responses.create
    events = list(create(model="tiny", input=QUESTION, temperature=0, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert len(deltas) > 4, "the text didn't come in pieces"
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * len(deltas),
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert all(type(event).model_validate(event.model_dump(), strict=True) for event in events)
    assert events[2].item.content == [] and events[2].item.status == "in_progress"
    assert events[-4].text == events[-1].response.output_text == "".join(deltas)
    assert events[-2].item == events[-1].response.output[0]
    assert events[0].response.status == "in_progress" and events[0].response.output == []
    assert len({event.response.id for event in (events[0], events[1], events[-1])}) == 1
    assert len({e.item_id for e in events if hasattr(e, "item_id")}) == 1
    *_, last = create(model="tiny", input=QUESTION, max_output_tokens=2, stream=True)
    assert last.type == "response.incomplete" and last.response.status == "incomplete"
    with client.responses.stream(model="tiny", input=QUESTION, temperature=0) as stream:
        assert stream.get_final_response().output_text == "The cow says moo."


def test_tools(client: Any) -> None:
    """A call, streamed and not; its result sent back as the package's own items."""
    create = client.responses.create
    found = create(model="tiny", input=QUESTION, **FORCED)
    [call] = found.output
    assert call.type == "function_call" and call.name == "sound" and call.call_id != call.id
    assert Response.model_validate(found.model_dump(), strict=True)
    assert found.tools[0].parameters == SOUND["parameters"] and found.tool_choice == "required"
    events = list(create(model="tiny", input=QUESTION, stream=True, **FORCED))
    kinds = [event.type for event in events]
    deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert kinds[2:-1] == [
        "response.output_item.added",
        *["response.function_call_arguments.delta"] * len(deltas),
        "response.function_call_arguments.done",
        "response.output_item.done",
    ]
    assert all(type(event).model_validate(event.model_dump(), strict=True) for event in events)
    assert events[-3].arguments == "".join(deltas) == call.arguments and len(deltas) > 4
    assert events[2].item.arguments == "" and events[-2].item.status == "completed"

    named = create(
        model="tiny",
        input=QUESTION,
        **{**FORCED, "tool_choice": {"type": "function", "name": "sound"}},
    )
    assert named.output[0].name == "sound"
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "moo"}
    asked = [{"role": "user", "content": QUESTION}, call, result]
    answer = create(model="tiny", input=asked, tools=[SOUND], temperature=0, max_output_tokens=9)
    assert answer.output[0].type == "message"
    lone = create(model="tiny", input=QUESTION, tools=[SOUND], max_output_tokens=1)
    assert answer.usage.input_tokens > lone.usage.input_tokens + 20, "the call isn't read"
    plain = create(model="tiny", input=QUESTION, tools=[SOUND], tool_choice="none", temperature=0)
    assert plain.output_text == "The cow says moo."


def test_an_empty_answer(llama: Llama) -> None:
    """It is a message without text; tokens of the prompt are read from the cache or written."""
    body = responses.schemas.ResponsesRequest(input=QUESTION)
    growing = responses.GrowingResponse(responses._empty(body, "tiny"), Turn(None), None)
    sequence = llama.tasks.text(["The cow"], SamplingParams())[0]
    sequence.n_reused = 1
    growing.push(Piece(0, "", 0, "stop"))
    growing.end(Job(sequence, lambda _: None))
    [message] = growing.response.output
    assert message.type == "message" and [part.text for part in message.content] == [""]
    used = growing.response.usage
    assert used is not None and used.input_tokens == len(sequence.prompt) > 1
    assert used.input_tokens_details.cached_tokens == 1
    assert used.input_tokens_details.cache_write_tokens == used.input_tokens - 1


def test_calls_in_a_row_are_one_message() -> None:
    """Templates refuse two answers in turn."""
    call = {"type": "function_call", "name": "sound", "arguments": "{}"}
    result = {"type": "function_call_output", "output": "moo"}
    items = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "Wait."}]
    items += [{**call, "call_id": "1"}, {**call, "call_id": "2"}]
    items += [{**result, "call_id": "1"}, {**result, "call_id": "2"}]
    dialog = responses.schemas.ResponsesRequest.model_validate({"input": items}).dialog
    assert [message["role"] for message in dialog] == ["user", "assistant", "tool", "tool"]
    assert [each["id"] for each in dialog[1]["tool_calls"]] == ["1", "2"]


def test_text_and_calls(llama: Llama) -> None:
    """Each is an item of its own, which ends before the next one begins."""
    options = ChatOptions(tools=[{"type": "function", "function": {"name": "sound"}}])
    body = responses.schemas.ResponsesRequest(input=QUESTION)
    turn = Turn(llama.tasks.answer_parser(options))
    growing = responses.GrowingResponse(responses._empty(body, "tiny"), turn, None)
    call = '<tool_call>\n{"name": "sound", "arguments": {"loud": true}}\n</tool_call>'
    events: list[Any] = [*growing.begin()]
    for text in ("One ", "moment.", f"\n{call[:20]}", call[20:], f"\n{call}", "\nThat", " is all."):
        events += growing.push(Piece(0, text, 9, None))
    events += growing.push(Piece(0, "", 9, "stop"))
    sequence = llama.tasks.text(["The cow"], SamplingParams())[0]
    events += growing.end(Job(sequence, lambda _: None))
    assert [item.type for item in growing.response.output] == [
        "message",
        "function_call",
        "function_call",
        "message",
    ]
    texts = [item.content[0].text for item in growing.response.output if item.type == "message"]
    assert [text.strip() for text in texts] == ["One moment.", "That is all."]
    assert {item.status for item in growing.response.output} == {"completed"}
    opened: list[int] = []
    for event in events:
        if event.type == "response.output_item.added":
            assert event.output_index == len(opened), "an item begins before the last has ended"
            opened.append(event.output_index)
        elif event.type == "response.output_item.done":
            assert event.output_index == len(opened) - 1
            assert event.item == growing.response.output[event.output_index].model_dump()
    done = [event.type for event in events].count("response.output_item.done")
    assert len(opened) == done == 4


def test_items(client: Any, url: str) -> None:
    """Every kind of item that clients send back; reasoning is left out."""
    first = client.responses.create(model="tiny", input=QUESTION, temperature=0)
    question = [{"role": "user", "content": [{"type": "input_text", "text": "And where?"}]}]
    reasoning = {"type": "reasoning", "id": "rs_1", "summary": []}
    for earlier in (first.output, [item.model_dump() for item in first.output]):
        items = [{"role": "user", "content": QUESTION}, reasoning, *earlier, *question]
        found = client.responses.create(model="tiny", input=items, temperature=0)
        chat = [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": "And where?"},
        ]
        same = post(f"{url}/chat/completions", {"messages": chat, "temperature": 0}).json()
        assert found.output_text == same["choices"][0]["message"]["content"]
        assert found.usage.input_tokens == same["usage"]["prompt_tokens"]
    begun = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "The cow"}]
    assert client.responses.create(model="tiny", input=begun, temperature=0).output_text == (
        " says moo."
    )


def test_parsed(client: Any) -> None:
    found = client.responses.parse(model="tiny", input="An animal", text_format=Animal)
    assert isinstance(found.output_parsed, Animal)
    assert found.text.format.type == "json_schema" and found.text.format.name == "Animal"
    with client.responses.stream(model="tiny", input="An animal", text_format=Animal) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Animal)
    forms: Any = ({"type": "json_object", "schema": Animal.model_json_schema()},)
    for form in forms:
        found = client.responses.create(model="tiny", input="An animal", text={"format": form})
        assert Animal.model_validate_json(found.output_text)


def test_logprobs(client: Any) -> None:
    settings = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "temperature": 0}
    found = client.responses.create(model="tiny", input=QUESTION, **settings)
    assert Response.model_validate(found.model_dump(), strict=True)
    scores = found.output[0].content[0].logprobs
    assert "".join(score.token for score in scores).strip() == found.output_text
    assert all(len(score.top_logprobs) == 2 for score in scores)
    events = client.responses.create(model="tiny", input=QUESTION, stream=True, **settings)
    deltas = [e for e in events if e.type == "response.output_text.delta"]
    streamed = [score.token for event in deltas for score in event.logprobs]
    assert streamed == [score.token for score in scores]


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "keeps nothing"),
        ({"conversation": "conv_1"}, "conversation", "keeps nothing"),
        ({"background": True}, "background", ""),
        ({"input": []}, "input", ""),
        ({"input": [{"type": "reasoning", "id": "rs_1", "summary": []}]}, "input", "no message"),
        (
            {"input": [{"type": "item_reference", "id": "msg_1"}]},
            "input.0",
            "this server keeps none",
        ),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, None, "input_image"),
        ({"tools": [{"type": "web_search"}]}, "tools.0", "functions only"),
        ({"tools": [SOUND, SOUND]}, "tools", "twice"),
        ({"tool_choice": "required"}, "tool_choice", ""),
        ({"tools": [SOUND], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice", "x"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort", ""),
        (
            {"text": {"format": {"type": "json_object", "schema": {"type": "x"}}}},
            "text.format",
            "x",
        ),
        ({"n": 2}, "n", "no such parameter"),
        ({"model": "gpt-5"}, "model", "this server has 'tiny'"),
    ],
)
def test_mistakes(url: str, body: dict[str, Any], param: str | None, message: str) -> None:
    answer = post(f"{url}/responses", {"input": QUESTION, **body})
    assert answer.status_code in (400, 404), answer.text
    error = answer.json()["error"]
    assert message in error["message"] and (param is None or error["param"] == param), error


def test_neutral_fields(client: Any) -> None:
    """Clients send these to every server."""
    found = client.responses.create(
        model="tiny",
        input=[{"type": None, "role": "user", "content": QUESTION}],
        temperature=0,
        tools=[],
        moderation=None,
        context_management=None,
        prompt_cache_options=None,
        tool_choice="auto",
        parallel_tool_calls=None,
        previous_response_id=None,
        reasoning={"effort": None, "summary": "auto"},
        include=["reasoning.encrypted_content"],
        truncation="disabled",
        text={"verbosity": "medium"},
        service_tier="auto",
        max_tool_calls=3,
        prompt_cache_key="k",
        safety_identifier="u",
        stream_options=None,
        top_logprobs=None,
        store=None,
    )
    assert found.output_text == "The cow says moo."


def test_failures(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal by a guard, a failure in the middle of a stream, a client that hangs up."""
    monkeypatch.setattr(llama, "output_guard", lambda _, answer: Verdict("moo" not in answer))
    with serve(llama) as (url, service):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        found = client.responses.create(model="tiny", input=QUESTION, temperature=0)
        assert found.status == "incomplete" and "moo" not in found.output_text
        assert found.incomplete_details and found.incomplete_details.reason == "content_filter"
        monkeypatch.setattr(llama, "output_guard", lambda _, answer: 1 / 0)
        body = {"input": QUESTION, "temperature": 0}
        assert post(f"{url}/v1/responses", body).status_code == 500
        *_, last = client.responses.create(model="tiny", input=QUESTION, stream=True)
        assert last.type == "response.failed" and last.response.status == "failed"
        assert last.response.error and "guard failed" in last.response.error.message
        monkeypatch.setattr(llama, "output_guard", None)
        many = {"input": QUESTION, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/responses", json=many, timeout=60) as answer:
            next(answer.iter_lines())
        wait_until(lambda: not service.loop.n_active and not service.loop.n_waiting)
        assert service.loop.counts.generated_tokens < 900
