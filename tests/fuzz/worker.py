"""The process that mutates, loads and runs checkpoints: numbers on stdin, reports on stdout.

Each request and report is one line of JSON. A request is answered twice: when the mutated files
lie on disk, and when the library has answered.
"""

import contextlib
import ctypes
import functools
import gc
import json
import linecache
import os
import resource
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' helpers
import formats
import mutations
import torch

import llama
from llama import Llama
from llama.checkpoint.description import describe
from llama.errors import NotFinite
from llama.generation import TINY

MEMORY = 6 << 30  # address space that one mutation may add
RESIDENT = 1 << 30  # memory that it may fill: the files have a few megabytes
LONGEST = 2000  # characters of an error's message
PACKAGE = str(Path(llama.__file__).parent)


def main(seed: int, folder: Path) -> None:
    requests, reports = sys.stdin, os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing that a library prints gets among the reports
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def report(**content: Any) -> None:
        reports.write(json.dumps(content) + "\n")
        reports.flush()

    @functools.cache
    def bases_of(kind: str) -> dict[str, mutations.Files]:
        bases = formats.make_bases(kind, folder)
        for name, files in bases.items():  # what is sound must run, or nothing here means much
            outcome, text = answer_of_files(kind, files, folder / f"{kind} {name}")
            if outcome != "runs":
                raise RuntimeError(f"the undamaged {kind} {name} fails: {outcome} {text}")
        gc.freeze()  # what is there now needn't be searched after each mutation
        return bases

    report(ready=True)
    for line in requests:
        request = json.loads(line)
        kind = request["format"]
        run_one(kind, seed, request["number"], request["plant"], bases_of(kind), folder, report)


def run_one(
    kind: str,
    seed: int,
    number: int,
    plant: str,
    bases: dict[str, mutations.Files],
    folder: Path,
    report: Any,
) -> None:
    marker = folder / "marker"
    target = folder / "ckpt"
    try:
        what, files = formats.make(kind, seed, number, bases, marker)
        mutations.write_files(files, target)
        report(what=what)
        del files
        before = _start_measuring()
        start = time.monotonic()
        outcome, text = answer(kind, target, plant, marker)
        seconds = time.monotonic() - start
        grown = _status("VmHWM") - before
        if grown > RESIDENT:
            outcome, text = "MEMORY", f"{grown >> 20} MiB were filled; {outcome}: {text}"
        if marker.exists():
            outcome, text = "CODE EXECUTED", f"the marker is there; {outcome}: {text}"
        report(kind=outcome, text=text, seconds=seconds, memory=grown)
    finally:
        shutil.rmtree(target, ignore_errors=True)
        marker.unlink(missing_ok=True)


def answer_of_files(kind: str, files: mutations.Files, target: Path) -> tuple[str, str]:
    mutations.write_files(files, target)
    return answer(kind, target, "", target / "marker")


def answer(kind: str, directory: Path, plant: str, marker: Path) -> tuple[str, str]:
    """Return the kind of the library's answer to a directory, and its text."""
    path = directory / "model.gguf" if kind == "gguf" else directory
    outcomes = []
    for run in (_run_on_call, _run) if kind == "adapter" else (_run,):
        try:
            _plant(plant, marker)
            outcomes.append(run(kind, path))
        except BaseException as error:
            outcomes.append(judge(error))
    outcome = next((o for o in outcomes if not _is_clean(o[0])), outcomes[0])
    try:  # the description answers everything without an error
        found = describe(path)
        json.dumps(found, allow_nan=False)
        for text in (*found["problems"], *found["warnings"]):
            if len(text) > LONGEST or not text.isprintable():
                return "UNREADABLE DESCRIPTION", ascii(text)[:400]
    except BaseException as error:
        outcome = f"DESCRIPTION {type(error).__name__}", judge(error)[1]
    gc.collect()
    return outcome


def _is_clean(outcome: str) -> bool:
    return outcome == "runs" or outcome.startswith("clean: ")


@functools.cache
def _base() -> Llama:
    return Llama.build(TINY, max_seq_len=64, max_batch_size=2, device="cpu", dtype=torch.float32)


def _run_on_call(kind: str, path: Path) -> tuple[str, str]:
    """Use an adapter beside the base's weights."""
    model = _base()
    model.load_adapter("a", path)
    try:
        found = model.text_completion(["Once upon a", "The"], max_gen_len=4, seed=1, adapter="a")
    finally:
        model.unload_adapter("a")
    return ("runs", "") if isinstance(found[0]["generation"], str) else ("NO TEXT", str(found))


def _run(kind: str, path: Path) -> tuple[str, str]:
    options: dict[str, Any] = {"max_seq_len": 64, "max_batch_size": 2, "device": "cpu"}
    if kind == "adapter":
        options["adapter"] = path
        path = TINY
    model = Llama.build(path, dtype=torch.float32, **options)
    found = model.text_completion(["Once upon a"], max_gen_len=4, logprobs=True, seed=1)
    if kind in ("llama3", "hf", "gguf"):
        dialog: Any = [{"role": "user", "content": "Hi"}]
        model.chat_completion([dialog], max_gen_len=2, seed=1)
    return ("runs", "") if isinstance(found[0]["generation"], str) else ("NO TEXT", str(found))


def judge(error: BaseException) -> tuple[str, str]:
    """Return the kind of an error, raised on purpose and saying something or not, and its text."""
    tb = error.__traceback__
    while tb is not None and tb.tb_next is not None:
        tb = tb.tb_next
    place, line, raised = "", 0, False
    if tb is not None:
        place, line = tb.tb_frame.f_code.co_filename, tb.tb_lineno
        raised = linecache.getline(place, line).strip().startswith("raise ")
    ours = raised and place.startswith(PACKAGE)
    name, message = type(error).__name__, str(error)
    text = f"{message[:400]!a} ({Path(place).name}:{line})"
    if not ours or not message.strip():
        return f"RAW {name}", text
    if type(error) is NotFinite and "not finite" in message:
        return "clean: not finite", text
    own = type(error).__module__.startswith("llama.") and isinstance(error, ValueError)
    if not own and type(error) not in (ValueError, FileNotFoundError, MemoryError):
        return f"RAW {name}", text
    if any(sign in message for sign in ("DefaultCPUAllocator", "bad_alloc", "MemoryError")):
        return "ALLOCATION", text
    if len(message) > LONGEST or "\n" in message.strip() or not message.isprintable():
        return "UNREADABLE MESSAGE", f"{len(message)} characters: {text}"
    return f"clean: {name}", text


def _plant(bug: str, marker: Path) -> None:
    """A bug that the harness must notice."""
    if bug == "raise":
        raise KeyError("planted")
    if bug == "hang":
        time.sleep(1000)
    if bug == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if bug == "allocate":
        torch.zeros(2 * MEMORY, dtype=torch.uint8)
    if bug == "fill":
        torch.ones(RESIDENT + RESIDENT // 8, dtype=torch.uint8)
    if bug == "execute":
        marker.touch()


def _status(name: str) -> int:
    """A size of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def _start_measuring() -> int:
    """Give the process its limit again. Returns its resident memory."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + MEMORY, hard))
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    return _status("VmRSS")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
