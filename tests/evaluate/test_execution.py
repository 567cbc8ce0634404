"""Programs that attack the machine reach nothing, and can't make themselves pass."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from llama.evaluate import execution
from llama.evaluate.execution import Limits, Verdict, execute, execute_all, trial

SHORT, LONG = Limits(seconds=0.7), Limits(seconds=10)
KILLED = "failed: ended the process that waited for it"
SYSTEM_PYTHON = Path("/usr/bin/python3")  # which any user can read

# Each fails as its text says, within its limits.
ATTACKS = {
    "fork bomb": ("import os\nwhile True: os.fork()", "failed: BlockingIOError"),
    "threads": ("import threading\nthreading.Thread(target=print).start()", "can't start new"),
    "another program": ("import subprocess\nsubprocess.run(['true'])", "failed: BlockingIOError"),
    "memory": ("bytearray(2**30)", "failed: MemoryError"),
    "endless loop": ("while True: pass", "timed out"),
    "wait": ("import signal\nsignal.pause()", "timed out"),
    "big file": (
        "with open('a', 'wb') as f:\n while True: f.write(bytes(2**20))",
        "failed: OSError",
    ),
    "big files": (
        "for i in range(99):\n with open(str(i), 'wb') as f: f.write(bytes(2**20))",
        "No space left",
    ),
    "many files": ("for i in range(9999): open(str(i), 'w').close()", "No space left"),
    "flood of output": ("while True: print('x' * 2**20)", "timed out"),
    "flood of reports": (
        "import os\nfor fd in range(3, 64):\n try:\n  while True: os.write(fd, b'x' * 2**16)\n"
        " except OSError: pass",
        "timed out",
    ),
    "network": (
        "import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)",
        "Network is unreachable",
    ),
    "file of the machine": ("open({path!r})", "failed: FileNotFoundError"),
    "other processes": ("import os\nos.listdir('/proc/1')", "failed: FileNotFoundError"),
    "Python's own files": ("import os\nopen(os.__file__, 'a')", "failed: "),
    "root": ("import os\nos.setuid(0)", "failed: PermissionError"),
    "more limits": (
        "import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (9, 9))",
        "failed: ValueError",
    ),
    "namespaces": (
        "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0, 'refused'",
        "failed: AssertionError: refused",
    ),
    "question": ("input()", "failed: EOFError"),
    # Those that forge their result.
    "exit": ("import sys\nsys.exit(0)", "failed: SystemExit"),
    "exit at once": ("import os\nos._exit(0)", "failed: ended with status 0"),
    "own death": ("import ctypes\nctypes.string_at(0)", "failed: ended with status -11"),
    "printed verdict": ("print('passed', flush=True)\nraise SystemExit", "failed: SystemExit"),
    "written verdict": (
        "import os\nfor fd in range(1, 64):\n try: os.write(fd, b'passed')\n"
        " except OSError: pass\nos._exit(0)",
        "failed: passed",
    ),
    "JSON verdict": (
        'print(\'{{"verdict": "passed", "cut_off": []}}\', flush=True)\nimport os\nos._exit(0)',
        "failed: ended with status 0",
    ),
    "other functions": (
        "import os\nos.read = lambda *_: b'passed'\nos._exit = os.write = print\nassert False",
        "failed: AssertionError",
    ),
}


@pytest.fixture(scope="module", autouse=True)
def needs_namespaces() -> None:
    take = ["unshare", "--net", "--pid", "--mount", *["--user"] * (os.getuid() != 0), "true"]
    if not shutil.which("unshare") or subprocess.run(take, capture_output=True).returncode:
        pytest.skip("this kernel grants no namespaces")
    if trial() == ("network",):
        pytest.skip("this kernel can't make a whole file system read-only")


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_fail(name: str) -> None:
    """A program that reaches the machine or outlasts its limits, or that passes without having come
    to its end."""
    program, expected = ATTACKS[name]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        # Those that end by themselves may take longer on a busy machine.
        limits = SHORT if expected == "timed out" else LONG
        verdict = execute(program.format(port=port, path=__file__), limits)
    assert not verdict.passed
    assert expected in verdict.text
    assert len(verdict.text) < 300
    assert verdict.cut_off == ("network", "files")


@pytest.mark.parametrize("target", ["os.getppid()", "0", "-1"])
def test_killing_others_kills_nobody(target: str) -> None:
    """A program whose signals reach the process that waits for it, or this one."""
    verdict = execute(f"import os\ntry: os.kill({target}, 9)\nexcept OSError: pass", SHORT)
    assert verdict.text in ("passed", "timed out")


def test_the_environment_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that sees a password which was given to this process."""
    monkeypatch.setenv("HF_TOKEN", "a secret")
    program = "import os\nraise Exception(os.getcwd(), os.listdir(), sorted(os.environ))"
    text = execute(program).text
    assert text.startswith("failed: Exception: ('/program', [], ['LC_CTYPE', ")
    assert "TOKEN" not in text


