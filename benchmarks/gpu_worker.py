"""Measure one engine on one device, with the device's limits before and after.

    python benchmarks/gpu_worker.py ENGINE OUT --shape 7B --device cuda

gpu_speed.py starts it, a process for each engine. It appends a line of JSON to ``OUT`` for each
thing that it has found, so that what was measured stays if it fails later.
"""

import contextlib
import gc
import json
import logging
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from engines import peak_memory
from gpu_engines import FILES, NEW, VLLM, Engine, Ours, Transformers, build, timed
from shapes import SHAPES, position_bytes, read_bytes

from llama import Llama, ModelArgs, cli

Record = dict[str, Any]
OutOfMemory = (MemoryError, torch.OutOfMemoryError)


def limits(device: torch.device) -> dict[str, float]:
    """Return the bytes per second of a copy, read and written, and bfloat16's flops per second."""
    nbytes, side = 1 << 24, 256
    if device.type == "cuda":
        nbytes, side = min(1 << 30, torch.cuda.mem_get_info(device)[0] // 4), 8192
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))

    def median(run: Callable[[], object], inner: int = 10) -> float:
        def several() -> None:
            for _ in range(inner):
                run()

        several()
        return statistics.median(timed(device, several) for _ in range(5)) / inner

    return {
        "bandwidth": 2 * nbytes / median(lambda: target.copy_(source)),
        "peak": 2 * side**3 / median(lambda: F.linear(a, b)),
    }


def release(device: torch.device) -> None:
    """Give freed memory back, for what comes next in this process."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.init()  # in a process that hasn't used the device yet, nothing could be reset
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    on_cuda = device.type == "cuda"
    return torch.cuda.max_memory_allocated(device) if on_cuda else peak_memory()


def options_of(engine: str) -> dict[str, Any]:
    """Return the options of ``build`` that an engine's name says, "llama int4 compiled"."""
    words = engine.split()[1:]
    quantize = next((word for word in words if word in ("int8", "int4")), None)
    form = next((FILES[word] for word in words if word in FILES), None)
    return {"compile": "compiled" in words, "quantize": quantize, "form": form}


