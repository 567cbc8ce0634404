"""Continuous batching: sequences take slots of the cache as they come, and free them as they end.

Each step is one pass through the network. It brings the next token of every sequence that is being
decoded, together with pieces of the prompts that wait to be read.
"""

from collections import deque
from collections.abc import Sequence as List
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch

from llama import heartbeat
from llama.adapters.changes import write_prefix
from llama.engine.prefix_cache import PrefixCache, common_prefix
from llama.engine.results import FinishReason
from llama.engine.runner import IN_FLIGHT, Pass, Piece, Runner
from llama.engine.sequence import Alternatives, Event, Sequence
from llama.errors import NotFinite
from llama.layers.varlen import MAX_DRAFT
from llama.model import Transformer
from llama.sampling import token_logprobs
from llama.tokenizer import BaseTokenizer

if TYPE_CHECKING:
    from llama.engine.graphs import DecodingSteps

AHEAD = 4  # sequences for each slot, where many wait: some are prepared while others run
PREFILL_TOKENS = 2048  # tokens of all prompts in a step, unless the model takes more of one
_SCORED = 512  # tokens of a prompt in a step if more of its outputs are needed
_WORTH_WAITING = 64  # tokens of a prompt that is being read, which another one has too


@dataclass
class Counts:
    """Counts of the engine's work."""

    prompt_tokens: int = 0  # read
    reused_tokens: int = 0  # that the cache held
    generated_tokens: int = 0
    passes: int = 0


