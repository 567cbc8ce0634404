"""Processes that tests start: ranks of a job, and ports for them to meet at."""

import os
import socket
import subprocess
import sys
from pathlib import Path

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def torchrun(
    *arguments: str, timeout: int = 120, path: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a job; ``path`` is where its processes find more modules."""
    more = {"PYTHONPATH": os.pathsep.join(filter(None, (path, os.environ.get("PYTHONPATH"))))}
    return subprocess.run(
        [*TORCHRUN, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **more} if path else None,
    )


def script(tmp_path: Path, text: str) -> str:
    (tmp_path / "script.py").write_text(text)
    return str(tmp_path / "script.py")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
