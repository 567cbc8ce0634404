"""Requests and responses of the API: https://platform.openai.com/docs/api-reference.

Unknown fields are refused, and so are values that this server doesn't support, except with
--lenient (see ``llama.server.lenient``).
"""

from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from llama.server.schemas_ignored import Ignored, IgnoredFields
from llama.server.schemas_sampling import (
    EmptyAsNull,
    RequestBody,
    ResponseFormat,
    SamplingFields,
    Whole,
)

MAX_PROMPTS = 2048  # of a request; OpenAI's limit for embeddings


def _check_number(value: Any) -> Any:
    if isinstance(value, list) and len(value) > MAX_PROMPTS and not isinstance(value[0], int):
        raise ValueError(f"expected up to {MAX_PROMPTS:,} prompts, found {len(value):,}")
    return value


def _check_last(n: int) -> int:
    if n == 0:
        raise ValueError("a prompt needs a token: expected 1 or more, or -1 for as many as fit")
    return n


# With fail_fast an invalid list makes one error, not one for each of a million elements.
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[str], Field(min_length=1, fail_fast=True)]
Prompt = Annotated[
    str | Texts | Ids | Annotated[list[Ids], Field(min_length=1, fail_fast=True)],
    BeforeValidator(_check_number),  # before each prompt is validated
]


ModelName: Any = Field(None, description="The served model's id or alias, or an adapter's id.")
TokenLimit = Annotated[Whole, Field(ge=-1), AfterValidator(_check_last)]
LastTokens = Annotated[
    TokenLimit | None,
    Field(
        description="Keep this many tokens at the prompt's end; -1 for as many as fit, with room "
        "for max_tokens, of at most a quarter of max_model_len."
    ),
]


class StreamOptions(RequestBody):
    include_usage: bool = Field(False, description="Send a last event with the usage.")
    include_obfuscation: bool | None = Ignored


class TextRequest(SamplingFields, IgnoredFields):
    """The common part of requests for text and for chat."""

    model: str | None = ModelName
    n: Annotated[Whole, Field(ge=1, le=16)] | None = Field(
        1, description="Number of answers to each prompt."
    )
    response_format: Annotated[ResponseFormat | None, EmptyAsNull] = Field(
        None, description="The form of the answer."
    )
    stream: bool | None = Field(False, description="Send events as the text is generated.")
    stream_options: StreamOptions | None = Field(None, description="With stream only.")
    timeout: float | None = Field(
        None, gt=0, description="Seconds until the request is cancelled; an extension."
    )

    @property
    def generation(self) -> dict[str, Any]:
        """Return arguments of ``SamplingParams``: those that the request sets."""
        form = self.response_format
        return self.sampling | {"n": self.n or 1, "response_format": form and form.as_dict()}

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


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
    parse_special: bool | None = Field(
        None,
        description="Control pieces' spellings in the prompt, such as <PRE>, are the pieces; by "
        "default if the server is started with --parse_special.",
    )
    best_of: Annotated[Whole, Field(ge=1, le=20)] | None = Field(
        None,
        description="Answers to generate to each prompt, n of which are returned: those with the "
        "highest mean log-probability.",
    )
    truncate_prompt_tokens: LastTokens = None

    @property
    def n_generated(self) -> int:
        """The number of answers to each prompt, of which the best n are returned."""
        return self.best_of or self.n or 1

    @field_validator("best_of")
    @classmethod
    def _check_best(cls, best_of: int | None, info: ValidationInfo) -> int | None:
        n, is_streamed = info.data.get("n") or 1, info.data.get("stream")
        if best_of is not None and best_of < n:
            raise ValueError(f"{n} of {best_of} answers can't be returned: give n or more")
        if best_of is not None and best_of > n and is_streamed:
            raise ValueError(
                "the best answers are known when all have ended: leave it out, or give stream=false"
            )
        return best_of

    @model_validator(mode="after")
    def _check_suffix(self) -> "CompletionRequest":
        if self.suffix is not None and not isinstance(self.prompt, str):
            raise ValueError("suffix goes with a prompt that is one text")
        if self.suffix is not None and self.echo:
            raise ValueError("echo doesn't go with suffix")
        if self.suffix is not None and self.parse_special:
            raise ValueError("parse_special doesn't go with suffix, which stays text")
        if self.suffix is not None and self.truncate_prompt_tokens is not None:
            raise ValueError("truncate_prompt_tokens doesn't go with suffix")
        return self


class EmbeddingRequest(RequestBody):
    input: Prompt
    model: str | None = ModelName
    encoding_format: Annotated[Literal["float", "base64"] | None, EmptyAsNull] = "float"
    dimensions: int | None = Field(None, ge=1, description="Only the model's own number.")
    truncate_prompt_tokens: LastTokens = None
    user: str | None = Ignored


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


class ModelMeta(BaseModel):
    description: str = Field(description="In plain words, with the number of parameters.")
    chat_format: str
    precision: str = Field(description="In plain words: how the weights are stored.")
    n_params: int
    infills: bool = Field(description="True if it was trained to fill in the middle.")
    chats: bool = Field(description="False for a model that writes no text.")
    tools: bool = Field(description="True if the chat format has a place for tools.")
    top_logprobs: int = Field(description="Alternatives to a token, at most.")
    sampling: dict[str, int | float] = Field(description="The server's defaults.")


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "llama"
    root: str = Field(description="The name of its file or directory, without the path.")
    parent: str | None = Field(None, description="Of an adapter the model that it changes.")
    max_model_len: int = Field(description="Tokens of prompt and answer together.")
    meta: ModelMeta


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