class Engine:
    """Runs sequences on a model, which nothing else may use in the meantime. For one thread.

    On several ranks each has an engine, and all get the same calls in the same order.

    Attributes:
        prefill_beside_decoding: tokens of prompts that a step reads while others are being
            decoded: few keep their streams smooth, many get a batch done sooner.
        max_decoded: tokens that a step decodes at most, drafts included; None for no limit.
        decode: a faster way to the logits of passes that only decode, without adapters.
        runs_ahead: whether to start the next pass before the results of one are known, so that
            the device never waits for the host.
    """

    def __init__(self, model: Transformer, tokenizer: BaseTokenizer):
        self.model = model
        self.tokenizer = tokenizer
        self.prefill_beside_decoding = PREFILL_TOKENS
        self.max_decoded: int | None = None
        self.decode: DecodingSteps | None = None
        self.runs_ahead = model.capability.kind == "cuda"
        self.counts = Counts()
        self._runner = Runner(model, tokenizer.n_words)
        self._ahead: Pass | None = None  # started, with the results of the last one still unknown
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # in the order in which they came
        self._prefixes = PrefixCache(model.params.max_batch_size)
        self._n_passes = model.n_passes  # any other pass changes the cache

    @property
    def n_running(self) -> int:
        return len(self._running)

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    def submit(self, sequences: List[Sequence], network_may_change: bool = True) -> None:
        """Queue sequences; each takes a slot of the cache when one is free, first come first.

        Args:
            sequences: of any number.
            network_may_change: whether the caller may change weights or hooks between steps, which
                then look for changes. Of a small network's token that takes a tenth of the time.

        Raises:
            ValueError: a prompt is empty; none is queued then.
        """
        if not all(sequence.prompt for sequence in sequences):
            raise ValueError("a prompt has no tokens: begin it with the tokenizer's bos_id")
        for sequence in sequences:
            sequence.begin(self.tokenizer)
        self._waiting += sequences
        if sequences and self.decode is not None:
            self.decode.look_again(network_may_change)

    def cancel(self, sequence: Sequence, reason: FinishReason = "cancelled") -> None:
        """End a sequence, unless it has ended; its slot is free at once."""
        if sequence.finish_reason is None:
            self._finish(sequence, reason)

    def cancel_all(self) -> None:
        """Cancel all sequences."""
        for sequence in [*self._running, *self._waiting]:
            self.cancel(sequence)

    def forget(self) -> None:
        """Reuse nothing of what the cache holds."""
        self._prefixes.clear()

    def step(self) -> list[Event]:
        """Admit sequences to free slots, and do one pass.

        Returns:
            An event for each sequence that has new text, a new token or has ended.

        Raises:
            NotFinite: the network's output isn't. All running sequences have ended with "error",
                and the cache is empty.
            RankLost: another rank has failed or can't be reached.
        """
        if self.model.n_passes != self._n_passes:
            self._prefixes.clear()
        try:
            current, self._ahead = self._ahead, None
            if current is None:
                self._admit()
                if not (pieces := self._schedule()):
                    return []
                current = self._start(pieces)
            if self._goes_on_after(current):
                self._ahead = self._start(_next_pieces(current), current.tokens)
            return self._finish_pass(current)
        except BaseException as error:
            self._ahead = None
            self._prefixes.clear()  # of copies and passes that were interrupted
            if isinstance(error, NotFinite):
                self.model.clear_cache()  # where a NaN would spread to later sequences
                for sequence in list(self._running):
                    self._finish(sequence, "error")
            else:
                heartbeat.explain(error)
            raise

    def _admit(self) -> None:
        # One that waits for another's prompt keeps a slot free.
        for sequence in [*islice(self._waiting, len(self._prefixes.free))]:
            if self._waits(sequence):
                continue
            self._waiting.remove(sequence)
            adapter = sequence.adapter
            ids = sequence.keyed(sequence.input_ids)
            # Tokens whose outputs are needed must pass through the network.
            limit = len(ids) - sequence.n_outputs if _reuses(sequence) else 0
            sequence.slot, n_reused, copy = self._prefixes.take(ids, limit)
            self._running.append(sequence)
            if copy is not None:
                self.model.copy_cache(copy[0], sequence.slot, copy[1])
            sequence.n_cached = write_prefix(self.model, sequence.slot, adapter, n_reused)
            self._prefixes.write(sequence.slot, 0, ids[: sequence.n_cached])
            sequence.n_reused = max(n_reused - sequence.n_virtual, 0)
            self.counts.reused_tokens += sequence.n_reused

    def _waits(self, sequence: Sequence) -> bool:
        """Return whether a prompt being read begins so much like this one that waiting pays.

        For an equal prompt it always does, as for the answers to one.
        """
        if not _reuses(sequence):
            return False
        ids = sequence.input_ids
        held = self._prefixes.longest(sequence.keyed(ids))
        return any(
            common_prefix(ids, other.input_ids, len(ids) - 1)
            > held + (1 if other.input_ids == ids else _WORTH_WAITING)
            for other in self._running
            if other.is_prefilling
            and other.adapter is sequence.adapter
            and other.salt == sequence.salt
        )

    def _schedule(self) -> list[Piece]:
        """Return each decoding sequence's last token and draft, and some tokens of prompts."""
        n_decoding = sum(not sequence.is_prefilling for sequence in self._running)
        budget = max(PREFILL_TOKENS, self.model.prefill_tokens)
        if n_decoding:
            budget = min(budget, self.prefill_beside_decoding)
        max_draft = None
        if self.max_decoded is not None:
            max_draft = max(self.max_decoded // max(n_decoding, 1) - 1, 0)
        pieces = []
        for sequence in self._running:
            assert sequence.slot is not None
            if not sequence.is_prefilling:
                start = len(sequence.input_ids) + len(sequence.tokens) - 1
                tokens = [sequence.tokens[-1], *sequence.draft(max_draft)]
                n = len(tokens)
                pieces.append(Piece(sequence, sequence.slot, start, tokens, n, n))
            elif budget:
                pieces.append(self._prompt_piece(sequence, sequence.slot, budget))
                budget -= len(pieces[-1].tokens)
        # Long pieces stand together, behind the others: few calls of attention serve them.
        return sorted(pieces, key=lambda piece: (len(piece.tokens) > MAX_DRAFT, piece.slot))

    def _prompt_piece(self, sequence: Sequence, slot: int, budget: int) -> Piece:
        """Return the next tokens of a prompt: some, so that scores and masks stay small."""
        n_needed, start = sequence.n_outputs, sequence.n_cached
        n_tokens = min(budget, self.model.prefill_tokens, _SCORED if n_needed > _SCORED else budget)
        tokens = sequence.input_ids[start : start + n_tokens]
        is_continued = not sequence.is_read_only and sequence.max_new_tokens > 0
        n_left = len(sequence.input_ids) - start - len(tokens)
        n_outputs = min(max(n_needed - n_left, 0), len(tokens))
        return Piece(sequence, slot, start, tokens, n_outputs, int(is_continued and not n_left))

    def _start(self, pieces: list[Piece], drawn: torch.Tensor | None = None) -> Pass:
        self.counts.passes += 1
        self._n_passes = self.model.n_passes + 1
        return self._runner.start(pieces, self.decode, drawn)

    def _goes_on_after(self, current: Pass) -> bool:
        """Return whether the next pass is clear before this one's results are known.

        What it computes for sequences that these results end is thrown away. One sequence that may
        draft, whose alternatives are read or whose logits the host changes makes all wait.
        """
        if not self.runs_ahead or (self._waiting and self._prefixes.free):
            return False
        return len(current.pieces) == len(self._running) and all(
            piece.is_running
            and piece.n_drawn == 1
            and not piece.sequence.params.prompt_lookup_num_tokens
            and piece.sequence.params.logits_processor is None  # which is called with all tokens
            and piece.sequence.grammar is None  # whose masks depend on them
            and not piece.sequence.params.top_logprobs  # whose reading waits for the device
            and len(piece.sequence.tokens) + 1 < piece.sequence.max_new_tokens
            for piece in current.pieces
        )

    def _finish_pass(self, current: Pass) -> list[Event]:
        """Wait for a pass, and give its results to the sequences."""
        chosen, is_redrawn = self._runner.finish(current)
        if is_redrawn:
            self._ahead = None  # goes on from other tokens
        events, first = [], 0
        for piece, output in zip(current.pieces, current.outputs, strict=True):
            sequence, draft = piece.sequence, piece.tokens[1:]
            some = chosen[first : first + piece.n_drawn]
            first += piece.n_drawn
            if not piece.is_running:  # since the pass was started
                continue
            tokens = sequence.tokens[-1:] if piece.tokens == [IN_FLIGHT] else piece.tokens
            self._prefixes.write(piece.slot, piece.start, sequence.keyed(tokens))
            if sequence.is_prefilling:
                self._read(piece, output)
                draft = []
            if sequence.finish_reason is not None:
                events.append(Event(sequence))
            elif some:
                events.append(self._append(sequence, draft, some, output[-len(some) :]))
        return events

    def _read(self, piece: Piece, output: torch.Tensor) -> None:
        """Note that a prompt's piece is in the cache, and keep what is wanted of its outputs."""
        sequence = piece.sequence
        first = max(sequence.n_virtual - piece.start, 0)  # behind virtual tokens
        of_prompt = output[first:]
        self.counts.prompt_tokens += len(piece.tokens[first:])
        sequence.n_cached += len(piece.tokens)
        if sequence.params.scores_prompt:
            self._score_prompt(sequence, of_prompt)
        if sequence.output == "scores":
            self._score_targets(sequence, output)
        if sequence.output == "mean":
            part = of_prompt.sum(0) / len(sequence.prompt)
            sequence.pooled = part if sequence.pooled is None else sequence.pooled + part
        if sequence.is_prefilling:
            return
        if sequence.output in ("last", "logits"):
            sequence.pooled = output[-1].clone()
        if sequence.is_read_only:
            self._finish(sequence, "stop")
        elif sequence.max_new_tokens == 0:  # only the prompt was requested
            self._finish(sequence, "length")

    def _score_prompt(self, sequence: Sequence, logits: torch.Tensor) -> None:
        """Add the log-probabilities of the prompt's tokens that a piece of it predicts."""
        if not sequence.prompt_logprobs and len(logits):
            sequence.prompt_logprobs.append(0.0)
            sequence.prompt_top_logprobs.append([])
        start = len(sequence.prompt_logprobs)
        predicted = sequence.prompt[start : start + len(logits)]
        ids = torch.tensor(predicted, device=logits.device, dtype=torch.long)
        logits = logits[: len(predicted)]
        sequence.prompt_logprobs += token_logprobs(logits, ids).tolist()
        sequence.prompt_top_logprobs += self._top(logits, sequence)

    def _score_targets(self, sequence: Sequence, logits: torch.Tensor) -> None:
        """Add the scores of what the targets have after each row of logits."""
        before = sequence.pooled
        if before is None:
            before = logits.new_zeros(0, len(sequence.targets), 2)
        ids = torch.tensor(sequence.targets, device=logits.device).T[len(before) :][: len(logits)]
        is_best = logits.argmax(-1, keepdim=True) == ids  # (n_rows, n_targets)
        scores = torch.stack((logits.log_softmax(-1).gather(1, ids), is_best.float()), -1)
        sequence.pooled = torch.cat((before, scores))

    def _append(
        self,
        sequence: Sequence,
        draft: list[int],
        chosen: list[tuple[int, float]],
        logits: torch.Tensor,
    ) -> Event:
        before = len(sequence.tokens)
        text = sequence.append(draft, chosen)
        n_new = max(len(sequence.tokens) - before, 0)
        self.counts.generated_tokens += n_new
        if sequence.params.top_logprobs:
            sequence.top_logprobs += self._top(logits[:n_new], sequence)
            del sequence.top_logprobs[len(sequence.tokens) :]
        if sequence.finish_reason is not None:
            self._leave(sequence)
        return Event(sequence, text)

    def _top(self, logits: torch.Tensor, sequence: Sequence) -> list[Alternatives]:
        """Return a sequence's most probable tokens at each row of logits."""
        if not sequence.params.top_logprobs:
            return [[] for _ in logits]
        logprobs = logits.log_softmax(-1)[:, : self.tokenizer.n_words]
        values, ids = logprobs.topk(min(sequence.params.top_logprobs, logprobs.shape[1]))
        return [
            list(zip(some_ids, some, strict=True))
            for some_ids, some in zip(ids.tolist(), values.tolist(), strict=True)
        ]

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.finish(reason)
        self._leave(sequence)

    def _leave(self, sequence: Sequence) -> None:
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        elif sequence.slot is not None:
            self._running.remove(sequence)
            self._prefixes.release(sequence.slot)
        if self._ahead is not None and not any(piece.is_running for piece in self._ahead.pieces):
            self._ahead = None  # which would keep the sequences and their adapters


def _reuses(sequence: Sequence) -> bool:
    """Return whether a prompt may begin with what the cache holds."""
    is_whole = sequence.params.scores_prompt or sequence.is_read_only
    return not is_whole or sequence.output == "scores"


def _next_pieces(current: Pass) -> list[Piece]:
    """Return the pieces of the pass that takes the tokens which one draws."""
    return [
        Piece(piece.sequence, piece.slot, piece.start + len(piece.tokens), [IN_FLIGHT], 1, 1)
        for piece in current.pieces
    ]
