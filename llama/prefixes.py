"""What the cache still holds of earlier calls: a prompt that begins alike needs only its rest."""

from collections.abc import Sequence

import torch

from llama.decoding import Row
from llama.model import Transformer


class Prefixes:
    """The tokens whose keys and values each row of a model's cache holds."""

    def __init__(self, model: Transformer):
        self._model = model
        self._held: list[list[int]] = []
        self._passes = model.n_passes  # any later pass may have overwritten them

    def reuse(self, rows: Sequence[Row]) -> list[int]:
        """Bring what the cache holds of the prompts to their rows.

        Row ``i`` of ``rows`` is row ``i`` of the cache; a beginning that another row holds is
        copied.

        Returns:
            For each prompt how many of its tokens are there, at most all but the last.
        """
        held = self._held if self._model.n_passes == self._passes else []
        self._held = []
        starts, copies = [], []
        for i, row in enumerate(rows):
            limit = len(row.prompt) - 1
            lengths = [common_prefix(row.prompt, tokens, limit) for tokens in held]
            best = max(lengths, default=0)
            starts.append(best)
            if best > (lengths[i] if i < len(lengths) else 0):
                copies.append((lengths.index(best), i, best))
        copy_rows(self._model, copies)
        return starts

    def record(self, rows: Sequence[Row], passes: int) -> None:
        """Note what rows hold, unless the model has done other work since ``passes``."""
        if self._model.n_passes == passes:
            # The last token's keys and values are made when the next one is asked for.
            self._held = [row.prompt + row.tokens[:-1] for row in rows]
            self._passes = passes


def common_prefix(a: Sequence[int], b: Sequence[int], limit: int) -> int:
    """How many of the first ``limit`` elements are the same."""
    limit = min(limit, len(b))
    return next((i for i in range(limit) if a[i] != b[i]), limit)


def copy_rows(model: Transformer, copies: Sequence[tuple[int, int, int]]) -> None:
    """Copy the first tokens of cache rows, given as (from, to, how many), all at once."""
    for name, cache in model.named_buffers():
        if ".cache_" in name:
            taken: list[torch.Tensor] = [cache[source, :, :n].clone() for source, _, n in copies]
            for (_, target, n), tensor in zip(copies, taken, strict=True):
                cache[target, :, :n] = tensor
