"""The fields of requests that say what to generate: samplers, stops, the form of the answer.

They have the names of OpenAI's API, and those of vLLM where OpenAI has no such field. null stands
for the default everywhere.
"""

from functools import cache
from types import NoneType
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from llama.sampling import SamplingParams
from llama.server.lenient import Unsupported, ignore

MAX_FIELDS = 100  # of an object
MAX_DEPTH = 64  # of a JSON Schema
MAX_ELEMENTS = 1024  # of a list or a dictionary that a request names
MAX_MESSAGES = 10_000  # and parts of them; to validate more would stop everybody's streams
_DEFAULTS = SamplingParams()
_OTHER_NAMES = {"include_stop_str_in_output": "include_stop"}  # of SamplingParams


class RequestBody(BaseModel):
    """An object of a request: unknown fields are refused, and a text is no number.

    null stands for the default, also where a field's type doesn't say so, and asks for nothing in
    a field that is unknown. With --lenient unknown fields are ignored whatever they say.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _left_out(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        # Pydantic would make an error for each unknown field, which blocks the server.
        if len(value) > MAX_FIELDS:
            raise ValueError(f"expected up to {MAX_FIELDS} fields, found {len(value):,}")
        known, nullable = _fields(cls)
        return {
            key: field
            for key, field in value.items()
            if (key in nullable or field is not None) and (key in known or not ignore(key))
        }


@cache
def _fields(model: type[BaseModel]) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names of a model's fields, and of those for which null isn't left out."""
    named = {field.alias or name: field for name, field in model.model_fields.items()}
    nullable = {
        name
        for name, field in named.items()
        if field.is_required() or NoneType in (field.annotation, *get_args(field.annotation))
    }
    return frozenset(named), frozenset(nullable)


def _check_depth(schema: dict[str, Any]) -> dict[str, Any]:
    level: list[Any] = [schema]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return schema
    raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")


def _check_elements(value: Any) -> Any:
    if isinstance(value, dict | list) and len(value) > MAX_ELEMENTS:
        raise ValueError(f"expected up to {MAX_ELEMENTS:,} elements, found {len(value):,}")
    return value


def _check_messages(value: Any) -> Any:
    if isinstance(value, list):
        lists = [x for item in value if isinstance(item, dict) for x in item.values()]
        n = len(value) + sum(len(part) for part in lists if isinstance(part, list))
        if n > MAX_MESSAGES:
            raise ValueError(f"expected up to {MAX_MESSAGES:,} messages and parts, found {n:,}")
    return value


def whole(value: Any) -> Any:
    """Return 16 for 16.0, as JSON has one kind of number only."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(whole)]


NOTHING: tuple[Any, ...] = ("", [], {})  # values that ask for nothing, as null does


def _empty_as_null(value: Any) -> Any:
    return None if value in NOTHING else value


Null = Annotated[None, Unsupported, Field(description="Only null.")]
EmptyAsNull = BeforeValidator(_empty_as_null)
Bounded = BeforeValidator(_check_elements)
Dialog = BeforeValidator(_check_messages)
Schema = Annotated[dict[str, Any], AfterValidator(_check_depth)]
TokenId = Annotated[str, Field(pattern=r"^\d{1,9}$")]


class TextFormat(RequestBody):
    type: Literal["text"]

    def as_dict(self) -> dict[str, Any] | None:
        return None


class JsonObjectFormat(RequestBody):
    type: Literal["json_object"]
    schema_: Schema | None = Field(None, alias="schema", description="As llama.cpp has it.")

    def as_dict(self) -> dict[str, Any] | None:
        if self.schema_ is None:
            return {"type": "json_object"}
        return {"type": "json_schema", "json_schema": {"schema": self.schema_}}


class NamedSchema(RequestBody):
    schema_: Schema = Field(alias="schema")
    name: str | None = Field(None, description="Ignored.")
    description: str | None = Field(None, description="Ignored.")
    strict: bool | None = Field(None, description="Answers are always held to the schema.")


class JsonSchemaFormat(RequestBody):
    type: Literal["json_schema"]
    json_schema: NamedSchema

    def as_dict(self) -> dict[str, Any] | None:
        return {"type": "json_schema", "json_schema": {"schema": self.json_schema.schema_}}


class RegexFormat(RequestBody):
    type: Literal["regex"]
    regex: str

    def as_dict(self) -> dict[str, Any] | None:
        return {"type": "regex", "regex": self.regex}


class ChoiceFormat(RequestBody):
    type: Literal["choice"]
    choice: Annotated[list[str], Field(min_length=1, fail_fast=True), Bounded]

    def as_dict(self) -> dict[str, Any] | None:
        return {"type": "choice", "choice": self.choice}


class GrammarFormat(RequestBody):
    type: Literal["grammar"]
    grammar: str = Field(description="In Lark's or GBNF's notation.")

    def as_dict(self) -> dict[str, Any] | None:
        return {"type": "grammar", "grammar": self.grammar}


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat | ChoiceFormat | GrammarFormat,
    Field(discriminator="type"),
]


class SamplingFields(RequestBody):
    """The common part of all requests for text."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None = Field(
        _DEFAULTS.temperature, description="0 takes the most probable token."
    )
    top_p: Annotated[float, Field(ge=0, le=1)] | None = _DEFAULTS.top_p
    top_k: Annotated[Whole, Field(ge=-1)] | None = Field(
        0, description="Most probable tokens to draw from; 0 or -1 for all."
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        0, description="Draw from tokens this many times as probable as the most probable one."
    )
    seed: Whole | None = Field(None, description="Makes sampling repeatable.")
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0
    repetition_penalty: Annotated[float, Field(ge=0.001, le=1000)] | None = Field(
        1, description="A factor for tokens of prompt and answer; 1 changes nothing."
    )
    logit_bias: (
        Annotated[dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], Bounded] | None
    ) = Field(None, description="Numbers added to logits, by token id; -100 bans a token.")
    min_tokens: Annotated[Whole, Field(ge=0)] | None = Field(
        0, description="Tokens before which the model ends no answer."
    )
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = Field(
        None, description="Texts that end an answer, up to 16, of up to 1,000 characters each."
    )
    stop_token_ids: (
        Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True), Bounded] | None
    ) = Field(None, description="Token ids that end an answer.")
    ignore_eos: bool | None = Field(False, description="Go on after the model's own end.")
    include_stop_str_in_output: bool | None = Field(
        False, description="End an answer with the stop text that ended it."
    )
    cache_salt: Annotated[str, Field(max_length=1000)] | None = Field(
        None,
        description="A secret text: the request reuses the cache's prompts of requests with the "
        "same one only, so that others can't learn from timing what it holds; an extension.",
    )

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: str | list[str] | None) -> str | list[str] | None:
        texts = [stop] if isinstance(stop, str) else stop or []
        if len(texts) > 16 or not all(len(text) <= 1000 for text in texts):
            raise ValueError("expected up to 16 texts of 1 to 1,000 characters each")
        return [text for text in texts if text] or None  # an empty one asks for nothing

    @property
    def sampling(self) -> dict[str, Any]:
        """Return arguments of ``SamplingParams``: those that the request sets."""
        biases = self.logit_bias or {}
        changed = {
            "top_k": None if self.top_k is None else max(self.top_k, 0),
            "logit_bias": {int(token): bias for token, bias in biases.items()},
        }
        found = {}
        for field in SamplingFields.model_fields.keys() & self.model_fields_set:
            value = changed.get(field, getattr(self, field))
            if value is not None:
                found[_OTHER_NAMES.get(field, field)] = value
        return found
