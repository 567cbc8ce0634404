"""This library's server against its installed peers': the same weights, concurrent streams.

    pip install -e '.[server,bench]'
    python benchmarks/serving.py                 # 1.1B in bfloat16, 1 and 8 streams

The servers run one after another on the same machine with two threads each, and stream greedy
completions of prompts of 64 tokens. Tokens per second include the prefill: they are counted from
sending the first request to the last token. The last line counts only tokens that arrive while all
streams are decoding. Text of random weights repeats itself more than that of a trained model;
therefore prompt lookup, which the server uses while few streams are active, is shown with and
without.
"""

import asyncio
import contextlib
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

import httpx
import shapes
import weights

from llama import ModelArgs, Tokenizer, cli
from llama.generation import TINY

THREADS = 2
PROMPT = 64  # tokens
STREAMS = 8


def write_vocabulary(n_words: int, path: Path) -> None:
    """Write the embedded model's SentencePiece pieces, and invented words up to ``n_words``."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((TINY / "tokenizer.model").read_bytes())
    for number in range(len(model.pieces), n_words):
        model.pieces.add(piece=f"▁w{number}", score=-float(number))
    path.write_bytes(model.SerializeToString())


def text_of(number: int) -> str:
    """Return a prompt of ``PROMPT`` tokens, including the beginning of the sequence."""
    rng = random.Random(number)
    tokenizer = Tokenizer(TINY / "tokenizer.model")
    pieces = map(tokenizer.token_piece, range(300, tokenizer.n_words))
    words = [piece[1:] for piece in pieces if piece[0] == "▁" and piece[1:].isalpha()]
    while True:
        text = " ".join(rng.choices(words, k=PROMPT - 1))
        if len(tokenizer.encode(text, bos=True, eos=False)) == PROMPT:
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


def llama_command(path: Path, port: int) -> list[str]:
    command = ["llama.server", "--ckpt_dir", str(path), "--port", str(port), "--page=False"]
    return [*command, "--max_seq_len", "1024", "--model_name", "model"]


def plain_command(path: Path, port: int) -> list[str]:
    return [*llama_command(path.with_name("llama"), port), "--prompt_lookup_num_tokens", "0"]


def llama_cpp_command(path: Path, port: int) -> list[str]:
    command = ["llama_cpp.server", "--model", str(path), "--port", str(port), "--n_ctx", "1024"]
    threads = ["--n_threads", str(THREADS), "--n_threads_batch", str(THREADS)]
    # By default a new request ends the active stream.
    return [*command, *threads, "--model_alias", "model", "--interrupt_requests", "False"]


def transformers_command(path: Path, port: int) -> list[str]:
    command = ["transformers.cli.transformers", "serve", str(path), "--port", str(port)]
    return [*command, "--device", "cpu", "--dtype", "bfloat16"]


def batching_command(path: Path, port: int) -> list[str]:
    return [*transformers_command(path.with_name("transformers"), port), "--continuous-batching"]


Writer = Callable[[ModelArgs, weights.Tensors, Path], None]
SERVERS: dict[str, tuple[str, Writer | None, Callable[[Path, int], list[str]]]] = {
    "llama": ("llama", write_llama, llama_command),
    "llama, without lookup": ("llama", None, plain_command),
    "llama-cpp-python": ("llama_cpp", write_gguf, llama_cpp_command),
    "transformers": ("transformers", write_hf, transformers_command),
    "transformers, continuous batching": ("transformers", None, batching_command),
}


@contextlib.contextmanager
def running(command: list[str], log: Path) -> Iterator[str]:
    """Start a server, and yield its address once it answers."""
    port = command[command.index("--port") + 1]
    url = f"http://127.0.0.1:{port}"
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
    with log.open("w") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", *command], stdout=file, stderr=file, env=environment
        )
    try:
        for _ in range(1800):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/v1/models", timeout=5).is_success:
                    break
            if server.poll() is not None:
                raise RuntimeError(log.read_text().strip().splitlines()[-1])
            time.sleep(0.1)
        yield url
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(20)
        server.kill()


async def stream(client: httpx.AsyncClient, model: str, number: int, n: int) -> list[float]:
    """Return the times at which the pieces of a completion of ``n`` tokens arrived."""
    body = {
        "model": model,
        "prompt": text_of(number),
        "max_tokens": n,
        "temperature": 0,
        "stream": True,
    }
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


async def measure(url: str, model: str, n: int, repeats: int) -> dict[str, float]:
    """Return tokens per second of 1 and of ``STREAMS`` streams, and times to the first token."""
    results: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        results.setdefault(name, []).append(value)

    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        numbers = iter(range(1, 10_000))
        await stream(client, model, 0, 24)  # until the weights are packed
        for _ in range(repeats):
            for count in (1, STREAMS):
                begin = time.perf_counter()
                streams = [stream(client, model, next(numbers), n) for _ in range(count)]
                times = await asyncio.gather(*streams)
                end = max(max(each) for each in times)
                note(f"{count}", count * n / (end - begin))
                first, last = max(t[0] for t in times), min(t[-1] for t in times)
                together = sum(first < t <= last for each in times for t in each)
                # Pieces aren't always tokens: scale the number of pieces to that of tokens.
                share = count * n / sum(map(len, times))
                seconds = last - first
                note(f"written {count}", together * share / seconds if together else math.nan)
            note("first token", await _first_token(client, model, next(numbers)))
            others = [
                asyncio.create_task(stream(client, model, next(numbers), n))
                for _ in range(STREAMS - 1)
            ]
            await asyncio.sleep(results["first token"][-1] * STREAMS + 1)
            note("first token under load", await _first_token(client, model, next(numbers)))
            for other in others:
                other.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await asyncio.sleep(1)
    return {name: statistics.median(values) for name, values in results.items()}


async def _first_token(client: httpx.AsyncClient, model: str, number: int) -> float:
    begin = time.perf_counter()
    times = await stream(client, model, number, 2)
    return times[0] - begin


def table(results: dict[str, dict[str, float]]) -> str:
    """Return a Markdown table of the results, and of this library's relative speed."""
    lines = [
        "| server | 1 stream, tokens/s | 8 streams, tokens/s | first token, alone "
        "| first token with 7 streams | 1 stream: ours is | 8 streams: ours is |",
        "|---|---|---|---|---|---|---|",
    ]
    ours = results["llama"]
    plain = results.get("llama, without lookup", ours)
    for name, measured in results.items():
        one, eight = measured["1"], measured[str(STREAMS)]
        lines.append(
            f"| {name} | {one:.1f} | {eight:.1f} | {measured['first token']:.2f} s "
            f"| {measured['first token under load']:.2f} s | {ours['1'] / one:.2f} x "
            f"| {ours[str(STREAMS)] / eight:.2f} x |"
        )
    one, eight = plain["written 1"], plain[f"written {STREAMS}"]
    step = STREAMS / eight
    n_steps = (plain["first token under load"] - plain["first token"]) / step
    lines += [
        "",
        f"Without lookup, while all streams are decoding: {one:.1f} tokens/s of 1 stream, "
        f"{eight:.1f} of {STREAMS}, {eight / one:.2f} x. A new request's first token with 7 streams"
        f" takes {n_steps:.1f} decoding steps longer than alone.",
    ]
    return "\n".join(lines)


