"""Sampling of the next tokens from logits, and its parameters (``SamplingParams``)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, NamedTuple, TypedDict

import torch

from llama.errors import checked_list

_FINITE = 3.4e38
# The least and the largest value of a parameter.
_RANGES: dict[str, tuple[float, float, str]] = {
    "temperature": (0.0, _FINITE, "0 (greedy) or more"),
    "top_p": (0.0, 1.0, "a probability mass from 0 to 1"),
    "min_p": (0.0, 1.0, "a share of the largest probability from 0 to 1"),
    "repetition_penalty": (1e-3, 1e3, "a factor above 0, where 1 changes nothing"),
    "presence_penalty": (-1e9, 1e9, "a number, as a rule from -2 to 2"),
    "frequency_penalty": (-1e9, 1e9, "a number, as a rule from -2 to 2"),
}
_COUNTS = ("prompt_lookup_num_tokens", "top_logprobs", "top_k", "min_tokens", "n")

LogitsProcessor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class SamplingOptions(TypedDict, total=False):
    """The keyword arguments of ``Llama.generate`` and all tasks, see ``SamplingParams``."""

    stop: Sequence[str]
    seed: int | None
    prompt_lookup_num_tokens: int
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    min_tokens: int
    n: int
    stop_token_ids: Iterable[int]
    ignore_eos: bool
    include_stop: bool
    logits_processor: LogitsProcessor | None
    response_format: Mapping[str, Any] | None
    sampling: str | None
    adapter: str | None
    cache_salt: str | None


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of generation: which token comes next, where a text ends, and the results.

    Penalties and biases change the logits first; temperature divides them; then top-k, top-p and
    min-p choose the tokens to draw from, each among those that the one before has left.

    Args:
        temperature: divides the logits; 0 takes the most probable token each time.
        top_p: the probability mass to draw from.
        max_gen_len: new tokens at most; None for as many as the cache has room for.
        logprobs: whether to return the tokens' log-probabilities, which are the model's own.
        echo: whether to return the prompt too; its first token has the log-probability 0.0.
        stop: strings that end a sequence, looked for in the text of its new tokens; one that is
            a control piece of the tokenizer, as its vocabulary spells it, ends it as a token. Other
            control pieces aren't part of the text: a longer string with one in it is never found.
        seed: makes draws repeatable: sequence i of a call draws by the seed and i alone,
            whatever other sequences run with it. None takes the next seed of the ``Llama``.
        prompt_lookup_num_tokens: draft tokens at most that are proposed from the sequence's own
            text and checked in one pass: faster where text repeats itself, and in float32 with
            the same result. 10 suits edits of code; 0 proposes none.
        stop_token_ids: ids that end a sequence, besides the tokenizer's own.
        top_logprobs: how many of the most probable tokens to keep at each position.
        top_k: how many of the most probable tokens to draw from; 0 for all.
        min_p: draw from tokens at least this many times as probable as the most probable one.
        repetition_penalty: divides positive logits of tokens in the prompt or the answer, and
            multiplies negative ones (CTRL, https://arxiv.org/abs/1909.05858, section 4.1).
        presence_penalty: is subtracted from the logits of tokens in the answer.
        frequency_penalty: is subtracted from a token's logit as often as the answer has it.
        logit_bias: numbers that are added to logits, by token id; -100 or less bans a token.
        min_tokens: new tokens before which no token ends a sequence.
        n: how many answers to give to each prompt, which is read once.
        ignore_eos: whether the tokenizer's and the chat format's own ends end no sequence.
        include_stop: whether a text ends with the stop string that ended it, and its tokens with
            this string's.
        logits_processor: called with a sequence's ids, (1, n_tokens), and the next token's logits,
            float32, (1, n_words); returns logits. transformers' processors fit.
        response_format: the form of the answer, as in OpenAI's API: ``{"type": "json_object"}`` or
            ``{"type": "json_schema", "json_schema": {"schema": ...}}``; or ``{"type": "regex",
            "regex": ...}``, ``{"type": "choice", "choice": [...]}``, ``{"type": "grammar",
            "grammar": ...}`` (Lark or GBNF). See ``llama.structure``.
        sampling: "checkpoint" takes what the checkpoint's ``generation_config.json`` recommends
            for parameters that have their default values here.
        adapter: the name of an adapter that ``Llama.load_adapter`` has loaded; None for the model
            as it is.
        cache_salt: a text; what the cache holds of prompts is reused for those with the same one.

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
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    n: int = 1
    ignore_eos: bool = False
    include_stop: bool = False
    logits_processor: LogitsProcessor | None = None
    response_format: Mapping[str, Any] | None = None
    sampling: str | None = None
    adapter: str | None = None
    cache_salt: str | None = None

    def __post_init__(self) -> None:
        for name, (least, most, meaning) in _RANGES.items():
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, Real):
                raise TypeError(f"{name} is {value!r}: give a number")
            if value < least or not value <= most:  # or NaN
                raise ValueError(f"{name} is {value!r}: expected {meaning}")
        has_limit = self.max_gen_len is not None
        for name in [*_COUNTS, *["max_gen_len"] * has_limit]:
            least = int(name == "n")
            if type(value := getattr(self, name)) is not int or value < least:
                raise ValueError(f"{name} is {value!r}: expected a whole number, {least} or more")
        if not isinstance(self.seed, int | None):
            raise TypeError(f"seed is {self.seed!r}: give a whole number")
        stop = tuple(checked_list(self.stop, "stop"))
        if not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop is {stop!r}: expected strings that are not empty")
        ids = frozenset(checked_list(self.stop_token_ids, "stop_token_ids"))
        if not all(isinstance(i, int) for i in ids):
            raise TypeError(f"stop token ids are {sorted(map(repr, ids))}: give token ids")
        if not isinstance(self.logit_bias, Mapping) or not all(
            type(i) is int and isinstance(bias, Real) and bias == bias  # no NaN
            for i, bias in self.logit_bias.items()
        ):
            raise TypeError(f"logit_bias is {self.logit_bias!r}: give numbers by token ids")
        if not isinstance(self.response_format, Mapping | None):
            raise TypeError(
                f"response_format is {self.response_format!r}: give a dictionary such as "
                "{'type': 'json_object'}"
            )
        if self.sampling not in (None, "checkpoint"):
            raise ValueError(f"sampling is {self.sampling!r}: expected None or 'checkpoint'")
        if not isinstance(self.adapter, str | None):
            raise TypeError(f"adapter is {self.adapter!r}: give the name it was loaded under")
        if not isinstance(self.cache_salt, str | None):
            raise TypeError(
                f"cache_salt is {self.cache_salt!r}: give a text, the same for prompts "
                "that may be reused for each other"
            )
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
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
    top_k: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the next token of each row of logits; nothing waits for the device.

    Args:
        logits: float32, shape (n, vocab_size).
        temperature: divides the logits, shape (n,); 0 (or less than 1e-6) takes the most probable
            token.
        top_p, n_candidates, top_k, min_p: see ``keep``.
        uniforms: float32 in [0, 1), shape (n,): the number that decides each row's draw.

    Returns:
        int64, shape (n,), and whether there were enough candidates for each draw: others must be
        drawn again, among all.
    """
    is_greedy = temperature < 1e-6
    # The maximum is taken off first, so that a small temperature can't overflow.
    scaled = logits - logits.amax(dim=-1, keepdim=True)
    scaled = scaled / torch.where(is_greedy, 1.0, temperature)[:, None]
    kept = keep(scaled.softmax(dim=-1), top_p, n_candidates, top_k, min_p)
    drawn, is_enough = _draw(kept, uniforms)
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
    return _draw(keep(probs, torch.full_like(uniforms, p)), uniforms)[0]


