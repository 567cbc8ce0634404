"""The command line gives lm-eval's flags to lm-eval, and the model's to the model."""

import json
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import lm_eval.__main__
import pytest
from lm_eval._cli import HarnessCLI

from llama import Llama, cli
from llama.evaluate import command
from llama.evaluate.flags import HarnessFlags, ModelFlags
from llama.evaluate.harness import LlamaLM
from llama.generation import TINY


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[Namespace]:
    """The namespaces that lm-eval's own command parses from command lines."""
    found: list[Namespace] = []
    parse = lambda: found.append(HarnessCLI().parse_args())  # noqa: E731
    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", parse)
    return found


def evaluate(*args: str) -> None:
    cli.run(command.main, "llama.evaluate", args)


def test_flags_reach_lm_eval(parsed: list[Namespace], monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure means that a flag does nothing, or something else than in lm-eval."""
    before = sys.argv
    shots = ("--num_fewshot", "5", "--limit", "10", "--gen_kwargs", 'temperature=0.5,until=["a b"]')
    chat = ("--apply_chat_template", "--nofewshot_as_multiturn", "--seed=1,2,3,4")
    evaluate("my, model", "--tasks", "a,b", *shots, *chat, "--log_samples", "--batch_size=auto")
    evaluate("--tasks=a", "--adapter=x,y", "--dtype=float32")
    assert sys.argv is before
    first, second = parsed
    assert (first.model, first.tasks, first.num_fewshot, first.limit) == (
        "llama",
        ["a", "b"],
        5,
        10,
    )
    assert first.gen_kwargs == {"temperature": 0.5, "until": ["a b"]}
    assert (first.apply_chat_template, first.fewshot_as_multiturn) == (True, False)
    assert (first.seed, first.log_samples, first.batch_size) == ([1, 2, 3, 4], True, "auto")
    assert first.model_args == {"pretrained": "my, model", "batch_size": "auto", "device": None}
    assert second.model_args["adapter"] == ["x", "y"]
    assert not hasattr(second, "apply_chat_template")
    built: dict[str, Any] = {}
    monkeypatch.setattr(Llama, "build", lambda **arguments: built.update(arguments))
    arguments = {**second.model_args}
    ModelFlags(arguments.pop("pretrained"), **arguments).build(7)
    assert built["adapter"] == ["x", "y"]
    assert (built["max_batch_size"], built["seed"], str(built["dtype"])) == (8, 7, "torch.float32")


def test_every_flag_of_lm_eval_is_known() -> None:
    """A failure means that lm-eval has a flag that isn't passed on, or has lost one that is."""
    theirs = {action.dest for action in _run_parser()._actions}
    ours = {*vars(HarnessFlags())}
    # What says which model it is, and what does nothing any more.
    assert theirs - ours == {
        *("help", "config", "model", "model_args", "batch_size", "max_batch_size", "device"),
        "verbosity",
    }
    assert ours <= theirs


def _run_parser() -> Any:
    return HarnessCLI()._subparsers.choices["run"]


def test_a_cache_of_answers_belongs_to_a_model(parsed: list[Namespace], tmp_path: Path) -> None:
    """A failure means that one model gets the answers of another, or none of its own."""
    checkpoint = tmp_path / "model"
    checkpoint.mkdir()
    (checkpoint / "weights").write_text("a")

    def name(*flags: str) -> str:
        evaluate(str(checkpoint), "--tasks=a", "--use_cache", "cache", *flags)
        used: str = parsed[-1].use_cache
        return used

    usual = name()
    assert usual.startswith("cache_")
    assert usual == name("--batch_size=3", "--model_parallel_size=1")
    assert len({usual, name("--quantize=int8"), name("--max_seq_len=9")}) == 3
    os.utime(checkpoint / "weights", (1, 1))
    assert usual != name()


def test_mistakes_are_told_before_anything_is_loaded(
    parsed: list[Namespace], capsys: pytest.CaptureFixture[str]
) -> None:
    """A failure means that a wrong flag is found after minutes, or with a traceback."""
    for args, expected in {
        (): "--tasks is missing",
        ("--tasks=a", "--num_fewshots=5"): "did you mean --num_fewshot?",
    }.items():
        with pytest.raises(SystemExit) as exited:
            evaluate(*args)
        assert expected in f"{exited.value.code}{capsys.readouterr().err}"
    with pytest.raises(SystemExit, match="--tasks has arc_easy beside humaneval, which isn't lm-"):
        evaluate("--tasks=humaneval,arc_easy")
    assert not parsed
    with pytest.raises(ValueError, match="batch_size is 'all': expected a whole number or auto"):
        LlamaLM(str(TINY), batch_size="all")


def test_tasks_in_which_programs_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure means that lm-eval runs what a model writes, without any limits, or a flag is
    lost."""
    found: list[tuple[Any, ...]] = []
    monkeypatch.setattr(command, "evaluate_code", lambda *arguments: found.append(arguments))
    seeds: list[int] = []
    monkeypatch.setattr(ModelFlags, "build", lambda _, seed: seeds.append(seed))
    rest = ("--allow_execution", "--k=1,10", "--limit=2", "--output_path=out")
    evaluate("--tasks", "humaneval,humaneval_infilling", *rest, "--seed=1,2,3,4")
    [(build, tasks, flags, limit, path)] = found
    assert (tasks, limit, path) == (["humaneval", "humaneval_infilling"], 2, "out")
    assert (flags.allow_execution, flags.k) == (True, ("1", "10"))
    build()
    assert seeds == [3]


@pytest.mark.soak
def test_a_killed_evaluation_goes_on_with_two_ranks(tmp_path: Path) -> None:
    """A failure means that the command as it is typed fails on several ranks, or asks again."""
    import subprocess

    from test_harness import TASKS

    out = tmp_path / "results.json"
    words = ["-m", "llama.evaluate", "--tasks=animals,capitals,stories"]
    words += ["--num_fewshot=2", f"--include_path={TASKS}", f"--output_path={out}"]
    words += ["--dtype=float32", "--device=cpu", f"--use_cache={tmp_path / 'cache'}"]
    started = subprocess.Popen([sys.executable, *words], stderr=subprocess.PIPE, text=True)
    assert started.stderr is not None
    for line in started.stderr:
        if "Running loglikelihood_rolling" in line:
            break
    started.kill()
    started.wait()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    done = subprocess.run([*launcher, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Requests remaining: 0" in done.stderr
    assert "|animals " in done.stdout
    [path] = tmp_path.glob("results_*.json")
    results = json.loads(path.read_text())
    assert results["results"]["animals"]["acc,none"] > 0.9
    assert results["config"]["model_num_parameters"] == 1_918_656
