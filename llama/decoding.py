"""The algorithm of generation: prompts go into the cache, then rows grow token by token."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from numbers import Real

import torch

from llama import parallel
from llama.args import ModelArgs
from llama.errors import NotFinite, PromptTooLong, checked_list
from llama.lookup import Lookup
from llama.model import Transformer
from llama.packing import Segment, prefill_passes
from llama.sampling import next_tokens, token_logprobs
from llama.streaming import TextStream


@dataclass
class Row:
    """One prompt on its way: what came, what is to come and how it ends."""

    prompt: list[int]
    limit: int  # of new tokens
    draws: random.Random  # its own, so that neighbours don't matter
    text: TextStream
    lookup: Lookup | None = None  # what guesses its next tokens
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    ended: bool = False
    _drawn: list[float] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return self.ended or len(self.tokens) >= self.limit

    def uniform(self, ahead: int) -> float:
        """The number in [0, 1) that draws the token which comes ``ahead`` of the next one."""
        number = len(self.tokens) + ahead
        while len(self._drawn) <= number:
            self._drawn.append(self.draws.random())
        return self._drawn[number]

    def guess(self, most: int | None = None) -> list[int]:
        """What may come next, one token less than there is room for; empty without lookup.

        ``most`` is how many at most; None for as many as lookup likes.
        """
        room = self.limit - len(self.tokens) - 1
        return self.lookup.guess(room if most is None else min(room, most)) if self.lookup else []


@dataclass
class Request:
    """What the rows of a call have in common."""

    temperature: float
    top_p: float
    logprobs: bool  # whether to score new tokens, and with echo the prompts'
    echo: bool
    stop_tokens: set[int]
    needs_text: bool  # whether rows keep their text, as stop strings and text tasks want
    n_words: int  # ids from here on mean nothing to the tokenizer

    def __post_init__(self) -> None:
        for name, value in (("temperature", self.temperature), ("top_p", self.top_p)):
            if not isinstance(value, Real):
                raise TypeError(f"{name} is {value!r}: give a number")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature!r}: expected 0 (greedy) or more")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p!r}: expected a probability mass from 0 to 1")


def make_rows(
    params: ModelArgs,
    prompts: Sequence[Sequence[int]],
    max_gen_len: int | None,
    seed: int,
    decode: Callable[[Sequence[int]], str],
    stop: Sequence[str],
    in_context: bool,
    prompt_lookup_num_tokens: int,
) -> list[Row]:
    """A row for each prompt.

    Args:
        params: the model's, for the sizes of cache and vocabulary.
        max_gen_len: new tokens at most; None for as many as the cache takes.
        seed: row i draws by ``seed`` and i.
        decode: from token ids to text.
        stop: strings that end a row.
        in_context: whether a row's text continues its prompt's, or begins afresh.
        prompt_lookup_num_tokens: how many tokens are guessed at most; 0 guesses none.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of its range, or a prompt doesn't fit the cache.
    """
    stop = tuple(checked_list(stop, "stop"))
    if not all(isinstance(s, str) and s for s in stop):
        raise ValueError(f"stop is {stop!r}: expected strings that are not empty")
    if max_gen_len is None:
        max_gen_len = params.max_seq_len
    if not isinstance(max_gen_len, int) or max_gen_len < 0:
        raise ValueError(f"max_gen_len is {max_gen_len!r}: expected a whole number, 0 or more")
    n_lookup = prompt_lookup_num_tokens
    if not isinstance(n_lookup, int) or n_lookup < 0:
        raise ValueError(
            f"prompt_lookup_num_tokens is {n_lookup!r}: expected a whole number, 0 or more"
        )
    rows = []
    for i, ids in enumerate(checked_prompts(params, prompts)):
        limit = min(max_gen_len, params.max_seq_len - len(ids))
        text = TextStream(decode, stop, context=ids if in_context else ())
        lookup = Lookup(ids, n_lookup) if n_lookup else None
        rows.append(Row(ids, limit, random.Random(f"{seed} {i}"), text, lookup))
    return rows


def checked_prompts(params: ModelArgs, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The prompts as lists, if the model can read them; errors as in ``make_rows``."""
    checked = []
    for i, prompt in enumerate(checked_list(prompts, "prompt_tokens")):
        if isinstance(prompt, str | bytes) or not isinstance(prompt, Sequence):
            raise TypeError(f"prompt {i} is {prompt!r}: give a list of token ids for each prompt")
        ids = list(prompt)
        foreign = [t for t in ids if not isinstance(t, int)]
        if foreign:
            raise TypeError(f"prompt {i} holds {foreign[0]!r}: give token ids, which are int")
        if len(ids) > params.max_seq_len:
            raise PromptTooLong(i, len(ids), params.max_seq_len)
        wrong = [t for t in ids if not 0 <= t < params.vocab_size]
        if wrong:
            raise ValueError(
                f"prompt {i} holds the token id {wrong[0]}, outside the vocabulary of "
                f"{params.vocab_size}"
            )
        checked.append(ids)
    return checked


