"""Every command prints its help, and names what it isn't given right before it loads anything."""

import logging
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import forked

from llama import Llama, cli

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [
    str(path.relative_to(ROOT))
    for folder in ("examples", "benchmarks", "tools")
    for path in sorted((ROOT / folder).glob("*.py"))
    if "__main__" in path.read_text(encoding="utf-8")
]
# What to type, and a flag that the command has.
ALL = {
    **dict.fromkeys(SCRIPTS, ""),
    "examples/chat.py": "--temperature",
    "llama.batch": "--errors",
    "llama.server": "--max_queue",
    "llama.evaluate": "--num_fewshot",
    "llama.checkpoint": "--max_seq_len",
    "llama.checkpoint reshard": "--model_parallel_size",
    "llama.convert": "--group_size",
    "llama.evaluate.code": "--n_samples",
    "llama.perplexity": "--stride",
    "llama.plan": "--gpus",
    **{f"llama {name}": "--ckpt_dir" for name in ("chat", "complete", "infill", "serve", "batch")},
    "llama inspect": "--max_seq_len",
    "llama evaluate": "--num_fewshot",
    "llama convert": "--group_size",
    "llama perplexity": "--stride",
    "llama plan": "--gpus",
    **{f"tools/train_tiny.py {name}": "--steps" for name in ("train", "code")},
    "tools/train_tiny.py evaluate": "--samples",
}
PROGRAMS = ("llama", "tools/train_tiny.py")  # of several commands
SINGLE = [command for command in ALL if command not in PROGRAMS]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process, which has imported much of it, and must load no model.

    Returns its exit status, standard output and standard error.
    """

    def run(command: str, *args: str) -> tuple[int, str, str]:
        first, *more = command.split()
        monkeypatch.setattr(sys, "argv", [first, *more, *args])
        monkeypatch.setattr(Llama, "build", lambda *_, **__: pytest.fail("a model is loaded"))
        status: object = 0
        try:
            if first.endswith(".py"):
                monkeypatch.syspath_prepend(ROOT / Path(first).parent)
                runpy.run_path(str(ROOT / first), run_name="__main__")
            else:
                for name in (first, f"{first}.__main__"):
                    monkeypatch.delitem(sys.modules, name, raising=False)
                runpy.run_module(first, run_name="__main__", alter_sys=True)
        except SystemExit as error:
            status = error.code
            if isinstance(status, str):
                print(status, file=sys.stderr)
                status = 1
        found = capsys.readouterr()
        return int(status or 0), found.out, found.err  # type: ignore[call-overload]

    return run


def test_every_command_is_here() -> None:
    assert {f"llama {name}" for name in cli.COMMANDS} == {c for c in ALL if c.startswith("llama ")}
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        for path in (ROOT / "llama").rglob("*.py")
        if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")
    }
    modules -= {"llama", "llama.evaluate.sandbox"}  # the latter is for programs to start
    assert modules == {c for c in ALL if c.startswith("llama.") and " " not in c}


@pytest.mark.parametrize("command", ALL)
def test_help(command: str, start: Run) -> None:
    status, out, err = start(command, "--help")
    assert (status, err) == (0, "")
    assert out.startswith("usage: ") and ALL[command] in out
    assert start(command, "-h") == (0, out, "")


def parameters(usage: str) -> list[str]:
    """The flags that a help text names, those that are given by position too."""
    entries = re.findall(r"^  (?:--)?(\w+)", usage, re.M)
    return [f"--{entry.lower()}" for entry in entries]


@pytest.mark.parametrize("command", SINGLE)
def test_an_unknown_flag(command: str, start: Run) -> None:
    known = ALL[command] or parameters(start(command, "-h")[1])[0]
    for args in ([f"{known}x", "3"], [f"{known}x=3"], ["a", f"{known}x"]):
        status, out, err = start(command, *args)
        assert (status, out) == (2, "")
        assert f": there is no flag {known}x: did you mean {known}?\n" in err
    status, out, err = start(command, "--qqqqqqqqqqqqqqq")
    assert (status, out) == (2, "")
    assert "there is no flag --qqqqqqqqqqqqqqq\n" in err


@pytest.mark.parametrize("command", SINGLE)
def test_too_many_arguments(command: str, start: Run) -> None:
    usage = start(command, "-h")[1]
    if "..." in usage.splitlines()[0]:
        return  # any number of texts
    status, out, err = start(command, *["x"] * (len(parameters(usage)) + 1))
    assert (status, out) == (2, "")
    assert "'x' is one argument too many\n" in err or "is 'x': " in err


def test_the_list_of_commands(start: Run) -> None:
    status, out, err = start("llama")
    assert (status, err) == (0, "")
    assert start("llama", "--help") == start("llama", "-h") == (0, out, "")
    for name in cli.COMMANDS:
        assert f"\n  {name} " in out
    assert "Write a checkpoint in another format" in out
    status, _, err = start("llama", "compleet", "text")
    assert (status, err.splitlines()[0]) == (
        2,
        "llama: there is no command compleet: did you mean complete?",
    )
    assert "there are chat, complete" in start("llama", "?")[2]


@pytest.mark.slow
def test_help_of_all_commands_imports_none_of_them() -> None:
    """A failure means that ``llama --help`` waits for what only some command needs."""
    code = """
