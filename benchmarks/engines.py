"""The engines that speed.py compares, with one interface: load and generate.

A worker process measures one of them: ``python benchmarks/engines.py ENGINE PATH START``.
"""

import contextlib
import gc
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT = 512
NEW = 32
THREADS = 2
BATCH = 8
REPEATS = 3  # of each measurement in a process


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """Return token ids that no cache has seen before."""
    return [(seed * 7919 + i * 104729) % 31000 + 300 for i in range(length)]


class Ours:
    """This library, on Meta's layout."""

    name, package, weights = "llama", "llama", "bf16"
    compile = False

    def __init__(self, path: str, max_seq_len: int = PROMPT + 2 * NEW, max_batch_size: int = BATCH):
        import torch

        from llama import Llama
        from llama.generation import TINY

        torch.set_num_threads(THREADS)
        self.llama = Llama.build(
            path,
            None if Path(path).is_dir() else TINY / "tokenizer.model",  # a file has none
            max_seq_len=max_seq_len,
            max_batch_size=max_batch_size,
            device="cpu",
            compile=self.compile,
        )
        self.llama.tokenizer.stop_ids = frozenset()  # random weights would end a text at random

    def generate(self, prompt: list[int], length: int) -> int:
        return len(self.llama.generate([prompt], length, temperature=0)[0][0])

    def products(self) -> Callable[[], object]:
        """Return a function that does the products of a decoding step alone.

        They are recorded where steps are.
        """
        import torch

        from llama.layers.kernels.graphs import CpuGraph
        from llama.layers.linear import fused_linear

        model = self.llama.model
        groups = list(model.linear_groups())
        dtype = model.norm.weight.dtype
        inputs = {g: torch.ones(1, g[0].in_features, dtype=dtype) for g in groups}

        @torch.inference_mode()
        def multiply(_: torch.Tensor) -> torch.Tensor:
            return [fused_linear(inputs[layers], *layers)[-1] for layers in groups][-1]

        nothing = torch.empty(1)
        if self.llama.engine.decode is None:
            return lambda: multiply(nothing)
        with torch.inference_mode():
            graph = CpuGraph(multiply, nothing, CpuGraph.pool(model))
        return torch.inference_mode()(lambda: graph(nothing))

    def step(self, bsz: int, kv_len: int) -> None:
        """Decode one token of each of some sequences; the time is independent of which ones."""
        import torch

        from llama.layers.batch import Segment

        segments = [Segment(slot, kv_len, 1) for slot in range(bsz)]
        tokens, decode = torch.full((bsz,), 5), self.llama.engine.decode
        if decode is not None and decode.supports(segments):
            decode(tokens, segments, *map(torch.tensor, decode.places(segments)))
        else:
            self.llama.model.forward_ragged(tokens, segments)

    def details(self) -> dict[str, float]:
        """Return what is measured of this library only, from cases that take turns."""
        kv_len = PROMPT // 8
        cases = {
            "products": self.products(),
            "one": lambda: self.step(1, kv_len),
            "batch": lambda: self.step(BATCH, kv_len),
        }
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        for number in range(2 * REPEATS + 1):
            for name, run in cases.items():
                taken = timed(run, 2)
                if number:  # the first round isn't counted
                    seconds[name] += taken
        products, one, batch = (statistics.median(s) for s in seconds.values())
        return {"products_of_step": products / one, "batch_over_one": BATCH * one / batch}


class Compiled(Ours):
    """This library with ``compile=True``."""

    name = "llama compiled"
    compile = True


class OursInt8(Ours):
    """This library on a checkpoint that llama.convert has quantised."""

    name, weights = "llama int8", "int8"


class OursInt4(Ours):
    name, weights = "llama int4", "int4"


class Transformers:
    """transformers, on Hugging Face's layout."""

    name, package, weights = "transformers", "transformers", "bf16"

    def __init__(self, path: str):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(THREADS)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)

    def generate(self, prompt: list[int], length: int) -> int:
        import torch

        tokens = torch.tensor([prompt])
        out = self.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=length,
            min_new_tokens=length,
            do_sample=False,
            pad_token_id=0,
        )
        return int(out.shape[1]) - len(prompt)


