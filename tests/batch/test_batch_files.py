"""The files of a batch: lines that are read in windows, and answers that outlive their process."""

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from llama.batch import requests as reading
from llama.batch.keys import Keys
from llama.batch.requests import Request, Requests
from llama.batch.results import Results, result_line


def line(name: object, body: object = None, **fields: object) -> str:
    body = {"prompt": "x"} if body is None else body
    return json.dumps({"custom_id": name, "url": "/v1/completions", "body": body, **fields})


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{text}\n" for text in lines))
    return path


def read(path: Path, keys: Keys | None = None) -> list[list[Request]]:
    return list(Requests(path, keys or Keys()).windows())


def answer(results: Results, request: Request, body: str = "{}", status: int = 200) -> None:
    text = result_line(request, status, body.encode(), "0" * 32)
    results.write(request.key, text, status != 200 or request.refusal is not None)


def named(path: Path) -> list[Any]:
    return [json.loads(text)["custom_id"] for text in path.read_text().splitlines()]


WRONG = {
    "not json": ("invalid_line", "the line is not JSON"),
    '{"custom_id": "a"': ("invalid_line", "the line is not JSON"),
    "[" * 9_000 + "]" * 9_000: ("invalid_line", "the line is nested too deeply"),
    "[1]": ("invalid_line", "the line is [1]: expected an object"),
    "{}": ("invalid_line", "custom_id is missing: expected a text that no other line has"),
    line(7): ("invalid_line", "custom_id is 7: expected a text that no other line has"),
    line("first"): (
        "duplicate_custom_id",
        "an earlier line has the custom_id 'first': give each its own",
    ),
    line("g", method="GET"): ("invalid_request", "method is 'GET': expected 'POST'"),
    line("u", url="v1"): (
        "invalid_request",
        "url is 'v1': expected a path, such as /v1/chat/completions",
    ),
    json.dumps({"custom_id": "b", "url": "/x"}): (
        "invalid_request",
        "body is missing: expected the object that is sent to the url",
    ),
    line("s", {"stream": True}): (
        "invalid_request",
        "stream is set, and an answer in a file is no stream: leave it out",
    ),
    line("x" * 30_000): ("invalid_line", "the line has 30,069 bytes, more than 20,000"),
}


def test_wrong_lines_are_refused_each_for_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line that ends the run, that is passed over, or whose reason doesn't tell what to do."""
    monkeypatch.setattr(reading, "MAX_LINE", 20_000)
    path = write(tmp_path / "in", line("first"), "", *WRONG)
    requests = [request for window in read(path) for request in window]
    found = {r.refusal.line: (r.refusal.code, r.refusal.message) for r in requests if r.refusal}
    assert found == dict(enumerate(WRONG.values(), 3))
    assert sum(r.size for r in requests) == path.stat().st_size - 1

    with Results(tmp_path / "out", tmp_path / "errors") as results:
        for request in requests:
            answer(results, request)
        assert results.n_failed == len(WRONG)
    assert named(tmp_path / "out") == ["first"]
    error = json.loads((tmp_path / "errors").read_text().splitlines()[0])
    assert error["response"] is None and {"code", "message", "line"} <= error["error"].keys()
    with Results(tmp_path / "out", tmp_path / "errors") as results:
        assert read(path, results.keys) == []  # each keeps its answer


def test_fixed_lines_are_answered_by_the_next_run(tmp_path: Path) -> None:
    """A refusal that stays with the number of a line whose text has changed."""
    path = write(tmp_path / "in", line("a"), line("a"), "nonsense", line("b", method="GET"))
    with Results(tmp_path / "out", tmp_path / "errors") as results:
        for request in read(path, results.keys)[0]:
            answer(results, request)
    write(path, line("a"), line("c"), line("d"), line("b", method="GET"))
    with Results(tmp_path / "out", tmp_path / "errors") as results:
        assert [request.custom_id for request in read(path, results.keys)[0]] == ["c", "d"]
    (tmp_path / "errors").unlink()
    with Results(tmp_path / "out", tmp_path / "errors") as results:
        assert [request.custom_id for request in read(path, results.keys)[0]] == ["b", "c", "d"]


