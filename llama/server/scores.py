"""What OpenAI's answers say of tokens: their log-probabilities, and how many there are."""

import re
import time
import uuid
from collections.abc import Sequence

from llama.server.jobs import Alternatives, Job
from llama.server.schemas import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptDetails,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from llama.streaming import TextStream
from llama.tokenizer import BaseTokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def new_id(kind: str) -> tuple[str, int]:
    """An answer's id, and the time in seconds."""
    return f"{kind}-{uuid.uuid4().hex}", int(time.time())


def usage(jobs: Sequence[Job], n: int = 1) -> Usage:
    """What a request's rows took, ``n`` of which answer each prompt."""
    n_prompt = sum(len(job.row.prompt) for job in jobs[::n])
    n_written = sum(len(job.row.tokens) for job in jobs)
    return Usage(
        prompt_tokens=n_prompt,
        completion_tokens=n_written,
        total_tokens=n_prompt + n_written,
        prompt_tokens_details=PromptDetails(cached_tokens=sum(job.n_reused for job in jobs[::n])),
    )


def token_text(tokenizer: BaseTokenizer, token: int) -> str:
    """What a token stands for in the middle of a text."""
    return tokenizer.decode_infilling([token]) or tokenizer.token_piece(token)


def token_bytes(tokenizer: BaseTokenizer, token: int) -> list[int] | None:
    """The bytes that a token stands for; None where they are part of a character, unknown."""
    found = _BYTE.fullmatch(tokenizer.token_piece(token))
    if found:
        return [int(found[1], 16)]
    text = token_text(tokenizer, token)
    return None if "\ufffd" in text else list(text.encode())


class Scores:
    """The log-probabilities of a row's tokens, given out as its text is.

    Args:
        echo: whether the prompt's come first.
    """

    def __init__(self, tokenizer: BaseTokenizer, job: Job, echo: bool = False):
        self._tokenizer = tokenizer
        self._job = job
        self._echo = echo
        self._given = 0
        self._n_echoed = 0  # characters of the prompt

    def _next(self, n_tokens: int) -> list[tuple[int, float | None, Alternatives]]:
        """The tokens that haven't been given yet, of ``n_tokens`` in all."""
        job, row = self._job, self._job.row
        found: list[tuple[int, float | None, Alternatives]] = []
        if self._echo:
            self._echo = False
            scores = [None, *row.prompt_logprobs[1:]]  # nothing foresees the first token
            found += zip(row.prompt, scores, job.prompt_top, strict=True)
        written = range(self._given, n_tokens)
        found += [(row.tokens[i], row.logprobs[i], job.top[i] if job.top else []) for i in written]
        self._given = max(self._given, n_tokens)
        return found

    def for_completion(self, n_tokens: int) -> CompletionLogprobs:
        offsets = self._prompt_starts() if self._echo else []
        starts = self._job.row.text.starts[self._given : n_tokens]
        offsets += [self._n_echoed + start for start in starts]
        tokens, scores, tops = [], [], []
        for token, score, top in self._next(n_tokens):
            tokens.append(token_text(self._tokenizer, token))
            scores.append(score)
            tops.append(self._by_text(top) or None)
        return CompletionLogprobs(
            tokens=tokens,
            token_logprobs=scores,
            top_logprobs=tops if any(tops) else None,
            text_offset=offsets,
        )

    def _prompt_starts(self) -> list[int]:
        text = TextStream(self._tokenizer.decode)
        for token in self._job.row.prompt:
            text.push(token)
        text.flush()
        self._n_echoed = len(text.text)
        return text.starts

    def _by_text(self, top: Alternatives) -> dict[str, float]:
        found: dict[str, float] = {}
        for token, score in top:
            text = token_text(self._tokenizer, token)
            if "\ufffd" in text:  # part of a character
                text = self._tokenizer.token_piece(token)
            found.setdefault(text, score)  # of two that read alike, the likelier
        return found

    def for_chat(self, n_tokens: int) -> ChatLogprobs:
        content = []
        for token, score, top in self._next(n_tokens):
            likeliest = [self._named(t, value) for t, value in top]
            named = self._named(token, score or 0.0)
            content.append(TokenLogprob(**dict(named), top_logprobs=likeliest))
        return ChatLogprobs(content=content)

    def _named(self, token: int, score: float) -> TopLogprob:
        text, its_bytes = token_text(self._tokenizer, token), token_bytes(self._tokenizer, token)
        return TopLogprob(token=text, logprob=score, bytes=its_bytes)
