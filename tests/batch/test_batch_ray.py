"""A file of requests on a Ray cluster: of this machine alone, and as exact as in one process."""

import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import wait_until
from test_batch_command import FLAGS, check_answers, file_of
from test_batch_files import named

from llama import Llama
from llama.batch import command
from llama.cli import run

# Ray's own processes take half a minute of a core to start and to end.
pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster of two CPUs, to which this process is connected."""
    ray: Any = pytest.importorskip("ray")
    with (
        tempfile.TemporaryDirectory(prefix="ray") as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # Ray gives up when its agent takes 15 seconds to start; without extras it takes fewer.
        missing = "ray._private.utils.get_dashboard_dependency_error"
        patch.setattr(missing, lambda: ImportError("not needed"))
        ray.init(
            address="local",
            _temp_dir=folder,
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
        )
        try:
            yield
        finally:
            ray.shutdown()


def spread(tmp_path: Path, *flags: str) -> None:
    files = (str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"))
    run(command.main, "batch", [*files, "--ray", *flags, *FLAGS])


def check(tmp_path: Path, tiny: Llama, n: int) -> None:
    out = tmp_path / "out.jsonl"
    assert sorted(named(out), key=int) == [f"{i}" for i in range(n)]
    check_answers(out, tiny, n)


def leaders() -> list[int]:
    """The processes that have a model."""
    found = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout
    lines = [line.split() for line in found.splitlines() if "ray::Leader" in line]
    return [int(line[0]) for line in lines]


def test_a_replica_that_is_killed_loses_nothing(tmp_path: Path, tiny: Llama, cluster: None) -> None:
    """A request without an answer, or with two, after one of two models was killed at work."""
    file_of(tmp_path / "in.jsonl", 400)
    out = tmp_path / "out.jsonl"
    killed = []

    def kill() -> None:
        wait_until(lambda: out.exists() and out.stat().st_size > 0, 240)
        first = leaders()[0]  # the other one may still be starting
        os.kill(first, signal.SIGKILL)
        killed.append(first)

    thread = threading.Thread(target=kill)
    thread.start()
    spread(tmp_path, "--replicas", "2")
    thread.join()
    assert killed and not set(killed) & set(leaders())
    check(tmp_path, tiny, 400)


def test_a_replica_of_two_processes(tmp_path: Path, tiny: Llama, cluster: None) -> None:
    """Processes of a group that don't find each other, or that answer otherwise than one."""
    file_of(tmp_path / "in.jsonl", 12)
    spread(tmp_path, "--model_parallel_size", "2")
    check(tmp_path, tiny, 12)
    spread(tmp_path, "--model_parallel_size", "2")  # nothing is left to answer
    check(tmp_path, tiny, 12)