def main(
    shape: str = "1.1B", servers: str | None = None, n_tokens: int = 48, repeats: int = 2
) -> None:
    """Measure servers on random weights of a shape of speed.py, and print a table.

    Args:
        shape: a name in ``shapes.SHAPES``.
        servers: names separated by semicolons; all that are installed by default.
        n_tokens: tokens of each completion.
        repeats: how often to measure; the table shows medians.
    """
    names = list(SERVERS) if servers is None else ["llama", *servers.split(";")]
    args = shapes.SHAPES[shape]
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        tensors = weights.random_weights(args)
        for name, (module, write, _) in SERVERS.items():
            if name in names and find_spec(module) is not None and write is not None:
                write(args, tensors, Path(directory) / name)
        del tensors
        for name in dict.fromkeys(names):
            module, _, command = SERVERS[name]
            path = Path(directory) / name
            if find_spec(module) is None:
                continue
            print(f"{name} ...", file=sys.stderr)
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                port = s.getsockname()[1]
            model = str(path) if module == "transformers" else "model"
            if "continuous" in name:
                model = str(path.with_name("transformers"))
            try:
                with running(command(path, port), Path(directory) / f"{name}.log") as url:
                    results[name] = asyncio.run(measure(url, model, n_tokens, repeats))
            except Exception as error:
                print(f"{name} failed: {error}", file=sys.stderr)
    print(table(results))


if __name__ == "__main__":
    cli.run(main)
