"""Requests and responses of /v1/responses, which keeps nothing between requests."""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
)

from llama.chat.prompts import Message
from llama.errors import short
from llama.server.lenient import Unsupported
from llama.server.schemas_chat import Choices, Function, TokenLogprob, Tools, tool_options
from llama.server.schemas_ignored import Ignored, IgnoredFields
from llama.server.schemas_sampling import (
    NOTHING,
    Bounded,
    ChoiceFormat,
    Dialog,
    EmptyAsNull,
    GrammarFormat,
    JsonObjectFormat,
    NamedSchema,
    Null,
    RegexFormat,
    RequestBody,
    SamplingFields,
    TextFormat,
    Whole,
)


class _Item(BaseModel):
    """A part of the input; clients send items of earlier answers back with all their fields."""

    model_config = ConfigDict(extra="ignore", strict=True)


class InputText(_Item):
    type: Literal["input_text", "output_text", "text"]
    text: str


class InputRefusal(_Item):
    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


Content = (
    str
    | Annotated[
        list[Annotated[InputText | InputRefusal, Field(discriminator="type")]],
        Field(fail_fast=True),
    ]
)


class InputMessage(_Item):
    type: Literal["message"] | None = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class InputCall(_Item):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class InputResult(_Item):
    type: Literal["function_call_output"]
    call_id: str
    output: Content


class InputReasoning(_Item):
    type: Literal["reasoning"]


def _kind(item: Any) -> Any:
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return kind or "message"


Item = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputResult, Tag("function_call_output")]
    | Annotated[InputReasoning, Tag("reasoning")],
    Discriminator(
        _kind,
        custom_error_type="item",
        custom_error_message="expected an item of the type message, function_call, "
        "function_call_output or reasoning, sent whole: this server keeps none",
    ),
]


def _check_kind(tool: Any) -> Any:
    if isinstance(tool, dict) and tool.get("type") != "function":
        raise ValueError(f"answers call functions only, not {short(tool.get('type'))}")
    return tool


class FlatTool(Function):
    type: Literal["function"]
    defer_loading: Annotated[Literal[False] | None, Unsupported] = Field(
        None, description="Only false."
    )
    allowed_callers: Null = None
    output_schema: dict[str, Any] | None = Field(None, description="Ignored.")


class FlatNamedTool(RequestBody):
    type: Literal["function"]
    name: str


class FlatSchemaFormat(NamedSchema):
    type: Literal["json_schema"]

    def as_dict(self) -> dict[str, Any] | None:
        return {"type": "json_schema", "json_schema": {"schema": self.schema_}}


class TextConfig(RequestBody):
    format: (
        Annotated[
            TextFormat
            | JsonObjectFormat
            | FlatSchemaFormat
            | RegexFormat
            | ChoiceFormat
            | GrammarFormat,
            Field(discriminator="type"),
        ]
        | None
    ) = Field(None, description="The form of the answer.")
    verbosity: str | None = Ignored


class ReasoningConfig(RequestBody):
    effort: Annotated[Literal["none"] | None, Unsupported] = Field(None, description="Only none.")
    summary: str | None = Ignored
    generate_summary: str | None = Ignored


class ResponseStreamOptions(RequestBody):
    include_obfuscation: bool | None = Ignored
    include_usage: bool | None = Field(None, description="Ignored: the last event always has it.")


