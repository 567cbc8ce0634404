"""Log-probabilities and usage, in OpenAI's format."""

import re
import threading
import time
import uuid
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from llama.engine.detokenizer import Detokenizer
from llama.engine.sequence import Alternatives
from llama.server.loop import Job
from llama.server.schemas import CompletionLogprobs, PromptDetails, Usage
from llama.server.schemas_chat import ChatLogprobs, TokenLogprob, TopLogprob
from llama.structure.vocabulary import piece_bytes
from llama.tokenizer import BaseTokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_known: "WeakKeyDictionary[BaseTokenizer, list[bytes]]" = WeakKeyDictionary()
_lock = threading.Lock()  # answers with log-probabilities are built in threads


def new_id(kind: str) -> tuple[str, int]:
    """Return an answer's id, and the present time in seconds."""
    return f"{kind}-{uuid.uuid4().hex}", int(time.time())


def usage(jobs: Sequence[Job], n: int = 1) -> Usage:
    """Return the token counts of a request's jobs, ``n`` of which answer each prompt."""
    n_prompt = sum(len(job.sequence.prompt) for job in jobs[::n])
    n_generated = sum(len(job.sequence.tokens) for job in jobs)
    n_cached = sum(job.sequence.n_reused for job in jobs[::n])
    return Usage(
        prompt_tokens=n_prompt,
        completion_tokens=n_generated,
        total_tokens=n_prompt + n_generated,
        prompt_tokens_details=PromptDetails(cached_tokens=n_cached),
    )


def token_text(tokenizer: BaseTokenizer, token: int, begins: bool = False) -> str:
    """Return a token's text in the middle of a text, or at its beginning."""
    text = tokenizer.decode_infilling([token]) or tokenizer.token_piece(token)
    is_cut = begins and text[0] == " " and tokenizer.decode([token]) == text[1:]
    return text[1:] if is_cut else text


def token_bytes(tokenizer: BaseTokenizer, token: int, begins: bool = False) -> list[int] | None:
    """Return a token's bytes; None if they are part of a character and unknown."""
    byte = _BYTE.fullmatch(tokenizer.token_piece(token))
    if byte:
        return [int(byte[1], 16)]
    text = token_text(tokenizer, token, begins)
    if "\ufffd" not in text:
        return list(text.encode())
    pieces = _pieces(tokenizer)
    return list(pieces[token]) if pieces else None


def _pieces(tokenizer: BaseTokenizer) -> list[bytes]:
    """Return the bytes of a tokenizer's pieces, found once; none if they aren't known."""
    with _lock:
        if tokenizer not in _known:
            try:
                _known[tokenizer] = piece_bytes(tokenizer)
            except ValueError:
                _known[tokenizer] = []
        return _known[tokenizer]


class Scores:
    """The log-probabilities of a sequence's tokens, returned together with its text.

    Args:
        echo: return those of the prompt first.
    """

    def __init__(self, tokenizer: BaseTokenizer, job: Job, echo: bool = False):
        self._tokenizer = tokenizer
        self._sequence = job.sequence
        self._echo = echo
        self._n_returned = 0
        self._n_echoed = 0  # characters of the prompt

    def _next(self, n_tokens: int) -> list[tuple[int, float | None, Alternatives]]:
        """Return the tokens among the first ``n_tokens`` that haven't been returned yet."""
        sequence = self._sequence
        scored: list[tuple[int, float | None, Alternatives]] = []
        if self._echo:
            self._echo = False
            scores = [None, *sequence.prompt_logprobs[1:]]  # nothing predicts the first token
            tops = sequence.prompt_top_logprobs
            scored += zip(sequence.prompt, scores, tops, strict=True)
        for i in range(self._n_returned, n_tokens):
            top = sequence.top_logprobs[i] if sequence.top_logprobs else []
            scored.append((sequence.tokens[i], sequence.logprobs[i], top))
        self._n_returned = max(self._n_returned, n_tokens)
        return scored

    def for_completion(self, n_tokens: int) -> CompletionLogprobs:
        """Return the log-probabilities of a completion's next tokens, up to ``n_tokens``."""
        offsets = self._prompt_starts() if self._echo else []
        assert self._sequence.detokenizer is not None
        starts = self._sequence.detokenizer.starts[self._n_returned : n_tokens]
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
        text = Detokenizer(self._tokenizer.decode)
        for token in self._sequence.prompt:
            text.push(token)
        text.flush()
        self._n_echoed = len(text.text)
        return text.starts

    def _by_text(self, top: Alternatives) -> dict[str, float]:
        scores: dict[str, float] = {}
        for token, score in top:
            text = token_text(self._tokenizer, token)
            if "\ufffd" in text:  # part of a character
                text = self._tokenizer.token_piece(token)
            scores.setdefault(text, score)  # of equal texts, the more probable
        return scores

    def for_chat(self, n_tokens: int) -> ChatLogprobs:
        """Return the log-probabilities of an answer's next tokens, up to ``n_tokens``.

        The bytes of all of them are those of the text: SentencePiece's first piece has no space.
        """
        content: list[TokenLogprob] = []
        assert self._sequence.detokenizer is not None
        begins = not self._n_returned and not self._sequence.detokenizer.text.startswith(" ")
        for token, score, top in self._next(n_tokens):
            most_probable = [self._named(t, value, begins) for t, value in top]
            named = self._named(token, score or 0.0, begins)
            begins = False
            content.append(TokenLogprob(**dict(named), top_logprobs=most_probable))
        return ChatLogprobs(content=content)

    def _named(self, token: int, score: float, begins: bool) -> TopLogprob:
        named = self._tokenizer, token, begins
        return TopLogprob(token=token_text(*named), logprob=score, bytes=token_bytes(*named))
