"""Compute how fast decoding on GPUs should be: nothing is measured here.

    python benchmarks/expected.py

The model is the one of ``python -m llama.plan``, described in ``llama/plan/costs.py``.
"""

from collections.abc import Sequence

from shapes import SHAPES, network_of

from llama import cli
from llama.plan.costs import DEVICES, Cost, Machines, Pass, cost, position_bytes, read_bytes

WEIGHTS = ("bf16", "int8", "int4")
POSITIONS = (512, 16384)


def step_of(
    shape: str, gpu: str, ranks: int, weights: str, positions: int, compile: bool = False
) -> Cost:
    """Return a step of one sequence with so many positions filled, on ``ranks`` GPUs."""
    network, machines = network_of(SHAPES[shape], weights), Machines(DEVICES[gpu], ranks)
    return cost(network, machines, ranks, Pass.step(1, positions), compile)


def table(contexts: Sequence[int] = POSITIONS) -> str:
    """Return the expected speeds as a Markdown table."""
    cells = "".join(f"| GB at {n:,} positions | tokens/s | compiled " for n in contexts)
    lines = [f"| model | GPU | weights {cells}|", "|---|---|---|" + "---|---|---|" * len(contexts)]
    cases = [("7B", gpu, 1) for gpu in ("a100", "h100", "h200", "rtx4090")]
    cases += [("70B", gpu, 8) for gpu in ("a100", "h100")]
    for shape, gpu, ranks in cases:
        name = DEVICES[gpu].name
        for weights in WEIGHTS:
            network = network_of(SHAPES[shape], weights)
            line = f"| {shape} | {f'{ranks} × ' * (ranks > 1)}{name} | {weights} |"
            for n in contexts:
                n_bytes = read_bytes(network, ranks) + n * position_bytes(network, ranks)
                steps = (step_of(shape, gpu, ranks, weights, n, how) for how in (False, True))
                line += f" {n_bytes / 1e9:.1f} |"
                line += "".join(f" {1 / step.seconds:.0f} |" for step in steps)
            lines.append(line)
    return "\n".join(lines)


def main(contexts: str = "512,16384") -> None:
    """Print the expected speeds of Llama 2 7B on one GPU and of 70B on eight.

    All of them are computed, from the bytes that a step reads, data sheets, and how far measured
    steps are from their limits.

    Args:
        contexts: filled positions of the sequence; several with commas.
    """
    print(table([int(context) for context in contexts.split(",")]))


if __name__ == "__main__":
    cli.run(main)
