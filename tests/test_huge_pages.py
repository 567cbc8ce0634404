"""Large tensors lie in pages of 2 MB, where Linux gives them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama import huge_pages

NAME = "THP_MEM_ALLOC_ENABLE"
CODE = """
import llama, torch
large = torch.ones(1 << 25)
lines = open("/proc/self/smaps_rollup").read().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("AnonHugePages")))
"""


@pytest.mark.parametrize(
    ("setting", "before", "after"),
    [
        ("always [madvise] never", None, "1"),
        ("always [madvise] never", "0", "0"),
        ("[always] madvise never", None, None),
        ("always madvise [never]", None, None),
        (None, None, None),
    ],
)
def test_they_are_asked_for_where_they_are_given(
    setting: str | None,
    before: str | None,
    after: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A failure means slow tokens, a warning for each large tensor, or a setting that is lost."""
    monkeypatch.setenv(NAME, before or "")
    if before is None:
        monkeypatch.delenv(NAME)
    monkeypatch.setattr(huge_pages, "_SETTING", tmp_path / "enabled")
    if setting is not None:
        (tmp_path / "enabled").write_text(setting)
    huge_pages.ask_for()
    assert os.environ.get(NAME) == after


@pytest.mark.skipif(
    not huge_pages._SETTING.exists() or "[madvise]" not in huge_pages._SETTING.read_text(),
    reason="this system gives all large tensors huge pages, or none",
)
@pytest.mark.parametrize("enabled", [True, False])
def test_pytorch_has_allocated_nothing_before(enabled: bool) -> None:
    """A failure means that PyTorch has read its setting before, so that tokens are slow again."""
    environment = {name: value for name, value in os.environ.items() if name != NAME}
    if not enabled:
        environment[NAME] = "0"
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert (int(done.stdout) > 100_000) == enabled, done.stdout
