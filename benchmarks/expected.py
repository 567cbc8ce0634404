"""Compute how fast decoding on GPUs should be: nothing is measured here.

    python benchmarks/expected.py

A step of one sequence takes

    weights / (aim * copy) + positions * cache / (CACHE_AIM * copy) + 2 * layers * all-reduce

where ``weights`` are the bytes of one rank's weights without the embedding, ``cache`` the bytes of
a cached position, ``copy`` the bandwidth of a copy (``COPY`` of the data sheet's) and ``aim`` the
part of it that a product with one row should reach. The all-reduces are there with several GPUs
only. Without CUDA graphs a step also takes no less than ``layers * LAUNCHES * LAUNCH_COST``.
"""

from collections.abc import Sequence
from typing import NamedTuple

from shapes import SHAPES, position_bytes, read_bytes

from llama import cli

COPY = 0.85  # gpt-fast's README: 1,700 GB/s on an A100 whose data sheet says 2,039
# gpt-fast's README, of these 1,700 GB/s: bf16 0.82, int8 0.63, int4 0.51. The int4 of here is 1.8
# times as fast as bf16, with 0.5625 bytes a weight (``group_size=64``).
AIM = {"bf16": 0.80, "int8": 0.60, "int4": 0.41}
CACHE_AIM = 0.60  # at 16,384 positions of 7B weights and cache together then reach 0.70
ALL_REDUCE = 20e-6  # seconds, of one token's hidden state among eight GPUs with NVLink
LAUNCHES = 18  # kernels a layer
LAUNCH_COST = 6e-6  # seconds that Python and the driver take for one

# Data sheets, bytes per second.
BANDWIDTH = {"A100 80GB": 2.0e12, "H100": 3.35e12, "H200": 4.8e12, "RTX 4090": 1.0e12}
POSITIONS = (512, 16384)


class Step(NamedTuple):
    """A decoding step of one sequence: bytes that each GPU reads, and seconds by their cause."""

    weights: float
    cache: float
    reading: float
    reducing: float
    launching: float  # without graphs, while the GPU works

    @property
    def with_graphs(self) -> float:
        return self.reading + self.reducing

    @property
    def without_graphs(self) -> float:
        return max(self.with_graphs, self.launching)


def step_of(shape: str, gpu: str, ranks: int, weights: str, positions: int) -> Step:
    """Return a step of one sequence with so many positions filled, on ``ranks`` GPUs."""
    args = SHAPES[shape]
    copy = COPY * BANDWIDTH[gpu]
    n_weights = read_bytes(args, weights, ranks, 64 if weights == "int4" else None)
    n_cache = positions * position_bytes(args, ranks)
    return Step(
        n_weights,
        n_cache,
        n_weights / (AIM[weights] * copy) + n_cache / (CACHE_AIM * copy),
        2 * args.n_layers * ALL_REDUCE if ranks > 1 else 0.0,
        args.n_layers * LAUNCHES * LAUNCH_COST,
    )


def table(contexts: Sequence[int] = POSITIONS) -> str:
    """Return the expected speeds as a Markdown table."""
    cells = "".join(f"| GB at {n:,} positions | tokens/s | without graphs " for n in contexts)
    lines = [f"| model | GPU | weights {cells}|", "|---|---|---|" + "---|---|---|" * len(contexts)]
    cases = [("7B", gpu, 1) for gpu in BANDWIDTH]
    cases += [("70B", gpu, 8) for gpu in ("A100 80GB", "H100")]
    for shape, gpu, ranks in cases:
        for weights in AIM:
            name = f"{ranks} × {gpu}" if ranks > 1 else gpu
            line = f"| {shape} | {name} | {weights} |"
            for positions in contexts:
                step = step_of(shape, gpu, ranks, weights, positions)
                line += f" {(step.weights + step.cache) / 1e9:.1f}"
                line += f" | {1 / step.with_graphs:.0f} | {1 / step.without_graphs:.0f} |"
            lines.append(line)
    return "\n".join(lines)


def main(contexts: str = "512,16384") -> None:
    """Print the expected speeds of Llama 2 7B on one GPU and of 70B on eight.

    All of them are computed, from the bytes that a step reads, the bandwidth of data sheets and the
    constants at the top of this file.

    Args:
        contexts: filled positions of the sequence; several with commas.
    """
    print(table([int(context) for context in contexts.split(",")]))


if __name__ == "__main__":
    cli.run(main)