class ResponsesRequest(SamplingFields, IgnoredFields):
    model: str | None = Field(None, description="The served model's id, or an adapter's.")
    input: Annotated[str | Annotated[list[Item], Field(min_length=1, fail_fast=True)], Dialog]
    instructions: str | None = Field(None, description="A first system message.")
    max_output_tokens: Annotated[Whole, Field(ge=1)] | None = Field(
        None, description="As many as fit, if null."
    )
    text: TextConfig | None = None
    tools: Annotated[list[Annotated[FlatTool, BeforeValidator(_check_kind)]], Tools] | None = Field(
        None, description="Functions that the answer may call."
    )
    tool_choice: Annotated[Choices | FlatNamedTool | None, EmptyAsNull] = None
    parallel_tool_calls: bool | None = Field(
        None, description="Several calls in one answer; by default where none is required."
    )
    stream: bool | None = Field(False, description="Send events as the text is generated.")
    stream_options: ResponseStreamOptions | None = None
    include: Annotated[list[str], Field(fail_fast=True), Bounded] | None = Field(
        None, description="message.output_text.logprobs for log-probabilities; others are ignored."
    )
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = Field(
        None, description="With the log-probabilities that include asks for."
    )
    timeout: float | None = Field(
        None, gt=0, description="Seconds until the request is cancelled; an extension."
    )
    previous_response_id: Null = None
    conversation: Null = None
    prompt: Null = None
    moderation: Null = None
    context_management: Null = None
    background: Annotated[Literal[False] | None, Unsupported] = Field(
        None, description="Only false."
    )
    metadata: dict[str, str] | None = Field(None, description="Returned.")
    reasoning: ReasoningConfig | None = None
    truncation: Literal["auto", "disabled"] | None = Field(
        None, description="Nothing is cut off: too long an input is an error."
    )
    max_tool_calls: Whole | None = Field(None, description="Ignored: it is for built-in tools.")

    @field_validator("input")
    @classmethod
    def _check_input(cls, items: str | list[Any]) -> str | list[Any]:
        if not isinstance(items, str) and all(isinstance(item, InputReasoning) for item in items):
            raise ValueError("there is no message: reasoning is left out")
        return items

    @field_validator("previous_response_id", "conversation", "prompt", mode="before")
    @classmethod
    def _check_state(cls, value: Any) -> Any:
        if value is not None and value not in NOTHING:
            raise ValueError("this server keeps nothing between requests: send all of the input")
        return None

    @field_validator("tools")
    @classmethod
    def _check_tools(cls, tools: list[FlatTool] | None) -> list[FlatTool] | None:
        tool_options(tools or (), None)
        return tools

    @field_validator("tool_choice")
    @classmethod
    def _check_choice(cls, choice: Any, info: ValidationInfo) -> Any:
        if "tools" in info.data:  # otherwise they are wrong already
            tool_options(info.data["tools"] or (), _name(choice))
        return choice

    @property
    def wants_logprobs(self) -> bool:
        return "message.output_text.logprobs" in (self.include or ())

    @property
    def generation(self) -> dict[str, Any]:
        """Return arguments of ``SamplingParams``: those that the request sets."""
        form = self.text.format if self.text else None
        return self.sampling | {
            "max_gen_len": self.max_output_tokens,
            "response_format": form and form.as_dict(),
            "logprobs": self.wants_logprobs,
            "top_logprobs": (self.top_logprobs or 0) * self.wants_logprobs,
        }

    @property
    def options(self) -> dict[str, Any]:
        """Return arguments of ``ChatOptions``."""
        choice = _name(self.tool_choice)
        tools = tool_options(self.tools or (), choice, self.parallel_tool_calls)
        last = self.dialog[-1]
        continues = last["role"] == "assistant" and not last.get("tool_calls")
        return tools | {"continue_final_message": continues}

    @property
    def dialog(self) -> list[Message]:
        """Return the messages that the items are; calls in a row are one message."""
        messages: list[Any] = []
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        items = [self.input] if isinstance(self.input, str) else self.input
        for item in items:
            if isinstance(item, str):
                messages.append({"role": "user", "content": item})
            elif isinstance(item, InputMessage):
                role = "system" if item.role == "developer" else item.role
                messages.append({"role": role, "content": _text(item.content)})
            elif isinstance(item, InputCall):
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": None})
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                messages[-1].setdefault("tool_calls", []).append(call)
            elif isinstance(item, InputResult):
                result = {"tool_call_id": item.call_id, "content": _text(item.output)}
                messages.append({"role": "tool", **result})
        return messages


def _name(choice: str | FlatNamedTool | None) -> str | None:
    return choice.name if isinstance(choice, FlatNamedTool) else choice


def _text(content: Content) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


class OutputText(BaseModel):
    type: Literal["output_text"] = "output_text"
    text: str = ""
    annotations: list[Any] = []
    logprobs: list[TokenLogprob] = []


Status = Literal["in_progress", "completed", "incomplete"]


class OutputMessage(BaseModel):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: Status = "in_progress"
    content: list[OutputText] = []


class OutputCall(BaseModel):
    id: str
    type: Literal["function_call"] = "function_call"
    call_id: str
    name: str
    arguments: str = ""
    status: Status = "in_progress"


class InputDetails(BaseModel):
    cached_tokens: int = Field(description="Tokens reused from the cache.")
    cache_write_tokens: int


class OutputDetails(BaseModel):
    reasoning_tokens: int = 0


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails = OutputDetails()
    total_tokens: int


class ResponseFailure(BaseModel):
    code: Literal["server_error"] = "server_error"
    message: str


class IncompleteDetails(BaseModel):
    reason: Literal["max_output_tokens", "content_filter"]


class ModelResponse(BaseModel):
    """An answer; its first fields are those that a stream changes."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Literal["in_progress", "completed", "incomplete", "failed"] = "in_progress"
    output: list[OutputMessage | OutputCall] = []
    usage: ResponseUsage | None = None
    error: ResponseFailure | None = None
    incomplete_details: IncompleteDetails | None = None
    model: str
    instructions: str | None
    max_output_tokens: int | None
    temperature: float | None
    top_p: float | None
    text: dict[str, Any]
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    metadata: dict[str, str]
    top_logprobs: int
    truncation: Literal["disabled"] = "disabled"
    background: Literal[False] = False
    store: Literal[False] = False
    previous_response_id: None = None
    reasoning: dict[str, None] = {"effort": None, "summary": None}
    user: str | None


class ResponseEvent(BaseModel):
    """An event of a stream: it has the fields of OpenAI's event of the same type."""

    model_config = ConfigDict(extra="allow")

    type: str
    sequence_number: int
