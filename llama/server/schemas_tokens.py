"""Requests and responses about tokens: llama.cpp's and vLLM's forms of them."""

from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError, model_validator

from llama.server.schemas_chat import ChatMessage, ChatRequest, Tool, Tools
from llama.server.schemas_sampling import Null, RequestBody


class TokenizeRequest(RequestBody):
    """A text as llama.cpp names it, ``content``, or as vLLM does, ``prompt``; or a dialog."""

    model: str | None = Field(None, description="The served model's id, or an adapter's.")
    content: str | None = Field(None, description="A text.")
    prompt: str | None = Field(None, description="The same.")
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)] | None = Field(
        None, description="A dialog, read as by /v1/chat/completions."
    )
    add_special: bool | None = Field(
        None, description="Begin with the beginning-of-sequence token; not by default."
    )
    add_special_tokens: bool | None = Field(
        None, description="The same; by default for prompt, and not for messages."
    )
    parse_special: bool | None = Field(
        True, description="Control pieces' spellings in the text are the pieces, not text."
    )
    with_pieces: bool | None = Field(False, description="Return each token with its piece.")
    return_token_strs: bool | None = Field(
        False, description="Return the vocabulary's entries too."
    )
    tools: Annotated[list[Tool], Tools] | None = Field(None, description="Of the dialog.")
    continue_final_message: bool | None = Field(None, description="Of the dialog.")
    add_generation_prompt: bool | None = Field(None, description="Of the dialog.")
    chat_template: Null = None
    chat_template_kwargs: Null = None

    @model_validator(mode="after")
    def _check_source(self) -> "TokenizeRequest":
        given = [n for n in ("content", "prompt", "messages") if getattr(self, n) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"expected one of content, prompt and messages, found {found}")
        try:
            self.chat  # noqa: B018 (its own checks)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ValueError(reason) from None
        return self

    @property
    def chat(self) -> ChatRequest | None:
        """The request that would have the dialog answered."""
        if self.messages is None:
            return None
        names = ("messages", "tools", "continue_final_message", "add_generation_prompt")
        given: dict[str, Any] = {name: getattr(self, name) for name in names}
        return ChatRequest(**given)


class TokenPiece(BaseModel):
    id: int
    piece: str | list[int] = Field(description="Bytes, if they are only a part of a character.")


class Tokenized(BaseModel):
    count: int
    max_model_len: int = Field(description="Tokens of prompt and answer together.")
    tokens: list[int] | list[TokenPiece]
    token_strs: list[str] | None = None


class DetokenizeRequest(RequestBody):
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
    model: str | None = Field(None, description="The served model's id, or an adapter's.")


class Detokenized(BaseModel):
    content: str = Field(description="The text, with control pieces written out.")
    prompt: str = Field(description="The same.")


class AppliedTemplate(BaseModel):
    prompt: str = Field(
        description="The dialog as a text, for a request with parse_special=true to read."
    )


class TokenizerInfo(BaseModel):
    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    add_bos_token: bool
    add_eos_token: bool = False
    model_max_length: int
    chat_template: str | None = Field(description="In Jinja's language, if the model has one.")