def test_windows_hold_equal_beginnings_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts with a common beginning that others part, or requests that are lost in the sort."""
    systems = [f"You are {kind}. " * 20 for kind in ("a cow", "a duck")]
    messages = [
        [{"role": "system", "content": systems[i % 2]}, {"role": "user", "content": str(i)}]
        for i in range(10)
    ]
    path = write(tmp_path / "in", *(line(f"{i}", {"messages": m}) for i, m in enumerate(messages)))
    order = [[int(request.custom_id or "") for request in window] for window in read(path)]
    assert order == [[0, 2, 4, 6, 8, 1, 3, 5, 7, 9]]
    monkeypatch.setattr(reading, "WINDOW", 4)
    assert [len(window) for window in read(path)] == [4, 4, 2]
    monkeypatch.setattr(reading, "WINDOW_BYTES", 1)
    assert [len(window) for window in read(path)] == [1] * 10


def test_memory_doesnt_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list or a dictionary of all lines, which ten million of them would make too large."""
    monkeypatch.setattr(reading, "WINDOW", 32)
    path = write(tmp_path / "in", *(line(f"{i}", {"prompt": "x" * 2000}) for i in range(1500)))
    tracemalloc.start()
    n = sum(len(window) for window in Requests(path, Keys()).windows())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 1500
    assert peak < path.stat().st_size / 5


def test_every_beginning_of_a_last_line_is_cut_off(tmp_path: Path) -> None:
    """A line that a killed process wrote in part, and that is taken for an answer or stays."""
    path = write(tmp_path / "in", line("a"), line('"b\\\ud800"'))
    out = tmp_path / "out"
    with Results(out, tmp_path / "errors") as results:
        first, second = read(path, results.keys)[0]
        answer(results, first, '{"text": "}\\n"}')
        whole = out.read_bytes()
        answer(results, second)
    both = out.read_bytes()
    for end in (*range(len(whole), len(both), 5), len(both) - 1, len(both)):
        for tail in (b"", b"\0" * 9) if end == len(whole) else (b"",):
            out.write_bytes(both[:end] + tail)
            with Results(out, tmp_path / "errors") as results:
                left = [request for window in read(path, results.keys) for request in window]
            assert left == ([second] if end < len(both) else [])
            assert out.read_bytes() == (whole if end < len(both) else both)


@pytest.mark.parametrize("text", ["a list of mine", "a list of mine\n", '{"id": 3}\n', "\n"])
def test_other_files_are_never_changed(tmp_path: Path, text: str) -> None:
    """The output's name is that of another file, whose last line is cut off."""
    other = tmp_path / "out"
    other.write_text(text)
    with pytest.raises(ValueError, match="has a line 1 that isn't an answer to a request: name"):
        Results(other, tmp_path / "errors")
    assert other.read_text() == text


def test_a_request_has_one_answer(tmp_path: Path) -> None:
    """A second answer to a request, which a cluster may compute, is written too."""
    [[request]] = read(write(tmp_path / "in", line("a")))
    with Results(tmp_path / "out", tmp_path / "errors") as results:
        answer(results, request)
        answer(results, request, status=500)
    assert named(tmp_path / "out") == ["a"]
    assert not (tmp_path / "errors").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no locks")
def test_two_processes_dont_write_one_file(tmp_path: Path) -> None:
    """A batch that is started twice, and answers each request twice."""
    with Results(tmp_path / "out", tmp_path / "errors"):
        with pytest.raises(ValueError, match="another process is writing"):
            Results(tmp_path / "out", tmp_path / "errors")
        lock = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        done = subprocess.run(
            [sys.executable, "-S", "-c", lock, tmp_path / "out"], capture_output=True
        )
        assert b"BlockingIOError" in done.stderr
    with Results(tmp_path / "out", tmp_path / "errors"):
        pass
