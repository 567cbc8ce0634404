"""What the README shows runs as it stands there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "README.md", "exec"), {})
    assert "The cow says moo." in capsys.readouterr().out


def test_files_that_are_linked_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
    for script in re.findall(r"\b((?:examples|benchmarks|tools)/\w+\.py)", README):
        assert (ROOT / script).exists(), script


def test_every_source_file_is_on_the_map() -> None:
    for path in (ROOT / "llama").glob("[a-z]*.py"):
        assert f"(llama/{path.name})" in README, path.name
