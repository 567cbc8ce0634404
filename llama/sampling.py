"""Sampling of the next tokens from logits, and its parameters (``SamplingParams``)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TypedDict

import torch

from llama.errors import checked_list


class SamplingOptions(TypedDict, total=False):
    """The keyword arguments of ``Llama.generate`` and all tasks, see ``SamplingParams``."""

    stop: Sequence[str]
    seed: int | None
    prompt_lookup_num_tokens: int


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of generation: sampling, length and results.

    Args:
        temperature: divides the logits; 0 takes the most probable token each time.
        top_p: the probability mass to draw from.
        max_gen_len: new tokens at most; None for as many as the cache has room for.
        logprobs: whether to return the tokens' log-probabilities (before temperature and top-p).
        echo: whether to return the prompt too; its first token has the log-probability 0.0.
        stop: strings that end a sequence, looked for in the text of its new tokens.
        seed: makes draws repeatable: sequence i of a call draws by the seed and i alone,
            whatever other sequences run with it. None takes the next seed of the ``Llama``.
        prompt_lookup_num_tokens: draft tokens at most that are proposed from the sequence's own
            text and checked in one pass: faster where text repeats itself, and in float32 with
            the same result. 10 suits edits of code; 0 proposes none.
        stop_token_ids: ids that end a sequence, besides the tokenizer's own.
        top_logprobs: how many of the most probable tokens to keep at each position.

    Raises:
        TypeError, ValueError: a value is of the wrong type or out of its range.
    """

    temperature: float = 0.6
    top_p: float = 0.9
    max_gen_len: int | None = None
    logprobs: bool = False
    echo: bool = False
    stop: Sequence[str] = ()
    seed: int | None = None
    prompt_lookup_num_tokens: int = 0
    stop_token_ids: Iterable[int] = ()
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p"):
            if not isinstance(getattr(self, name), Real):
                raise TypeError(f"{name} is {getattr(self, name)!r}: give a number")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature!r}: expected 0 (greedy) or more")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p!r}: expected a probability mass from 0 to 1")
        has_limit = self.max_gen_len is not None
        for name in ["prompt_lookup_num_tokens", "top_logprobs"] + ["max_gen_len"] * has_limit:
            if not isinstance(value := getattr(self, name), int) or value < 0:
                raise ValueError(f"{name} is {value!r}: expected a whole number, 0 or more")
        if not isinstance(self.seed, int | None):
            raise TypeError(f"seed is {self.seed!r}: give a whole number")
        stop = tuple(checked_list(self.stop, "stop"))
        if not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop is {stop!r}: expected strings that are not empty")
        ids = frozenset(self.stop_token_ids)
        if not all(isinstance(i, int) for i in ids):
            raise TypeError(f"stop token ids are {sorted(map(repr, ids))}: give token ids")
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", ids)
        object.__setattr__(self, "echo", bool(self.echo))

    @property
    def scores_prompt(self) -> bool:
        """True if the prompt's own tokens get log-probabilities."""
        return self.logprobs and self.echo


def sample(
    logits: torch.Tensor, params: Sequence[SamplingParams], uniforms: torch.Tensor
) -> torch.Tensor:
    """Return the next token of each row of logits.

    Args:
        logits: float32, shape (n, vocab_size).
        params: for each row its own.
        uniforms: float32 in [0, 1), shape (n,): the number that decides each row's draw.

    Returns:
        int64, shape (n,).
    """
    groups: dict[tuple[float, float], list[int]] = {}  # rows that are drawn alike
    for i, each in enumerate(params):
        groups.setdefault((each.temperature, each.top_p), []).append(i)
    if len(groups) == 1:
        return next_tokens(logits, *next(iter(groups)), uniforms)
    tokens = torch.empty(len(params), dtype=torch.long, device=logits.device)
    for (temperature, top_p), rows in groups.items():
        tokens[rows] = next_tokens(logits[rows], temperature, top_p, uniforms[rows])
    return tokens


def next_tokens(
    logits: torch.Tensor, temperature: float, top_p: float, uniforms: torch.Tensor
) -> torch.Tensor:
    """Return the next token of each row.

    Args:
        logits: float32, shape (bsz, vocab_size).
        temperature: divides the logits; 0 (or less than 1e-6) takes the most probable token.
        top_p: the probability mass to draw from (nucleus sampling).
        uniforms: one number in [0, 1) for each row, shape (bsz,): the draw.

    Returns:
        int64, shape (bsz,).
    """
    if temperature < 1e-6:
        return logits.argmax(dim=-1)
    # The maximum is taken off first, so that a small temperature can't overflow.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    return sample_top_p(scaled.softmax(dim=-1), top_p, uniforms)


def sample_top_p(
    probs: torch.Tensor, p: float, uniforms: torch.Tensor | None = None
) -> torch.Tensor:
    """Draw from the smallest set of tokens whose probabilities reach ``p``.

    Inverse transform sampling (https://arxiv.org/abs/1904.09751 for the nucleus): the row's own
    number decides, so a row's draw doesn't depend on its neighbours.

    Args:
        probs: float32, shape (bsz, vocab_size), each row adding up to 1.
        p: 0 to 1; the most probable token is always in the set.
        uniforms: in [0, 1), shape (bsz,); None draws them.

    Returns:
        int64, shape (bsz,).
    """
    if uniforms is None:
        uniforms = torch.rand(len(probs), device=probs.device)
    sorted_probs, order = probs.sort(dim=-1, descending=True)
    reached = sorted_probs.cumsum(dim=-1)
    nucleus = reached - sorted_probs <= p
    nucleus[:, 0] = True
    size = nucleus.sum(dim=-1, keepdim=True)
    mass = reached.gather(1, size - 1)
    uniforms = uniforms.clamp(max=1 - 2**-24)  # a draw just below 1 may have been rounded up
    drawn = (reached <= uniforms[:, None] * mass).sum(dim=-1, keepdim=True)
    return order.gather(1, torch.minimum(drawn, size - 1)).squeeze(1)


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities of tokens under logits as they are.

    Args:
        logits: float32, shape (n, vocab_size).
        tokens: int64, shape (n,).

    Returns:
        float32, shape (n,).
    """
    return logits.log_softmax(dim=-1).gather(1, tokens[:, None]).squeeze(1)
