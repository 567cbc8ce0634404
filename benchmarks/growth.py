"""Measure how the cost grows with the batch, its raggedness, the context and the turns of a dialog.

    python benchmarks/growth.py CKPT_DIR    # as speed.py does on its random weights

The compared cases alternate in one process, so that drift of the machine's speed doesn't matter;
the figures are medians. ``speed.py`` runs it on the same weights as the peers.
"""

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable

import engines
import torch

from llama import Llama, cli
from llama.checkpoint.sharding import parameter_count, weight_bytes
from llama.layers.batch import Segment

BATCHES = (1, 2, 4, 8)
CONTEXTS = (128, 512, 1024, 2048, 4096)
RAGGED = (16, 87, 158, 229, 300, 371, 442, 512)


def alternate(cases: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each case in each round, after a first one that isn't counted."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(above: list[float], below: list[float]) -> float:
    """Return the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def decode(llama: Llama, bsz: int, kv_len: int, steps: int = 3) -> None:
    """Decode with ``bsz`` sequences of ``kv_len`` tokens; the time is independent of which ones."""
    tokens = torch.full((bsz,), 5)
    for i in range(steps):
        segments = [Segment(slot, kv_len + i, 1) for slot in range(bsz)]
        llama.model.forward_ragged(tokens, segments)


def prefill(llama: Llama, lengths: tuple[int, ...]) -> None:
    """Process prompts of some lengths in one pass, with the logits of their last tokens."""
    segments = [Segment(slot, 0, length) for slot, length in enumerate(lengths)]
    tokens = torch.tensor(engines.prompt_of(sum(lengths)))
    llama.model.forward_ragged(tokens, segments, torch.tensor(lengths).cumsum(0) - 1)


def second_turn(llama: Llama, length: int = 480) -> tuple[float, float]:
    """Return the seconds to the first token of a prompt, and of the same with 32 more tokens."""
    seconds = []
    prompt = engines.prompt_of(length, seed=time.perf_counter_ns() % 1000)
    for more in (0, 32):
        prompt = prompt + engines.prompt_of(more, seed=9)
        start = time.perf_counter()
        llama.generate([prompt], 1, temperature=0)
        seconds.append(time.perf_counter() - start)
    return seconds[0], seconds[1]


def measure(path: str, rounds: int = 5) -> dict[str, object]:
    """Return the speeds and ratios of the checkpoint at ``path``."""
    llama = engines.Ours(path, max_seq_len=CONTEXTS[-1] + 8, max_batch_size=8).llama
    for _ in range(20):
        decode(llama, 1, 0, 1)  # until the weights are packed
    args = llama.model.params
    itemsize = llama.model.norm.weight.itemsize
    n_weights = parameter_count(args) - args.vocab_size * args.dim
    per_position = 2 * args.n_layers * args.kv_heads * args.head_dim * itemsize
    batches = alternate(
        {str(bsz): lambda bsz=bsz: decode(llama, bsz, CONTEXTS[0]) for bsz in BATCHES}, rounds
    )
    contexts = alternate(
        {str(kv_len): lambda n=kv_len: decode(llama, 1, n) for kv_len in CONTEXTS}, rounds
    )
    equal = (sum(RAGGED) // 8,) * 7 + (sum(RAGGED) - sum(RAGGED) // 8 * 7,)
    prompts = alternate(
        {"ragged": lambda: prefill(llama, RAGGED), "equal": lambda: prefill(llama, equal)}, rounds
    )
    turns = [second_turn(llama) for _ in range(rounds)]
    n_bytes = n_weights * itemsize
    if llama.model.forms:
        n_bytes = weight_bytes(args, llama.model.norm.weight.dtype, 1, llama.model.forms)
    first, last = str(CONTEXTS[0]), str(CONTEXTS[-1])
    bound = n_bytes / (n_bytes + per_position * CONTEXTS[-1])
    return {
        "batch": {n: 3 * int(n) / statistics.median(s) for n, s in batches.items()},
        "context": {n: 3 / statistics.median(s) for n, s in contexts.items()},
        "batch_8_over_1": 8 * ratio(batches["1"], batches["8"]),
        "context_4096_over_128": ratio(contexts[first], contexts[last]),
        "context_4096_bound": bound,
        "ragged_over_equal": ratio(prompts["ragged"], prompts["equal"]),
        "second_turn_over_first": ratio([t[1] for t in turns], [t[0] for t in turns]),
    }


def table(results: dict[str, float]) -> str:
    """Return the ratios as a Markdown table."""
    bound = results["context_4096_bound"]
    lines = [
        "| what | measured |",
        "|---|---|",
        f"| decoding 8 sequences, tokens/s of 1 sequence | {results['batch_8_over_1']:.2f} x |",
        f"| decoding after 4,096 tokens, tokens/s of after 128 | "
        f"{results['context_4096_over_128']:.2f} x ({bound:.2f} by the bytes read) |",
        f"| prefill of 8 prompts of 16 to 512 tokens, time of as many in equal lengths | "
        f"{results['ragged_over_equal']:.2f} x |",
        f"| first token of a second turn, 480 tokens and 32 new, time of the first turn's | "
        f"{results['second_turn_over_first']:.2f} x |",
    ]
    return "\n".join(lines)


def main(path: str, rounds: int = 5, as_json: bool = False) -> None:
    """Measure the checkpoint at ``path`` and print a table, or JSON."""
    with contextlib.redirect_stdout(sys.stderr):
        results = measure(str(path), rounds)
    print(json.dumps(results) if as_json else table(results))


if __name__ == "__main__":
    cli.run(main)
