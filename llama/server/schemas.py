"""Requests and responses of the API: https://platform.openai.com/docs/api-reference.

Unknown fields are refused, and so are values that this server doesn't support.
"""

from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_serializer,
    model_validator,
)

MAX_PROMPTS = 2048  # of a request; OpenAI's limit for embeddings
MAX_FIELDS = 100  # of an object


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _check_size(cls, value: Any) -> Any:
        # Pydantic would make an error for each unknown field, which blocks the server.
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            raise ValueError(f"expected up to {MAX_FIELDS} fields, found {len(value):,}")
        return value


def _check_number(value: Any) -> Any:
    if isinstance(value, list) and len(value) > MAX_PROMPTS and not isinstance(value[0], int):
        raise ValueError(f"expected up to {MAX_PROMPTS:,} prompts, found {len(value):,}")
    return value


# With fail_fast an invalid list makes one error, not one for each of a million elements.
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[str], Field(min_length=1, fail_fast=True)]
Prompt = Annotated[
    str | Texts | Ids | Annotated[list[Ids], Field(min_length=1, fail_fast=True)],
    BeforeValidator(_check_number),  # before each prompt is validated
]
Null = Annotated[None, Field(description="Only null.")]
Zero = Annotated[float, Field(ge=0, le=0)]


TEMPERATURE, TOP_P = 0.6, 0.9


class StreamOptions(_Request):
    include_usage: bool = Field(False, description="Send a last event with the usage.")


class _TextRequest(_Request):
    """The common part of all requests for text."""

    model: str | None = Field(None, description="The served model's id.")
    temperature: Annotated[float, Field(ge=0, le=100)] | None = Field(
        TEMPERATURE, description="0 takes the most probable token."
    )
    top_p: Annotated[float, Field(ge=0, le=1)] | None = TOP_P
    n: Annotated[int, Field(ge=1, le=16)] | None = Field(
        1, description="Number of answers to each prompt."
    )
    seed: int | None = Field(None, description="Makes sampling repeatable.")
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = Field(
        None, description="Texts that end an answer, up to 16, of up to 1,000 characters each."
    )
    stream: bool | None = Field(False, description="Send events as the text is generated.")
    stream_options: StreamOptions | None = None
    timeout: float | None = Field(
        None, gt=0, description="Seconds until the request is cancelled; an extension."
    )
    presence_penalty: Zero | None = Field(0, description="Only 0.")
    frequency_penalty: Zero | None = Field(0, description="Only 0.")
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = Field(
        None, description="Only empty."
    )
    user: str | None = Field(None, description="Ignored.")
    metadata: dict[str, str] | None = Field(None, description="Ignored.")
    store: Literal[False] | None = Field(None, description="Nothing is stored.")

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def sampling(self) -> dict[str, Any]:
        """Return arguments of ``SamplingParams``; null stands for the default."""
        return {
            "temperature": TEMPERATURE if self.temperature is None else self.temperature,
            "top_p": TOP_P if self.top_p is None else self.top_p,
            "stop": self.stops,
            "seed": self.seed,
        }

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: str | list[str] | None) -> str | list[str] | None:
        texts = [stop] if isinstance(stop, str) else stop or []
        if len(texts) > 16 or not all(0 < len(text) <= 1000 for text in texts):
            raise ValueError("expected up to 16 texts of 1 to 1,000 characters each")
        return stop

    @model_validator(mode="after")
    def _check_stream(self) -> "_TextRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for stream=true")
        return self


class CompletionRequest(_TextRequest):
    prompt: Prompt = Field("", description="Texts, or their token ids.")
    suffix: str | None = Field(
        None, description="Text after the middle to fill in, for a model trained for infilling."
    )
    max_tokens: int | None = Field(16, ge=0, description="null for as many as fit.")
    echo: bool | None = Field(False, description="Return the prompt too.")
    logprobs: int | None = Field(
        None,
        ge=0,
        le=20,
        description="Most probable tokens to return with each chosen one.",
    )
    best_of: Literal[1] | None = Field(None, description="Only 1.")

    @model_validator(mode="after")
    def _check_suffix(self) -> "CompletionRequest":
        if self.suffix is not None and not isinstance(self.prompt, str):
            raise ValueError("suffix goes with a prompt that is one text")
        if self.suffix is not None and self.echo:
            raise ValueError("echo doesn't go with suffix")
        return self


class TextPart(_Request):
    type: Literal["text"]
    text: str


class ChatMessage(_Request):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    name: str | None = Field(None, description="Ignored.")
    # OpenAI's package sends these back as part of an earlier answer.
    refusal: Null = None
    annotations: Null = None
    audio: Null = None
    function_call: Null = None
    tool_calls: Null = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ResponseFormat(_Request):
    type: Literal["text"]


class ChatRequest(_TextRequest):
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: int | None = Field(None, ge=1, description="As many as fit, if null.")
    max_tokens: int | None = Field(None, ge=1, description="The older name of the same.")
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20, description="With logprobs only.")
    response_format: ResponseFormat | None = Field(None, description="Only text.")

    @model_validator(mode="after")
    def _check_top(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs=true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are the same: give one")
        return self


class EmbeddingRequest(_Request):
    input: Prompt
    model: str | None = Field(None, description="The served model's id.")
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, description="Only the model's own number.")
    user: str | None = Field(None, description="Ignored.")


class PromptDetails(BaseModel):
    cached_tokens: int = Field(description="Tokens reused from the cache.")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


FinishReason = Literal["stop", "length", "content_filter"] | None


LogprobsT = TypeVar("LogprobsT")
ChoiceT = TypeVar("ChoiceT")


class _Choice(BaseModel, Generic[LogprobsT]):
    index: int
    logprobs: LogprobsT | None = None
    finish_reason: FinishReason = None


class _Answer(BaseModel, Generic[ChoiceT]):
    id: str
    object: str
    created: int
    model: str
    choices: list[ChoiceT]
    usage: Usage | None = None


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(_Choice[CompletionLogprobs]):
    text: str


class Completion(_Answer[CompletionChoice]):
    """An answer, or with ``stream`` the part of it in one event."""

    object: Literal["text_completion"] = "text_completion"


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class ChatAnswer(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: str | None = None


class ChatDelta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer
    def _without_nulls(self) -> dict[str, str]:
        return {name: value for name, value in self if value is not None}


class ChatChoice(_Choice[ChatLogprobs]):
    message: ChatAnswer


class ChatChunkChoice(_Choice[ChatLogprobs]):
    delta: ChatDelta


class ChatCompletion(_Answer[ChatChoice]):
    object: Literal["chat.completion"] = "chat.completion"


class ChatChunk(_Answer[ChatChunkChoice]):
    """The part of an answer in one event."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    object: Literal["list"] = "list"
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "llama"
    max_model_len: int = Field(description="Tokens of prompt and answer together.")


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok", "draining"]
    active: int = Field(description="Requests that have a slot of the cache.")
    waiting: int


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    error: ErrorBody

    @staticmethod
    def of(message: str, kind: str, param: str | None = None, code: str | None = None) -> Any:
        body = ErrorBody(message=message, type=kind, param=param, code=code)
        return ErrorAnswer(error=body).model_dump()
