"""Fields that ask for nothing are answered; others are refused, or ignored with --lenient."""

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import torch
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params
from servers import post, serve

from llama import Llama
from llama.server import schemas
from llama.server.lenient import HEADER
from llama.server.schemas_chat import ChatRequest
from llama.server.schemas_responses import ResponsesRequest
from llama.server.schemas_sampling import RequestBody

U: Any = {"role": "user", "content": "What does the cow say?"}
MOO = "The cow says moo."
LEAST: dict[str, Any] = {
    "chat/completions": {"messages": [U], "temperature": 0},
    "completions": {"prompt": "The cow", "temperature": 0, "max_tokens": 4},
    "embeddings": {"input": "The cow"},
    "responses": {"input": U["content"], "temperature": 0},
}


def llama() -> Llama:
    return Llama.build(dtype=torch.float32, device="cpu", max_seq_len=512, max_batch_size=2)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serve(llama()) as (found, _):
        yield f"{found}/v1"


@pytest.fixture(scope="module")
def lenient_url() -> Iterator[str]:
    with serve(llama(), lenient=True) as (found, _):
        yield f"{found}/v1"


def content(answer: httpx.Response) -> Any:
    """An answer, without its name and time."""
    assert answer.status_code == 200, answer.text
    found = answer.json()
    kept = ("choices", "data", "output", "usage")
    for item in found.get("output", ()):
        item.pop("id")
    found.get("usage", {}).pop("prompt_tokens_details", None)  # the cache's
    found.get("usage", {}).pop("input_tokens_details", None)
    return {name: found[name] for name in kept if name in found}


@pytest.mark.parametrize(
    ("path", "params", "model"),
    [
        ("chat/completions", chat_create_params.CompletionCreateParamsBase, ChatRequest),
        (
            "completions",
            completion_create_params.CompletionCreateParamsBase,
            schemas.CompletionRequest,
        ),
        ("embeddings", embedding_create_params.EmbeddingCreateParams, schemas.EmbeddingRequest),
        ("responses", response_create_params.ResponseCreateParamsBase, ResponsesRequest),
    ],
)
def test_openai_s_fields_are_known(
    url: str, path: str, params: Any, model: type[RequestBody]
) -> None:
    """A field that OpenAI's own package sends is one that this server has never heard of."""
    names = set(params.__annotations__)
    assert len(names) > 4 and names <= set(model.model_fields)
    body = dict.fromkeys(names - {"max_tokens"}) | LEAST[path]  # where null lifts the limit
    assert content(post(f"{url}/{path}", body)) == content(post(f"{url}/{path}", LEAST[path]))


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        *(
            ("chat/completions", fields)
            for fields in (
                {"service_tier": "auto"},
                {"service_tier": "default", "store": False, "user": "Ann", "metadata": {"a": "b"}},
                {"modalities": ["text"], "audio": None, "prediction": None},
                {"modalities": [], "reasoning_effort": "none", "verbosity": "medium"},
                {"prompt_cache_key": "k", "safety_identifier": "u", "reasoning_effort": ""},
                {"prompt_cache_retention": "24h", "prompt_cache_options": {"mode": "implicit"}},
                {"stop": []},
                {"stop": ""},
                {"stream": False, "stream_options": {"include_usage": True}},
                {"stream_options": {"include_usage": None, "include_obfuscation": True}},
                {"logprobs": False, "top_logprobs": 0, "logit_bias": {}, "seed": None},
                {"max_tokens": 64.0, "model": ""},
                {"something_new": None},
                {"stop": [""], "tool_choice": "", "response_format": {}},
                {"max_tokens": 64, "max_completion_tokens": 64},
                {"messages": [{**U, "refusal": ""}]},
                {"messages": [{**U, "cache_control": {"type": "ephemeral"}, "new": None}]},
            )
        ),
        ("completions", {"best_of": 1, "stop": "", "stream_options": {}, "echo": None}),
        ("completions", {"best_of": 1, "n": 1, "logit_bias": {}, "service_tier": "auto"}),
        ("embeddings", {"encoding_format": None, "dimensions": None, "user": ""}),
        ("embeddings", {"encoding_format": ""}),
        ("responses", {"previous_response_id": "", "context_management": [], "store": True}),
        ("responses", {"conversation": {}, "tool_choice": ""}),
        ("responses", {"reasoning": {"effort": "none"}, "background": False, "metadata": {}}),
        ("responses", {"stream_options": {"include_obfuscation": False, "include_usage": True}}),
        ("responses", {"prompt_cache_options": {"mode": "implicit"}, "text": {}}),
    ],
)
def test_values_that_ask_for_nothing(url: str, path: str, fields: dict[str, Any]) -> None:
    """A client that sends all fields that it knows is refused, or gets another answer."""
    plain = content(post(f"{url}/{path}", LEAST[path]))
    assert content(post(f"{url}/{path}", LEAST[path] | fields)) == plain


