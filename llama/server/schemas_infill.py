"""Requests and responses of infilling: llama.cpp's /infill and Mistral's /v1/fim/completions."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from llama.server.lenient import Unsupported
from llama.server.schemas import TextRequest
from llama.server.schemas_ignored import Ignored
from llama.server.schemas_sampling import (
    Bounded,
    EmptyAsNull,
    Null,
    RequestBody,
    SamplingFields,
    Whole,
    whole,
)

Milliseconds = Annotated[Whole, Field(ge=-1)]
Zero = Annotated[
    Literal[0] | None, BeforeValidator(whole), Unsupported, Field(description="Only 0.")
]


class FimRequest(TextRequest):
    prompt: str = Field(description="The text before the middle.")
    suffix: str | None = Field(
        None, description="The text after it; without one the prompt is continued."
    )
    max_tokens: Annotated[Whole, Field(ge=0)] | None = Field(
        None, description="As many as fit, if null."
    )
    random_seed: Whole | None = Field(None, description="Mistral's name of seed.")

    @property
    def generation(self) -> dict[str, Any]:
        seed = {} if self.random_seed is None else {"seed": self.random_seed}
        return super().generation | seed


class ExtraText(RequestBody):
    text: str
    filename: str | None = Field(None, description="Ignored.")
    time: Any = Field(None, description="Ignored.")


class NeutralFields(RequestBody):
    """llama.cpp's fields for what this server hasn't, which some clients send at their defaults.

    Those that shape such a sampler count for nothing without it.
    """

    mirostat: Zero = None
    mirostat_tau: Any = Ignored
    mirostat_eta: Any = Ignored
    typical_p: Annotated[Literal[1] | None, BeforeValidator(whole), Unsupported] = None
    top_n_sigma: Annotated[Literal[-1, 0] | None, BeforeValidator(whole), Unsupported] = None
    xtc_probability: Zero = None
    xtc_threshold: Any = Ignored
    dynatemp_range: Zero = None
    dynatemp_exponent: Any = Ignored
    dry_multiplier: Zero = None
    dry_base: Any = Ignored
    dry_allowed_length: Any = Ignored
    dry_penalty_last_n: Any = Ignored
    dry_sequence_breakers: Any = Ignored
    repeat_last_n: Annotated[Literal[-1, 64] | None, Unsupported] = Field(
        None, description="Only -1, or 64, the default: penalties count all tokens."
    )
    min_keep: Annotated[Literal[0, 1] | None, Unsupported] = None
    n_discard: Any = Ignored
    n_probs: Zero = None
    post_sampling_probs: Any = Ignored
    return_progress: Annotated[Literal[False] | None, Unsupported] = None
    grammar: Null = None
    json_schema: Annotated[None, Unsupported, EmptyAsNull] = Field(None, description="Only null.")
    lora: Null = None


class InfillRequest(SamplingFields, NeutralFields):
    input_prefix: str = Field("", description="The text before the middle.")
    input_suffix: str = Field("", description="The text after it.")
    input_extra: Annotated[list[ExtraText], Field(fail_fast=True), Bounded] | None = Field(
        None, description="Other texts, to put before these."
    )
    prompt: str = Field("", description="More of the text before the middle, such as its line.")
    model: str | None = Field(None, description="The served model's id, or an adapter's.")
    n_predict: Annotated[Whole, Field(ge=-1)] | None = Field(
        None, description="Tokens at most; null and -1 for as many as fit."
    )
    max_tokens: Annotated[Whole, Field(ge=-1)] | None = Field(
        None, description="OpenAI's name of n_predict."
    )
    repeat_penalty: Annotated[float, Field(ge=0.001, le=1000)] | None = Field(
        None, description="The older name of repetition_penalty."
    )
    stream: bool | None = Field(False, description="Send events as the text is generated.")
    n_indent: Annotated[Whole, Field(ge=0)] | None = Field(
        0, description="End before a line that is indented less."
    )
    t_max_predict_ms: Milliseconds | None = Field(
        0,
        description="End after this time from the first token on, once there is a line; 0 and -1 "
        "for none.",
    )
    response_fields: Annotated[list[str], Field(fail_fast=True), Bounded] | None = Field(
        None, description="The only ones to return, such as content or timings/predicted_n."
    )
    return_tokens: bool | None = Field(False, description="Return the tokens' ids, too.")
    timeout: float | None = Field(
        None, gt=0, description="Seconds until the request is cancelled; an extension."
    )
    samplers: Annotated[list[str], Field(fail_fast=True), Bounded] | None = Field(
        None, description="Ignored: their order is this server's."
    )
    cache_prompt: bool | None = Field(None, description="Ignored: prompts are cached.")
    id_slot: Whole | None = Field(None, description="Ignored.")
    n_keep: Whole | None = Field(None, description="Ignored.")
    t_max_prompt_ms: Milliseconds | None = Field(None, description="Ignored.")
    timings_per_token: bool | None = Field(None, description="Ignored.")

    @property
    def generation(self) -> dict[str, Any]:
        """Return arguments of ``SamplingParams``: those that the request sets."""
        found = self.sampling
        if self.repeat_penalty is not None:
            found["repetition_penalty"] = self.repeat_penalty
        if self.seed is not None and self.seed < 0:  # llama.cpp's name of none
            found.pop("seed", None)
        return found

    @model_validator(mode="after")
    def _check_number(self) -> "InfillRequest":
        limits = {self.n_predict, self.max_tokens} - {None}
        if len(limits) > 1:
            raise ValueError("n_predict and max_tokens are the same: give one")
        return self

    @property
    def n_new(self) -> int | None:
        """The number of tokens at most; None for as many as fit."""
        n = self.max_tokens if self.n_predict is None else self.n_predict
        return None if n == -1 else n


class Timings(BaseModel):
    prompt_n: int = Field(description="Tokens of the prompt that weren't in the cache.")
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float

    @staticmethod
    def of(n_prompt: int, prompt: float, n_predicted: int, predicted: float) -> "Timings":
        """Return the timings of so many tokens and seconds."""
        return Timings(
            prompt_n=n_prompt,
            prompt_ms=prompt * 1e3,
            prompt_per_token_ms=prompt * 1e3 / max(n_prompt, 1),
            prompt_per_second=n_prompt / max(prompt, 1e-6),
            predicted_n=n_predicted,
            predicted_ms=predicted * 1e3,
            predicted_per_token_ms=predicted * 1e3 / max(n_predicted, 1),
            predicted_per_second=n_predicted / max(predicted, 1e-6),
        )


class InfillPiece(BaseModel):
    """A part of the middle in one event."""

    index: int = 0
    content: str
    tokens: list[int]
    stop: bool = False


class Infill(InfillPiece):
    """The middle; in streams its end, without text."""

    stop: bool = True
    stop_type: Literal["eos", "word", "limit"]
    stopping_word: str = ""
    model: str
    tokens_predicted: int
    tokens_evaluated: int
    tokens_cached: int
    truncated: bool = Field(description="Whether the texts were cut to fit.")
    timings: Timings


class SelectedFields(BaseModel):
    """The fields of an answer that a request names."""

    model_config = {"extra": "allow"}

    @staticmethod
    def of(answer: BaseModel, paths: list[str]) -> "SelectedFields":
        """Return an answer's fields by their paths, such as ``timings/prompt_n``."""
        found: dict[str, Any] = {}
        whole = answer.model_dump()
        for path in paths:
            value: Any = whole
            for key in path.split("/"):
                value = value.get(key) if isinstance(value, dict) else None
            if value is not None:
                found[path] = value
        return SelectedFields(**found)
