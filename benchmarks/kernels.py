"""The speed of each kernel on a CPU: 10⁹ weights a second for some numbers of tokens, one thread.

    python benchmarks/kernels.py

The time is the thread's own, so other processes' work on the machine counts only as far as they
share its caches and its memory.
"""

import time
from collections.abc import Callable, Iterator, Sequence

import torch

from llama import cli
from llama.layers.capability import Capability
from llama.layers.kernels import Kernel, cpu, digits, groups, make_kernel, plain
from llama.layers.quantization import Form, Grouped, Rotated, StoredWeight

FORMS: list[tuple[str, Form]] = [
    ("4 bits, groups of 32", Grouped("int4", 32)),
    ("4 bits, groups of 16", Grouped("int4", 16)),
    ("8 bits, groups of 32", Grouped("int8", 32, has_zeros=False)),
    ("8 bits, groups of 16", Grouped("int8", 16, has_zeros=False)),
    ("8 bits, whole rows", Grouped("int8", 0, has_zeros=False)),
    ("8 bits, rotated", Rotated()),
    ("float8, groups of 128", Grouped("float8", 128, False, torch.float32)),
]
COPIES = 8  # of a weight, which a processor's cache doesn't hold together


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Return the smallest time of this thread that a call took."""
    times = []
    for _ in range(repeats + 1):
        start = time.thread_time()
        run()
        times.append(time.thread_time() - start)
    return min(times[1:])


def random_weight(form: Form, out_features: int, in_features: int) -> dict[str, torch.Tensor]:
    stored = {}
    for name, shape in form.shapes(out_features, in_features).items():
        dtype = form.dtypes()[name]
        if name == "weight":
            stored[name] = torch.randint(0, 60, shape, dtype=torch.uint8).view(dtype)
        else:
            stored[name] = torch.rand(shape).to(dtype)
    return stored


def kernels_of(form: Form, dtype: torch.dtype, stored: StoredWeight) -> Iterator[Kernel]:
    """Yield the kernels that this machine has for a weight."""
    block = form.block_size(stored["weight"].shape[1])
    if isinstance(form, Grouped) and dtype == torch.bfloat16 and form.group_size:
        if digits.Digits.supports(form, stored["weight"]) and cpu.int4_tile():
            yield cpu.Int4(stored, form)
        if groups.Groups.supports(form, stored["weight"]):
            yield groups.Groups(stored, form)
        yield plain.Widened(stored, form, Capability())
    else:
        yield make_kernel(stored, form, dtype, block, Capability())


def main(
    out_features: int = 5632,
    in_features: int = 2048,
    tokens: Sequence[int] = (1, 8, 32, 512),
    repeats: int = 7,
) -> None:
    """Print a table.

    Args:
        out_features: of the weight.
        in_features: of the weight.
        tokens: numbers of tokens that are multiplied at once.
        repeats: of each product, of which the fastest counts.
    """
    torch.set_num_threads(1)
    print("| weights | inputs | kernel |" + "".join(f" {n} |" for n in tokens))
    print("|---" * (3 + len(tokens)) + "|")
    for dtype in (torch.bfloat16, torch.float32):
        for name, form in FORMS:
            weights = [random_weight(form, out_features, in_features) for _ in range(COPIES)]
            for copies in zip(*(kernels_of(form, dtype, each) for each in weights), strict=True):
                kind = type(copies[0])
                row = f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}"
                print(f"| {name} | {str(dtype).removeprefix('torch.')} | {row} |", end="")
                for n_tokens in tokens:
                    x = torch.randn(n_tokens, in_features).to(dtype)
                    spent = seconds(lambda: [kernel(x) for kernel in copies], repeats)  # noqa: B023
                    rate = out_features * in_features * COPIES / spent / 1e9
                    print(f" {rate:.2f} |", end="", flush=True)
                print()


if __name__ == "__main__":
    cli.run(main)
