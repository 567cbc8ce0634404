"""A file of very many requests: the memory it takes, and one answer for each request.

    python benchmarks/long_batch.py --lines 10000000
    python benchmarks/long_batch.py --lines 1000000 --api

The command answers it in a process that is killed in the middle, and in a second one. All of it is
what users run, but for the model, which would take weeks: each request gets the same text at once,
or with ``--api`` what the server's own code answers to the cheapest request, ``/tokenize``.
"""

import asyncio
import json
import multiprocessing
import re
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import NamedTuple

from llama import cli
from llama.batch import command
from llama.batch.cluster import ClusterConfig
from llama.batch.model import Model, Result
from llama.batch.requests import Request
from llama.batch.results import result_line
from llama.server.config import ModelConfig

ANSWER = json.dumps({"choices": [{"text": "x" * 100}]}).encode()
ROWS = 6  # of the table, for each process


class Fixed(Model):
    """A model whose answers are all the same, and done in another order than they were asked."""

    async def answer(self, request: Request) -> Result:
        """Return the answer to a request."""
        await asyncio.sleep(0)
        line = result_line(request, 200, ANSWER, uuid.uuid4().hex)
        return Result(request.key, line, False)


class Look(NamedTuple):
    """A process at one moment, in seconds and megabytes."""

    seconds: float
    written: float
    resident: float


def main(lines: int = 100_000, folder: str | None = None, api: bool = False) -> None:
    """Print the memory of a process that answers a long file, and count the answers.

    Args:
        lines: of the file, each a request.
        folder: has room for the files, about 400 bytes for each line.
        api: have the server's own code answer.
    """
    with tempfile.TemporaryDirectory(dir=folder) as path:
        source, out = Path(path, "in.jsonl"), Path(path, "out.jsonl")
        write(source, lines)
        print("| process | seconds | MB written | MB resident |")
        print("|---|---|---|---|")
        for name, end in (("first", lines // 2), ("second", None)):
            looks = watch(source, out, api, end)
            for look in looks[len(looks) // ROWS :: max(1, len(looks) // ROWS)]:
                print(f"| {name} | {look.seconds:.0f} | {look.written:.0f} | {look.resident:.0f} |")
        print(f"\n{count(out, lines):,} requests have one answer each")


def write(path: Path, n_lines: int) -> None:
    """Write a file of short requests."""
    with path.open("w") as file:
        for i in range(n_lines):
            line = {"custom_id": f"{i}", "url": "/tokenize", "body": {"prompt": f"cow {i}"}}
            print(json.dumps(line), file=file)


def answer(source: str, out: str, api: bool) -> None:
    """Run the command."""
    sys.stdout = sys.stderr
    if not api:
        command.Model = Fixed  # type: ignore[misc]
    command.main(source, out, cluster=ClusterConfig(), config=ModelConfig())


def watch(source: Path, out: Path, api: bool, end: int | None) -> list[Look]:
    """Answer a file in a process of its own, and return how it was, second by second.

    Args:
        end: the number of answers at which it is killed; None to let it come to its end.
    """
    spawn = multiprocessing.get_context("spawn")
    process = spawn.Process(target=answer, args=(str(source), str(out), api))
    process.start()
    looks, begin, size = [], time.monotonic(), 0
    while process.is_alive():
        time.sleep(1)
        size = out.stat().st_size if out.exists() else 0
        found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
        if found and size:
            looks.append(Look(time.monotonic() - begin, size / 1e6, int(found[1]) / 1e3))
        if end is not None and size and size > end * line_size(out):
            process.kill()
    process.join()
    if end is None and process.exitcode:
        raise ChildProcessError(f"the command ended with {process.exitcode}")
    return looks


def line_size(path: Path) -> int:
    """Return the size of a file's first line."""
    with path.open("rb") as file:
        return len(file.readline())


def count(out: Path, n_lines: int) -> int:
    """Return the number of requests with an answer.

    Raises:
        ValueError: one has none, or two.
    """
    answered = bytearray(n_lines)
    with out.open() as file:
        for line in file:
            answered[int(json.loads(line)["custom_id"])] += 1
    if set(answered) != {1}:
        raise ValueError(f"{answered.count(0):,} requests have no answer, others have two")
    return len(answered)


if __name__ == "__main__":
    cli.run(main)
