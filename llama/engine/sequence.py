"""A sequence in the engine: its prompt, its parameters and its results."""

import random
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Literal, NamedTuple

import torch

from llama.adapters import Adapter, keyed, n_virtual
from llama.args import ModelArgs
from llama.engine.detokenizer import Detokenizer
from llama.engine.prompt_lookup import PromptLookup
from llama.engine.results import FinishReason
from llama.errors import PromptTooLong, checked_list
from llama.logits.masks import Grammar
from llama.sampling import SamplingParams
from llama.tokenizer import BaseTokenizer
from llama.tokenizers.control import End, with_marks

Output = Literal["text", "infilling", "ids", "mean", "last", "logits", "scores"]
Alternatives = list[tuple[int, float]]  # token ids and log-probabilities, most probable first


@dataclass(eq=False)
class Sequence:
    """One prompt and its continuation.

    Args:
        prompt: token ids.
        params: the parameters of generation.
        seed: decides its draws, so that they don't depend on other sequences.
        max_new_tokens: at most, as far as the cache has room.
        output: the tokens, decoded as a text or what is missing between two, or the ids alone;
            or, of a prompt that is only read, the mean or last of its hidden states (dim,), the
            last token's logits (n_outputs,), or the scores of ``targets`` (n_scored, n_targets, 2):
            log-probabilities, and 1 for a token that is the most probable, else 0.
        in_context: whether the text continues the prompt's, or begins a text.
        ends: those of the stop strings and ids that are the tokenizer's or the format's own, which
            no ``stop_reason`` names.
        visible: control ids whose spelling is part of the text.
        adapter: which changes the network for it; kept also if it is unloaded meanwhile.
        targets: ids whose scores are wanted, (n_targets, n_scored): the last one of each after the
            whole prompt, the one before it after all but the prompt's last token, and so on.
    """

    prompt: list[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    seed: str = ""
    max_new_tokens: int = 0
    output: Output = "text"
    in_context: bool = False
    ends: frozenset[End] = frozenset()
    visible: Mapping[int, str] = field(default_factory=dict)
    adapter: Adapter | None = None
    targets: List[List[int]] = ()

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[Alternatives] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_top_logprobs: list[Alternatives] = field(default_factory=list)
    pooled: torch.Tensor | None = None  # the result of a prompt that is only read
    grammar: Grammar | None = None  # the form that the answer must have
    finish_reason: FinishReason | None = None
    stop_reason: End | None = None  # the caller's stop string or id that ended it
    slot: int | None = None  # of the cache
    n_cached: int = 0  # of input_ids in the cache
    n_reused: int = 0  # tokens of the prompt that the cache held before
    detokenizer: Detokenizer | None = None
    _spelled: dict[int, str] = field(default_factory=dict)  # stop strings that are control pieces
    _lookup: PromptLookup | None = None
    _rng: random.Random | None = None
    _draws: list[float] = field(default_factory=list)

    def begin(self, tokenizer: BaseTokenizer) -> None:
        """Get ready to generate, with the tokenizer that decodes the text."""
        stop, controls = self.params.stop, tokenizer.control_ids
        self._spelled = {controls[s]: s for s in stop if s in controls and s not in self.ends}
        if self.output in ("text", "infilling"):
            kept = {s for s in stop if self.params.include_stop and s not in self.ends}
            marks = {**self.visible, **{i: s for i, s in self._spelled.items() if s in kept}}
            decode = tokenizer.decode if self.output == "text" else tokenizer.decode_infilling
            context = self.prompt if self.in_context else ()
            marked = with_marks(decode, tokenizer, marks)
            self.detokenizer = Detokenizer(marked, stop, context, kept, marks)
        if self.params.prompt_lookup_num_tokens:
            self._lookup = PromptLookup(self.prompt, self.params.prompt_lookup_num_tokens)
        self._rng = random.Random(self.seed)

    @cached_property
    def input_ids(self) -> list[int]:
        """The ids that the network reads: the adapter's virtual tokens, then the prompt."""
        return [*self.adapter.virtual, *self.prompt] if self.adapter else self.prompt

    @cached_property
    def salt(self) -> int:
        """A number that only sequences with the same ``cache_salt`` have; 0 for none."""
        text = (self.params.cache_salt or "").encode(errors="surrogatepass")
        return int.from_bytes(sha256(text).digest()[:16], "big") if text else 0

    def keyed(self, tokens: List[int]) -> List[int]:
        """Return tokens as the cache of prefixes tells them from other sequences'."""
        return keyed(tokens, self.adapter, self.salt)

    @property
    def n_virtual(self) -> int:
        return n_virtual(self.adapter)

    @property
    def is_read_only(self) -> bool:
        """True if nothing is generated after the prompt."""
        return self.output in ("mean", "last", "logits", "scores")

    @property
    def n_outputs(self) -> int:
        """The number of the prompt's last tokens whose outputs are needed."""
        if self.params.scores_prompt or self.output == "mean":
            return len(self.input_ids)
        return len(self.targets[0]) if self.output == "scores" else 1

    @property
    def is_prefilling(self) -> bool:
        """True if some of the prompt isn't in the cache yet."""
        return self.n_cached < len(self.input_ids)

    @property
    def text(self) -> str:
        """The text so far, without the stop string that ended it."""
        return self.detokenizer.text if self.detokenizer else ""

    @property
    def n_decoded(self) -> int:
        """The number of tokens whose text has been returned in full."""
        if self.finish_reason is not None or self.detokenizer is None:
            return len(self.tokens)
        return self.detokenizer.n_tokens

    def uniform(self, ahead: int) -> float:
        """Return the number in [0, 1) that draws the token ``ahead`` of the next one."""
        assert self._rng is not None
        number = len(self.tokens) + ahead
        while len(self._draws) <= number:
            self._draws.append(self._rng.random())
        return self._draws[number]

    def draft(self, limit: int | None = None) -> list[int]:
        """Propose at most ``limit`` tokens after the next one, one less than there is room for."""
        if self._lookup is None:
            return []
        room = self.max_new_tokens - len(self.tokens) - 1
        draft = self._lookup.draft(room if limit is None else min(room, limit))
        return draft if self.grammar is None else draft[: self.grammar.accepted(draft)]

    def append(self, draft: List[int], chosen: List[tuple[int, float]]) -> str:
        """Append tokens: as many as the draft has right, and one more.

        Args:
            chosen: the next token, then for each token of the draft the one after it, all with
                their log-probabilities.

        Returns:
            The text that has become certain.
        """
        text, n_accepted = "", 0
        for (token, logprob), expected in zip(chosen, [*draft, None], strict=True):
            text += self._append(token, logprob)
            if self.finish_reason is not None or token != expected:
                break
            n_accepted += 1
        if self._lookup is not None:
            self._lookup.learn(len(draft), n_accepted)
        return text

    def _append(self, token: int, logprob: float) -> str:
        if self.grammar is not None:
            self.grammar.push(token)
            if self.grammar.error:
                return self.finish("error")
        if token in self.params.stop_token_ids:
            self.stop_reason = None if token in self.ends else self._spelled.get(token, token)
            if not (self.detokenizer and self.params.include_stop and token in self._spelled):
                return self.finish("stop")
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self._lookup is not None:
            self._lookup.push(token)
        text = self.detokenizer.push(token) if self.detokenizer else ""
        if self.detokenizer and self.detokenizer.stopped:
            return text + self.finish("stop")
        if self.grammar is not None and self.grammar.is_finished:
            return text + self.finish("stop")
        if len(self.tokens) >= self.max_new_tokens:
            return text + self.finish("length")
        return text

    def finish(self, reason: FinishReason) -> str:
        """End the sequence, and return the text that was held back."""
        text = ""
        if self.detokenizer is not None and reason in ("stop", "length"):
            text = self.detokenizer.flush()
            if self.detokenizer.stopped:
                reason, kept = "stop", self.detokenizer.n_tokens
                stop = self.detokenizer.stopped
                self.stop_reason = None if stop in self.ends else stop
                self.tokens, self.logprobs = self.tokens[:kept], self.logprobs[:kept]
        self.finish_reason = reason
        self._lookup = None  # takes more memory than the results that are kept
        return text


class Event(NamedTuple):
    """The result of a step for a sequence: new text, and whether it has ended."""

    sequence: Sequence
    text: str = ""

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.sequence.finish_reason


def checked_prompts(
    args: ModelArgs, prompts: Iterable[List[int]], adapter: Adapter | None = None
) -> list[list[int]]:
    """Return prompts as lists of token ids.

    Raises:
        TypeError: a prompt isn't a list of ints.
        PromptTooLong: a prompt and its adapter's virtual tokens are more than ``max_seq_len``.
        ValueError: a prompt is empty, or holds an id outside the vocabulary.
    """
    checked, room = [], args.max_seq_len - n_virtual(adapter)
    for i, prompt in enumerate(checked_list(prompts, "prompt_tokens")):
        if isinstance(prompt, str | bytes) or not isinstance(prompt, List):
            raise TypeError(f"prompt {i} is {prompt!r}: give a list of token ids for each prompt")
        ids = list(prompt)
        invalid = [t for t in ids if not isinstance(t, int)]
        if invalid:
            raise TypeError(f"prompt {i} holds {invalid[0]!r}: give token ids, which are int")
        if len(ids) > room:
            raise PromptTooLong(i, len(ids), args.max_seq_len, n_virtual(adapter))
        outside = [t for t in ids if not 0 <= t < args.vocab_size]
        if outside:
            raise ValueError(
                f"prompt {i} holds the token id {outside[0]}, outside the vocabulary of "
                f"{args.vocab_size}"
            )
        checked.append(ids)
    return checked
