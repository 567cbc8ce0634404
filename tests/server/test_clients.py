"""Tools and structured answers through the packages that people use, with the embedded model.

Grammars hold its calls and answers to their schemas, whatever it prefers to write.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import openai
import pytest
import torch
from pydantic import BaseModel, ConfigDict, Field
from servers import serve

from llama import Llama

pytest.importorskip("llguidance", reason="needs llguidance")

COW = [{"role": "user", "content": "What does the cow say?"}]
SOUND = {
    "name": "sound",
    "description": "The sound of an animal",
    "parameters": {
        "type": "object",
        "properties": {"animal": {"enum": ["cow", "bee"]}, "loud": {"type": "boolean"}},
        "required": ["animal", "loud"],
        "additionalProperties": False,
    },
}
TOOLS: Any = [{"type": "function", "function": SOUND}]


class Animal(BaseModel):
    """An animal of the farm."""

    model_config = ConfigDict(extra="forbid")  # else the model makes up more and more fields

    name: Literal["cow", "bee"]
    legs: Annotated[int, Field(ge=2, le=6)]
    sounds: list[Literal["moo", "buzz"]] = Field(max_length=2)


class Sound(BaseModel):
    """The sound of an animal"""

    animal: Literal["cow", "bee"]
    loud: bool


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    llama = Llama.build(
        dtype=torch.float32,
        device="cpu",
        max_seq_len=2048,
        max_batch_size=4,
        tool_format="hermes",
    )
    with serve(llama) as (found, _):
        yield f"{found}/v1"


@pytest.fixture(scope="module")
def client(url: str) -> Any:
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


def _check(call: Any) -> None:
    assert call.type == "function" and call.function.name == "sound" and call.id
    assert Sound.model_validate_json(call.function.arguments)


def test_openai_tools(client: Any) -> None:
    """A forced call, its result sent back, and the choices that offer none."""
    create, choice = client.chat.completions.create, {"type": "function"}
    settings = {"model": "tiny", "messages": COW, "tools": TOOLS, "temperature": 0}
    for forced in ("required", {**choice, "function": {"name": "sound"}}):
        found = create(tool_choice=forced, parallel_tool_calls=False, **settings).choices[0]
        assert found.finish_reason == "tool_calls"
        assert found.message.content is None
        [call] = found.message.tool_calls
        _check(call)
    result = {"role": "tool", "tool_call_id": call.id, "content": "moo"}
    answer = create(**{**settings, "messages": [*COW, found.message, result]}, max_tokens=20)
    assert answer.choices[0].message.content and answer.choices[0].message.tool_calls is None
    plain = create(model="tiny", messages=COW, temperature=0).choices[0].message.content
    for none in ({"tool_choice": "none"}, {"tools": []}, {"tools": None}):
        answer = create(**{**settings, **none})
        assert answer.choices[0].message.content == plain
        assert answer.choices[0].finish_reason == "stop"


def test_openai_streamed_tools(client: Any) -> None:
    """A call begins with its id and name; its arguments follow in pieces; the end is its own."""
    settings = {"model": "tiny", "messages": COW, "tools": TOOLS, "temperature": 0}
    settings |= {"tool_choice": "required", "parallel_tool_calls": False, "n": 2, "logprobs": True}
    chunks = list(client.chat.completions.create(stream=True, **settings))
    for number in range(2):
        choices = [c.choices[0] for c in chunks if c.choices[0].index == number]
        assert choices[0].delta.role == "assistant" and choices[0].delta.content is None
        calls = [choice.delta.tool_calls[0] for choice in choices[1:-1]]
        assert calls[0].id and calls[0].function.name == "sound"
        assert calls[0].function.arguments == ""
        assert all(call.id is None and call.function.name is None for call in calls[1:])
        assert len(calls) > 4, "the arguments didn't come in pieces"
        Sound.model_validate_json("".join(call.function.arguments for call in calls))
        assert choices[-1].finish_reason == "tool_calls" and not choices[-1].delta.tool_calls
        scored = [t.token for c in choices if c.logprobs for t in c.logprobs.content]
        assert "<tool_call>" in "".join(scored), "the scores aren't of all tokens"
    with client.chat.completions.stream(**{**settings, "n": 1, "logprobs": False}) as stream:
        final = stream.get_final_completion()
    _check(final.choices[0].message.tool_calls[0])


def test_openai_parses_a_model(client: Any) -> None:
    parse = client.chat.completions.parse
    found = parse(model="tiny", messages=COW, response_format=Animal, temperature=0.8)
    assert isinstance(found.choices[0].message.parsed, Animal)
    tool = openai.pydantic_function_tool(Sound)
    found = parse(model="tiny", messages=COW, tools=[tool], tool_choice="required")
    assert isinstance(found.choices[0].message.tool_calls[0].function.parsed_arguments, Sound)


def test_openai_completions(client: Any) -> None:
    """The older endpoint with every field that the package has for it, and others beside."""
    found = client.completions.create(
        model="tiny",
        prompt=["The cow", "Once upon a time"],
        best_of=None,
        echo=True,
        frequency_penalty=0.5,
        logit_bias={"50": -100},
        logprobs=2,
        max_tokens=8,
        n=2,
        presence_penalty=0.5,
        seed=1,
        stop=["\n"],
        stream=False,
        suffix=None,
        temperature=0.8,
        top_p=0.9,
        user="Ann",
        extra_body={"top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1, "min_tokens": 2},
    )
    assert [choice.text[:7] for choice in found.choices] == ["The cow"] * 2 + ["Once up"] * 2
    assert found.usage.completion_tokens <= 32 and found.choices[0].logprobs.tokens


def test_langchain(url: str) -> None:
    pytest.importorskip("langchain_openai", reason="needs langchain-openai")
    from langchain_core.messages import ToolMessage
    from langchain_openai import ChatOpenAI

    for responses in (False, True):
        model = ChatOpenAI(
            base_url=url,
            api_key="none",
            model="tiny",
            temperature=0,
            use_responses_api=responses,
        )
        bound = model.bind_tools([Sound], tool_choice="any", parallel_tool_calls=False)
        answer = bound.invoke("What does the cow say?")
        [call] = answer.tool_calls
        assert call["name"] == "Sound" and Sound(**call["args"])
        streamed = list(bound.stream("What does the cow say?"))
        whole = streamed[0]
        for chunk in streamed[1:]:
            whole += chunk
        assert whole.tool_calls[0]["args"] == call["args"] and len(streamed) > 4
        result = ToolMessage("moo", tool_call_id=call["id"])
        again = model.bind_tools([Sound]).invoke([("human", "Hello"), answer, result])
        assert again.content
        for method in ("json_schema", "function_calling"):
            structured = model.with_structured_output(Animal, method=method)
            assert isinstance(structured.invoke("Name an animal."), Animal)


def test_instructor(client: Any) -> None:
    instructor = pytest.importorskip("instructor", reason="needs instructor")
    for mode in ("TOOLS", "TOOLS_STRICT", "JSON_SCHEMA"):
        patched = instructor.from_openai(client, mode=getattr(instructor.Mode, mode))
        settings = {"model": "tiny", "messages": COW, "response_model": Animal, "temperature": 0}
        found = patched.chat.completions.create(max_retries=0, **settings)
        assert isinstance(found, Animal), mode
        *_, last = patched.chat.completions.create_partial(**settings)
        assert Animal.model_validate(last.model_dump()), mode


def test_pydantic_ai(url: str) -> None:
    pytest.importorskip("pydantic_ai", reason="needs pydantic-ai")
    from pydantic_ai import Agent, NativeOutput, ToolOutput
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=url, api_key="none")
    for model in (OpenAIChatModel, OpenAIResponsesModel):
        for output in (ToolOutput(Animal), NativeOutput(Animal)):
            agent = Agent(
                model("tiny", provider=provider),
                output_type=output,
                system_prompt=("Be brief.", "Be kind."),
                model_settings={"temperature": 0, "max_tokens": 200},
            )
            found = agent.run_sync("Name an animal.")
            assert isinstance(found.output, Animal)
            more = agent.run_sync("And another one.", message_history=found.all_messages())
            assert isinstance(more.output, Animal)


def test_openai_agents(url: str) -> None:
    """In this environment, or in one that LLAMA_AGENTS_PYTHON names."""
    here = sys.executable if importlib.util.find_spec("agents") else None
    python = os.environ.get("LLAMA_AGENTS_PYTHON", here)
    if not python:
        pytest.skip("needs openai-agents here, or its Python in LLAMA_AGENTS_PYTHON")
    script = Path(__file__).parent / "agents_client.py"
    done = subprocess.run([python, str(script), url], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("answers with a model") == 2


@pytest.fixture(scope="module")
def smollm2() -> Iterator[str]:
    path = os.environ.get("LLAMA_SMOLLM2")
    if not path:
        pytest.skip("LLAMA_SMOLLM2 is not set")
    how = {"device": "cpu", "max_seq_len": 2048, "max_batch_size": 2, "tool_format": "hermes"}
    llama = Llama.build(path, quantize="none", **how)  # loaded in half the time
    with serve(llama) as (found, _):
        yield f"{found}/v1"


class Person(BaseModel):
    """A person"""

    name: str
    age: int
    city: str


def test_a_real_model(smollm2: str) -> None:
    """SmolLM2 picks the right function, fills in what was said, and reads a result."""
    client = openai.OpenAI(base_url=smollm2, api_key="none", max_retries=0)
    number = {"type": "integer"}
    schemas = {"add": {"a": number, "b": number}, "get_weather": {"city": {"type": "string"}}}
    tools: Any = [
        openai_tool(name, description, schemas[name])
        for name, description in (
            ("get_weather", "Get the current weather of a city"),
            ("add", "Add two numbers"),
        )
    ]
    for question, name, arguments in (
        ("What is the weather in Paris?", "get_weather", {"city": "Paris"}),
        ("What is 12 plus 30?", "add", {"a": 12, "b": 30}),
    ):
        asked = [{"role": "user", "content": question}]
        found = client.chat.completions.create(
            model="tiny", messages=asked, tools=tools, tool_choice="required", temperature=0
        )  # type: ignore[call-overload]
        [call] = found.choices[0].message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == (name, arguments)
    text = "Anna is 31 years old and lives in Rome."
    parsed = client.responses.parse(model="tiny", input=text, text_format=Person, temperature=0)
    assert parsed.output_parsed == Person(name="Anna", age=31, city="Rome")


def openai_tool(name: str, description: str, properties: dict[str, Any]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


def test_an_agent_of_pydantic_ai(smollm2: str) -> None:
    """It calls a tool, reads its result, and answers with a model."""
    pytest.importorskip("pydantic_ai", reason="needs pydantic-ai")
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=smollm2, api_key="none")
    agent = Agent(
        OpenAIChatModel("tiny", provider=provider),
        output_type=Person,
        model_settings={"temperature": 0, "max_tokens": 200},
    )
    found = agent.run_sync("Anna is 31 years old and lives in Rome.")
    assert found.output == Person(name="Anna", age=31, city="Rome")
