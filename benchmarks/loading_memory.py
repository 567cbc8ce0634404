"""Peak memory while loading, compared with the size of weights and cache.

    python benchmarks/loading_memory.py
    python benchmarks/loading_memory.py --size 7B --cases "bf16 as it is;int4"
    python benchmarks/loading_memory.py --size 110M --cases "bf16 as it is" --prompt 16380 \\
        --max_batch_size 1

Writes random checkpoints of 1.1 billion parameters (2.2 GB) to a temporary directory and loads
each in a fresh process: bfloat16 as it is, float16 converted, two shards joined into one, a
Hugging Face directory in one process and in two, and bfloat16 that llama.convert has quantised to
int8 and int4; "to int4" is that conversion itself. "used" is the peak after a prompt and four more
tokens.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from llama import ModelArgs, cli
from llama.checkpoint.base import Checkpoint, Weights
from llama.checkpoint.save import save
from llama.checkpoint.save_hf import save_hf
from llama.checkpoint.sharding import full_shapes
from llama.generation import TINY

SIZES = {
    "110M": ModelArgs(dim=768, n_layers=12, n_heads=12, vocab_size=32000),
    "1.1B": ModelArgs(
        dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, vocab_size=32000, multiple_of=256
    ),
    "7B": ModelArgs(dim=4096, n_layers=32, n_heads=32, vocab_size=32000, multiple_of=256),
}
# The stored dtype, the number of files (0: a Hugging Face directory), and of processes.
CASES = {
    "bf16 as it is": (torch.bfloat16, 1, 1),
    "fp16 to bf16": (torch.float16, 1, 1),
    "2 shards to 1": (torch.bfloat16, 2, 1),
    "HF": (torch.bfloat16, 0, 1),
    "HF, 2 processes": (torch.bfloat16, 0, 2),
    "int8": (torch.bfloat16, 1, 1),
    "int4": (torch.bfloat16, 1, 1),
}
LOAD = """
import json, sys, torch
from llama import Llama, parallel
from llama.checkpoint.sharding import weight_bytes
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
imported = peak()
path, prompt, max_batch_size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
llama = Llama.build(path, None, max(512, prompt + 4), max_batch_size, device="cpu",
                    dtype=torch.bfloat16)
model = llama.model
needed = weight_bytes(model.params, torch.bfloat16, parallel.world_size(), model.forms)
needed += sum(t.nbytes for name, t in llama.model.named_buffers() if "cache" in name)
loaded = peak()
llama.generate([[1] * prompt], 4, temperature=0)
parallel.print_once(json.dumps({
    "needed": needed,
    "imported": imported,
    "loaded": loaded,
    "generated": peak(),
}))
"""


CONVERT = """
import json, os, sys
from llama.convert import convert
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
imported = peak()
convert(sys.argv[1], sys.argv[2], quantize=sys.argv[3])
made = os.path.getsize(os.path.join(sys.argv[2], "consolidated.00.pth"))
print(json.dumps({"needed": made, "imported": imported, "loaded": peak(), "generated": peak()}))
"""


def show(case: str, measured: dict[str, int]) -> None:
    sizes = [measured[key] / 1e9 for key in ("needed", "imported", "loaded", "generated")]
    ratio = max(sizes[2:]) / sizes[0]
    print(f"{case:<16}" + "".join(f"{n:>14.2f} GB" for n in sizes) + f"{ratio:>17.2f}")


def quantize(path: Path, scheme: str) -> Path:
    """Replace a checkpoint by a quantised one, and return its path."""
    out = path.with_name(f"{path.name}-quantized")
    command = [sys.executable, "-c", CONVERT, str(path), str(out), scheme]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    show(f"to {scheme}", json.loads(done.stdout))
    shutil.rmtree(path)
    return out


def write(args: ModelArgs, directory: Path, dtype: torch.dtype, shards: int) -> None:
    tensors = {
        name: torch.empty(shape, dtype=dtype).normal_(std=0.02)
        for name, shape in full_shapes(args).items()
    }
    files = {"tokenizer.model": TINY / "tokenizer.model"}
    if shards:
        save([tensors], args, directory, shards, files)
    else:
        whole = Checkpoint("random", {}, [Weights.of(tensors)], ["random"], dtype, files)
        save_hf(whole, args, directory)


def main(
    size: str = "1.1B",
    cases: str = ";".join(CASES),
    prompt: int = 500,
    max_batch_size: int = 8,
) -> None:
    """Print a process's peak resident memory by stages, and its ratio to weights and cache."""
    columns = ("weights + cache", "imports", "loaded", "used", "ratio")
    print(f"{'case':<16}" + "".join(f"{column:>17}" for column in columns))
    with tempfile.TemporaryDirectory() as directory:
        for case in cases.split(";"):
            dtype, shards, processes = CASES[case]
            path = Path(directory) / case.replace(" ", "-")
            write(SIZES[size], path, dtype, shards)
            if case in ("int8", "int4"):
                path = quantize(path, case)
            launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
            script = Path(directory) / "load.py"
            script.write_text(LOAD)
            done = subprocess.run(
                [
                    *(sys.executable, *launcher * (processes > 1)),
                    *(str(script), str(path), str(prompt), str(max_batch_size)),
                ],
                stdout=subprocess.PIPE,
                stderr=None if processes == 1 else subprocess.DEVNULL,
                check=True,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            )
            show(case, json.loads(done.stdout))
            shutil.rmtree(path)


if __name__ == "__main__":
    cli.run(main)
