"""This library against installed peers: the same random weights, in turns, fresh processes.

    pip install -e '.[bench]'
    python benchmarks/speed.py --out results.json --plots plots/ --grow
    python benchmarks/speed.py --kinds Q4_0,Q4_K_M --directory files/ --repeats 3
    python benchmarks/speed.py --shape SmolLM2 --directory files/
    python benchmarks/speed.py --device cuda    # on a GPU: see gpu_speed.py

Each engine gets the weights in its own format (CTranslate2 in int8, as it has no bfloat16 products
on a CPU), or both the same GGUF file. Engines take turns for ``repeats`` rounds; the tables show
medians. The limits of the machine, its read bandwidth (a large tensor's sum) and its peak (the
better of PyTorch's two ways to multiply), are measured right before and after each engine. The
second table says which of ``targets.py`` are reached. With ``grow``, growth.py measures the cost of
larger batches, longer contexts and further turns.
"""

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import engines
import growth
import targets
import torch
from gpu_speed import DeviceConfig, compare
from plots import draw_growth, draw_peers
from shapes import SHAPES
from weights import WRITERS, random_weights

from llama import ModelArgs, cli
from llama.checkpoint.load import has_fast_bf16
from llama.checkpoint.sharding import parameter_count

KINDS = {
    "bf16": ("llama", "llama.cpp", "transformers"),
    "int8": ("llama int8", "llama.cpp Q8_0", "ctranslate2"),
    "int4": ("llama int4", "llama.cpp Q4_0"),
    "BF16": ("llama BF16", "llama.cpp"),
    "Q8_0": ("llama Q8_0", "llama.cpp Q8_0"),
    "Q4_0": ("llama Q4_0", "llama.cpp Q4_0"),
    "Q4_K_M": ("llama Q4_K_M", "llama.cpp Q4_K_M"),
}
DEFAULT_KINDS = "bf16,int8,Q4_0,Q4_K_M"
# Of a weight, including scales.
BYTES = {"bf16": 2.0, "int8": 1.0, "int4": 0.5625, "Q8_0": 1.0625, "Q4_0": 0.5625, "Q4_K_M": 0.6}

LIMITS = """
import json, sys, time, torch
torch.set_num_threads(int(sys.argv[1]))
dtype, size = getattr(torch, sys.argv[2]), int(sys.argv[3])
def fastest(function, repeats=5):
    function()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
large = torch.ones(size)
bandwidth = large.nbytes / fastest(large.sum)
del large
n = 2048
a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
ways = [lambda: torch.nn.functional.linear(a, b)]
if torch.backends.mkldnn.is_available():
    packed = torch.ops.mkldnn._reorder_linear_weight(b, n)
    ways.append(lambda: torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], ""))
print(json.dumps({"bandwidth": bandwidth, "peak": 2 * n**3 / min(map(fastest, ways))}))
"""
LARGE = 1 << 28  # elements whose sum tells the bandwidth


def product_dtype() -> str:
    """Return the dtype in which this machine multiplies checkpoints of bfloat16."""
    return "bfloat16" if has_fast_bf16(torch.device("cpu")) else "float32"


def limits() -> dict[str, float]:
    """Return bytes read and operations per second, measured in a process of its own."""
    numbers = [str(engines.THREADS), product_dtype(), str(LARGE)]
    command = [sys.executable, "-c", LIMITS, *numbers]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return dict(json.loads(done.stdout))


def run_worker(engine: str, path: Path) -> dict[str, float] | None:
    command = [sys.executable, engines.__file__, engine, str(path), str(time.time())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"{engine} failed: {last}", file=sys.stderr)
        return None
    return dict(json.loads(done.stdout))


