"""Programs that a model wrote, run in processes of their own, within limits."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_SANDBOX = Path(__file__).with_name("sandbox.py")
_GRACE = 10.0  # seconds for a sandbox to begin and to end


@dataclass(frozen=True)
class Limits:
    """Limits of one program.

    A program starts no other processes or threads. It writes files only where it is cut off from
    the machine's own.

    Args:
        seconds: until it must have ended.
        memory: bytes of its address space.
        disk: bytes of all files that it writes.
    """

    seconds: float = 3.0
    memory: int = 2**30
    disk: int = 2**24


DEFAULT = Limits()


class Verdict(NamedTuple):
    """The end of a program.

    Attributes:
        text: "passed", "timed out", or "failed: " and why.
        cut_off: what the program couldn't reach: "network", "files".
    """

    text: str
    cut_off: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return self.text == "passed"


def execute(
    program: str, limits: Limits = DEFAULT, cut_off: Sequence[str] | None = None
) -> Verdict:
    """Run a Python program; it passes if it comes to its end without an exception.

    The program runs in an interpreter of its own, in an empty directory, with an empty environment
    and without input or output. Where the kernel allows it, namespaces cut it off from the network,
    from other processes and from all files but Python's. As root it runs as ``nobody``.

    Args:
        cut_off: what the program must be cut off from; by default as much as the kernel allows.

    Raises:
        ValueError: this isn't Linux.
        OSError: the process can't be limited or cut off so.
    """
    if sys.platform != "linux":
        raise ValueError(f"programs are limited by means of Linux, and this is {sys.platform}")
    job = json.dumps({"program": program, "cut_off": cut_off, **vars(limits)})
    with tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True) as directory:
        sandbox = subprocess.Popen(
            [sys.executable, "-s", "-B", str(_SANDBOX)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=directory,
            env=_environment(),
            start_new_session=True,
        )
        try:
            output, errors = sandbox.communicate(job.encode("utf-8"), limits.seconds + _GRACE)
        except subprocess.TimeoutExpired:
            return Verdict("timed out")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(sandbox.pid, signal.SIGKILL)
            sandbox.communicate()
    if sandbox.returncode < 0:
        return Verdict("failed: ended the process that waited for it")
    if sandbox.returncode > 0:
        reason = errors.decode(errors="replace").strip().rpartition("\n")[2]
        raise OSError(f"programs can't be run within limits here: {reason}")
    answer = json.loads(output)
    return Verdict(answer["verdict"], tuple(answer["cut_off"]))


def execute_all(
    programs: Sequence[str],
    limits: Limits = DEFAULT,
    cut_off: Sequence[str] | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Verdict]:
    """Run programs as ``execute`` does, as many at once as there are processors; equal ones once.

    Args:
        progress: called with the number of programs that have ended.
    """
    verdicts: dict[str, Verdict] = {}
    different = list(dict.fromkeys(programs))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        results = pool.map(lambda program: execute(program, limits, cut_off), different)
        for program, verdict in zip(different, results, strict=True):
            verdicts[program] = verdict
            progress(len(verdicts))
    return [verdicts[program] for program in programs]


def trial(limits: Limits = DEFAULT) -> tuple[str, ...]:
    """Run a program that must pass; return what programs can be cut off from.

    Raises:
        OSError, ValueError: as in ``execute``, or the program didn't pass.
    """
    program = "import collections, hashlib, math, random, re, typing"
    try:
        verdict = execute(program, limits)
    except OSError:  # some kernels grant namespaces, and then refuse their use
        verdict = execute(program, limits, cut_off=())
    if not verdict.passed:
        raise OSError(
            f"a program that only imports modules of Python {verdict.text}: it needs more time or "
            f"memory, or {sys.base_prefix} can't be read by all users"
        )
    return verdict.cut_off


def _environment() -> dict[str, str]:
    """Return the environment of programs, of this process's only what its Python may need."""
    variables = {
        "PYTHONHASHSEED": "0",  # the same verdict each time
        "PYTHONIOENCODING": "utf-8",
        "OPENBLAS_NUM_THREADS": "1",  # numpy's, which else fails where it can't have threads
        "OMP_NUM_THREADS": "1",
    }
    libraries = os.environ.get("LD_LIBRARY_PATH")
    return {**variables, "LD_LIBRARY_PATH": libraries} if libraries else variables
