"""The data sets of the tasks beside this file; tools/evaluation_tasks.py writes what is a file."""

import json
import random
from pathlib import Path
from typing import Any

import datasets


def _read(name: str) -> dict[str, Any]:
    text = Path(__file__).with_name(f"{name}.jsonl").read_text(encoding="utf-8")
    documents = [json.loads(line) for line in text.splitlines()]
    return _test(documents)


def _test(documents: list[dict[str, Any]]) -> dict[str, Any]:
    return {"test": datasets.Dataset.from_list(documents)}


def animals(**_: object) -> dict[str, Any]:
    return _read("animals")


def capitals(**_: object) -> dict[str, Any]:
    return _read("capitals")


def stories(**_: object) -> dict[str, Any]:
    return _read("stories")


def endings(**_: object) -> dict[str, Any]:
    return _read("endings")


def lines(**_: object) -> dict[str, Any]:
    """Every third line of HumanEval's solutions, beside three others that are indented alike."""
    from llama.evaluate.humaneval import humaneval, single_line

    rng = random.Random(1)
    gaps = [gap for problem in humaneval() for gap in single_line(problem)]
    texts = sorted({gap.solution.lstrip(" ") for gap in gaps})
    documents = []
    for gap in gaps[::3]:
        right = gap.solution.lstrip(" ")
        indent = " " * (len(gap.solution) - len(right))
        choices = [right, *rng.sample([text for text in texts if text != right], 3)]
        rng.shuffle(choices)
        answer = choices.index(right)
        choices = [f"{indent}{choice}" for choice in choices]
        documents.append({"text": gap.prefix, "choices": choices, "answer": answer})
    return _test(documents)
