"""Time the drawing of tokens beside a step of the network, by the sequences' parameters.

    python benchmarks/sampling.py
    python benchmarks/sampling.py --shape 7B --device cuda --n_sequences 256

Weights and logits are random. A step of the network and all kinds of draws alternate,
so that other programs disturb all alike; the table shows medians. A draw is all that a step does
besides the network: penalties, biases, samplers, what is sent to the device and fetched from it.
``mixed`` gives each sequence another sampler. ``sort`` is a sort of all logits, which no draw does.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from shapes import SHAPES

from llama import ModelArgs, Tokenizer, Transformer, cli, parallel
from llama.checkpoint.backend import choose_backend
from llama.engine.runner import Piece, Runner
from llama.engine.sequence import Sequence
from llama.generation import TINY
from llama.layers.batch import Segment
from llama.sampling import SamplingParams

PENALTIES = {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.1}
KINDS: dict[str, Callable[[int], dict[str, Any]]] = {
    "greedy": lambda i: {"temperature": 0.0},
    "top-p": lambda i: {},
    "top-k": lambda i: {"top_k": 40},
    "min-p": lambda i: {"top_p": 1.0, "min_p": 0.05},
    "penalties": lambda i: dict(PENALTIES),
    "biases": lambda i: {"logit_bias": dict.fromkeys(range(i, i + 10), 1.0)},
    "mixed": lambda i: {
        "temperature": 0.5 + i / 100,
        "top_p": 0.8 + i / 1000,
        "top_k": 10 + i,
        **({"min_p": 0.001 * i} if i % 2 else {}),
        **(PENALTIES if i % 3 else {"repetition_penalty": 1 + i / 100}),
        **({"logit_bias": {i: 2.0, i + 1: -100}} if i % 4 else {"min_tokens": 100}),
        "stop_token_ids": [2],
    },
}
"""The parameters of sequence i."""


class Network:
    """Stands for a model in ``Runner``: its logits are always the same."""

    def __init__(self, args: ModelArgs, n_sequences: int, device: torch.device):
        self.params = args
        self.freqs_cis = torch.zeros(1, device=device)
        generator = torch.Generator().manual_seed(1)
        logits = torch.randn(n_sequences, args.vocab_size, generator=generator) * 4
        self.fixed = logits.to(device)

    def hidden_states(self, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        return tokens

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.fixed


def random_model(args: ModelArgs, device: torch.device, dtype: torch.dtype) -> Transformer:
    """Return a network of random weights, with the kernels of its device."""
    with torch.device("meta"):
        model = Transformer(args)
    model = model.to(dtype).to_empty(device=device).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    backend = choose_backend(args, 1, dtype, device, int8_cache=False)
    model.allocate_buffers(device, dtype, backend=backend)
    model.pack()
    return model


def pieces(kind: str, n_sequences: int, n_text: int, n_words: int) -> list[Piece]:
    """Return the decoding step of sequences of one kind, with texts of random tokens."""
    tokenizer = Tokenizer(TINY / "tokenizer.model")
    generator = torch.Generator().manual_seed(2)
    found = []
    for i in range(n_sequences):
        text = torch.randint(n_words, (n_text,), generator=generator).tolist()
        prompt, answer = text[: n_text // 2], text[n_text // 2 :]
        params = SamplingParams(**KINDS[kind](i))
        sequence = Sequence(prompt, params, str(i), 10**6, "ids", tokens=answer)
        sequence.begin(tokenizer)
        found.append(Piece(sequence, i, n_text - 1, answer[-1:], 1, 1))
    return found


def seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the time of one of several runs, the device's work included."""
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / repeats


def main(
    shape: str = "1.1B",
    n_sequences: int = 64,
    n_text: int = 512,
    rounds: int = 9,
    device: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Print a table of the milliseconds of draws, and their share of a step of the network.

    Args:
        shape: of the network, see shapes.py.
        n_sequences: that are decoded together.
        n_text: tokens of each one's prompt and answer together.
        rounds: of which the table shows medians.
        device: cpu or cuda; the fastest available by default.
        dtype: of the weights.
    """
    on = parallel.detect_device(device)
    parallel.initialize(on)
    sizes = {"max_batch_size": n_sequences, "max_seq_len": 2 * n_text}
    args = ModelArgs(**{**vars(SHAPES[shape]), **sizes})
    model, network = random_model(args, on, dtype), Network(args, n_sequences, on)
    tokens = torch.ones(n_sequences, dtype=torch.long, device=on)
    segments = [Segment(i, n_text - 1, 1) for i in range(n_sequences)]

    def draw(some: list[Piece], runner: Runner) -> Callable[[], object]:
        return lambda: runner.finish(runner.start(some, None))

    runs: dict[str, Callable[[], object]] = {
        "network": lambda: model.forward_ragged(tokens, segments, None),
        "sort": lambda: network.fixed.sort(descending=True),
    }
    for kind in KINDS:
        runner = Runner(network, args.vocab_size)  # type: ignore[arg-type]
        runs[kind] = draw(pieces(kind, n_sequences, n_text, args.vocab_size), runner)
    found: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for number in range(-1, rounds):  # the first one warms up
            for name, run in runs.items():
                took = seconds(run, on, 1 if name == "network" else 3)
                if number >= 0:
                    found[name].append(took)
    step = statistics.median(found["network"])
    print(f"{shape}, {n_sequences} sequences of {n_text} tokens on {on}, {dtype}\n")
    print("| | ms | of the network's step |\n|---|---|---|")
    for name, times in found.items():
        median = statistics.median(times)
        print(f"| {name} | {1000 * median:.2f} | {100 * median / step:.1f} % |")


if __name__ == "__main__":
    cli.run(main)
