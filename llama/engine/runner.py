"""Forward passes with the draws after them, which the host starts without waiting for them."""

from collections.abc import Callable
from collections.abc import Sequence as List
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import torch

from llama import parallel
from llama.adapters.rows import AdapterRows
from llama.engine.sequence import Sequence
from llama.errors import NotFinite
from llama.layers.batch import Segment, to_device, to_host
from llama.logits.changes import LogitChanges
from llama.model import Transformer
from llama.sampling import sample, token_logprobs

if TYPE_CHECKING:
    from llama.engine.graphs import DecodingSteps

_CANDIDATES = 1024  # tokens that are sorted to draw one; if they aren't enough, all are
_AFTER_REDRAWING = 64  # passes that sort all tokens, after one whose candidates weren't enough
IN_FLIGHT = -1  # stands for a token that only the device knows yet


class Piece(NamedTuple):
    """A sequence's part of a pass: tokens from a position on, some of which may be a draft."""

    sequence: Sequence
    slot: int
    start: int
    tokens: list[int]
    n_outputs: int  # how many of the last tokens' outputs are needed
    n_drawn: int  # after how many of the last tokens one is drawn

    @property
    def is_running(self) -> bool:
        """True unless its sequence has ended, which may be known after the pass was started."""
        return self.sequence.finish_reason is None

    @property
    def is_pooled(self) -> bool:
        """True if its outputs are hidden states, False if they are logits."""
        return self.sequence.output in ("mean", "last")


class Pass(NamedTuple):
    """A pass, which the device may still be computing."""

    pieces: list[Piece]
    outputs: tuple[torch.Tensor, ...]  # each piece's logits, or hidden states to be pooled
    logits: torch.Tensor  # (n_drawn, n_outputs), the model's own
    changed: torch.Tensor  # (n_drawn, n_words), that tokens are drawn from
    sampling: list[torch.Tensor]  # of each draw: temperature, top_p, random number; top_k, min_p
    tokens: torch.Tensor  # that were drawn
    # Waits for the tokens, their log-probabilities' bits, whether candidates were enough, and
    # whether all outputs are finite: int32, (3 * n_drawn + 1,). None if there are no outputs.
    wait: Callable[[], torch.Tensor] | None


