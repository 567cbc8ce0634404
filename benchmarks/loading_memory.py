"""Peak memory while loading, compared with the size of weights and cache.

    python benchmarks/loading_memory.py
    python benchmarks/loading_memory.py --size 7B --cases "bf16 as it is;int4"
    python benchmarks/loading_memory.py --size 7B --cases Q4_K_M
    python benchmarks/loading_memory.py --size 110M --cases "bf16 as it is" --prompt 16380 \\
        --max_batch_size 1

Writes random checkpoints of 1.1 billion parameters (2.2 GB) to a temporary directory and loads
each in a fresh process: bfloat16 as it is, float16 converted, two shards joined into one, a
Hugging Face directory in one process and in two, and bfloat16 that llama.convert has quantised to
int8 and int4; "to int4" is that conversion itself. "Q4_K_M" is a GGUF file of random blocks, read
from a warm page cache. "used" is the peak after a prompt and four more tokens, "weights" what they
take of the file's size, "beyond" the peak's excess over weights and cache, Python and PyTorch
included; "in files" are resident pages of mapped files, at the end: libraries' code, which
processes share and the system drops where memory is short, and weights that are used as they are
mapped. The first line names the machine.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import targets
import torch
import weights

from llama import ModelArgs, cli
from llama.checkpoint.base import Checkpoint, Weights
from llama.checkpoint.save import save
from llama.checkpoint.save_hf import save_hf
from llama.checkpoint.sharding import full_shapes
from llama.generation import TINY

SIZES = {
    "18M": ModelArgs(dim=256, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=32000),
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
    "Q4_K_M": (torch.bfloat16, 1, 1),
}
LOAD = """
import json, os, sys, time, torch
from llama import Llama, parallel
from llama.checkpoint.sharding import weight_bytes
def resident(name="VmHWM"):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))
imported = resident()
path, prompt, max_batch_size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
tokenizer = None if os.path.isdir(path) else sys.argv[4]  # a file without a vocabulary
start = time.monotonic()
llama = Llama.build(path, tokenizer, max(512, prompt + 4), max_batch_size, device="cpu",
                    dtype=torch.bfloat16)
seconds = time.monotonic() - start
model = llama.model
weights = needed = weight_bytes(model.params, torch.bfloat16, parallel.world_size(), model.forms)
needed += sum(t.nbytes for name, t in llama.model.named_buffers() if "cache" in name)
loaded = resident()
llama.generate([[1] * prompt], 4, temperature=0)
parallel.print_once(json.dumps({
    "needed": needed,
    "imported": imported,
    "loaded": loaded,
    "generated": resident(),
    "in_files": resident("RssFile"),
    "weights": weights,
    "seconds": seconds,
}))
"""


CONVERT = """
import json, os, sys, time
from llama.convert import convert
def resident(name="VmHWM"):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))
imported = resident()
start = time.monotonic()
convert(sys.argv[1], sys.argv[2], quantize=sys.argv[3])
seconds = time.monotonic() - start
made = os.path.getsize(os.path.join(sys.argv[2], "consolidated.00.pth"))
print(json.dumps({
    "needed": made,
    "imported": imported,
    "loaded": resident(),
    "generated": resident(),
    "in_files": resident("RssFile"),
    "weights": made,
    "seconds": seconds,
}))
"""


COLUMNS = (
    *("case", "weights + cache", "imports", "loaded", "used", "of weights + cache"),
    *("beyond", "in files", "weights", "seconds"),
)


def row(case: str, measured: dict[str, float], file_bytes: int) -> str:
    """Return a line of the table; of ``CASES``, and of conversions."""
    keys = ("needed", "imported", "loaded", "generated")
    sizes = [measured[key] / 1e9 for key in keys]
    peak = max(sizes[2:])
    cells = [
        case,
        *(f"{size:.2f} GB" for size in sizes),
        f"{peak / sizes[0]:.2f}",
        f"{peak - sizes[0]:.2f} GB",
        f"{measured['in_files'] / 1e9:.2f} GB",
        f"{measured['weights'] / file_bytes:.2f} of the file",
        f"{measured['seconds']:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of a directory's weights."""
    files = [path] if path.is_file() else path.iterdir()
    return sum(file.stat().st_size for file in files)


def quantize(path: Path, scheme: str) -> Path:
    """Replace a checkpoint by a quantised one, and return its path."""
    out = path.with_name(f"{path.name}-quantized")
    command = [sys.executable, "-c", CONVERT, str(path), str(out), scheme]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    print(row(f"to {scheme}", json.loads(done.stdout), size_of(path)), flush=True)
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
    torch.manual_seed(0)
    print(f"{size}, {targets.machine(torch.get_num_threads())}:\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    with tempfile.TemporaryDirectory() as directory:
        for case in cases.split(";"):
            dtype, shards, processes = CASES[case]
            path = Path(directory) / case.replace(" ", "-")
            if case == "Q4_K_M":
                weights.write_q4_k_m(SIZES[size], path)
            else:
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
                    str(TINY / "tokenizer.model"),
                ],
                stdout=subprocess.PIPE,
                stderr=None if processes == 1 else subprocess.DEVNULL,
                check=True,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            )
            print(row(case, json.loads(done.stdout), size_of(path)), flush=True)
            remove = shutil.rmtree if path.is_dir() else Path.unlink
            remove(path)


if __name__ == "__main__":
    cli.run(main)
