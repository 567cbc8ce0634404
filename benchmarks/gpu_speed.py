"""This library on one device, against transformers and vLLM: ``speed.py --device cuda``.

Each engine runs in a process of its own, on random weights of one shape, and measures the device's
limits before and after: the bandwidth of a copy (bytes read and written) and the matrix peak in
bfloat16. The report shows what part of them each engine reaches:

    decoding   (weights + filled cache, in bytes) * steps per second / bandwidth
    prefill    operations of the prompts per second / peak

and says for each target whether it was reached.
"""

import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_worker
from gpu_engines import FILES
from gpu_worker import Record, options_of
from shapes import SHAPES, position_bytes, prompt_flops, read_bytes

from llama.layers.quantization import Form

VARIANTS = ("llama", "llama compiled", "llama int8", "llama int4")
PEERS = ("transformers", "transformers static", "vllm")


@dataclass(frozen=True)
class DeviceConfig:
    """What to measure on one device.

    Args:
        device: "cuda", or "cpu" to try the program out; without it CPU engines are compared.
        contexts: tokens of a prompt, after which decoding is measured; several with commas.
        batches: numbers of sequences; several with commas.
        compile: measure compiled steps only.
        quantize: measure "int8" or "int4" weights only, or those of a file: "Q4_0", "GPTQ" (4 bits,
            groups of 128), "Q6_K", "Q8_0" or "FP8" (whole rows).
    """

    device: str | None = None
    contexts: str = "512,4096,16384,100000"
    batches: str = "1,8,64"
    compile: bool = False
    quantize: str | None = None

    def variants(self) -> tuple[str, ...]:
        """Return this library's engines to measure."""
        if not self.compile and self.quantize is None:
            return VARIANTS
        if self.quantize not in (None, "int8", "int4", *FILES):
            raise ValueError(
                f"quantize is {self.quantize!r}: expected int8, int4, {', '.join(FILES)}"
            )
        words = ["llama", self.quantize or "", "compiled" if self.compile else ""]
        return (" ".join(word for word in words if word),)


@dataclass
class Result:
    """What the worker of one engine has found."""

    cells: list[Record]
    limits: list[dict[str, float]]
    skipped: list[Record]
    notes: list[str]
    about: Record

    @staticmethod
    def of(records: Sequence[Record]) -> "Result":
        notes = list(dict.fromkeys(line for record in records for line in record.get("log", ())))
        notes += [f"failed: {record['failed']}" for record in records if "failed" in record]
        return Result(
            [record for record in records if "filled" in record],
            [record["limits"] for record in records if "limits" in record],
            [record for record in records if "skipped" in record],
            notes,
            next((record for record in records if "device" in record), {}),
        )

    def limit(self, name: str) -> float:
        """Return the better of what was measured before and after."""
        return max(limits[name] for limits in self.limits)

    def cell(self, bsz: int, context: int) -> Record | None:
        found = (c for c in self.cells if (c["batch"], c["context"]) == (bsz, context))
        return next(found, None)


def weights_of(engine: str) -> str | Form:
    options = options_of(engine)
    return options["form"] or options["quantize"] or "bf16"


def fractions(shape: str, engine: str, result: Result, cell: Record) -> tuple[float, float]:
    """Return the fractions of the matrix peak (prefill) and of the bandwidth (decoding)."""
    args = SHAPES[shape]
    prompts_per_s = cell["prefill_tokens_per_s"] / cell["context"]
    flops = prompt_flops(args, cell["context"]) * prompts_per_s
    cache = cell["batch"] * cell["filled"] * position_bytes(args)
    steps_per_s = cell["decode_tokens_per_s"] / cell["batch"]
    moved = (read_bytes(args, weights_of(engine)) + cache) * steps_per_s
    return flops / result.limit("peak"), moved / result.limit("bandwidth")


