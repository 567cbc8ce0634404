"""A short part of the fuzzing of checkpoints, and that its harness notices bugs."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz.fuzz_checkpoint import FORMATS, Fuzzer, describe

pytestmark = pytest.mark.slow

MUTATIONS = {"meta": 18, "llama3": 12, "hf": 16, "gguf": 13, "adapter": 12}


@pytest.fixture(scope="module")
def fuzzer() -> Iterator[Fuzzer]:
    """One for all, since a worker imports PyTorch, and makes sound checkpoints, for seconds."""
    with Fuzzer(seed=1) as fuzzer:
        yield fuzzer


@pytest.mark.parametrize("format", FORMATS)
def test_damaged_checkpoints_run_or_are_refused(format: str, fuzzer: Fuzzer) -> None:
    """A failure means that a damaged file gives an error of some library, or worse."""
    outcomes = [fuzzer.run(number, format) for number in range(MUTATIONS[format])]
    findings = [describe(fuzzer, outcome) for outcome in outcomes if outcome.is_finding]
    assert not findings, "\n".join(findings)
    kinds = {outcome.kind for outcome in outcomes}
    assert {"runs", "clean: ValueError"} <= kinds


@pytest.mark.parametrize(
    ("bug", "kind"),
    [
        ("raise", "RAW KeyError"),
        ("allocate", "RAW RuntimeError"),
        ("fill", "MEMORY"),
        ("execute", "CODE EXECUTED"),
        ("crash", "CRASH"),
    ],
)
def test_a_bug_is_found(fuzzer: Fuzzer, bug: str, kind: str) -> None:
    outcome = fuzzer.run(0, plant=bug)
    assert outcome.is_finding
    assert outcome.kind == kind
    assert kind in describe(fuzzer, outcome)


def test_a_hang_is_found_and_ended(fuzzer: Fuzzer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzzer, "timeout", 0.5)
    assert fuzzer.run(0, plant="hang").kind == "HANG"


def test_the_command_says_what_a_number_is() -> None:
    script = Path(__file__).parent / "fuzz" / "fuzz_checkpoint.py"
    command = [sys.executable, str(script), "--only", "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert any(name in done.stdout for name in ("consolidated", "params.json", "tokenizer.model"))
