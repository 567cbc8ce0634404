"""Grammars are tried in a process that is killed at a limit, and never outlives its parent."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from llama import Tokenizer
from llama.generation import TINY
from llama.structure import compile_format, trial, vocabulary_of
from llama.structure.formats import grammar_of


def slow(n_patterns: int = 20) -> dict[str, Any]:
    """A schema that takes seconds, whatever fuel its lexer has."""
    parts = [{"type": "string", "pattern": f"[a-z]{{{i + 1}}}x{i}"} for i in range(n_patterns)]
    return {"type": "json_schema", "schema": {"allOf": parts}}


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 20
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(pid)


def worker_pid() -> int:
    assert trial._worker is not None
    return trial._worker._process.pid


def test_a_grammar_that_takes_too_long_is_refused_and_the_next_one_is_not(
    tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure means that one request stops the process for as long as its schema likes."""
    compile_format({"type": "json_object"}, tiny_tokenizer, [2], False)
    vocabulary_of(tiny_tokenizer, {}).grammars.clear()
    monkeypatch.setattr(trial, "SECONDS", 0.3)
    pid, begin = worker_pid(), time.monotonic()
    for _ in range(2):
        with pytest.raises(ValueError, match="at 'pattern': it takes more than 5 s"):
            compile_format(slow(), tiny_tokenizer, [2], False)
    assert time.monotonic() - begin < 3, "the verdict is kept"
    wait_for_end(pid)
    monkeypatch.undo()
    compile_format({"type": "choice", "choice": ["next"]}, tiny_tokenizer, [2], False)
    assert worker_pid() != pid


def test_the_worker_is_kept_and_gets_each_vocabulary_once(
    tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure means that every request waits for a process, or for a vocabulary to be sent."""
    compile_format({"type": "choice", "choice": ["a"]}, tiny_tokenizer, [2], False)
    pid, sent = worker_pid(), []
    send = trial._Worker.send
    monkeypatch.setattr(trial._Worker, "send", lambda self, r: (sent.append(r), send(self, r)))
    compile_format({"type": "choice", "choice": ["b"]}, tiny_tokenizer, [2], False)
    compile_format({"type": "choice", "choice": ["b"]}, tiny_tokenizer, [2], False)  # is kept
    assert [request.pieces for request in sent] == [None]
    other = Tokenizer(TINY / "tokenizer.model")
    compile_format({"type": "choice", "choice": ["b"]}, other, [2], False)
    assert [request.pieces is None for request in sent] == [True, True, False]
    assert worker_pid() == pid


def test_a_worker_that_was_killed_is_started_again(tiny_tokenizer: Tokenizer) -> None:
    compile_format({"type": "choice", "choice": ["c"]}, tiny_tokenizer, [2], False)
    os.kill(worker_pid(), signal.SIGKILL)
    wait_for_end(worker_pid())
    compile_format({"type": "choice", "choice": ["d"]}, tiny_tokenizer, [2], False)


def test_threads_wait_for_each_other(tiny_tokenizer: Tokenizer) -> None:
    found: list[object] = []

    def compile_one(i: int) -> None:
        form = {"type": "choice", "choice": [f"thread {i}"]}
        found.append(compile_format(form, tiny_tokenizer, [2], False))

    threads = [threading.Thread(target=compile_one, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 8 and None not in found


def test_a_worker_that_cant_start_is_told(
    tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "worker.py").write_text("raise SystemExit(1)")
    monkeypatch.setattr(trial, "_worker", None)
    monkeypatch.setattr(trial.worker, "__file__", str(tmp_path / "worker.py"))
    with pytest.raises(RuntimeError, match="doesn't start"):
        compile_format({"type": "choice", "choice": ["e"]}, tiny_tokenizer, [2], False)


PARENT = """
import sys, time
sys.path.insert(0, {path!r})
from llama import Tokenizer
from llama.generation import TINY
from llama.generation import TINY
from llama.structure import compile_format, trial
tokenizer = Tokenizer(TINY / "tokenizer.model")
compile_format({{"type": "json_object"}}, tokenizer, [2], False)
print(trial._worker._process.pid, flush=True)
if {busy}:
    compile_format({form!r}, tokenizer, [2], False)
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked up in /proc")
@pytest.mark.parametrize("busy", [pytest.param(False, marks=pytest.mark.soak), True])
def test_the_worker_ends_with_its_parent(busy: bool) -> None:
    """A failure means that servers leave processes behind."""
    path = str(Path(trial.__file__).parents[2])
    text = PARENT.format(path=path, busy=busy, form=slow())
    parent = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert is_running(pid)
    time.sleep(0.5 * busy)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_for_end(pid)


def test_the_worker_imports_nothing_of_ours() -> None:
    """A failure means that the first request waits until torch is imported again."""
    code = f"import runpy, sys; runpy.run_path({trial.worker.__file__!r}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "llama", "numpy"} & set(done.stdout.split())


def test_a_form_is_compiled_for_the_order_of_its_properties(tiny_tokenizer: Tokenizer) -> None:
    properties = {"a": {"const": 1}, "b": {"const": 2}}
    forms = [
        {"type": "json_schema", "schema": {"properties": dict(some)}}
        for some in (properties.items(), reversed(properties.items()))
    ]
    assert grammar_of(forms[0]) != grammar_of(forms[1])
