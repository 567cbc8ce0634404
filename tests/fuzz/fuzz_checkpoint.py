"""Damage checkpoints and see that the library answers each with a model or with a clean error.

python tests/fuzz/fuzz_checkpoint.py --mutations 2000 --seed 1
"""

import argparse
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT = 20.0  # seconds for one mutation
FORMATS = ("meta", "llama3", "hf", "gguf", "adapter")
START = 300.0  # seconds for a worker to import torch and to run the sound checkpoints


@dataclass
class Outcome:
    """The result of one mutation. ``kind`` is "runs", "clean: ..." or the kind of a finding."""

    format: str
    number: int
    what: str
    kind: str
    text: str
    seconds: float = 0.0
    memory: int = 0  # bytes

    @property
    def is_finding(self) -> bool:
        return self.kind != "runs" and not self.kind.startswith("clean: ")


class Fuzzer:
    """Sends mutations to a worker process, and starts another when one dies or hangs."""

    def __init__(self, seed: int = 1, timeout: float = TIMEOUT):
        self.seed = seed
        self.timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        self._pending = b""
        self._folder = tempfile.TemporaryDirectory(prefix="fuzz-")

    def run(self, number: int, format: str = FORMATS[0], plant: str = "") -> Outcome:
        """Try one mutation; ``plant`` names a bug that the worker then has (``worker._plant``)."""
        process = self._started()
        assert process.stdin is not None
        request = {"format": format, "number": number, "plant": plant}
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        built = self._report(START)
        if built is None:
            self._fail(f"mutation {number} of {format} could not be made")
        what = built["what"]
        start = time.monotonic()
        try:
            done = self._report(self.timeout)
        except TimeoutError:
            self.close()
            seconds = time.monotonic() - start
            return Outcome(format, number, what, "HANG", "no answer", seconds)
        if done is None:
            seconds = time.monotonic() - start
            return Outcome(format, number, what, "CRASH", self._end(process), seconds)
        return Outcome(format, number, what, **done)

    def command(self, outcome: Outcome) -> str:
        """A command that repeats a mutation."""
        which = f"--format {outcome.format} --seed {self.seed} --only {outcome.number}"
        return f"{sys.executable} {__file__} {which}"

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def __enter__(self) -> "Fuzzer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._stderr.close()
        self._folder.cleanup()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._stderr.seek(0)
            self._stderr.truncate()
            self._pending = b""
            folder = tempfile.mkdtemp(dir=self._folder.name)  # the last worker may have left files
            worker = Path(__file__).with_name("worker.py")
            self._process = subprocess.Popen(
                [sys.executable, str(worker), str(self.seed), folder],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                # One worker dies with its memory limit; a hundred threads' stacks are no finding.
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
            )
            if self._report(START) is None:
                self._fail("the worker could not start")
        return self._process

    def _report(self, timeout: float) -> Any:
        """The worker's next line; None where it has died."""
        assert self._process is not None and self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        deadline = time.monotonic() + timeout
        while b"\n" not in self._pending:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                raise TimeoutError
            chunk = os.read(pipe, 1 << 16)
            if not chunk:
                return None
            self._pending += chunk
        line, self._pending = self._pending.split(b"\n", 1)
        return json.loads(line)

    def _end(self, process: subprocess.Popen[bytes]) -> str:
        process.communicate()
        self._process = None
        code = process.returncode
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").splitlines()
        notable = [line.strip() for line in lines if "Error" in line or "what()" in line]
        frames = [line.strip() for line in lines if line.startswith("  File")]
        return "; ".join([how, *notable[-2:], *frames[:2]])

    def _fail(self, message: str) -> None:
        assert self._process is not None
        raise RuntimeError(f"{message}: {self._end(self._process)}")


def describe(fuzzer: Fuzzer, outcome: Outcome) -> str:
    """A finding and how to see it again."""
    return (
        f"{outcome.kind} at mutation {outcome.number} ({outcome.what}): {outcome.text}\n"
        f"    {fuzzer.command(outcome)}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--format", choices=FORMATS, help="of what is damaged; each by default")
    parser.add_argument("--mutations", type=int, default=2000, help="how many to try of a format")
    parser.add_argument("--first", type=int, default=0, help="the first one's number")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="try this one and say what it is")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds for each")
    options = parser.parse_args()
    numbers = range(options.first, options.first + options.mutations)
    if options.only is not None:
        numbers = range(options.only, options.only + 1)
        options.format = options.format or FORMATS[0]
    found = 0
    for format in [options.format] if options.format else FORMATS:
        print(f"{format}:")
        with Fuzzer(options.seed, options.timeout) as fuzzer:
            found += try_all(fuzzer, format, numbers, options.only is not None)
    return int(found > 0)


def try_all(fuzzer: Fuzzer, format: str, numbers: range, says_what: bool = False) -> int:
    """Try mutations of a format and print what came of them. Returns the number of findings."""
    outcomes = []
    start = time.monotonic()
    for done, number in enumerate(numbers, 1):
        outcome = fuzzer.run(number, format)
        outcomes.append(outcome)
        if outcome.is_finding:
            print(f"\r{describe(fuzzer, outcome)}", flush=True)
        if done % 20 == 0 or done == len(numbers):
            findings = sum(o.is_finding for o in outcomes)
            rate = (time.monotonic() - start) / done
            progress = f"\r{done}/{len(numbers)}, {findings} findings, {rate:.2f} s each"
            print(progress, end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    if says_what:
        print(f"{outcomes[0].what}: {outcomes[0].kind} {outcomes[0].text}")
    for kind, count in sorted(Counter(o.kind for o in outcomes).items()):
        finding = "" if kind == "runs" or kind.startswith("clean: ") else "FINDING "
        print(f"{count:6d}  {finding}{kind}")
    slowest = max(outcomes, key=lambda o: o.seconds)
    print(f"slowest: {slowest.seconds:.2f} s, mutation {slowest.number} ({slowest.what})")
    largest = max(outcomes, key=lambda o: o.memory)
    print(f"largest: {largest.memory >> 20} MiB, mutation {largest.number} ({largest.what})")
    return sum(o.is_finding for o in outcomes)


if __name__ == "__main__":
    sys.exit(main())
