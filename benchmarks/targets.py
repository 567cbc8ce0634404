"""What speed.py should reach, by the kind of machine, and the table that says what was reached."""

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llama.layers.capability import cpu_abilities

Engines = Mapping[str, Mapping[str, float]]  # each engine's medians


class Target(NamedTuple):
    """A ratio of two engines' speeds, or a value of one engine, and the least that it should be."""

    what: str
    key: str
    engine: str
    other: str | None
    with_amx: float
    without: float

    def value(self, engines: Engines) -> float | None:
        """Return the ratio or the value; None where it wasn't measured."""
        names = [self.engine] if self.other is None else [self.engine, self.other]
        if any(self.key not in engines.get(name, {}) for name in names):
            return None
        values = [engines[name][self.key] for name in names]
        return values[0] if len(values) == 1 else values[0] / values[1]


DECODE, PREFILL = "decode_tokens_per_s", "prefill_tokens_per_s"
TARGETS = (
    Target(
        "bf16 decode, of the speed of its products", "products_of_step", "llama", None, 0.93, 0.90
    ),
    Target("bf16 decode, of llama.cpp", DECODE, "llama", "llama.cpp", 1.05, 0.95),
    Target("bf16 prefill, of transformers", PREFILL, "llama", "transformers", 1.3, 1.1),
    Target("int8 decode, of llama.cpp's Q8_0", DECODE, "llama int8", "llama.cpp Q8_0", 1.4, 0.9),
    Target("int8 prefill, of CTranslate2", PREFILL, "llama int8", "ctranslate2", 1.5, 0.9),
    *(
        Target(
            f"{kind} file, {what}, of llama.cpp", key, f"llama {kind}", f"llama.cpp {kind}", *bars
        )
        for kind, what, key, bars in (
            ("Q4_K_M", "decode", DECODE, (0.75, 0.6)),
            ("Q4_K_M", "prefill", PREFILL, (4.0, 1.3)),
            ("Q4_0", "decode", DECODE, (1.1, 0.7)),
            ("Q4_0", "prefill", PREFILL, (4.0, 1.3)),
        )
    ),
    *(
        Target(f"{kind}, 8 sequences, tokens/s of 1", "batch_over_one", engine, None, bar, bar)
        for kind, engine, bar in (
            ("bf16", "llama", 5.0),
            ("int8", "llama int8", 5.0),
            ("int4", "llama int4", 3.0),
            ("Q4_0", "llama Q4_0", 3.0),
        )
    ),
)


def capabilities() -> list[str]:
    """Return which of the processor's units matter here, the best first."""
    found = cpu_abilities()
    if not found:  # before torch 2.11
        return [torch.backends.cpu.get_cpu_capability()]
    names = {
        "amx_bf16": "AMX",
        "avx512_bf16": "AVX-512 with bfloat16",
        "avx512_vnni": "AVX-512 with VNNI",
        "avx512_f": "AVX-512",
        "avx2": "AVX2",
    }
    return [text for name, text in names.items() if found.get(name)] or [platform.machine()]


def machine(threads: int) -> str:
    """Return the kind of this machine: its processor, what that can do, the threads in use."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        model = next((line.split(":")[1].strip() for line in lines if "model name" in line), model)
    best, *_ = capabilities()
    without = "" if best == "AMX" else ", without AMX"
    return f"{threads} threads of {model}, {best}{without}"


def has_amx() -> bool:
    return "AMX" in capabilities()


def table(engines: Engines, amx: bool) -> str:
    """Return the targets whose engines were measured, as a Markdown table; empty if there are none.

    Args:
        engines: the medians of each engine.
        amx: the kind of machine.
    """
    lines = []
    for target in TARGETS:
        value = target.value(engines)
        if value is not None:
            bar = target.with_amx if amx else target.without
            reached = "yes" if value >= bar else "no"
            lines.append(f"| {target.what} | {value:.2f} | {bar:.2f} | {reached} |")
    header = ["| what | measured | to reach | reached |", "|---|---|---|---|"]
    return "\n".join([*header, *lines]) if lines else ""


def summary(results: Mapping[str, Any]) -> str:
    """Return the table of targets with its heading, for results of speed.py."""
    text = table(results["engines"], results["amx"])
    return f"\n{results['shape']}, {results['machine']}:\n\n{text}" if text else ""
