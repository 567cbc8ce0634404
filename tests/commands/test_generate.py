"""``python -m llama complete`` and ``infill``: prompts given and read, on one or two processes."""

import io
import sys

import pytest
from processes import forked

from llama import Llama, cli

GREEDY = ["--temperature", "0", "--max_gen_len", "12", "--dtype", "float32", "--device", "cpu"]
ADD = "def add(left, right):\n    <FILL>\n    return left + right\n"


def test_complete_prints_what_comes_next(tiny: Llama, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["Once upon a time", "007", "- Sam had a red kite."]  # which stay as they are
    cli.main(["complete", *prompts, *GREEDY])
    found = tiny.text_completion(prompts, 0, max_gen_len=12)
    assert capsys.readouterr().out == "".join(f"{f['generation']}\n" for f in found)


def test_infill_prints_the_whole_text(tiny: Llama, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["infill", ADD, ADD.rstrip("\n"), *GREEDY])
    prefix, suffix = ADD.split("<FILL>")
    found = tiny.text_infilling([prefix], [suffix], 0, max_gen_len=12)[0]
    assert capsys.readouterr().out.startswith(f"{prefix}{found['generation']}{suffix}{prefix}")


@pytest.mark.parametrize("prompt", ["def f():", "<FILL> and <FILL>"])
def test_a_text_without_one_hole(prompt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Llama, "build", lambda *_, **__: pytest.fail("a model is loaded"))
    with pytest.raises(SystemExit, match=r"llama infill: .* has [02] times <FILL>: expected it"):
        cli.main(["infill", prompt])


def test_a_terminal_is_told_what_to_do_and_not_steered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("def f():\n    \x1b[2J<FILL>\n"))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    cli.main(["infill", *GREEDY])
    found = capsys.readouterr()
    assert found.out.startswith("def f():\n    \ufffd[2J")
    assert found.err == "type a text; Ctrl-D ends it\n"


@pytest.mark.slow
def test_standard_input_reaches_every_process() -> None:
    command, text = ("-m", "llama", "complete", *GREEDY), "Once upon a time"
    alone = forked(*command, input=text)
    two = forked(*command, input=text, n=2)
    for done in (alone, two):
        assert done.returncode == 0, done.stderr[-3000:]
    assert alone.stdout == two.stdout
    assert len(alone.stdout) > 20
