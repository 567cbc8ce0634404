"""A real model: SmolLM2-135M-Instruct gives transformers' ids, straight from its GGUF file.

The short version of benchmarks/smollm2_parity.py; it needs the file that LLAMA_SMOLLM2 names.
"""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import smollm2_parity


@pytest.fixture
def gguf() -> Path:
    path = os.environ.get("LLAMA_SMOLLM2")
    if not path:
        pytest.skip("LLAMA_SMOLLM2 is not set")
    return Path(path)


def test_it_says_what_transformers_says(gguf: Path) -> None:
    found = smollm2_parity.ours(gguf, count=2, length=12)
    assert found["answer"][0]["generation"]["content"] == "The capital of France is Paris."
    # What transformers 5.23 gives for the same file, by the benchmark.
    assert found["alone"] == [
        [504, 3575, 282, 4649, 314, 7042, 30],
        [1653, 260, 5646, 28, 5646, 29, 14519, 8085, 28, 476, 64, 32206],
    ]
    assert found["ragged"] == found["alone"]
