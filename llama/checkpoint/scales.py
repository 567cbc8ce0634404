"""Scales of quantised weights in the shapes that formats give them, spread to groups of inputs."""

from math import gcd

import torch

_GROUP_SIZES = (256, 128, 64, 32, 16)  # that kernels take

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Block = tuple[int, int]
"""The outputs and the inputs that share a scale."""


def block_of(
    scales: torch.Tensor, shape: tuple[int, int], stated: Block | None, what: str
) -> Block:
    """Return which outputs and inputs share a scale.

    Args:
        scales: one number, or one for each output: (out_features,) or (out_features, 1); or one
            for each block, of which those at the end may be smaller.
        shape: the weight's, (out_features, in_features).
        stated: the block, if the format says; else it follows from the shapes.
        what: the tensor and the file that describes it, for errors.

    Raises:
        ValueError: the scales don't fit the weight.
    """
    n_outputs, n_inputs = shape
    if scales.numel() == 1:
        return shape
    if tuple(scales.shape) in ((n_outputs,), (n_outputs, 1)):
        return (1, n_inputs)
    if scales.dim() == 2 and scales.numel():
        rows, columns = scales.shape
        if stated is not None and (rows, columns) == (
            -(-n_outputs // stated[0]),
            -(-n_inputs // stated[1]),
        ):
            return (min(stated[0], n_outputs), min(stated[1], n_inputs))
        if stated is None and n_outputs % rows == n_inputs % columns == 0:
            return (n_outputs // rows, n_inputs // columns)
    blocks = f", or one for each block of {stated[0]} by {stated[1]}" if stated else ""
    raise ValueError(
        f"{what} has the shape {tuple(scales.shape)} for a weight of {n_outputs} by {n_inputs}: "
        f"expected one number, one for each of {n_outputs} rows{blocks}; download it again"
    )


def stored_group_size(block: Block, n_inputs: int, whole: bool, what: str) -> int:
    """Return how many inputs share a scale in the stored form; 0 for all of them.

    Args:
        block: those that share one in the file.
        n_inputs: the number of inputs.
        whole: whether all inputs may be one group.
        what: the tensor and the file that describes it, for errors.

    Raises:
        ValueError: no group of a size that kernels take lies within each block.
    """
    if whole and block[1] >= n_inputs:
        return 0
    common = gcd(block[1], n_inputs)  # the last block may be smaller
    sizes = [size for size in _GROUP_SIZES if common % size == 0]
    if not sizes:
        raise ValueError(
            f"{what} is for groups of {block[1]} of {n_inputs} inputs: multiples of "
            f"{_GROUP_SIZES[-1]} are read; use the original weights, which quantize='int4' rounds "
            "while loading"
        )
    return sizes[0]


def spread(
    scales: torch.Tensor, shape: tuple[int, int], block: Block, group_size: int
) -> torch.Tensor:
    """Return scales, or zero points, of groups of inputs: (out_features, n_groups), contiguous.

    Args:
        scales: see ``block_of``.
        shape: the weight's, (out_features, in_features).
        block: of ``block_of``.
        group_size: of ``stored_group_size``.
    """
    n_outputs, n_inputs = shape
    scales = scales.reshape(-(-n_outputs // block[0]), -(-n_inputs // block[1]))
    if block[0] > 1:
        scales = scales.repeat_interleave(block[0], 0)[:n_outputs]
    if group_size and block[1] != group_size:
        n_groups = n_inputs // group_size
        scales = scales.repeat_interleave(block[1] // group_size, 1)[:, :n_groups]
    return scales.contiguous()