def speeds(shape: str, results: dict[str, Result]) -> str:
    """Return all measured speeds as a Markdown table."""
    lines = [
        "| engine | batch | context | prefill tokens/s | of the peak | decode tokens/s "
        "| of the bandwidth | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for engine, result in results.items():
        for cell in result.cells:
            of_peak, of_bandwidth = fractions(shape, engine, result, cell)
            lines.append(
                f"| {engine} | {cell['batch']} | {cell['context']:,} "
                f"| {cell['prefill_tokens_per_s']:.0f} | {of_peak:.2f} "
                f"| {cell['decode_tokens_per_s']:.1f} | {of_bandwidth:.2f} "
                f"| {cell['peak_bytes'] / 1e9:.1f} GB |"
            )
    return "\n".join(lines)


def device_limits(results: dict[str, Result]) -> str:
    """Return the device's limits, before and after each engine, as a Markdown table."""
    lines = ["| engine | copy, GB/s | matrix peak, Tflop/s |", "|---|---|---|"]
    for engine, result in results.items():
        copies = ", ".join(f"{limits['bandwidth'] / 1e9:.0f}" for limits in result.limits)
        peaks = ", ".join(f"{limits['peak'] / 1e12:.1f}" for limits in result.limits)
        lines.append(f"| {engine} | {copies} | {peaks} |")
    return "\n".join(lines)


def targets(shape: str, results: dict[str, Result]) -> str:
    """Return each target, what was measured and whether it was reached, as a Markdown table."""
    rows: list[tuple[str, str, float, float | None]] = []

    def fraction(engine: str, bsz: int, context: int, kind: int) -> float | None:
        result = results.get(engine)
        cell = result.cell(bsz, context) if result else None
        return fractions(shape, engine, result, cell)[kind] if result and cell else None

    def ratio(above: tuple[str, int], below: tuple[str, int], context: int = 512) -> float | None:
        cells = []
        for engine, bsz in (above, below):
            result = results.get(engine)
            cells.append(result.cell(bsz, context) if result else None)
        first, second = cells
        if not (first and second):
            return None
        return float(first["decode_tokens_per_s"] / second["decode_tokens_per_s"])

    for engine, wanted in (("llama compiled", 0.80), ("llama", 0.65)):
        found = fraction(engine, 1, 512, 1)
        rows.append((engine, "decoding, batch 1, of the copy bandwidth", wanted, found))
    for engine in ("llama compiled", "llama"):
        found = fraction(engine, 1, 16384, 1)
        rows.append((engine, "the same at 16,384 positions, with the cache", 0.70, found))
        found = ratio((engine, 64), (engine, 1))
        rows.append((engine, "decoding, batch 64 over batch 1", 30.0, found))
        found = fraction(engine, 1, 4096, 0)
        rows.append((engine, "prefill of 4,096 tokens, of the matrix peak", 0.60, found))
    found = ratio(("llama int4", 1), ("llama", 1))
    rows.append(("llama int4", "decoding, batch 1, int4 over bf16", 1.8, found))
    lines = ["| engine | target | wanted | measured | reached |", "|---|---|---|---|---|"]
    for engine, target, wanted, value in rows:
        measured = "not measured" if value is None else f"{value:.2f}"
        reached = "" if value is None else "yes" if value >= wanted else "no"
        lines.append(f"| {engine} | {target} | {wanted:.2f} | {measured} | {reached} |")
    return "\n".join(lines)


def report(shape: str, results: dict[str, Result]) -> str:
    """Return all that was found, as Markdown."""
    about = next((result.about for result in results.values() if result.about), {})
    parts = [", ".join([f"{shape} in bfloat16", *(f"{k} {v}" for k, v in about.items())])]
    parts += [speeds(shape, results), device_limits(results)]
    notes = [f"- {engine}: {note}" for engine, result in results.items() for note in result.notes]
    for engine, result in results.items():
        for record in result.skipped:
            bsz, context = record["skipped"]
            notes.append(
                f"- {engine}: batch {bsz}, context {context:,} left out: {record['reason']}"
            )
    parts += ["\n".join(notes)] if notes else []
    if shape != "7B":
        parts.append("The targets are for 7B on a GPU.")
    return "\n\n".join([*parts, targets(shape, results)])


def run_worker(engine: str, shape: str, config: DeviceConfig) -> list[Record]:
    """Measure an engine in a process of its own; its output goes to the standard error."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "found"
        out.touch()
        command = [sys.executable, gpu_worker.__file__, engine, str(out), "--shape", shape]
        command += ["--device", str(config.device), "--contexts", config.contexts]
        command += ["--batches", config.batches]
        done = subprocess.run(command, stdout=sys.stderr)
        records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    if done.returncode and not any("failed" in record for record in records):
        records.append({"failed": f"the process ended with status {done.returncode}"})
    return records


def median_of(rounds: Sequence[Sequence[Record]]) -> Result:
    """Return the last round's findings with the cells' medians over all rounds."""
    found = [Result.of(records) for records in rounds]
    last = found[-1]
    for cell in last.cells:
        others = [result.cell(cell["batch"], cell["context"]) for result in found]
        for key in cell:
            cell[key] = statistics.median(other[key] for other in others if other)
    last.limits = [limits for result in found for limits in result.limits]
    return last


def compare(
    config: DeviceConfig,
    shape: str = "7B",
    peers: str | Sequence[str] | None = None,
    repeats: int = 1,
    out: str | None = None,
) -> None:
    """Measure this library's variants and the peers on a device, and print the report.

    Args:
        peers: of ``PEERS``; all by default, and none for an empty text.
        repeats: rounds in which all of them are measured.
        out: where to write what was found, as JSON.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape is {shape!r}: expected one of {', '.join(SHAPES)}")
    chosen = PEERS if peers is None else peers.split(",") if isinstance(peers, str) else peers
    engines = [*config.variants()]
    for peer in filter(None, chosen):
        if peer not in PEERS:
            raise ValueError(f"there is no peer {peer!r}: expected {', '.join(PEERS)}")
        if importlib.util.find_spec(peer.split()[0]) is None:
            print(f"{peer} is left out: it isn't installed")
            continue
        engines.append(peer)
    rounds: dict[str, list[list[Record]]] = {engine: [] for engine in engines}
    for number in range(repeats):
        for engine in engines:
            print(f"round {number + 1} of {repeats}: {engine}", file=sys.stderr)
            rounds[engine].append(run_worker(engine, shape, config))
    print(report(shape, {engine: median_of(some) for engine, some in rounds.items()}))
    if out is not None:
        found: dict[str, Any] = {"shape": shape, "rounds": rounds}
        Path(out).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
