"""Which rows of a pass's tensors belong to which adapter, and the modules that change them."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from llama.adapters import Adapter, Change


class AdapterRows:
    """The rows of a pass that are adapters'; false if there are none.

    The layers see all of a pass's tokens, the last norm those whose outputs are needed, and the
    output layer those whose logits are.

    Args:
        pieces: of each its sequence's adapter, None for the base alone, and the numbers of its
            rows: tokens and outputs; and whether outputs are hidden states, not logits.

    Attributes:
        whole: indices that the pass sends to the device with its own.
    """

    def __init__(self, pieces: Sequence[tuple[Adapter | None, int, int, bool]]):
        self._rows: dict[Adapter, tuple[list[int], ...]] = {}
        firsts = [0, 0, 0]
        for adapter, n_tokens, n_outputs, is_pooled in pieces:
            for kind, n in enumerate((n_tokens, n_outputs, 0 if is_pooled else n_outputs)):
                if adapter is not None:
                    rows = self._rows.setdefault(adapter, ([], [], []))[kind]
                    rows += range(firsts[kind], firsts[kind] + n)
                firsts[kind] += n
        every = (rows for kinds in self._rows.values() for rows in kinds)
        self.whole = [rows for rows in every if _is_scattered(rows)]

    def __bool__(self) -> bool:
        return bool(self._rows)

    @contextmanager
    def applied(self, model: nn.Module, indices: Sequence[torch.Tensor]) -> Iterator[None]:
        """Let modules change their outputs, for one pass.

        Others see modules without adapters: compiled code needs no other version, and a copy of
        the model has none of them.

        Args:
            model: the network, which needn't have modules where no row is an adapter's.
            indices: ``whole``, on the device.
        """
        parts: dict[str, list[tuple[slice | torch.Tensor, Change]]] = defaultdict(list)
        left = iter(indices)
        for adapter, kinds in self._rows.items():
            places = [next(left) if _is_scattered(rows) else _as_slice(rows) for rows in kinds]
            for name, change in adapter.changes.items():
                kind = {"norm": 1, "output": 2}.get(name, 0)
                if kinds[kind]:
                    parts[name].append((places[kind], change))
        modules = {name: model.get_submodule(name) for name in parts}
        try:
            for name, changes in parts.items():
                vars(modules[name])["adapted"] = partial(_adapt, changes)
            yield
        finally:
            for module in modules.values():  # no trace, for which code would be compiled again
                vars(module).pop("adapted", None)


def _adapt(
    changes: Sequence[tuple[slice | torch.Tensor, Change]], x: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    for rows, change in changes:
        out[rows] = change(x[rows], out[rows])
    return out


def _is_scattered(rows: Sequence[int]) -> bool:
    """Return whether some rows, in order, aren't neighbours."""
    return bool(rows) and rows[-1] - rows[0] >= len(rows)


def _as_slice(rows: Sequence[int]) -> slice:
    return slice(rows[0], rows[-1] + 1) if rows else slice(0)
