"""Requests and responses of /v1/chat/completions: messages, tools, answers."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    Field,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from llama.chat.options import ChatOptions
from llama.chat.prompts import Message
from llama.server.lenient import Unsupported, ignore
from llama.server.schemas import Answer, Choice, LastTokens, TextRequest
from llama.server.schemas_ignored import CacheHints, EchoedFields, Ignored
from llama.server.schemas_sampling import (
    Bounded,
    Dialog,
    EmptyAsNull,
    Null,
    RequestBody,
    Schema,
    Whole,
)

MAX_TOOLS = 128  # OpenAI's limit
MAX_TOP_LOGPROBS = 20
_DEFAULT_NAME = "function_call"  # of a call in the older form, which has no id


class TextPart(CacheHints):
    type: Literal["text"]
    text: str
    annotations: Any = Ignored


class RefusalPart(CacheHints):
    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


class Called(RequestBody):
    name: str
    arguments: str = Field(description="JSON.")
    parsed_arguments: Any = Ignored
    provider_specific_fields: Any = Ignored


class ToolCall(RequestBody):
    id: str
    type: Literal["function"] = "function"
    function: Called
    index: int | None = Field(default=None, description="Ignored: streams have it.")
    provider_specific_fields: Any = Ignored
    extra_content: Any = Ignored

    def as_call(self) -> dict[str, Any]:
        """Return the call as a message has it."""
        function = {"name": self.function.name, "arguments": self.function.arguments}
        return {"id": self.id, "type": self.type, "function": function}


Part = Annotated[TextPart | RefusalPart, Field(discriminator="type")]


class ChatMessage(EchoedFields):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = Field(
        None, description="null of the assistant's messages only."
    )
    name: str | None = Field(None, description="Of the tool whose result this is.")
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True), Bounded] | None = None
    tool_call_id: str | None = Field(None, description="Of the call whose result this is.")
    function_call: Called | None = Field(None, description="The older form of tool_calls.")
    refusal: str | None = Field(None, description="Stands for a missing content.")

    @model_validator(mode="after")
    def _check_kind(self) -> "ChatMessage":
        if self.role != "assistant" and self.calls:
            raise ValueError(f"tool_calls are the assistant's: this message is by {self.role!r}")
        if self.role != "assistant" and self.refusal:
            raise ValueError(f"a refusal is the assistant's: this message is by {self.role!r}")
        if self.content is None and self.role != "assistant":
            raise ValueError("content is missing: only the assistant's messages need none")
        return self

    @property
    def calls(self) -> list[ToolCall]:
        if self.function_call is not None:
            return [ToolCall(id=_DEFAULT_NAME, function=self.function_call)]
        return self.tool_calls or []

    @property
    def text(self) -> str | None:
        if self.content is None:
            return self.refusal if self.calls else self.refusal or ""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)

    def as_message(self) -> Message:
        """Return the message as ``Llama.chat_completion`` takes it."""
        roles = {"developer": "system", "function": "tool"}
        message: dict[str, Any] = {"role": roles.get(self.role, self.role), "content": self.text}
        if self.calls:
            message["tool_calls"] = [call.as_call() for call in self.calls]
        if message["role"] == "tool":
            call = self.tool_call_id or (_DEFAULT_NAME if self.role == "function" else None)
            found = {"tool_call_id": call, "name": self.name}
            message |= {key: value for key, value in found.items() if value is not None}
        return message  # type: ignore[return-value]


class Function(RequestBody):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: Schema | None = Field(None, description="A JSON Schema; null for no arguments.")
    strict: bool | None = Field(None, description="Hold the arguments to their schema.")

    def as_tool(self) -> dict[str, Any]:
        """Return a tool as ``ChatOptions`` takes it."""
        found = {
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters,
            "strict": self.strict,
        }
        function = {name: value for name, value in found.items() if value is not None}
        return {"type": "function", "function": function}


class Tool(CacheHints):
    type: Literal["function"]
    function: Function


class Named(RequestBody):
    name: str


class NamedTool(RequestBody):
    type: Literal["function"]
    function: Named


Tools = Field(min_length=0, max_length=MAX_TOOLS, fail_fast=True)
Choices = Literal["auto", "none", "required"]


def tool_options(
    functions: Sequence[Function], choice: str | None, parallel: bool | None = None
) -> dict[str, Any]:
    """Return arguments of ``ChatOptions``: the functions that an answer may call.

    Args:
        choice: "auto", "none", "required" or a function's name.

    Raises:
        ValueError: two functions have the same name, or the choice can't be made.
    """
    # A named function is called once, as OpenAI's models do; and a small model that has to make a
    # call and may make more repeats it without end.
    may_repeat = choice in (None, "auto") or (choice == "required" and parallel is True)
    chosen = {
        "tools": [function.as_tool() for function in functions],
        "tool_choice": choice,
        "parallel_tool_calls": parallel is not False and may_repeat,
    }
    return chosen if ChatOptions(**chosen).offered else {}  # type: ignore[arg-type]


class ChatRequest(TextRequest):
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True), Dialog]
    max_completion_tokens: Annotated[Whole, Field(ge=1)] | None = Field(
        None, description="As many as fit, if null."
    )
    max_tokens: Annotated[Whole, Field(ge=1)] | None = Field(
        None, description="The older name of the same."
    )
    logprobs: bool | None = False
    top_logprobs: Annotated[Whole, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = Field(
        None, description="With logprobs only."
    )
    tools: Annotated[list[Tool], Tools] | None = Field(
        None, description="Functions that the answer may call."
    )
    tool_choice: Annotated[Choices | NamedTool | None, EmptyAsNull] = None
    parallel_tool_calls: bool | None = Field(
        None, description="Several calls in one answer; by default where none is required."
    )
    functions: Annotated[list[Any], Field(max_length=0)] | None = Field(
        None, description="Only empty: the older name of tools."
    )
    function_call: Annotated[Literal["none", "auto"] | None, Unsupported] = Field(
        None, description="The older name of tool_choice, which asks for nothing here."
    )
    audio: Null = None
    modalities: Annotated[
        Annotated[list[Literal["text"]], Field(fail_fast=True)] | None, Unsupported
    ] = Field(None, description="Only text.")
    moderation: Null = None
    prediction: dict[str, Any] | None = Field(
        None, description="Ignored: this server drafts from what it has read."
    )
    reasoning_effort: Annotated[Literal["none"] | None, Unsupported] = Field(
        None, description="Only none."
    )
    verbosity: str | None = Ignored
    web_search_options: Null = None
    continue_final_message: bool | None = Field(
        None, description="Continue the last message, by default if it is the assistant's."
    )
    add_generation_prompt: bool | None = Field(
        None, description="The opposite of continue_final_message."
    )
    truncate_prompt_tokens: LastTokens = None

    @field_validator("tools")
    @classmethod
    def _check_tools(cls, tools: list[Tool] | None) -> list[Tool] | None:
        tool_options([tool.function for tool in tools or ()], None)
        return tools

    @field_validator("tool_choice")
    @classmethod
    def _check_choice(cls, choice: Any, info: ValidationInfo) -> Any:
        if "tools" in info.data:  # otherwise they are wrong already
            tool_options([tool.function for tool in info.data["tools"] or ()], _name(choice))
        return choice

    @field_validator("functions", mode="before")
    @classmethod
    def _check_functions(cls, functions: Any) -> Any:
        if functions and not ignore("functions"):
            raise ValueError("functions is the older name: send them as tools")
        return None

    @model_validator(mode="after")
    def _check_top(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs=true")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ValueError("max_tokens and max_completion_tokens are the same: give one")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        if self.continues and self.messages[-1].role != "assistant":
            raise ValueError("continue_final_message needs the assistant's message as the last one")
        return self

    @property
    def continues(self) -> bool:
        """True if the last message is to be continued."""
        if self.continue_final_message is not None:
            return self.continue_final_message
        last = self.messages[-1]
        return (
            last.role == "assistant" and not last.calls and self.add_generation_prompt is not True
        )

    @property
    def dialog(self) -> list[Message]:
        return [message.as_message() for message in self.messages]

    @property
    def options(self) -> dict[str, Any]:
        """Return arguments of ``ChatOptions``."""
        functions = [tool.function for tool in self.tools or ()]
        tools = tool_options(functions, _name(self.tool_choice), self.parallel_tool_calls)
        return tools | {"continue_final_message": self.continues}


def _name(choice: str | NamedTool | None) -> str | None:
    return choice.function.name if isinstance(choice, NamedTool) else choice


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class _WithoutNulls(BaseModel):
    @model_serializer
    def _without_nulls(self) -> dict[str, Any]:
        return {name: value for name, value in self if value is not None}


class AnsweredFunction(BaseModel):
    name: str
    arguments: str


class AnsweredCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: AnsweredFunction


class ChatAnswer(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: str | None = None
    tool_calls: list[AnsweredCall] | None = None

    @model_serializer
    def _without_calls(self) -> dict[str, Any]:
        return {k: v for k, v in self if k != "tool_calls" or v is not None}


class FunctionDelta(_WithoutNulls):
    name: str | None = None
    arguments: str = ""


class CallDelta(_WithoutNulls):
    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class ChatDelta(_WithoutNulls):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[CallDelta] | None = None


class ChatChoice(Choice[ChatLogprobs]):
    message: ChatAnswer


class ChatChunkChoice(Choice[ChatLogprobs]):
    delta: ChatDelta


class ChatCompletion(Answer[ChatChoice]):
    object: Literal["chat.completion"] = "chat.completion"


class ChatChunk(Answer[ChatChunkChoice]):
    """The part of an answer in one event."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