class Kept(NamedTuple):
    """The tokens that are drawn from: the first ``size`` candidates of each row."""

    ids: torch.Tensor  # (n, n_candidates), the most probable first
    probs: torch.Tensor  # (n, n_candidates), as among all tokens
    reached: torch.Tensor  # (n, n_candidates), their sums up to each
    size: torch.Tensor  # (n, 1)
    mass: torch.Tensor  # (n, 1), the probability of all that are kept
    is_whole: torch.Tensor  # (n, 1), False if tokens that are no candidates are kept too
    is_all: torch.Tensor  # (n, 1), True if every token is kept


def keep(
    probs: torch.Tensor,
    top_p: torch.Tensor,
    n_candidates: int | None = None,
    top_k: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
) -> Kept:
    """Choose the tokens to draw from: by top-k, of these by top-p, of these by min-p.

    Args:
        probs: float32, shape (n, vocab_size), each row adding up to 1.
        top_p: the probability mass to draw from (nucleus sampling), shape (n,).
        n_candidates: how many of the most probable tokens to sort, not fewer than any of
            ``top_k``; None for all.
        top_k: how many of the most probable tokens to draw from, 0 for all, shape (n,).
        min_p: the least probability, as a share of the largest, shape (n,).
    """
    n_words = probs.shape[1]
    n_candidates = min(n_candidates or n_words, n_words)
    candidates, ids = probs.topk(n_candidates, dim=-1)
    reached = candidates.cumsum(dim=-1)
    is_all = top_p[:, None] >= 1
    limit = torch.where(is_all, torch.inf, top_p[:, None])  # sums may be rounded to more than 1
    is_kept = torch.ones_like(candidates, dtype=torch.bool)
    if top_k is not None:
        k = torch.where(top_k > 0, top_k, n_words).clamp(max=n_words).long()[:, None]
        is_kept = torch.arange(n_candidates, device=k.device) < k
        within = reached.gather(1, k.clamp(max=n_candidates) - 1)
        limit = torch.where(k < n_words, limit * within, limit)  # the mass is 1 of all together
        is_all = is_all & (k >= n_words)
    is_kept = is_kept & (reached - candidates <= limit)
    if min_p is not None:
        is_kept &= candidates >= min_p[:, None] * candidates[:, :1]
        is_all = is_all & (min_p[:, None] == 0)
    is_kept[:, 0] = True
    size = is_kept.sum(dim=-1, keepdim=True)
    is_whole = torch.ones_like(is_all) if n_candidates == n_words else ~is_kept[:, -1:]
    if top_k is not None:
        is_whole = is_whole | (k <= n_candidates)
    mass = torch.where(is_whole, reached.gather(1, size - 1), 1.0)
    return Kept(ids, candidates, reached, size, mass, is_whole, is_all)


def _draw(kept: Kept, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    uniforms = uniforms.clamp(max=1 - 2**-24)  # a draw just below 1 may have been rounded up
    target = uniforms[:, None] * kept.mass
    is_enough = kept.is_whole | (kept.is_all & (target < kept.reached[:, -1:]))
    drawn = (kept.reached <= target).sum(dim=-1, keepdim=True)
    return kept.ids.gather(1, torch.minimum(drawn, kept.size - 1)).squeeze(1), is_enough.squeeze(1)


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities of tokens under logits as they are.

    Args:
        logits: float32, shape (n, vocab_size).
        tokens: int64, shape (n,).

    Returns:
        float32, shape (n,).
    """
    return logits.log_softmax(dim=-1).gather(1, tokens[:, None]).squeeze(1)
