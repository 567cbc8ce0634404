"""Forks processes that needn't import PyTorch first, which takes seconds of a processor each.

Run as a program: reads a job a line as JSON, and writes what became of it. ``processes.forked`` and
``processes.started`` are the other end. A forked process runs its command and ends as Python does,
by its own handlers.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path

import torch.distributed as dist

import llama  # noqa: F401


def start(fds: list[int], environment: dict[str, str]) -> int:
    """Fork; return 0 in the child, with the file descriptors as standard input, output, errors."""
    pid = os.fork()
    if pid == 0:
        for number, fd in enumerate(fds):
            os.dup2(fd, number)
        os.environ.clear()
        os.environ.update(environment)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return pid


def serve_store(folder: Path) -> dict[str, str]:
    """Start the store where ranks meet, as torchrun does; return the variables that tell them."""
    read, write = os.pipe()
    null = os.open(os.devnull, os.O_RDWR)
    pid = start([null] * 3, dict(os.environ))
    if pid == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(write, str(store.port).encode())
        while True:
            signal.pause()
    os.close(null)
    os.close(write)
    port = os.read(read, 8).decode()
    os.close(read)
    (folder / "store").write_text(str(pid))
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **agent}


def wait(pids: list[int], seconds: float) -> int:
    """Wait for all; end the others if one fails or the time is over. Return the first failure."""
    end, failed = time.monotonic() + seconds, 0
    waiting = set(pids)
    while waiting:
        for pid in list(waiting):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                waiting.remove(pid)
                failed = failed or os.waitstatus_to_exitcode(status)
        if failed or time.monotonic() > end:
            failed = failed or 124
            for pid in waiting:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            break
        time.sleep(0.005)
    return failed


def answer(job: dict) -> int | None:
    """Do the job; return the number to write, or None in a process that was forked for it."""
    if "module" in job:
        importlib.import_module(job["module"])
        gc.freeze()
        return 0
    if "pid" in job:
        return wait([job["pid"]], job["timeout"])
    return run(job)


def run(job: dict) -> int | None:
    """Start a command; return its exit code, its process id if it isn't to be waited for, or None
    in a process that was forked for it."""
    n, folder = job["n"], Path(job["folder"])
    store = serve_store(folder) if n > 1 else {}
    pids = []
    given = os.open(folder / "in", os.O_RDONLY)  # one for all: what a rank reads, the others don't
    for rank in range(n):
        flags = os.O_WRONLY | os.O_CREAT
        written = [os.open(folder / f"{kind}{rank}", flags) for kind in ("out", "err")]
        sizes = {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)} if n > 1 else {}
        numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if n > 1 else {}
        pid = start([given, *written], {**job["environment"], **store, **sizes, **numbers})
        if pid == 0:
            return None
        pids.append(pid)
        for fd in written:
            os.close(fd)
    os.close(given)
    if not job["waits"]:
        return pids[0]
    code = wait(pids, job["timeout"])
    if store:
        pid = int((folder / "store").read_text())
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return code


def main() -> list[str]:
    """Run jobs until there are no more; return the command in a process that was forked."""
    for line in iter(sys.stdin.readline, ""):
        job = json.loads(line)
        code = answer(job)
        if code is None:
            sys.path[:0] = job["path"]
            os.chdir(job["cwd"])
            return job["command"]
        print(code, flush=True)
    return []


if __name__ == "__main__":
    gc.collect()
    gc.freeze()  # else each process copies, and looks through, what it was forked with
    command = main()
    sys.stdin = os.fdopen(0, closefd=False)  # the file, and nothing that was read ahead
    if command[:1] == ["-m"]:
        sys.argv = command[1:]
        sys.path.insert(0, "")
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    elif command[:1] == ["-c"]:
        sys.argv = ["-c", *command[2:]]
        sys.path.insert(0, "")
        exec(compile(command[1], "<string>", "exec"), {"__name__": "__main__"})
    elif command:
        sys.argv = command
        sys.path.insert(0, str(Path(command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")
