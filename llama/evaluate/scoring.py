"""Log-likelihoods of continuations: what their contexts have in common is read once."""

from collections.abc import Iterator
from collections.abc import Sequence as List
from itertools import islice, zip_longest
from typing import NamedTuple

from llama.args import ModelArgs
from llama.engine.sequence import Sequence
from llama.evaluate.runner import Runner

Score = tuple[float, bool]  # a log-likelihood, and whether greedy decoding gives the same tokens


class Pair(NamedTuple):
    """A context and its continuation, as token ids; neither is empty."""

    context: list[int]
    continuation: list[int]


def scores(runner: Runner, args: ModelArgs, pairs: List[Pair]) -> Iterator[tuple[int, Score]]:
    """Yield the numbers of pairs and their continuations' scores, as they are known.

    Of what doesn't fit into the cache the beginning is left out.

    Raises:
        ValueError: a continuation alone doesn't fit, or is empty.
    """
    for _, continuation in pairs:
        if not 1 <= len(continuation) <= args.max_seq_len:
            raise ValueError(
                f"a continuation has {len(continuation)} tokens: expected 1 to max_seq_len, "
                f"{args.max_seq_len}"
            )
    for wave in _waves(_grouped(pairs), args.max_batch_size):
        asked = {_scored([pairs[i] for i in prompt], args.max_seq_len): prompt for prompt in wave}
        for sequence in runner.run(asked):
            assert sequence.pooled is not None
            found = sequence.pooled.cpu()  # (n_scored, n_targets, 2)
            for column, i in enumerate(asked[sequence]):
                logprobs, is_best = found[-len(pairs[i].continuation) :, column].unbind(-1)
                yield i, (float(logprobs.sum()), bool(is_best.all()))


def _grouped(pairs: List[Pair]) -> list[list[list[int]]]:
    """Return the numbers of pairs: of each context, of each prompt that begins with it.

    A continuation's last token isn't read, so those of one token have their prompt in common.
    """
    contexts: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
    for i, (context, continuation) in enumerate(pairs):
        prompts = contexts.setdefault(tuple(context), {})
        prompts.setdefault(tuple(continuation[:-1]), []).append(i)
    return [list(prompts.values()) for prompts in contexts.values()]


def _waves(contexts: List[List[list[int]]], n_slots: int) -> Iterator[list[list[int]]]:
    """Yield prompts to run together: the first one of each of some contexts, then the second ones.

    As many contexts are taken at once as the cache has slots. Each then finds its beginning where
    the wave before has left it, however short that is.
    """
    rest = iter(contexts)
    while block := list(islice(rest, n_slots)):
        for wave in zip_longest(*block):
            yield [prompt for prompt in wave if prompt is not None]


def _scored(pairs: List[Pair], max_length: int) -> Sequence:
    """Return the sequence that scores continuations whose prompts are the same."""
    context, continuation = pairs[0]
    prompt = [*context, *continuation[:-1]][-max_length:]
    n_scored = max(len(pair.continuation) for pair in pairs)
    targets = [[0] * (n_scored - len(ids)) + ids for _, ids in pairs]
    return Sequence(prompt, output="scores", targets=targets)
