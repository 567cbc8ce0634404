"""The command that answers a file: as the server does, all of it, and each request once."""

import contextlib
import json
import os
import random
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import (
    Started,
    forked,
    lose_one_machine,
    started,
    two_machines,
    two_ranks,
    wait_until,
)
from servers import post, serve
from test_batch_files import line, named, write

from llama import Llama
from llama.batch import command
from llama.cli import run
from llama.engine.engine import Engine
from llama.server import service

COW = [{"role": "user", "content": "What does the cow say?"}]
GREEDY = {"temperature": 0, "max_tokens": 6}
# A line's url and body, of everything that the API answers and of what it refuses.
ASKED: list[tuple[str, Any]] = [
    ("/v1/chat/completions", {"messages": COW, **GREEDY, "logprobs": True, "top_logprobs": 2}),
    ("/v1/chat/completions/", {"messages": COW, "temperature": 2, "seed": 5, "top_k": 9, "n": 2}),
    ("/v1/completions", {"prompt": ["The cow", "A"], **GREEDY, "echo": True, "logprobs": 1}),
    ("/v1/completions", {"prompt": "The", **GREEDY, "n": 11, "max_tokens": 2}),
    ("/v1/completions", {"prompt": "def f(x):\n", "suffix": "\n", **GREEDY, "stop": ["x"]}),
    ("/v1/completions", {"prompt": "a", **GREEDY, "response_format": {"type": "json_object"}}),
    ("/v1/embeddings", {"input": ["The cow", "The duck"]}),
    ("/v1/responses", {"input": "What does the cow say?", "temperature": 0}),
    ("/tokenize", {"prompt": "The cow"}),
    ("/v1/chat/completions", {"messages": [], "tempurature": 0}),
    ("/v1/chat/completions", {"messages": COW, "max_tokens": "many"}),
    ("/v1/completions", {"prompt": "cow " * 3000}),
    ("/v1/completions", {"prompt": "x", "model": "gpt-4o"}),
    ("/v1/completions", "a text"),
    ("/v1/nothing", {}),
    ("/health", {}),
]
FLAGS = (
    "--dtype",
    "float32",
    "--device",
    "cpu",
    "--model_name",
    "tiny",
    "--max_batch_size",
    "4",
    "--max_seq_len",
    "512",
)


def batch(*args: object) -> None:
    run(command.main, "batch", [*map(str, args), *FLAGS])


def results(*paths: Path) -> dict[str, Any]:
    lines = [json.loads(text) for path in paths for text in path.read_text().splitlines()]
    return {each["custom_id"]: each for each in lines}


def without_changing(answer: dict[str, Any]) -> Any:
    """An answer without what differs from call to call."""
    changing = ("id", "created", "created_at", "completed_at", "usage")
    kept = {name: value for name, value in answer.items() if name not in changing}
    for item in kept.get("output", ()):
        del item["id"]
    return rounded(kept)


def rounded(value: Any) -> Any:
    """JSON with its numbers to four digits: the last ones depend on the batch."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return round(value, 4) if isinstance(value, float) else value


def test_a_line_is_what_a_post_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A field, a default, an answer or an error that a file has otherwise than the server has."""
    lines = [line(f"{i}", body, url=url) for i, (url, body) in enumerate(ASKED)]
    source = write(tmp_path / "in.jsonl", *lines, line("0"), "nonsense")
    batch(source, tmp_path / "out.jsonl")
    said = capsys.readouterr().out
    assert said.startswith("answered 18 requests in 0:00:0")
    assert f"9 of them by errors, see {tmp_path / 'out.errors.jsonl'}; tokens/s: " in said
    answers, errors = results(tmp_path / "out.jsonl"), results(tmp_path / "out.errors.jsonl")
    assert errors.pop(None)["error"]["line"] == 18  # type: ignore[call-overload]
    assert errors["0"]["error"]["code"] == "duplicate_custom_id"
    assert sorted(answers, key=int) == [f"{i}" for i in range(9)]
    both = errors | answers
    assert len({each["id"] for each in both.values()}) == len(ASKED)
    with serve(Llama.build(device="cpu", dtype=torch.float32)) as (url, _):
        for i, (path, body) in enumerate(ASKED):
            posted, response = post(f"{url}{path}", body), both[f"{i}"]["response"]
            assert both[f"{i}"]["error"] is None
            assert response["status_code"] == posted.status_code, path
            assert without_changing(response["body"]) == without_changing(posted.json()), path


def test_large_requests_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that fails since others take all the room, as none of a server's may."""
    monkeypatch.setattr(service, "MAX_HELD", 12)
    body = {"prompt": "The cow", **GREEDY, "max_tokens": 2, "n": 11}
    source = write(tmp_path / "in.jsonl", *(line(f"{i}", body) for i in range(4)))
    batch(source, tmp_path / "out.jsonl")
    assert sorted(named(tmp_path / "out.jsonl")) == ["0", "1", "2", "3"]


