"""What the tasks return: one dictionary for each prompt."""

from typing import TypedDict

from llama.chat.prompts import Message


class _Scores(TypedDict, total=False):
    tokens: list[str]
    logprobs: list[float]


class CompletionPrediction(_Scores):
    """A completion; with ``logprobs`` also its tokens and their log-probabilities."""

    generation: str


class ChatPrediction(_Scores):
    """An answer; with ``logprobs`` also its tokens and their log-probabilities."""

    generation: Message


class InfillingPrediction(_Scores):
    """A middle and the whole; with ``logprobs`` also its tokens and their log-probabilities."""

    generation: str
    full_text: str


class Classification(TypedDict):
    """The likeliest label, its probability, and the logits of all labels in order."""

    label: str
    score: float
    logits: list[float]
