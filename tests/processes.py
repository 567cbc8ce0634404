"""Processes that tests start: commands, ranks of a job, and ports for them to meet at."""

import atexit
import contextlib
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

TIMED_OUT = 124  # what the fork server gives as the exit code


def torchrun(*arguments: str, timeout: int = 120) -> subprocess.CompletedProcess[str]:
    """Run a job as users do, for what the launcher has a part in; ``forked`` does the rest."""
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


@functools.cache
def _fork_server() -> "subprocess.Popen[str]":
    command = [sys.executable, str(Path(__file__).parent / "fork_server.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    server = subprocess.Popen(command, text=True, **pipes)  # type: ignore[call-overload]
    atexit.register(server.communicate)  # which ends it
    return server


def _ask(**job: object) -> int:
    server = _fork_server()
    assert server.stdin and server.stdout
    print(json.dumps(job), file=server.stdin, flush=True)
    return int(server.stdout.readline())


def _job(*command: str, n: int = 1, path: str = "", **environment: str) -> dict[str, object]:
    job = {"command": command, "n": n, "cwd": os.getcwd(), "path": [path] if path else []}
    return {**job, "environment": os.environ | environment}


def forked(
    *command: str,
    n: int = 1,
    path: str = "",
    input: str = "",
    timeout: int = 120,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run ``python *command`` in a process that has imported ``llama`` already.

    Args:
        command: a file, ``-m`` and a module, or ``-c`` and a text; and arguments.
        n: the number of ranks that run it, if several.
        path: where they find more modules.
        input: the standard input, which ranks share as a launcher's do.
        timeout: in seconds, after which they are killed and the exit code is 124.
        environment: variables beside the present ones. What Python and PyTorch read when they
            start comes too late.

    Returns:
        The exit code of the first that failed or 0, and what they wrote, rank after rank.
    """
    job = _job(*command, n=n, path=path, **environment)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "in").write_text(input)
        code = _ask(**job, folder=folder, timeout=timeout, waits=True)
        out, err = (
            "".join(Path(folder, f"{kind}{rank}").read_text() for rank in range(n))
            for kind in ("out", "err")
        )
    return subprocess.CompletedProcess(command, code, out, err)


class Started:
    """A process that was forked and goes on running, as ``started`` says."""

    def __init__(self, folder: str, pid: int) -> None:
        self.pid = pid
        self._folder = folder
        self._code: int | None = None

    @property
    def output(self) -> str:
        """Everything that it wrote up to now."""
        return "".join(Path(self._folder, kind).read_text() for kind in ("out0", "err0"))

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float) -> int:
        """Return its exit code.

        Raises:
            TimeoutError: if it didn't end in time. It is killed.
        """
        if self._code is None:
            self._code = _ask(pid=self.pid, timeout=seconds)
        if self._code == TIMED_OUT:
            raise TimeoutError(f"it didn't end within {seconds} seconds and wrote: {self.output}")
        return self._code


@contextlib.contextmanager
def started(*command: str, module: str = "llama", **environment: str) -> Iterator[Started]:
    """Run a command as ``forked`` does, without waiting for it; it is ended after the block.

    Args:
        command: as ``forked`` has it.
        module: imported once for all, before the process is forked.
        environment: as ``forked`` has it.
    """
    _ask(module=module)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "in").touch()
        pid = _ask(**_job(*command, **environment), folder=folder, waits=False)
        process = Started(folder, pid)
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                process.wait(15)


@contextlib.contextmanager
def two_ranks(*command: str, module: str = "llama") -> Iterator[tuple[Started, Started]]:
    """Run a command on two ranks as ``started`` does, without a launcher that looks after them."""
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with (
        started(*command, module=module, **job, RANK="0") as first,
        started(*command, module=module, **job, RANK="1") as second,
    ):
        yield first, second


def launcher(*arguments: str) -> contextlib.AbstractContextManager[Started]:
    """Run torchrun, without waiting for it."""
    return started("-m", "torch.distributed.run", *arguments)


@contextlib.contextmanager
def two_machines(*command: str) -> Iterator[tuple[Started, Started]]:
    """Run two ranks as on two machines: each has a launcher, and the first one the store."""
    job = ("--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_id", "1")
    job += ("--rdzv_endpoint", f"127.0.0.1:{free_port()}", "--rdzv_conf")
    with (
        launcher(*job, "is_host=True", *command) as first,
        launcher(*job, "is_host=False", *command) as second,
    ):
        yield first, second


def lose_one_machine(first: Started, second: Started) -> None:
    """Kill the second of two machines, and check that the first one ends and says why."""
    ranks = []
    for machine in (first, second):
        command = ["ps", "-o", "pid=", "--ppid", str(machine.pid)]
        found = subprocess.run(command, capture_output=True, text=True).stdout
        ranks += [int(pid) for pid in found.split()]
    for pid in (second.pid, ranks[1]):
        os.kill(pid, signal.SIGKILL)
    assert first.wait(30) != 0
    lost = f"rank [01] on {socket.gethostname()} has died|rank 0 has ended"
    assert re.search(lost, first.output), first.output
    with contextlib.suppress(ProcessLookupError):
        os.kill(ranks[0], 0)
        raise AssertionError("a rank goes on without its launcher")


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition never became true"
        time.sleep(0.01)


def script(tmp_path: Path, text: str) -> str:
    (tmp_path / "script.py").write_text(text)
    return str(tmp_path / "script.py")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