def test_files_that_cant_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback, or a model that is loaded first."""
    source = write(tmp_path / "in.jsonl", line("a"))
    for args, expected in (
        ((tmp_path / "none", tmp_path / "out"), "No such file or directory"),
        ((source, source), "the three files must differ"),
        ((source, tmp_path / "out", "--errors", tmp_path / "out"), "the three files must differ"),
        ((source, tmp_path), "Is a directory"),
        ((source, tmp_path / "out", "--replicas", 2), "go with --ray"),
        ((source, tmp_path / "out", "--ray", "--replicas", 0), "expected 1 or more"),
    ):
        with pytest.raises(SystemExit) as ended:
            batch(*args)
        assert expected in str(ended.value)
    assert source.read_text() == line("a") + "\n"


def prompts(n: int) -> list[str]:
    return [f"The {'cow' if i % 2 else 'duck'} number {i} has" for i in range(n)]


def file_of(path: Path, n: int) -> Path:
    lines = (line(f"{i}", {"prompt": text, **GREEDY}) for i, text in enumerate(prompts(n)))
    return write(path, *lines)


def test_an_engine_that_fails_answers_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Requests that a failure of the machine ends, and that count as answered ever after."""
    source, out, n = file_of(tmp_path / "in.jsonl", 12), tmp_path / "out.jsonl", 0
    step = Engine.step

    def failing(self: Engine) -> Any:
        nonlocal n
        n += 1
        if n == 10:
            raise RuntimeError("the device is gone")
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", failing)
        patch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
        with pytest.raises(SystemExit) as ended:
            batch(source, out)
    assert ended.value.code == 1
    assert "the engine failed: start again to go on" in caplog.text
    assert 0 < len(named(out)) < 12
    batch(source, out)
    assert sorted(named(out), key=int) == [f"{i}" for i in range(12)]
    assert not (tmp_path / "out.errors.jsonl").exists()


def ended_at_random(tmp_path: Path, n_requests: int, n_ends: int, seed: int) -> Iterator[int]:
    """Start the command again and again, and end it; yield its exit codes."""
    rng, source, out = random.Random(seed), tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    wanted = file_of(source, n_requests).stat().st_size * 1.5 / (n_ends + 1)

    def size() -> int:
        return out.stat().st_size if out.exists() else 0

    for i in range(n_ends):
        arguments = ("-m", "llama.batch", str(source), str(out), *FLAGS)
        with started(*arguments, module="llama.batch.command") as process:
            enough = size() + rng.random() * wanted
            wait_until(lambda enough=enough: size() > enough, 120)  # type: ignore[misc]
            process.send_signal(signal.SIGINT if i == 0 else signal.SIGKILL)
            yield process.wait(60)


def check_ends(tmp_path: Path, tiny: Llama, n_requests: int, n_ends: int, seed: int) -> None:
    codes = list(ended_at_random(tmp_path, n_requests, n_ends, seed))
    assert codes == [130, *[-signal.SIGKILL] * (n_ends - 1)]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    before = len(named(out)) if out.read_bytes().endswith(b"\n") else None
    assert before is None or before < n_requests  # it was killed at work
    done = forked("-m", "llama.batch", str(source), str(out), *FLAGS, n=2)
    assert done.returncode == 0, done.stderr
    assert "were answered before" in done.stdout
    assert sorted(named(out), key=int) == [f"{i}" for i in range(n_requests)]
    check_answers(out, tiny, n_requests)


def check_answers(out: Path, tiny: Llama, n: int) -> None:
    """The answers that a file of n requests has by now are those of one process."""
    answers, asked = results(out), prompts(n)
    texts = [asked[int(name)] for name in answers]
    expected = tiny.text_completion(texts, temperature=0, max_gen_len=6)
    for answer, each in zip(answers.values(), expected, strict=True):
        [choice] = answer["response"]["body"]["choices"]
        assert choice["text"].lstrip() == each["generation"].lstrip()


@pytest.mark.slow
def test_ends_at_random_lose_nothing(tmp_path: Path, tiny: Llama) -> None:
    """A request without an answer, with two, or with another one, after the command was ended by
    Ctrl-C, killed twice, and finished by two ranks."""
    check_ends(tmp_path, tiny, 80, 3, seed=1)


@pytest.mark.soak
def test_twenty_ends_at_random_lose_nothing(tmp_path: Path, tiny: Llama) -> None:
    check_ends(tmp_path, tiny, 600, 20, seed=2)


@contextlib.contextmanager
def at_work(
    run: Callable[..., AbstractContextManager[tuple[Started, Started]]], folder: Path, tiny: Llama
) -> Iterator[tuple[Started, Started]]:
    """Two ranks that have begun with a file; afterwards their answers are compared with one's."""
    source, out, n = folder / "in.jsonl", folder / "out.jsonl", 2000
    command = ("-m", "llama.batch", str(file_of(source, n)), str(out), *FLAGS)
    with run(*command) as ranks:
        wait_until(lambda: out.exists() and out.stat().st_size > 0, 60)
        yield ranks
    check_answers(out, tiny, n)


@pytest.mark.slow
def test_a_lost_rank_ends_the_run(tmp_path: Path, tiny: Llama) -> None:
    """A run that waits forever for a rank that has died, or that doesn't say which one has."""
    run = partial(two_ranks, module="llama.batch.command")
    with at_work(run, tmp_path, tiny) as (first, second):
        second.send_signal(signal.SIGKILL)
        assert first.wait(30) == 1
        assert f"RankLost: rank 1 on {socket.gethostname()} has died" in first.output
        assert "the engine failed: start again to go on" in first.output


@pytest.mark.soak
def test_two_machines_of_which_one_is_lost(tmp_path: Path, tiny: Llama) -> None:
    with at_work(two_machines, tmp_path, tiny) as machines:
        lose_one_machine(*machines)
