"""The layout of several sequences' new tokens in one forward pass."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple, Protocol

import torch

from llama.layers.kv_cache import KVCache


class Segment(NamedTuple):
    """New tokens of one sequence: its slot in the cache, their first position, their number."""

    slot: int
    start_pos: int
    length: int


class AttentionCall(Protocol):
    """Some neighbouring tokens of a batch, which one call of an operator serves."""

    @property
    def tokens(self) -> slice:
        """Return which tokens of the batch it serves."""

    @property
    def kv_len(self) -> int:
        """Return how many cached positions it reads at most."""

    def attend(self, q: torch.Tensor, kv_cache: KVCache) -> torch.Tensor:
        """Return the attention of its queries: (n_tokens, n_heads, head_dim), also of ``q``."""


class RaggedBatch(NamedTuple):
    """The new tokens of a forward pass, without padding, sequence after sequence.

    Two sequences, of which slot 0 brings the prompt ``a b c`` and slot 3 the token ``x`` at
    position 7, are the tokens ``a b c x`` with

        slots      0 0 0 3
        positions  0 1 2 7
        calls      (tokens 0:3 read positions 0:3 of slot 0), (tokens 3:4 read 0:8 of slot 3)
    """

    slots: torch.Tensor  # (n_tokens,)
    positions: torch.Tensor  # (n_tokens,)
    calls: Sequence[AttentionCall]  # in the order of their tokens


def token_places(segments: Sequence[Segment]) -> tuple[list[int], list[int]]:
    """Return the slot and the position of each token."""
    slots = [s.slot for s in segments for _ in range(s.length)]
    positions = [p for s in segments for p in range(s.start_pos, s.start_pos + s.length)]
    return slots, positions


def to_device(
    device: torch.device, whole: Sequence[Sequence[int]], floats: Sequence[Sequence[float]] = ()
) -> list[torch.Tensor]:
    """Send lists of numbers to a device, in one transfer that the host doesn't wait for.

    Returns:
        A tensor for each list: int64 for whole numbers, then float32 for floats.
    """
    numbers = torch.tensor([*chain(*whole)], dtype=torch.int32, device="cpu")
    fractions = torch.tensor([*chain(*floats)], dtype=torch.float32, device="cpu")
    host = torch.cat((numbers, fractions.view(torch.int32)))
    if device.type == "cuda":
        host = host.pin_memory()  # which PyTorch keeps until it is read
    sent = host.to(device, non_blocking=True)
    return [
        *sent[: len(numbers)].long().split([len(each) for each in whole]),
        *sent[len(numbers) :].view(torch.float32).split([len(each) for each in floats]),
    ]


def to_host(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Begin to copy a tensor to the host; what is returned waits for that, and for nothing after.

    A copy that is only begun when it is needed would wait for all that was started since.
    """
    if tensor.device.type != "cuda":
        return tensor.cpu
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> torch.Tensor:
        copied.synchronize()
        return host

    return wait


def check_segments(
    segments: Sequence[Segment], tokens: torch.Tensor, max_batch_size: int, max_seq_len: int
) -> None:
    """Raise ``ValueError`` unless the segments are those of ``tokens`` and fit the cache."""
    total = sum(length for _, _, length in segments)
    if not segments or tokens.shape != (total,):
        raise ValueError(f"{tuple(tokens.shape)} tokens for segments of {total} in all")
    seen: set[int] = set()
    for slot, start_pos, length in segments:
        if slot in seen or not 0 <= slot < max_batch_size:
            raise ValueError(
                f"slot {slot} after slots {sorted(seen)}: each appears once at most, and stays "
                f"below the cache's max_batch_size of {max_batch_size}"
            )
        if length < 1 or start_pos < 0 or start_pos + length > max_seq_len:
            raise ValueError(
                f"slot {slot}: {length} tokens from position {start_pos} don't fit the cache's "
                f"max_seq_len of {max_seq_len}"
            )
        seen.add(slot)
