"""Processes that tests start: ranks of a job, and ports for them to meet at."""

import socket
import subprocess
import sys
from pathlib import Path

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def torchrun(*arguments: str, timeout: int = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*TORCHRUN, *arguments], capture_output=True, text=True, timeout=timeout)


def script(tmp_path: Path, text: str) -> str:
    (tmp_path / "script.py").write_text(text)
    return str(tmp_path / "script.py")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
