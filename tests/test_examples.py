"""Every example runs as the README and the references say, and prints sense."""

import functools
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import forked

from llama import Llama, cli
from llama.checkpoint import load
from llama.convert import convert
from llama.generation import TINY
from llama.layers.kernels import cpu

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
EXPECTED = {
    "example_text_completion.py": r"named Mia\.\n> \w.{40}",
    "example_chat_completion.py": r"> Assistant: The cow says moo\.",
    "example_infilling.py": r"if number > result:",
    "example_completion.py": r"return width \* height",
    "example_instructions.py": r"> Assistant: 3, 4, 5, 6, 7, 8, 9\.",
    "example_json.py": r'> \{"city":"[^"]*","country":"[^"]*","continent":"[A-Z][a-z]+"\}\n',
}


@pytest.fixture(autouse=True)
def examples_import_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def run_here(name: str, *flags: str) -> None:
    """Run an example's command line in this process."""
    cli.run(runpy.run_path(str(EXAMPLES / name))["main"], name, flags)


def test_every_example_is_tested() -> None:
    examples = {path.name for path in EXAMPLES.glob("example_*.py")}
    assert set(EXPECTED) == examples - {"example_smollm2.py", "example_tools.py"}


@pytest.fixture
def smollm2(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The flags of a real model, widened: without fast 4-bit kernels that takes a third as long.

    In float32, since bfloat16 decides a near tie otherwise. test_smollm2.py has the file as it is.
    """
    path = os.environ.get("LLAMA_SMOLLM2")
    if not path:
        pytest.skip("LLAMA_SMOLLM2 is not set")
    monkeypatch.setattr(load, "choose_dtype", lambda *_: torch.float32)
    return ["--ckpt_dir", path, "--quantize", "none"]


def test_a_real_model_answers(
    smollm2: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Llama, "build", functools.cache(Llama.build))  # for both, with these sizes
    smollm2 += ["--max_seq_len", "1024", "--max_batch_size", "4"]
    run_here("example_smollm2.py", *smollm2, "--max_gen_len", "10")
    assert "> Assistant: The capital of France is Paris." in capsys.readouterr().out
    run_here("example_json.py", *smollm2)
    expected = '> {"city":"Paris","country":"France","continent":"Europe"}'
    assert expected in capsys.readouterr().out


@pytest.mark.slow
def test_a_real_model_calls_a_function_and_uses_its_result(
    smollm2: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("llguidance")
    run_here("example_tools.py", *smollm2, "--max_gen_len", "40")
    out = capsys.readouterr().out
    assert '> Call: get_population({"city": "Oslo"})' in out
    assert re.search(r"> Assistant: .*720,?000", out)


@pytest.mark.slow
def test_plain_python_from_anywhere(tmp_path: Path) -> None:
    name = "example_text_completion.py"
    command = [sys.executable, str(EXAMPLES / name), "--temperature", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(EXPECTED[name], done.stdout)


@pytest.mark.parametrize("name", EXPECTED)
def test_whole_and_streamed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in ((), ("--stream",)):
        run_here(name, "--temperature", "0", *flags)
        assert re.search(EXPECTED[name], capsys.readouterr().out)


@pytest.mark.slow
def test_torchrun_from_inside_examples_with_the_references_flags(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(EXAMPLES)
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "1")
    flags = "--max_seq_len 128 --max_batch_size 4 --max_gen_len 32 --temperature 0 --top_p 0.9"
    checkpoint = [
        "--ckpt_dir",
        "../llama/tiny",
        "--tokenizer_path",
        "../llama/tiny/tokenizer.model",
    ]
    done = forked(*launcher, "example_text_completion.py", *checkpoint, *flags.split())
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(EXPECTED["example_text_completion.py"], done.stdout)


@pytest.mark.slow
def test_ranks_above_0_print_nothing_and_ids_agree(capsys: pytest.CaptureFixture[str]) -> None:
    two = forked(str(EXAMPLES / "example_chat_completion.py"), "--temperature", "0", n=2)
    assert two.returncode == 0, two.stderr[-3000:]
    run_here("example_chat_completion.py", "--temperature", "0")
    assert two.stdout == capsys.readouterr().out


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, converted."""
    path = tmp_path_factory.mktemp("converted") / "int8"
    convert(str(TINY), str(path), quantize="int8")
    return path


@pytest.mark.skipif(
    cpu.LEVELS < 127,
    reason="without AVX-512 VNNI int8 inputs have half the levels: other near ties",
)
@pytest.mark.parametrize("name", EXPECTED)
def test_greedy_text_of_every_example_is_unchanged_in_int8(
    name: str, int8: Path, capsys, monkeypatch
) -> None:
    # In bfloat16 the usual weights' text isn't float32's either: stories have near ties.
    monkeypatch.setattr(load, "choose_dtype", lambda *_: torch.float32)
    run_here(name, "--temperature", "0")
    usual = capsys.readouterr().out
    run_here(name, "--ckpt_dir", str(int8), "--temperature", "0")
    assert capsys.readouterr().out == usual
    assert usual.strip()