@contextlib.contextmanager
def heard(lines: list[str]) -> Iterator[None]:
    """Collect what the library logs of the attention's backend, and its last line on graphs."""
    attention = logging.getLogger("llama.checkpoint.backend")
    graphs = logging.getLogger("llama.engine.graphs")
    logged: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = logged.append  # type: ignore[method-assign, assignment]
    levels = attention.level, graphs.level
    for logger in (attention, graphs):
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger, level in zip((attention, graphs), levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
        lines += [record.getMessage() for record in logged if record.name == attention.name]
        lines += [record.getMessage() for record in logged if record.name == graphs.name][-1:]


def describe(device: torch.device) -> Record:
    """Return the device and the versions, as the report shows them."""
    name, capability = "CPU", "none"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
    return {
        "device": name,
        "compute capability": capability,
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "none",
    }


def check_fits(args: ModelArgs, bsz: int, context: int, device: torch.device) -> None:
    """Raise ``MemoryError`` if weights and caches in bfloat16 need more than a GPU has in all."""
    if device.type != "cuda":
        return
    needed = read_bytes(args) + bsz * (context + NEW) * position_bytes(args)
    total = torch.cuda.mem_get_info(device)[1]
    if needed > 0.95 * total:
        raise MemoryError(
            f"weights and cache of {needed / 1e9:.1f} GB don't fit the GPU's {total / 1e9:.1f} GB"
        )


def measure_ours(
    engine: str,
    args: ModelArgs,
    contexts: Sequence[int],
    batches: Sequence[int],
    device: torch.device,
    note: Callable[[Record], None],
) -> None:
    """Measure each batch with a cache for the longest context that fits."""
    for bsz in batches:
        left = sorted(contexts)
        llama: Llama | None = None
        lines: list[str] = []
        while left and llama is None:
            release(device)  # here, where no traceback holds what a failed attempt has made
            sizes = {"max_seq_len": left[-1] + NEW, "max_batch_size": bsz}
            with heard(lines):
                try:
                    llama = build(args, device, **options_of(engine), **sizes)
                except OutOfMemory as error:
                    note({"skipped": [bsz, left.pop()], "reason": short(error)})
        if llama is not None:
            graphs = device.type == "cuda" and llama.engine.decode is not None
            note({"log": [*lines, f"CUDA graphs are {'on' if graphs else 'off'}"]})
            measure_cells(Ours(llama, device), bsz, left, device, note)
        llama = None


def measure_cells(
    engine: Engine,
    bsz: int,
    contexts: Sequence[int],
    device: torch.device,
    note: Callable[[Record], None],
) -> None:
    for context in contexts:
        release(device)
        try:
            seconds, tokens_per_s, filled = engine.measure(bsz, context)
        except OutOfMemory as error:
            note({"skipped": [bsz, context], "reason": short(error)})
            continue
        note(
            {
                "batch": bsz,
                "context": context,
                "prefill_tokens_per_s": bsz * context / seconds,
                "decode_tokens_per_s": tokens_per_s,
                "filled": filled,
                "peak_bytes": peak_bytes(device),
            }
        )


def measure_peer(
    engine: str,
    args: ModelArgs,
    contexts: Sequence[int],
    batches: Sequence[int],
    device: torch.device,
    note: Callable[[Record], None],
) -> None:
    """Measure one model with all batches and contexts that fit."""
    cells: dict[int, list[int]] = {}
    for bsz in batches:
        for context in sorted(contexts):
            try:
                check_fits(args, bsz, context, device)
                if engine == "transformers static" and context != min(contexts):
                    raise MemoryError("each length would be compiled again")
                cells.setdefault(bsz, []).append(context)
            except MemoryError as error:
                note({"skipped": [bsz, context], "reason": str(error)})
    if not cells:
        return
    longest = max(map(max, cells.values()))
    with tempfile.TemporaryDirectory() as directory:
        peer: Engine
        if engine == "vllm":
            peer = VLLM(args, longest, directory)
        else:
            static = {"cache_implementation": "static"} if engine.endswith("static") else {}
            peer = Transformers(args, longest, device, **static)
        for bsz, some in cells.items():
            measure_cells(peer, bsz, some, device, note)


def short(error: BaseException) -> str:
    """Return the first line of an error, without its pages of advice."""
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def measure(
    engine: str,
    shape: str,
    contexts: Sequence[int],
    batches: Sequence[int],
    device: torch.device,
    note: Callable[[Record], None],
) -> None:
    """Measure an engine, with the device's limits before and after.

    Args:
        note: is called with each finding, a dictionary that JSON can hold.
    """
    note(describe(device))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    note({"limits": limits(device)})
    release(device)
    run = measure_ours if engine.split()[0] == "llama" else measure_peer
    try:
        run(engine, SHAPES[shape], contexts, batches, device, note)
    except Exception as error:
        note({"failed": f"{type(error).__name__}: {short(error)}"})
        raise
    release(device)
    note({"limits": limits(device)})


def main(
    engine: str,
    out: str,
    shape: str = "7B",
    device: str = "cuda",
    contexts: str = "512",
    batches: str = "1",
) -> None:
    """Measure one engine and append what is found to ``out``, a line of JSON each.

    Args:
        engine: llama with "compiled", "int8", "int4" or the form of a file (Q4_0, GPTQ, Q6_K,
            Q8_0, FP8) behind it, transformers, transformers static, or vllm.
    """

    def note(record: Record) -> None:
        with open(out, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    logging.getLogger("llama").addHandler(logging.StreamHandler())
    lengths, numbers = ([int(word) for word in text.split(",")] for text in (contexts, batches))
    where = torch.device("cuda", 0) if device == "cuda" else torch.device(device)
    measure(engine, shape, lengths, numbers, where, note)


if __name__ == "__main__":
    cli.run(main)