import sys
from llama import cli
before = set(sys.modules)
cli.main(["--help"])
print(*sorted({name for name in set(sys.modules) - before if name.startswith("llama")}))
"""
    done = forked("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "expected"),
    [("-m llama.server --help", 0), ("-m llama --help", 0), ("examples/chat.py --helpp", 2)],
)
def test_a_process_of_its_own(command: str, expected: int, monkeypatch) -> None:
    """``python -m llama.server --help`` once said that there is no flag --help."""
    monkeypatch.chdir(ROOT)
    done = forked(*command.split())
    assert done.returncode == expected, done.stderr
    assert done.stdout.startswith("usage: ") == (expected == 0)


def test_the_checkout_does_not_hide_the_package(tmp_path: Path) -> None:
    """A failure means that ``import llama`` finds no names in the folder that has the checkout."""
    (tmp_path / "llama").mkdir()
    code = "import importlib.util; print(importlib.util.find_spec('llama'))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def found(folder: Path) -> str:
        command = [sys.executable, "-c", code]
        return subprocess.check_output(command, cwd=folder, env=environment, text=True).strip()

    if f"'{ROOT / 'llama' / '__init__.py'}'" not in found(tmp_path / "llama"):
        pytest.skip("this checkout is not installed: pip install -e .")
    assert "origin=" in found(tmp_path)


def test_the_servers_flags(start: Run) -> None:
    status, _, err = start("llama.server", "--log_prompts", "false")
    assert status == 2
    assert "--log_prompts is 'false': give --log_prompts=True or --log_prompts=False" in err
    status, _, err = start("llama.server", "--dtype", "bf16")
    assert (status, err) == (
        1,
        "llama.server: dtype is 'bf16': expected float32, bfloat16, float16\n",
    )


@pytest.mark.parametrize("command", ["llama.server", "llama serve"])
def test_a_missing_package(command: str, start: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("llama.server.serve", "llama.server.api"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    status, out, err = start(command)
    assert (status, out) == (1, "")
    assert err == (
        f"{command}: the server needs the package uvicorn: "
        "pip install 'llama[server]' installs it\n"
    )


def a_command(
    path: str,
    count: int = 3,
    rate: float = 0.5,
    limit: int | None = None,
    key: str | None = None,
    loud: bool = False,
    adapter: str | tuple[str, ...] = (),
) -> None:
    """Do nothing, ``loudly``."""
    print((path, count, rate, limit, key, loud, adapter))


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("a", ("a", 3, 0.5, None, None, False, ())),
        ("1e5 --key 007 --rate 2", ("1e5", 3, 2.0, None, "007", False, ())),
        ("--path=a=b --limit=None --loud", ("a=b", 3, 0.5, None, None, True, ())),
        ("--count -1 a --loud=False --limit 9", ("a", -1, 0.5, 9, None, False, ())),
        ("--noloud a 4 --adapter x/y,z", ("a", 4, 0.5, None, None, False, ("x/y", "z"))),
        ("--adapter 1,5 --no-loud --key=a,b a", ("a", 3, 0.5, None, "a,b", False, ("1", "5"))),
        ("--count 1 -- --path 0.1", ("--path", 1, 0.1, None, None, False, ())),
        ("--key=--help a", ("a", 3, 0.5, None, "--help", False, ())),
    ],
)
def test_arguments(args: str, expected: object, capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(a_command, args=args.split())
    assert capsys.readouterr().out == f"{expected}\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("", "PATH is missing"),
        ("a --count x", "--count is 'x': expected an integer"),
        ("a --count 1.5", "--count is '1.5': expected an integer"),
        ("a --count True", "--count is 'True': expected an integer"),
        ("a --rate fast", "--rate is 'fast': expected a number"),
        ("a --limit x", "--limit is 'x': expected an integer or None"),
        ("a --loud 1", "--loud is '1': give --loud=True or --loud=False"),
        ("a --key --loud", "--key needs a value: --key=VALUE"),
        ("a --count", "--count needs a value: --count=VALUE"),
        ("a --nocount", "there is no flag --nocount: did you mean --count?"),
        ("a -c 3", "there is no flag -c"),
        ("a 1 2 3 4 True b c", "'c' is one argument too many"),
    ],
)
def test_usage_errors(args: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.run(a_command, "llama.toy", args.split())
    assert caught.value.code == 2
    found = capsys.readouterr()
    assert found.err == f"llama.toy: {message}\npython -m llama.toy --help shows all flags.\n"
    assert not found.out


def test_help_text() -> None:
    def command(*texts: str, page: bool = True, key: str | None = None) -> None:
        """Read ``texts``.

        At length.

        Args:
            texts: what to read,
                of any length.
            page: shown.
            key: the key.
        """

    assert cli.help_text(command, "llama read") == (
        "usage: llama read [TEXTS ...] [FLAGS]\n\nRead texts.\n\nAt length.\n\n"
        "arguments:\n  TEXTS\n      what to read, of any length.\n\n"
        "flags:\n  --page=BOOL (default True)\n      shown.\n  --key=STR\n      the key."
    )


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ImportError("no gguf"), "toy: no gguf"),
        (MemoryError("too large"), "toy: too large"),
        (FileNotFoundError("not here"), "toy: not here"),
        (ValueError("wrong"), "toy: wrong"),
        (KeyboardInterrupt(), 130),
    ],
)
def test_what_ends_a_command(error: BaseException, status: object) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        cli.run(fail, "toy", [])
    assert caught.value.code == status


def test_other_errors_are_ours() -> None:
    def fail() -> None:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        cli.run(fail, "toy", [])


def test_dtypes() -> None:
    assert [cli.dtype_of(name) for name in (None, *cli.DTYPES)] == [
        None,
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ]
    with pytest.raises(ValueError, match="dtype is 'int3': expected float32, bfloat16, float16"):
        cli.dtype_of("int3")


def test_progress_is_logged_every_five_seconds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    monkeypatch.setattr(cli, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(cli.logger, "propagate", True)
    monkeypatch.setattr(cli.logger, "handlers", [])
    caplog.set_level(logging.INFO, "llama.cli")
    with cli.progress(200, "writing") as show:
        for now in range(13):
            show(10 * now)
    assert [record.getMessage() for record in caplog.records] == ["writing: 30 %", "writing: 60 %"]
    cli.progress(0, "nothing")(0)


def test_progress_in_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(cli, "DELAY", 0)
    show = cli.progress(2000, "quantising", "weights")
    show(500)
    show(2001)  # which ends the bar
    out = capsys.readouterr().err
    assert out.startswith("\rquantising:") and out.endswith("\n")
    assert "100%" in out and "2.00k/2.00k" in out and "weights/s" in out
    with pytest.raises(ValueError), cli.progress(2000, "writing") as show:
        show(500)
        raise ValueError
    assert "25%" in (out := capsys.readouterr().err) and out.endswith("\n")
    monkeypatch.setenv("RANK", "1")
    cli.progress(2000, "writing")(2000)
    monkeypatch.delenv("RANK")
    monkeypatch.setitem(sys.modules, "tqdm", None)
    cli.progress(2000, "writing")(2000)
    assert not capsys.readouterr().err