def run_growth(path: Path) -> dict[str, Any]:
    command = [sys.executable, growth.__file__, str(path), "--as_json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return dict(json.loads(done.stdout))


def fractions(
    args: ModelArgs, weights: str, measured: dict[str, float], found: dict[str, float]
) -> dict[str, float]:
    """Return how much of the machine's limits an engine reaches.

    Args:
        args: the network's shape.
        weights: a name in ``BYTES``.
        measured: the engine's speeds.
        found: the limits.
    """
    n_embedding = args.vocab_size * args.dim
    # A token reads one row of an embedding that isn't the output, too; of a prompt only the last
    # position has logits.
    per_token = parameter_count(args) - (0 if args.tie_word_embeddings else n_embedding)
    per_prompt = per_token - n_embedding
    read = per_token * BYTES[weights] * measured["decode_tokens_per_s"]
    calculated = 2 * per_prompt * measured["prefill_tokens_per_s"]
    return {"of_bandwidth": read / found["bandwidth"], "of_peak": calculated / found["peak"]}


def table(shape: str, results: dict[str, Any]) -> str:
    """Return the medians, and their fractions of the machine's limits, as a Markdown table."""
    found, dtype = results["limits"], product_dtype()
    lines = [
        f"{shape}, {results['machine']}: read bandwidth {found['bandwidth'] / 1e9:.1f} GB/s, "
        f"{dtype} peak {found['peak'] / 1e9:.0f} Gflop/s",
        "",
        "| engine | prefill tokens/s | of the peak | decode tokens/s | of the bandwidth "
        "| first token | peak memory | prefill: ours is | decode: ours is |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, measured in results["engines"].items():
        speeds = measured["prefill_tokens_per_s"], measured["decode_tokens_per_s"]
        ours = _ours(name, results["engines"])
        ratios = "| | |"
        if ours is not None:
            own = ours["prefill_tokens_per_s"], ours["decode_tokens_per_s"]
            ratios = f"| {own[0] / speeds[0]:.2f} x | {own[1] / speeds[1]:.2f} x |"
        lines.append(
            f"| {name} | {speeds[0]:.0f} | {measured['of_peak']:.2f} | {speeds[1]:.1f} "
            f"| {measured['of_bandwidth']:.2f} | {measured['first_token_s']:.1f} s "
            f"| {measured['peak_bytes'] / 1e9:.2f} GB {ratios}"
        )
    return "\n".join(lines)


def _ours(engine: str, measured: dict[str, dict[str, float]]) -> dict[str, float] | None:
    """Return the speeds of this library on weights like an engine's, of the same file at best."""
    weights = engines.ENGINES[engine].weights
    like = {"bf16": "llama", "Q8_0": "llama int8", "Q4_0": "llama int4"}
    names = (f"llama {weights}", like.get(weights, ""))
    return next((measured[name] for name in names if name in measured), None)


def prepare(shape: str, names: list[str], directory: Path) -> None:
    """Write the files of engines that an earlier run hasn't left there."""
    missing = [name for name in names if not (directory / name).exists()]
    if not missing:
        return
    torch.manual_seed(0)  # files of several runs have the same weights
    tensors = random_weights(SHAPES[shape])
    for name in missing:
        if not (directory / name).exists():  # another's file may have been written with it
            print(f"writing {name}", file=sys.stderr)
            WRITERS[name](SHAPES[shape], tensors, directory / name)


def take_turns(shape: str, names: list[str], repeats: int, directory: Path) -> dict[str, Any]:
    """Measure engines in rounds, the machine's limits right before and after each of them."""
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    measured = [limits()]
    for number in range(repeats):
        for name in names:
            print(f"round {number + 1} of {repeats}: {name}", file=sys.stderr)
            result = run_worker(name, directory / name)
            measured.append(limits())
            if result is None:
                continue
            before, after = measured[-2:]
            around = {key: (before[key] + after[key]) / 2 for key in before}
            weights = engines.ENGINES[name].weights
            result |= fractions(SHAPES[shape], weights, result, around)
            rounds[name].append(result)
    return {
        "shape": shape,
        "machine": targets.machine(engines.THREADS),
        "amx": targets.has_amx(),
        "limits": {key: statistics.median(m[key] for m in measured) for key in measured[0]},
        "engines": {
            name: {key: statistics.median(r[key] for r in runs) for key in runs[0]}
            for name, runs in rounds.items()
            if runs
        },
        "rounds": rounds,
        "measured_limits": measured,
    }


def select(kinds: str | tuple[str, ...], peers: str | tuple[str, ...] | None) -> list[str]:
    """Return the installed engines of some kinds, or this library and some peers.

    Raises:
        ValueError: a kind or an engine isn't known.
    """
    if peers is None:
        wanted = kinds.split(",") if isinstance(kinds, str) else list(kinds)
        unknown = [kind for kind in wanted if kind not in KINDS]
        names = [name for kind in wanted for name in KINDS.get(kind, ())]
        known = KINDS.keys()
    else:
        names = ["llama", *(peers.split(",") if isinstance(peers, str) else peers)]
        unknown = [name for name in names if name and name not in WRITERS]
        known = WRITERS.keys()
    if unknown:
        raise ValueError(f"{unknown[0]!r} isn't one of {', '.join(known)}")
    installed = engines.installed()
    return [name for name in dict.fromkeys(names) if name in WRITERS and name in installed]


def main(
    shape: str | None = None,
    kinds: str = DEFAULT_KINDS,
    peers: str | None = None,
    repeats: int = 1,
    out: str | None = None,
    plots: str | None = None,
    grow: bool = False,
    directory: str | None = None,
    *,
    on: DeviceConfig,
) -> None:
    """Measure this library and its peers, print tables, write ``out`` as JSON and draw ``plots``.

    With ``device`` everything runs there, and gpu_speed.py does the work.

    Args:
        shape: of the random weights, 1.1B by default, with ``device`` 7B; see shapes.py.
        kinds: of weights, with commas between them: bf16, int8, int4 (which this library has
            made), BF16, Q8_0, Q4_0, Q4_K_M (llama.cpp's own files, for both).
        peers: engines to compare with instead, with commas between them.
        repeats: rounds, of which the tables show medians.
        out: the JSON file to write.
        plots: the directory for plots.
        grow: whether growth.py runs, too.
        directory: where the engines' files stay for the next run, which then writes none; by
            default they are removed.
    """
    if on.device is not None:
        if plots is not None or directory is not None or kinds != DEFAULT_KINDS:
            raise ValueError("--kinds, --directory and --plots are for runs without --device")
        compare(on, shape or "7B", peers, repeats, out)
        return
    shape = shape or "1.1B"
    names = select(kinds, peers)
    with contextlib.ExitStack() as stack:
        if directory is None:
            files = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            files = Path(directory) / shape
            files.mkdir(parents=True, exist_ok=True)
        prepare(shape, names + ["llama"] * (grow and "llama" not in names), files)
        results = take_turns(shape, names, repeats, files)
        if grow:
            results["growth"] = run_growth(files / "llama")
    print(table(shape, results))
    print(targets.summary(results))
    if grow:
        print(f"\n{growth.table(results['growth'])}")
    if out is not None:
        Path(out).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if plots is not None:
        Path(plots).mkdir(parents=True, exist_ok=True)
        draw_peers(results, Path(plots) / "speed_peers.svg")
        if grow:
            draw_growth(results, Path(plots) / "speed_growth.svg")


if __name__ == "__main__":
    cli.run(main)
