"""Requests and responses of /classify, as vLLM has it, and /v1/rerank, as Jina and Cohere do."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from llama.server.schemas import MAX_PROMPTS, EmbeddingUsage, LastTokens, Prompt, TokenLimit
from llama.server.schemas_sampling import RequestBody, Whole


class ClassifyRequest(RequestBody):
    input: Prompt = Field(description="Texts, or their token ids.")
    model: str | None = Field(None, description="The served model's id, or an adapter's.")
    truncate_prompt_tokens: LastTokens = None
    user: str | None = Field(None, description="Ignored.")


class Class(BaseModel):
    index: int
    label: str = Field(description="The most probable one.")
    probs: list[float] = Field(description="Of all labels, in the model's order.")
    num_classes: int


class Classes(BaseModel):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Class]
    usage: EmbeddingUsage


class Document(RequestBody):
    text: str


def _check_number(value: Any) -> Any:
    if isinstance(value, list) and len(value) > MAX_PROMPTS:
        raise ValueError(f"expected up to {MAX_PROMPTS:,} documents, found {len(value):,}")
    return value


class RerankRequest(RequestBody):
    query: str
    documents: Annotated[
        list[str | Document], Field(min_length=1, fail_fast=True), BeforeValidator(_check_number)
    ]
    model: str | None = Field(None, description="The served model's id, or an adapter's.")
    top_n: Annotated[Whole, Field(ge=0)] | None = Field(
        None, description="The number of documents to return; all by default, and for 0."
    )
    return_documents: bool | None = Field(True, description="Return the documents' texts, too.")
    max_tokens_per_doc: Annotated[Whole, Field(ge=1)] | None = Field(
        None, description="Tokens after which a document is cut."
    )
    truncate_prompt_tokens: TokenLimit | None = Field(
        None,
        description="Tokens of the query and a document, after which the document is cut; -1 for "
        "as many as fit.",
    )
    user: str | None = Field(None, description="Ignored.")


class Ranked(BaseModel):
    index: int = Field(description="In the request's documents.")
    relevance_score: float = Field(description="A probability.")
    document: Document | None = None


class Ranking(BaseModel):
    id: str
    model: str
    results: list[Ranked] = Field(description="The most relevant one first.")
    usage: EmbeddingUsage
