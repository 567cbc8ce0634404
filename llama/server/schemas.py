"""Requests and responses of the API: https://platform.openai.com/docs/api-reference.

Unknown fields are refused, and so are values that this server doesn't support.
"""

from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from llama.server.schemas_sampling import RequestBody, ResponseFormat, SamplingFields, Whole

MAX_PROMPTS = 2048  # of a request; OpenAI's limit for embeddings


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


class StreamOptions(RequestBody):
    include_usage: bool = Field(False, description="Send a last event with the usage.")


class TextRequest(SamplingFields):
    """The common part of requests for text and for chat."""

    model: str | None = Field(None, description="The served model's id, or an adapter's.")
    n: Annotated[Whole, Field(ge=1, le=16)] | None = Field(
        1, description="Number of answers to each prompt."
    )
    response_format: ResponseFormat | None = Field(None, description="The form of the answer.")
    stream: bool | None = Field(False, description="Send events as the text is generated.")
    stream_options: StreamOptions | None = None
    timeout: float | None = Field(
        None, gt=0, description="Seconds until the request is cancelled; an extension."
    )
    user: str | None = Field(None, description="Ignored.")
    metadata: dict[str, str] | None = Field(None, description="Ignored.")
    store: Literal[False] | None = Field(None, description="Nothing is stored.")

    @property
    def generation(self) -> dict[str, Any]:
        """Return arguments of ``SamplingParams``: those that the request sets."""
        form = self.response_format
        return self.sampling | {"n": self.n or 1, "response_format": form and form.as_dict()}

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def _check_stream(self) -> "TextRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for stream=true")
        return self


class CompletionRequest(TextRequest):
    prompt: Prompt = Field("", description="Texts, or their token ids.")
    suffix: str | None = Field(
        None, description="Text after the middle to fill in, for a model trained for infilling."
    )
    max_tokens: Annotated[Whole, Field(ge=0)] | None = Field(
        16, description="null for as many as fit."
    )
    echo: bool | None = Field(False, description="Return the prompt too.")
    logprobs: int | None = Field(
        None,
        ge=0,
        le=20,
        description="Most probable tokens to return with each chosen one.",
    )
    best_of: Literal[1] | None = Field(None, description="Only 1.")
    parse_special: bool | None = Field(
        None,
        description="Control pieces' spellings in the prompt, such as <PRE>, are the pieces; by "
        "default if the server is started with --parse_special.",
    )

    @model_validator(mode="after")
    def _check_suffix(self) -> "CompletionRequest":
        if self.suffix is not None and not isinstance(self.prompt, str):
            raise ValueError("suffix goes with a prompt that is one text")
        if self.suffix is not None and self.echo:
            raise ValueError("echo doesn't go with suffix")
        if self.suffix is not None and self.parse_special:
            raise ValueError("parse_special doesn't go with suffix, which stays text")
        return self


class EmbeddingRequest(RequestBody):
    input: Prompt
    model: str | None = Field(None, description="The served model's id, or an adapter's.")
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


FinishReason = Literal["stop", "length", "content_filter", "tool_calls"] | None


LogprobsT = TypeVar("LogprobsT")
ChoiceT = TypeVar("ChoiceT")


class Choice(BaseModel, Generic[LogprobsT]):
    index: int
    logprobs: LogprobsT | None = None
    finish_reason: FinishReason = None
    stop_reason: str | int | None = Field(
        default=None, description="The text or the token id of the request that ended the answer."
    )


class Answer(BaseModel, Generic[ChoiceT]):
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


class CompletionChoice(Choice[CompletionLogprobs]):
    text: str


class Completion(Answer[CompletionChoice]):
    """An answer, or with ``stream`` the part of it in one event."""

    object: Literal["text_completion"] = "text_completion"


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
    root: str = Field(description="The name of its file or directory, without the path.")
    parent: str | None = Field(None, description="Of an adapter the model that it changes.")
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
