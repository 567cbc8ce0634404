"""Fields of OpenAI's API that change no answer here, and so are accepted and ignored."""

from typing import Annotated, Any

from pydantic import Field

from llama.server.schemas_sampling import Bounded, Null, RequestBody

Ignored = Field(None, description="Ignored.")


class IgnoredFields(RequestBody):
    """Fields that say who asks, how it is billed, and what is kept or cached for later."""

    user: str | None = Ignored
    metadata: dict[str, Any] | None = Ignored
    store: bool | None = Field(None, description="Nothing is stored, whatever it says.")
    safety_identifier: str | None = Ignored
    prompt_cache_key: str | None = Ignored
    prompt_cache_retention: str | None = Ignored
    prompt_cache_options: dict[str, Any] | None = Ignored
    service_tier: str | None = Ignored


class CacheHints(RequestBody):
    """Hints about caches, beside a text, a message or a tool: this server's needs none."""

    cache_control: Any = Ignored
    prompt_cache_breakpoint: Any = Ignored


class EchoedFields(CacheHints):
    """Fields that stand beside content in answers of other servers, and that clients send back."""

    annotations: Annotated[list[Any], Bounded] | None = Ignored
    audio: Null = None
    images: Null = None
    additional_kwargs: Any = Ignored
    citations: Any = Ignored
    executed_tools: Any = Ignored
    extra_content: Any = Ignored
    finish_reason: Any = Ignored
    id: Any = Ignored
    parsed: Any = Ignored
    prefix: bool | None = Field(None, description="Ignored: a last answer is continued anyway.")
    provider_specific_fields: Any = Ignored
    reasoning: Any = Ignored
    reasoning_content: Any = Ignored
    reasoning_details: Any = Ignored
    thinking: Any = Ignored
    thinking_blocks: Any = Ignored
