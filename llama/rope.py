"""The rotary frequencies, and the ways to stretch them for texts longer than those of the training.

Without ``ModelArgs.rope_scaling`` all factors are 1. Its ``rope_type`` is one of these kinds, each
with its parameters:

- ``linear``: ``factor`` for all (https://arxiv.org/abs/2306.15595).
- ``llama3``: ``factor`` for waves longer than ``original_max_position_embeddings /
  low_freq_factor``, 1 for those shorter than the same by ``high_freq_factor``, and a mixture of
  both frequencies in between (Llama 3.1's reference).
- ``yarn``: the same between the pairs that rotate ``beta_fast`` and ``beta_slow`` times within
  ``original_max_position_embeddings`` (32 and 1), numbered in whole pairs unless ``truncate`` is
  false; queries and keys grow by ``attention_factor``, or by the paper's, which ``mscale`` and
  ``mscale_all_dim`` change (https://arxiv.org/abs/2309.00071).
- ``dynamic``: 1 up to ``original_max_position_embeddings``, beyond which ``factor`` would count
  (NTK-aware scaling by the text's length).
- ``longrope``: ``short_factor`` lists them up to ``original_max_position_embeddings``, beyond
  which ``long_factor`` would; ``attention_factor`` as above, or the paper's for ``factor``
  (https://arxiv.org/abs/2402.13753).
- ``factors``: ``factors`` lists them, with an ``attention_factor`` or without.

Source of ``longrope``: transformers' ``modeling_rope_utils.py``.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from llama.args import ModelArgs


def rope_freqs(args: ModelArgs) -> torch.Tensor:
    """Return the angles by which the pairs of a head rotate from token to token.

    Pair ``i`` rotates by ``rope_theta ** (-2 i / head_dim)``.

    Returns:
        float32, shape (head_dim / 2,), before any scaling.
    """
    exponents = torch.arange(0, args.head_dim, 2, device="cpu", dtype=torch.float32)
    return 1.0 / args.rope_theta ** (exponents / args.head_dim)


def rope_factors(args: ModelArgs) -> torch.Tensor:
    """Return the divisors of the rotary frequencies.

    Returns:
        float32, shape (head_dim / 2,).

    Raises:
        ValueError: ``max_seq_len`` is beyond the length where a longer text changes its beginning.
    """
    scaling = args.rope_scaling or {"rope_type": "linear", "factor": 1.0}
    kind = scaling["rope_type"]
    if kind == "dynamic" or scaling.get("short_factor") != scaling.get("long_factor"):
        _check_length(args.max_seq_len, scaling)
    if kind in ("factors", "longrope"):
        listed = scaling["factors" if kind == "factors" else "short_factor"]
        return torch.tensor(listed, device="cpu", dtype=torch.float32)
    if kind in ("linear", "dynamic"):
        factor = 1.0 if kind == "dynamic" else float(scaling["factor"])
        return torch.full((args.head_dim // 2,), factor, device="cpu", dtype=torch.float32)
    kept = (_kept_by_yarn if kind == "yarn" else _kept_by_llama3)(args, scaling)
    return 1 / ((1 - kept) / scaling["factor"] + kept)


def attention_factor(args: ModelArgs) -> float:
    """Return the number that queries and keys are multiplied by when they are rotated."""
    scaling = args.rope_scaling or {}
    if "attention_factor" in scaling:
        return float(scaling["attention_factor"])
    if scaling.get("rope_type") == "longrope":
        length = scaling["original_max_position_embeddings"]
        return math.sqrt(1 + math.log(max(1, scaling["factor"])) / math.log(length))
    if scaling.get("rope_type") != "yarn":
        return 1.0
    growth = 0.1 * math.log(max(1, scaling["factor"]))
    if "mscale" in scaling and "mscale_all_dim" in scaling:
        return (growth * scaling["mscale"] + 1) / (growth * scaling["mscale_all_dim"] + 1)
    return growth + 1


def _kept_by_llama3(args: ModelArgs, scaling: Mapping[str, Any]) -> torch.Tensor:
    """Return the part of each frequency that stays unscaled."""
    rotations = scaling["original_max_position_embeddings"] * rope_freqs(args) / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    return ((rotations - low) / (high - low)).clamp(0, 1)


def _kept_by_yarn(args: ModelArgs, scaling: Mapping[str, Any]) -> torch.Tensor:
    """Return the part of each frequency that stays unscaled."""

    def pair(rotations: float) -> float:
        """Return the number of the pair that rotates so often, which may lie between two."""
        length = scaling["original_max_position_embeddings"] / (2 * math.pi * rotations)
        return args.head_dim * math.log(length) / (2 * math.log(args.rope_theta))

    first, last = pair(scaling.get("beta_fast", 32)), pair(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, args.head_dim - 1)
    width = last - first or 0.001
    numbers = torch.arange(args.head_dim // 2, device="cpu", dtype=torch.float32)
    return 1 - ((numbers - first) / width).clamp(0, 1)


def _check_length(max_seq_len: int, scaling: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if texts may be so long that all of their logits change."""
    length = int(scaling["original_max_position_embeddings"])
    if max_seq_len > length:
        raise ValueError(
            f"max_seq_len is {max_seq_len}, but beyond {length} tokens this model's "
            f"{scaling['rope_type']} rotary scaling rotates a text's beginning otherwise, so that "
            f"logits would depend on how a prompt is cut: give max_seq_len={length} or less"
        )