class Runner:
    """Runs passes on a model: one upload each, and one download for all results.

    Args:
        model: of which nothing else may use the cache in the meantime.
        n_words: how many of the outputs stand for tokens; a vocabulary may be padded beyond them.
    """

    def __init__(self, model: Transformer, n_words: int):
        self._model = model
        self._n_words = n_words
        size = model.params.max_batch_size, model.params.max_seq_len
        self._changes = LogitChanges(*size, n_words)
        self._sorts_all = 0  # passes to come whose draws are likely to need all tokens

    @torch.inference_mode()
    def start(
        self, pieces: list[Piece], decode: "DecodingSteps | None", drawn: torch.Tensor | None = None
    ) -> Pass:
        """Start a pass.

        Args:
            pieces: what to compute.
            decode: a faster way to the logits, if all pieces decode; None if there is none.
            drawn: the tokens of the pass before, where they are the ids that this one takes.
        """
        owners = [piece.sequence for piece in pieces for _ in range(piece.n_drawn)]
        ahead = 0 if drawn is None else 1  # draws that the sequences don't know of
        floats = [
            [float(sequence.params.temperature) for sequence in owners],
            [float(sequence.params.top_p) for sequence in owners],
            [piece.sequence.uniform(ahead + i) for piece in pieces for i in range(piece.n_drawn)],
        ]
        limits = [
            (float(min(each.params.top_k, self._n_words)), float(each.params.min_p))
            for each in owners
        ]
        if any(map(any, limits)):
            floats += map(list, zip(*limits, strict=True))
        change = self._changes.of(pieces, drawn is not None)
        floats = [*change.floats, *floats]
        device = self._model.freqs_cis.device
        segments = [Segment(piece.slot, piece.start, len(piece.tokens)) for piece in pieces]
        ids = [token for piece in pieces for token in piece.tokens]
        counts = [piece.n_outputs for piece in pieces]
        owned = [(p.sequence.adapter, len(p.tokens), p.n_outputs, p.is_pooled) for p in pieces]
        rows = AdapterRows(owned)
        decodes = len(ids) == len(owners) and not rows  # steps are recorded without adapters
        if decode is not None and decodes and decode.supports(segments):
            whole = [ids, *decode.places(segments), *change.whole]
            tokens, slots, positions, *numbers = to_device(device, whole, floats)
            tokens = tokens if drawn is None else drawn
            logits = decode(tokens, segments, slots, positions)
            outputs = logits.split(counts)
        else:
            ends = accumulate(len(piece.tokens) for piece in pieces)
            chosen = [i for end, n in zip(ends, counts, strict=True) for i in range(end - n, end)]
            whole = [ids, chosen, *rows.whole, *change.whole]
            tokens, select, *numbers = to_device(device, whole, floats)
            indices, numbers = numbers[: len(rows.whole)], numbers[len(rows.whole) :]
            tokens = tokens if drawn is None else drawn
            with rows.applied(self._model, indices):
                hidden = self._model.hidden_states(
                    tokens, segments, select if len(chosen) < len(ids) else None
                )
                outputs = self._outputs(hidden, pieces)
            logits = _drawn_rows(outputs, pieces)
        n_changes = len(change.whole) + len(change.floats)
        changed = change.apply(logits[:, : self._n_words], tokens, numbers[:n_changes])
        started = Pass(pieces, outputs, logits, changed, numbers[n_changes:], tokens, None)
        tokens, results = self._draw(started)
        return started._replace(tokens=tokens, wait=None if results is None else to_host(results))

    def _outputs(self, hidden: torch.Tensor, pieces: List[Piece]) -> tuple[torch.Tensor, ...]:
        """Return each piece's hidden states if they are to be pooled, its logits otherwise."""
        counts = [piece.n_outputs for piece in pieces]
        if not any(piece.is_pooled for piece in pieces):
            return self._model.logits(hidden).split(counts)
        parts = list(zip(hidden.split(counts), pieces, strict=True))
        rest = [part for part, piece in parts if not piece.is_pooled]
        logits = self._model.logits(torch.cat(rest)) if rest else hidden[:0]
        some = iter(logits.split([len(part) for part in rest]))
        return tuple(part.float() if piece.is_pooled else next(some) for part, piece in parts)

    def _draw(self, started: Pass) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Draw tokens; return them and all that the host will want to know."""
        logits, pieces, outputs = started.logits, started.pieces, started.outputs
        if not any(len(output) for output in outputs):
            return logits, None
        rest = [o for o, p in zip(outputs, pieces, strict=True) if len(o) > p.n_drawn]
        parts = [part for part in (logits, *rest) if len(part)]
        # A NaN is both extremes.
        finite = torch.stack([x for part in parts for x in part.aminmax()]).isfinite().all()[None]
        if not len(logits):
            return logits, finite.int()
        params = [piece.sequence.params for piece in pieces if piece.n_drawn]
        temperature, top_p, uniforms, *limits = started.sampling
        if all(each.temperature == 0 for each in params):
            tokens, is_enough = started.changed.argmax(dim=-1), torch.ones_like(top_p)
        else:
            most = max(_CANDIDATES, *(each.top_k for each in params))
            n_candidates = None if self._sorts_all else most
            self._sorts_all = max(self._sorts_all - 1, 0)
            tokens, is_enough = sample(
                started.changed, temperature, top_p, uniforms, n_candidates, *limits
            )
        logprobs = torch.zeros_like(top_p)
        if any(each.logprobs for each in params):
            logprobs = token_logprobs(logits, tokens)
        results = torch.cat((tokens.int(), logprobs.view(torch.int32), is_enough.int(), finite))
        results = parallel.broadcast(results)  # ranks may round differently
        return results[: len(tokens)].long(), results

    def finish(self, started: Pass) -> tuple[list[tuple[int, float]], bool]:
        """Wait for a pass.

        Returns:
            For each draw its token and, where a sequence asks for it, log-probability; and whether
            tokens aren't those of the pass, since it had too few candidates.

        Raises:
            NotFinite: an output holds an infinity or a NaN.
        """
        if started.wait is None:
            return [], False
        results = started.wait()
        if not results[-1]:
            raise NotFinite
        tokens, bits, is_enough = results[:-1].view(3, -1)
        logprobs, is_redrawn = bits.contiguous().view(torch.float32), not is_enough.all()
        if is_redrawn:
            self._sorts_all = _AFTER_REDRAWING
            temperature, top_p, uniforms, *limits = started.sampling
            among_all, _ = sample(started.changed, temperature, top_p, uniforms, None, *limits)
            enough = is_enough.bool().to(among_all.device)  # neighbours keep their tokens
            among_all = torch.where(enough, tokens.to(among_all), among_all)
            tokens = parallel.broadcast(among_all)
            logprobs = token_logprobs(started.logits, tokens)
        return list(zip(tokens.tolist(), logprobs.tolist(), strict=True)), is_redrawn


def _drawn_rows(outputs: List[torch.Tensor], pieces: List[Piece]) -> torch.Tensor:
    """Return the logits that tokens are drawn from, (n_drawn, n_outputs)."""
    rows = [
        output[len(output) - piece.n_drawn :]
        for output, piece in zip(outputs, pieces, strict=True)
        if piece.n_drawn
    ]
    if len(rows) == 1:
        return rows[0]
    return torch.cat(rows) if rows else outputs[0][:0]
