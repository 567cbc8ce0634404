"""Time from the start of a process to its result, compared with ``import torch`` alone.

    python benchmarks/startup.py             # the embedded model's example
    python benchmarks/startup.py CKPT_DIR    # and another model's first token of a short prompt

Commands alternate, so that drift of the machine's speed doesn't matter; files are in the page
cache. The figures are medians.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

from llama import cli

ROOT = Path(__file__).resolve().parent.parent
MAP = "import glob, sys, torch\nfor f in glob.glob(sys.argv[1] + '/*.pth'):\n"
MAP += "    torch.load(f, mmap=True, weights_only=True)"
FIRST = "import sys, llama\nllama = llama.Llama.build(sys.argv[1], max_batch_size=1)\n"
FIRST += "llama.generate([[1, *range(300, 315)]], 1)"


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main(path: str | None = None, repeats: int = 7) -> None:
    """Print a table; ``path`` is a checkpoint in Meta's layout."""
    commands = {
        "import torch": ["-c", "import torch"],
        "examples/example_text_completion.py": [str(ROOT / "examples/example_text_completion.py")],
    }
    if path is not None:
        commands["import torch, and map the weights"] = ["-c", MAP, path]
        commands["first token of 16 in a prompt"] = ["-c", FIRST, path]
    times: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(repeats + 1):
        for name, command in commands.items():
            took = seconds(command)
            if number:
                times[name].append(took)
    torch_alone = statistics.median(times["import torch"])
    print("| command | seconds | of import torch |\n|---|---|---|")
    for name, took in times.items():
        middle = statistics.median(took)
        print(f"| {name} | {middle:.2f} | {middle / torch_alone:.2f} x |")


if __name__ == "__main__":
    cli.run(main)