def test_parts_of_messages(url: str) -> None:
    """A dialog that another library has written down is refused for what stands beside its text."""
    hint = {"cache_control": {"type": "ephemeral"}}
    question = {**U, "content": [{"type": "text", "text": U["content"], **hint}]}
    plain = post(f"{url}/chat/completions", LEAST["chat/completions"])
    asked = {"messages": [question], "temperature": 0}
    assert content(post(f"{url}/chat/completions", asked)) == content(plain)
    said = {"role": "assistant", "content": "Moo"}
    expected = None
    for beside in (
        {},
        {"reasoning_content": "hm", "reasoning": "hm", "reasoning_details": [{"type": "x"}]},
        {"thinking_blocks": [{"type": "thinking"}], "images": [], "audio": None, "citations": []},
        {"parsed": {"a": 1}, "refusal": None, "annotations": [], "prefix": False, "id": "x"},
        {"provider_specific_fields": {"refusal": None}, "tool_calls": [], "function_call": None},
        {"extra_content": {"google": 1}, "thinking": "hm", "executed_tools": [{"type": "x"}]},
        {"finish_reason": "stop", "additional_kwargs": {}},
        {"content": [{"type": "text", "text": "Moo", "annotations": []}]},
    ):
        body = {"messages": [U, {**said, **beside}, U], "temperature": 0}
        found = content(post(f"{url}/chat/completions", body))
        expected = expected or found
        assert found == expected, beside
    empty = [
        content(post(f"{url}/chat/completions", {"messages": [U, answer, U], "temperature": 0}))
        for answer in (
            {"role": "assistant", "content": ""},
            {"role": "assistant", "content": None},
            {"role": "assistant", "content": None, "tool_calls": []},
        )
    ]
    assert empty[0] == empty[1] == empty[2]


