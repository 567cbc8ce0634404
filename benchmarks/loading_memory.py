"""How much memory loading takes, beside what it has to: weights and cache.

    python benchmarks/loading_memory.py
    python benchmarks/loading_memory.py --size 7B --cases "bf16 as it is"

Writes random checkpoints of 1.1 billion parameters (2.2 GB) to a temporary directory and loads
each in a fresh process: bfloat16 as it is, float16 converted, and two shards joined into one.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import fire
import torch

from llama import ModelArgs, checkpoint, sharding
from llama.generation import TINY

SIZES = {
    "1.1B": ModelArgs(
        dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, vocab_size=32000, multiple_of=256
    ),
    "7B": ModelArgs(dim=4096, n_layers=32, n_heads=32, vocab_size=32000, multiple_of=256),
}
CASES = {
    "bf16 as it is": (torch.bfloat16, 1),
    "fp16 to bf16": (torch.float16, 1),
    "2 shards to 1": (torch.bfloat16, 2),
}
LOAD = """
import json, sys, torch
from llama import Llama
llama = Llama.build(sys.argv[1], device="cpu", dtype=torch.bfloat16)
tensors = [*llama.model.parameters()]
cache = [t for name, t in llama.model.named_buffers() if "cache" in name]
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
loaded = peak()
llama.generate([[1] * 500], 4, temperature=0)
print(json.dumps({
    "needed": sum(t.nbytes for t in tensors) + sum(t.nbytes for t in cache),
    "loaded": loaded,
    "generated": peak(),
}))
"""


def write(args: ModelArgs, directory: Path, dtype: torch.dtype, shards: int) -> None:
    tensors = {
        name: torch.empty(shape, dtype=dtype).normal_(std=0.02)
        for name, shape in sharding.full_shapes(args).items()
    }
    checkpoint.save([tensors], args, directory, shards)
    (directory / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes())


def main(size: str = "1.1B", cases: str = ",".join(CASES)) -> None:
    """Print the peak resident memory of each case and its ratio to weights and cache."""
    print(f"{'case':<16}{'weights + cache':>17}{'peak, loaded':>14}{'peak, used':>12}{'ratio':>8}")
    with tempfile.TemporaryDirectory() as directory:
        for case in cases.split(","):
            dtype, shards = CASES[case]
            path = Path(directory) / case.replace(" ", "-")
            write(SIZES[size], path, dtype, shards)
            done = subprocess.run(
                [sys.executable, "-c", LOAD, str(path)],
                stdout=subprocess.PIPE,
                check=True,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            )
            found = json.loads(done.stdout)
            needed, loaded, used = (found[k] / 1e9 for k in ("needed", "loaded", "generated"))
            ratio = max(loaded, used) / needed
            print(f"{case:<16}{needed:>14.2f} GB{loaded:>11.2f} GB{used:>9.2f} GB{ratio:>8.2f}")
            for file in path.iterdir():
                file.unlink()


if __name__ == "__main__":
    fire.Fire(main)