class LlamaCpp:
    """llama.cpp through llama-cpp-python, on a GGUF file."""

    name, package, weights = "llama.cpp", "llama_cpp", "bf16"

    def __init__(self, path: str):
        import llama_cpp

        self.model = llama_cpp.Llama(
            path,
            n_ctx=PROMPT + 2 * NEW,
            n_batch=PROMPT,
            n_ubatch=PROMPT,
            n_threads=THREADS,
            n_threads_batch=THREADS,
            verbose=False,
        )

    def generate(self, prompt: list[int], length: int) -> int:
        self.model.reset()
        self.model.eval(prompt)
        token = self.model.sample(temp=0.0)
        for _ in range(length - 1):
            self.model.eval([token])
            token = self.model.sample(temp=0.0)
        return length


class CTranslate2:
    """CTranslate2, on its own format."""

    name, package, weights = "ctranslate2", "ctranslate2", "int8"

    def __init__(self, path: str):
        import ctranslate2

        self.model = ctranslate2.Generator(
            path, compute_type="auto", intra_threads=THREADS, inter_threads=1
        )

    def generate(self, prompt: list[int], length: int) -> int:
        tokens = [f"t{i}" for i in prompt]
        results = self.model.generate_batch(
            [tokens],
            max_length=length,
            min_length=length,
            sampling_topk=1,
            include_prompt_in_result=False,
            end_token=[],
        )
        return len(results[0].sequences_ids[0])


class OursBf16File(Ours):
    """This library on llama.cpp's own file, as the ones below."""

    name = "llama BF16"


class OursQ8(Ours):
    name, weights = "llama Q8_0", "Q8_0"


class LlamaCppQ8(LlamaCpp):
    name, weights = "llama.cpp Q8_0", "Q8_0"


class OursQ4(Ours):
    name, weights = "llama Q4_0", "Q4_0"


class LlamaCppQ4(LlamaCpp):
    name, weights = "llama.cpp Q4_0", "Q4_0"


class OursQ4K(Ours):
    name, weights = "llama Q4_K_M", "Q4_K_M"


class LlamaCppQ4K(LlamaCpp):
    name, weights = "llama.cpp Q4_K_M", "Q4_K_M"


ENGINES = {
    engine.name: engine
    for engine in (
        Ours,
        OursBf16File,
        Compiled,
        Transformers,
        LlamaCpp,
        OursInt8,
        OursQ8,
        LlamaCppQ8,
        CTranslate2,
        OursInt4,
        OursQ4,
        LlamaCppQ4,
        OursQ4K,
        LlamaCppQ4K,
    )
}


def installed() -> list[str]:
    return [name for name, e in ENGINES.items() if importlib.util.find_spec(e.package)]


def peak_memory() -> int:
    """Return the most bytes that this process had resident."""
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def timed(function: Callable[[], Any], repeats: int = 5) -> list[float]:
    """Return the seconds of each of several calls."""
    seconds = []
    for _ in range(repeats):
        gc.collect()
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(engine: str, path: str, start: float) -> dict[str, float]:
    """Measure an engine from the start of its process (by ``time.time``)."""
    model = ENGINES[engine](path)
    model.generate(prompt_of(PROMPT), 1)
    first_token = time.time() - start
    seeds = iter(range(1, 100))

    def run(prompt: int, length: int, repeats: int) -> float:
        seconds = timed(lambda: model.generate(prompt_of(prompt, next(seeds)), length), repeats)
        return statistics.median(seconds)

    run(PROMPT, NEW + 1, 1)  # for what is done once
    prefill = run(PROMPT, 1, REPEATS)
    # After a short prompt, whose time, and so its error, is small compared with the tokens'.
    short = PROMPT // 8
    first, whole = run(short, 1, REPEATS), run(short, NEW + 1, REPEATS)
    peak = peak_memory()
    details = model.details() if isinstance(model, Ours) else {}
    return {
        **details,
        "first_token_s": first_token,
        "prefill_tokens_per_s": PROMPT / prefill,
        "decode_tokens_per_s": NEW / (whole - first),
        "peak_bytes": peak,
    }


def main(engine: str, path: str, start: float) -> None:
    """Print the result of ``measure`` as JSON.

    Args:
        engine: a name in ``ENGINES``.
        path: the weights in the engine's format.
        start: when the process was started, by ``time.time``.
    """
    with contextlib.redirect_stdout(sys.stderr):
        results = measure(engine, path, start)
    print(json.dumps(results))
    sys.stdout.flush()
    os._exit(0)  # some engines take long to clean up


if __name__ == "__main__":
    from llama import cli

    cli.run(main)