def test_calls_that_clients_send_back() -> None:
    """A call comes back as the package has parsed it, and its extras reach the chat template."""
    function = {"name": "f", "arguments": "{}", "parsed_arguments": {}}
    call = {"id": "1", "type": None, "function": function, "index": 0, "extra_content": {"x": 1}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    [_, found] = ChatRequest.model_validate({"messages": [U, message]}).dialog
    plain = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert found == {"role": "assistant", "content": None, "tool_calls": [plain]}


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("chat/completions", {"modalities": ["text", "audio"]}, "modalities"),
        ("chat/completions", {"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
        ("chat/completions", {"web_search_options": {}}, "web_search_options"),
        ("chat/completions", {"reasoning_effort": "high"}, "reasoning_effort"),
        ("chat/completions", {"messages": [{**U, "images": ["x"]}]}, "messages.0.images"),
        ("chat/completions", {"tempreature": 0.5}, "tempreature"),
        ("chat/completions", {"function_call": {"name": "f"}}, "function_call"),
        ("responses", {"background": True}, "background"),
        ("chat/completions", {"messages": [{**U, "contents": "x"}]}, "messages.0.contents"),
        ("responses", {"reasoning": {"effort": "low"}}, "reasoning.effort"),
        ("responses", {"moderation": {"model": "x"}}, "moderation"),
    ],
)
def test_values_that_ask_for_something(
    url: str, lenient_url: str, path: str, fields: dict[str, Any], param: str
) -> None:
    """An answer isn't what was asked for, and nobody is told; or --lenient doesn't ignore it."""
    answer = post(f"{url}/{path}", LEAST[path] | fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert ("--lenient" in error["message"]) or "no such parameter" in error["message"]
    assert HEADER not in answer.headers
    ignored = post(f"{lenient_url}/{path}", LEAST[path] | fields)
    assert content(ignored) == content(post(f"{lenient_url}/{path}", LEAST[path]))
    assert ignored.headers[HEADER] == param.rpartition(".")[2]


def test_state_is_never_ignored(lenient_url: str) -> None:
    """A lenient server answers a question without the dialog that it belongs to."""
    for name, value in (("previous_response_id", "resp_1"), ("conversation", "conv_1")):
        answer = post(f"{lenient_url}/responses", LEAST["responses"] | {name: value})
        assert answer.status_code == 400 and "keeps nothing" in answer.text
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    assert post(f"{lenient_url}/chat/completions", {"messages": [image]}).status_code == 400


def test_what_a_lenient_server_ignores(lenient_url: str) -> None:
    """The header tells of another request's fields, breaks the response, or has no end."""
    for _ in range(2):
        answer = post(f"{lenient_url}/chat/completions", LEAST["chat/completions"])
        assert answer.status_code == 200 and HEADER not in answer.headers
        fields = {
            "chat_id": 1,
            "messages": [{**U, "uuid": "x"}, {**U, "uuid": "y"}],
            "stream": True,
        }
        answer = post(f"{lenient_url}/chat/completions", fields)
        assert answer.headers[HEADER] == "chat_id, uuid" and "[DONE]" in answer.text
    fields = {"a\r\nSet-Cookie: b": 1, "\U0001f600": 1, "c" * 5000: 1}
    answer = post(f"{lenient_url}/completions", LEAST["completions"] | fields)
    assert answer.headers[HEADER] == f"a??Set-Cookie: b, ?, {'c' * 40}"
    many = {f"field{i}": 1 for i in range(90)}
    answer = post(f"{lenient_url}/completions", LEAST["completions"] | many)
    assert answer.headers[HEADER].count(",") == 19
    many = {f"field{i}": 1 for i in range(200)}
    assert post(f"{lenient_url}/completions", LEAST["completions"] | many).status_code == 400


def test_a_browser_may_read_the_header(lenient_url: str) -> None:
    """A web page of another origin can't see what was ignored."""
    with serve(llama(), lenient=True, cors="https://a.example") as (found, _):
        headers = {"Origin": "https://a.example"}
        answer = post(f"{found}/v1/completions", {**LEAST["completions"], "x": 1}, headers=headers)
        assert HEADER in answer.headers["access-control-expose-headers"]


def test_the_openai_package(url: str) -> None:
    """The package's own objects, sent back with all of their fields, are refused."""
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    sent: Any = {"model": "tiny", "temperature": 0, "service_tier": "auto", "modalities": ["text"]}
    first = client.chat.completions.create(messages=[U], **sent)
    messages = [U, first.choices[0].message.to_dict(), U]
    second = client.chat.completions.create(messages=messages, verbosity="low", **sent)
    assert first.choices[0].message.content == MOO and second.choices[0].message.content


def test_an_empty_suffix(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that fills in nothing refuses a client that sends all fields, empty ones too."""
    body = LEAST["completions"] | {"suffix": ""}
    with serve(llama()) as (found, service):
        plain = content(post(f"{found}/v1/completions", LEAST["completions"]))
        assert content(post(f"{found}/v1/completions", body)) != plain, "it fills in the middle"
        monkeypatch.setattr(service, "infills", False)
        assert content(post(f"{found}/v1/completions", body)) == plain
