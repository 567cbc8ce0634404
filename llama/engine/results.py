"""Results for callers: whole texts as dictionaries, streams as pieces."""

from collections.abc import Iterable
from typing import Literal, TypedDict

from llama.chat.prompts import Message
from llama.tokenizers.control import End

FinishReason = Literal["stop", "length", "content_filter", "cancelled", "timeout", "error"]


class Prediction(TypedDict, total=False):
    """Why a text ended; with ``logprobs``, its tokens (pieces) and their log-probabilities.

    ``finish_reason`` is "stop", "length", "tool_calls" for an answer that calls tools, or
    "content_filter" for a refused one; ``stop_reason`` is the stop string or id of the caller's
    that was met, and None for any other end.
    """

    finish_reason: FinishReason | Literal["tool_calls"]
    stop_reason: str | int | None
    tokens: list[str]
    logprobs: list[float]


class CompletionPrediction(Prediction):
    """A completion."""

    generation: str


class ChatPrediction(Prediction):
    """An answer."""

    generation: Message


class InfillingPrediction(Prediction):
    """A middle and the whole."""

    generation: str
    full_text: str


class Classification(TypedDict):
    """The most probable label, its probability, and the logits of all labels in order."""

    label: str
    score: float
    logits: list[float]


class StreamPiece(str):
    """New text of a stream, with the tokens whose text is complete by now.

    Attributes:
        token_ids, logprobs: of these tokens.
        finish_reason: why the stream ends here; None where it goes on.
        stop_reason: the caller's stop string or id that ended it; None for another end.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason | None
    stop_reason: End | None

    def __new__(
        cls,
        text: str = "",
        token_ids: Iterable[int] = (),
        logprobs: Iterable[float] = (),
        finish_reason: FinishReason | None = None,
        stop_reason: End | None = None,
    ) -> "StreamPiece":
        piece = super().__new__(cls, text)
        piece.token_ids, piece.logprobs = list(token_ids), list(logprobs)
        piece.finish_reason, piece.stop_reason = finish_reason, stop_reason
        return piece
