"""The data sets of the tasks beside this file, written by tools/evaluation_tasks.py."""

import json
from pathlib import Path
from typing import Any

import datasets


def _read(name: str) -> dict[str, Any]:
    text = Path(__file__).with_name(f"{name}.jsonl").read_text(encoding="utf-8")
    documents = [json.loads(line) for line in text.splitlines()]
    return {"test": datasets.Dataset.from_list(documents)}


def animals(**_: object) -> dict[str, Any]:
    return _read("animals")


def capitals(**_: object) -> dict[str, Any]:
    return _read("capitals")


def stories(**_: object) -> dict[str, Any]:
    return _read("stories")


def endings(**_: object) -> dict[str, Any]:
    return _read("endings")
