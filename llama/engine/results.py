"""Results for callers: whole texts as dictionaries, streams as pieces."""

from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch

from llama.chat.prompts import Message
from llama.tokenizer import BaseTokenizer
from llama.tokenizers.control import End

if TYPE_CHECKING:
    from llama.engine.sequence import Event, Sequence

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


def prediction(sequence: "Sequence", tokenizer: BaseTokenizer, **texts: Any) -> Any:
    """Return texts with why their sequence ended, and the scores that were asked for."""
    params = sequence.params
    prediction = texts | {k: getattr(sequence, k) for k in ("finish_reason", "stop_reason")}
    if params.logprobs:
        ids = sequence.prompt * params.echo + sequence.tokens
        prediction["tokens"] = [tokenizer.token_piece(t) for t in ids]
        prediction["logprobs"] = sequence.prompt_logprobs * params.echo + sequence.logprobs
    return prediction


def classification(
    logits: torch.Tensor, labels: list[str], head: torch.Tensor | None = None
) -> Classification:
    """Return the class that logits, shape (len(labels),), make the most probable.

    A single label's probability is the sigmoid of its logit, so it may be below 0.5. With the
    classifier's weight, ``head``, logits are hidden states instead, shape (dim,).
    """
    logits = logits if head is None else head.float() @ logits
    probabilities = logits.sigmoid() if len(labels) == 1 else logits.softmax(-1)
    label, score = labels[int(logits.argmax())], float(probabilities.max())
    return Classification(label=label, score=score, logits=logits.tolist())


class StreamPiece(str):
    """New text of a stream, with the tokens whose text is complete by now.

    Attributes:
        token_ids: these tokens' ids.
        logprobs: their log-probabilities.
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


def stream_pieces(events: Iterable["Event"]) -> Generator[StreamPiece, None, None]:
    """Yield the pieces of one sequence's events."""
    n_before = 0
    for sequence, text in events:
        n = sequence.n_decoded
        if text or sequence.finish_reason is not None:
            tokens, logprobs = sequence.tokens[n_before:n], sequence.logprobs[n_before:n]
            yield StreamPiece(text, tokens, logprobs, sequence.finish_reason, sequence.stop_reason)
            n_before = n
