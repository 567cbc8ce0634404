"""Processes that tests start: commands, ranks of a job, and ports for them to meet at."""

import atexit
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def torchrun(*arguments: str, timeout: int = 120) -> subprocess.CompletedProcess[str]:
    """Run a job as users do, for what the launcher has a part in; ``forked`` does the rest."""
    return subprocess.run([*TORCHRUN, *arguments], capture_output=True, text=True, timeout=timeout)


@functools.cache
def _fork_server() -> "subprocess.Popen[str]":
    command = [sys.executable, str(Path(__file__).parent / "fork_server.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    server = subprocess.Popen(command, text=True, **pipes)  # type: ignore[call-overload]
    atexit.register(server.communicate)  # which ends it
    return server


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
    server = _fork_server()
    assert server.stdin and server.stdout
    job = {"command": command, "n": n, "cwd": os.getcwd(), "timeout": timeout}
    job |= {"environment": os.environ | environment, "path": [path] if path else []}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "in").write_text(input)
        print(json.dumps(job | {"folder": folder}), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        out, err = (
            "".join(Path(folder, f"{kind}{rank}").read_text() for rank in range(n))
            for kind in ("out", "err")
        )
    return subprocess.CompletedProcess(command, code, out, err)


def script(tmp_path: Path, text: str) -> str:
    (tmp_path / "script.py").write_text(text)
    return str(tmp_path / "script.py")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
