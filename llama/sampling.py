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
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    uniforms: torch.Tensor,
    n_candidates: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the next token of each row of logits; nothing waits for the device.

    Args:
        logits: float32, shape (n, vocab_size).
        temperature: divides the logits, shape (n,); 0 (or less than 1e-6) takes the most probable
            token.
        top_p: the probability mass to draw from (nucleus sampling), shape (n,).
        uniforms: float32 in [0, 1), shape (n,): the number that decides each row's draw.
        n_candidates: how many of the most probable tokens to sort; None for all.

    Returns:
        int64, shape (n,), and whether there were enough candidates for each draw: others must be
        drawn again, among all.
    """
    is_greedy = temperature < 1e-6
    # The maximum is taken off first, so that a small temperature can't overflow.
    scaled = logits - logits.amax(dim=-1, keepdim=True)
    scaled = scaled / torch.where(is_greedy, 1.0, temperature)[:, None]
    drawn, is_enough = _draw(scaled.softmax(dim=-1), top_p, uniforms, n_candidates)
    return torch.where(is_greedy, logits.argmax(dim=-1), drawn), is_greedy | is_enough


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
    return _draw(probs, torch.full_like(uniforms, p), uniforms, None)[0]


def _draw(
    probs: torch.Tensor, top_p: torch.Tensor, uniforms: torch.Tensor, n_candidates: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    n_words = probs.shape[1]
    n_candidates = min(n_candidates or n_words, n_words)
    candidates, order = probs.topk(n_candidates, dim=-1)  # the most probable first
    reached = candidates.cumsum(dim=-1)
    nucleus = reached - candidates <= top_p[:, None]
    nucleus[:, 0] = True
    size = nucleus.sum(dim=-1, keepdim=True)
    is_whole = ~nucleus[:, -1:] if n_candidates < n_words else torch.ones_like(nucleus[:, :1])
    # Of all tokens together the mass is 1, however few are candidates.
    mass = torch.where(is_whole, reached.gather(1, size - 1), 1.0)
    uniforms = uniforms.clamp(max=1 - 2**-24)  # a draw just below 1 may have been rounded up
    target = uniforms[:, None] * mass
    is_enough = is_whole | ((top_p[:, None] >= 1) & (target < reached[:, -1:]))
    drawn = (reached <= target).sum(dim=-1, keepdim=True)
    return order.gather(1, torch.minimum(drawn, size - 1)).squeeze(1), is_enough.squeeze(1)


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities of tokens under logits as they are.

    Args:
        logits: float32, shape (n, vocab_size).
        tokens: int64, shape (n,).

    Returns:
        float32, shape (n,).
    """
    return logits.log_softmax(dim=-1).gather(1, tokens[:, None]).squeeze(1)