def run(
    model: Transformer, rows: list[Row], request: Request, starts: Sequence[int] | None = None
) -> Iterator[str]:
    """Work off one batch; row i of ``rows`` is row i of the cache. Yields each new text.

    Args:
        starts: how many of each prompt's tokens the cache already holds.
    """
    logits = _prefill(model, rows, request, starts or [0] * len(rows))
    active = [(i, row) for i, row in enumerate(rows) if not row.done]
    logits = logits[[i for i, _ in active]]
    guesses: list[list[int]] = [[] for _ in active]  # what may come after the next token
    while active:
        work = list(zip(active, guesses, strict=True))
        numbers = [row.uniform(j) for (_, row), guess in work for j in range(len(guess) + 1)]
        chosen = zip(*_choose(logits, numbers, request), strict=True)
        for (_, row), guess in work:
            yield from take_checked(row, guess, list(islice(chosen, len(guess) + 1)), request)
        active = [(i, row) for i, row in active if not row.done]
        guesses = [row.guess() for _, row in active]
        tokens, segments = [], []
        for (i, row), guess in zip(active, guesses, strict=True):
            segments.append(Segment(i, len(row.prompt) + len(row.tokens) - 1, 1 + len(guess)))
            tokens += [row.tokens[-1], *guess]
        if active:
            logits = checked_forward(model, tokens, segments)


def checked_forward(
    model: Transformer,
    tokens: list[int],
    segments: list[Segment],
    select: list[int] | None = None,
    hidden: bool = False,
) -> torch.Tensor:
    """``forward_packed``, or ``hidden_states`` in float32, of lists of ids and positions.

    Raises:
        NotFinite: the result isn't; the cache is empty then.
    """
    device = model.freqs_cis.device
    ids = torch.tensor(tokens, device=device)
    chosen = None if select is None else torch.tensor(select, device=device, dtype=torch.long)
    forward = model.hidden_states if hidden else model.forward_packed
    found = forward(ids, segments, chosen).float()
    if not found.isfinite().all():
        model.clear_cache()
        raise NotFinite
    return found


def _prefill(
    model: Transformer, rows: list[Row], request: Request, starts: Sequence[int]
) -> torch.Tensor:
    """Put prompts into the cache. Returns the logits after each, shape (n_rows, vocab_size)."""
    score = request.logprobs and request.echo
    last: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    for segments in prefill_passes([len(row.prompt) for row in rows], starts):
        tokens = [t for i, start, n in segments for t in rows[i].prompt[start : start + n]]
        ends, total = [], 0
        for i, start, n in segments:
            total += n
            if start + n == len(rows[i].prompt):
                ends.append((i, total - 1))
        logits = checked_forward(model, tokens, segments, None if score else [at for _, at in ends])
        if score:
            _score_prompts(rows, segments, logits)
            logits = logits[[at for _, at in ends]]
        for (i, _), row_logits in zip(ends, logits, strict=True):
            last[i] = row_logits
    return torch.stack(last)


def _choose(
    logits: torch.Tensor, numbers: list[float], request: Request
) -> tuple[list[int], list[float]]:
    """Draw a token by each number. Without ``logprobs``, the second list holds zeros."""
    uniforms = torch.tensor(numbers, device=logits.device)
    # A vocabulary may be padded beyond the tokenizer's pieces; those ids mean nothing.
    known = logits[:, : request.n_words]
    tokens = next_tokens(known, request.temperature, request.top_p, uniforms)
    # Rounding may differ between ranks; their tokens must not.
    tokens = parallel.broadcast(tokens)
    if not request.logprobs:
        return tokens.tolist(), [0.0] * len(numbers)
    return tokens.tolist(), token_logprobs(logits, tokens).tolist()


def _take(row: Row, token: int, logprob: float, request: Request) -> str:
    """Give a row its next token. Returns the text that has become certain."""
    piece = ""
    if token in request.stop_tokens:
        row.ended = True
    else:
        row.tokens.append(token)
        row.logprobs.append(logprob)
        if row.lookup is not None:
            row.lookup.push(token)
        if request.needs_text:
            piece = row.text.push(token)
            row.ended = row.text.stopped
    if row.done and request.needs_text:
        piece += row.text.flush()
        if row.text.stopped:
            kept = row.text.n_tokens
            row.tokens, row.logprobs = row.tokens[:kept], row.logprobs[:kept]
            row.ended = True
    return piece


def take_checked(
    row: Row, guess: list[int], chosen: list[tuple[int, float]], request: Request
) -> Iterator[str]:
    """Give a row its next tokens: as many as were chosen after a right guess, and one more.

    Args:
        chosen: the next token, then for each token of the guess the one after it, all with their
            log-probabilities.
    """
    right = 0
    for (token, logprob), guessed in zip(chosen, [*guess, None], strict=True):
        yield _take(row, token, logprob, request)
        if row.done or token != guessed:
            break
        right += 1
    if row.lookup is not None:
        row.lookup.learn(len(guess), right)


def _score_prompts(rows: list[Row], segments: list[Segment], logits: torch.Tensor) -> None:
    """Add the log-probabilities of the prompt tokens that a pass's logits predict."""
    pieces = logits.split([segment.length for segment in segments])
    for (i, start, _), piece in zip(segments, pieces, strict=True):
        score_prompt(rows[i], start, piece)


def score_prompt(row: Row, start: int, logits: torch.Tensor) -> None:
    """Add the log-probabilities of those prompt tokens that logits from ``start`` on predict."""
    if start == 0:
        row.prompt_logprobs.append(0.0)
    predicted = row.prompt[start + 1 : start + len(logits) + 1]
    ids = torch.tensor(predicted, device=logits.device, dtype=torch.long)
    row.prompt_logprobs += token_logprobs(logits[: len(predicted)], ids).tolist()