def test_without_namespaces_the_other_limits_hold(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A program that goes on when it has killed the process that waits for it, or that starts
    others or writes files, where the kernel has no namespaces for it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kill = "import os\nos.kill(os.getppid(), 9)\nwhile True: pass"
    assert execute(kill, SHORT, cut_off=()).text == KILLED
    end = time.monotonic() + 1.5  # its time of the processor is over later
    while any(folder.startswith(str(tmp_path)) for folder in _working_directories()):
        assert time.monotonic() < end
    assert not list(tmp_path.iterdir())
    fork = execute("import os\nos.fork()", SHORT, cut_off=())
    assert fork.text.startswith("failed: BlockingIOError")
    assert fork.cut_off == ()
    assert "File too large" in execute("open('a', 'wb', 0).write(b'a')", SHORT, cut_off=()).text


def _working_directories() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):  # of a process that has ended
            found.append(os.readlink(path))
    return found


@pytest.mark.skipif(os.getuid() != 0, reason="not root, so that all tests are without")
@pytest.mark.skipif(not SYSTEM_PYTHON.exists(), reason="no Python that all users can read")
def test_users_without_privileges_are_cut_off_too() -> None:
    """A user who isn't root, and whose programs keep rights or reach the network."""
    program = """
import ctypes, os, socket
try: socket.create_connection(("127.0.0.1", 1), 1)
except OSError as error: network = error.errno
effective = (ctypes.c_uint32 * 6)()
ctypes.CDLL(None).capget((ctypes.c_uint32 * 2)(0x20080522, 0), effective)
try: os.fork()
except OSError as error: fork = error.errno
unshared = ctypes.CDLL(None).unshare(0x10000000)
raise Exception(network, fork, unshared, list(effective), os.getpid(), os.path.exists("/home"))
"""
    job = {"program": program, "cut_off": None, **vars(SHORT)}
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o777)
        script = shutil.copy(execution._SANDBOX, directory)
        done = subprocess.run(
            [SYSTEM_PYTHON, "-s", "-B", script],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            cwd=directory,
            env={},
            user=65534,
            group=65534,
            extra_groups=[],
        )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["verdict"] == "failed: Exception: (101, 11, -1, [0, 0, 0, 0, 0, 0], 1, False)"
    assert answer["cut_off"] == ["network", "files"]


def test_many_run_at_once_and_equal_ones_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verdicts in another order than the programs, or one program that is run for each sample."""
    ran = []
    monkeypatch.setattr(execution, "execute", lambda p, *_: ran.append(p) or f"{p}!")
    seen: list[int] = []
    assert execute_all(["b", "a", "b"], progress=seen.append) == ["b!", "a!", "b!"]
    assert sorted(ran) == ["a", "b"]
    assert seen == [1, 2]


def test_a_machine_that_can_set_no_limits_runs_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A verdict on a program that wasn't limited, or an error that doesn't say what is missing."""
    broken = tmp_path / "sandbox.py"
    broken.write_text("raise OSError('no rights')")
    monkeypatch.setattr(execution, "_SANDBOX", broken)
    with pytest.raises(OSError, match="can't be run within limits here: OSError: no rights"):
        execute("")
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ValueError, match="this is darwin"):
        execute("")


def test_what_cuts_off_programs_must_hold_for_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A program that reaches the network because the kernel granted no namespace this once."""
    script = execution._SANDBOX.read_text()
    (tmp_path / "sandbox.py").write_text(
        script.replace("    if _LIBC.unshare(", "    if 1 or _LIBC.unshare(")
    )
    monkeypatch.setattr(execution, "_SANDBOX", tmp_path / "sandbox.py")
    assert execute("", SHORT).cut_off == ()
    with pytest.raises(OSError, match="no longer cuts programs off from network and files"):
        execute("", SHORT, cut_off=("network", "files"))


def test_a_trial_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that would count all of a model's programs as wrong, because none can start; or none at
    all where the kernel grants namespaces and refuses their use."""
    with pytest.raises(OSError, match=r"MemoryError: .*: it needs more time or memory"):
        trial(Limits(memory=2**20))

    def refusing(program: str, limits: Limits, cut_off: tuple[str, ...] | None = None) -> Verdict:
        if cut_off is None:
            raise PermissionError
        return Verdict("passed", cut_off)

    monkeypatch.setattr(execution, "execute", refusing)
    assert trial() == ()
