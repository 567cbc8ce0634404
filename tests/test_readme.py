"""What the documentation shows exists and runs as it stands there."""

import ast
import contextlib
import importlib
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from processes import forked
from servers import serve

from llama import Llama
from llama.cli import COMMANDS
from llama.server.page import mount_page

ROOT = Path(__file__).resolve().parent.parent
NAMES = (
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "MODEL_CARD.md", "SECURITY.md"),
    "CODE_OF_CONDUCT.md",
)
DOCS = [*(ROOT / name for name in NAMES), *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in DOCS}
README = TEXTS["README.md"]
ARCHITECTURE = TEXTS["docs/architecture.md"]
FOLDERS = (".ci", "benchmarks", "docs", "examples", "llama", "tests", "tools")
ADDRESS = "http://127.0.0.1:8000"  # at which the documentation's server listens

# What a command line may begin with, other than Python.
PROGRAMS = {".", "curl", "lint-imports", "mypy", "pip", "pre-commit", "printf", "ruff"}
PROGRAMS |= {"jupyter", "jupytext", "serve", "zensical"}
MODULES = {"pip", "pytest", "venv", "zipfile"}  # of other packages, as in python -m pytest


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def prose(text: str) -> str:
    """The text without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def is_translation(name: str) -> bool:
    """Return whether a page has the start page's code, which runs for that page."""
    code, start = (blocks(TEXTS[page], r"\w+") for page in (name, "docs/index.md"))
    return name != "docs/index.md" and code == start


def anchors(text: str) -> set[str]:
    """The anchors of headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


class Command(NamedTuple):
    """A Python command of the documentation."""

    target: str  # a script's path, or a module behind "-m "
    subcommand: str
    flags: frozenset[str]

    @staticmethod
    def of(words: list[str]) -> "Command | None":
        """The command of a command line, None for a program that isn't this repository's."""
        if words[0] == "torchrun":
            while not (words[0] == "-m" or words[0].endswith(".py")):
                del words[0]
            words = ["python", *words]
        if words[0] == "llama":
            words = ["python", "-m", *words]
        if words[0] in PROGRAMS or words[:2] == ["python", "-c"]:
            return None
        assert words[0] == "python", f"{words[0]}: neither Python nor a known program"
        target, rest = words[1], words[2:]
        if target == "-m":
            target, rest = f"-m {rest[0]}", rest[1:]
            if target.removeprefix("-m ") in MODULES:
                return None
        subcommand = rest[0] if rest and re.fullmatch("[a-z]+", rest[0]) else ""
        flags = {word.partition("=")[0] for word in rest if word.startswith("--")}
        return Command(target, subcommand, frozenset(flags - {"--help"}))


def command_lines(text: str) -> Iterator[list[str]]:
    """The simple commands of bash blocks, and of code in the text that begins like one."""
    code = [line for block in blocks(text, "bash") for line in join_lines(block).splitlines()]
    code += re.findall(r"`((?:python|torchrun|pip) [^`]+)`", prose(text))
    for line in code:
        for part in re.split(r" && | \| ", line):
            yield shlex.split(part)


def join_lines(block: str) -> str:
    """A block with its continued lines made one."""
    return re.sub(r"\s*\\\n\s*", " ", block)


def python_commands(text: str) -> list[Command]:
    found = {command for words in command_lines(text) if (command := Command.of(words))}
    return sorted(found, key=str)


# For each [target, *args] on the standard input: [status, what was printed]. All in one process, so
# that torch is imported once.
HELPER = """
import contextlib, io, json, os, runpy, sys
path = list(sys.path)
results = []
for target, *args in json.load(sys.stdin):
    out, status = io.StringIO(), 0
    before = set(sys.modules)
    sys.argv = [target.removeprefix("-m "), *args]
    sys.path[:] = [os.path.dirname(target), *path] if target.endswith(".py") else path
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            if target.startswith("-m "):
                runpy.run_module(target[3:], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(target, run_name="__main__")
    except SystemExit as error:
        status = error.code or 0
    except BaseException as error:
        status = repr(error)
    for name in set(sys.modules) - before:
        if not name.startswith(("llama", "torch")) and "." not in name:
            file = getattr(sys.modules[name], "__file__", None) or ""
            if os.path.dirname(os.path.dirname(file)) == os.getcwd():
                del sys.modules[name]  # a script's neighbour: another folder may have its name too
    results.append([status, out.getvalue()])
json.dump(results, sys.stdout)
"""


@pytest.fixture(scope="module")
def helps() -> dict[tuple[str, str], tuple[Any, str]]:
    """For each command its status and what it prints for --help."""
    commands = sorted(
        {(c.target, c.subcommand) for text in TEXTS.values() for c in python_commands(text)}
    )
    calls = [[target, *([sub] if sub else []), "--help"] for target, sub in commands]
    done = forked("-c", HELPER, input=json.dumps(calls), timeout=300)
    assert done.returncode == 0, done.stderr
    return dict(zip(commands, map(tuple, json.loads(done.stdout)), strict=True))


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server of the embedded model, with tools and the page."""
    llama = Llama.build(dtype=torch.float32, device="cpu", max_seq_len=1024, tool_format="hermes")
    with serve(llama, mount=mount_page) as (url, _):
        yield url


def test_readme_is_short_and_begins_with_the_two_commands() -> None:
    """A README that grows back into a reference, or whose first block isn't the two commands that
    the clean run reads from it and runs."""
    assert len(README.splitlines()) <= 200
    assert blocks(README, "bash")[0].splitlines() == [
        "pip install -e . && python examples/example_text_completion.py",
        "pip install -e '.[test]' && python -m pytest",
    ]


def test_readme_names_every_command() -> None:
    """A command of ``python -m llama`` that a newcomer would never hear of."""
    missing = [name for name in COMMANDS if f"`{name}`" not in README]
    assert not missing


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name: str) -> None:
    """A link or picture whose file has moved, or whose heading was renamed."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(TEXTS[name])):
        if re.match("https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("name", TEXTS)
def test_files_that_are_named_exist(name: str) -> None:
    """A file that has moved or was renamed, but not in the text."""
    folders = "|".join(map(re.escape, FOLDERS))
    paths = re.findall(rf"(?<![\w./-])((?:{folders})/[\w./-]*)", TEXTS[name])
    for path in paths:
        assert (ROOT / path.rstrip(".")).exists(), path
    files = [
        *ROOT.glob("*.*"),
        *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.*")),
    ]
    known = [file.as_posix() for file in files]
    for path in re.findall(r"`(?:\./)?(\w[\w./]*\.(?:py|md|sh))\b", prose(TEXTS[name])):
        assert any(file.endswith(f"/{path}") for file in known), path


def test_map_of_the_code_is_true() -> None:
    """A file or folder on the architecture's map that isn't where the map has it."""
    [tree] = [block for block in blocks(ARCHITECTURE, "text") if block.startswith("llama/\n")]
    folder = ""
    entries = 0
    for line in tree.splitlines()[1:]:
        indent, names = re.match(r"( +)((?:[\w./]+, )*[\w./]+)", line).groups()  # type: ignore[union-attr]
        folder = names if len(indent) == 2 else folder
        for entry in names.split(", "):
            path = ROOT / "llama" / (entry if len(indent) == 2 else folder + entry)
            assert path.exists(), path
            assert path.is_dir() == entry.endswith("/"), path
            entries += 1
    assert entries > 30


def test_architecture_names_the_whole_reading_path() -> None:
    """A module of the reading path that the walk through the code leaves out."""
    package = ROOT / "llama"
    names = ("generation", "model", "args", "tokenizer", "sampling", "parallel")
    modules = [package / f"{name}.py" for name in names]
    modules += [*package.glob("layers/**/*.py"), *package.glob("engine/*.py")]
    for path in modules:
        if path.name != "__init__.py":
            assert re.search(rf"\b{path.name}\b", ARCHITECTURE), path.relative_to(ROOT)


def test_architecture_names_functions_that_exist() -> None:
    """A class, function, argument or constant that the walk through the code names and that was
    renamed."""
    defined: set[str] = set()
    for path in ROOT.glob("llama/**/*.py"):
        defined.add(path.stem)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                defined.add(node.name)
            elif isinstance(node, ast.Name):
                defined.add(node.id)
            elif isinstance(node, ast.arg):
                defined.add(node.arg)
    names = re.findall(r"`(?:[A-Za-z]\w*\.)?([A-Za-z_]\w+)`", prose(ARCHITECTURE))
    names = [name for name in names if "_" in name or name != name.lower()]  # others are words
    assert len(names) > 40
    assert sorted(set(names) - defined) == []


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, text in TEXTS.items()  # tutorials have a test of their own
        if blocks(text, "python") and not is_translation(name) and "/tutorials/" not in name
    ],
)
def test_python_blocks_run(
    name: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An example that raises, or whose embedded model no longer gives the answer shown for it.

    A file's blocks run in their order, in one namespace. Clients talk to a server of the test's.
    """
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    code = blocks(TEXTS[name], "python")
    for block in code:
        if ADDRESS in block:
            block = block.replace(ADDRESS, request.getfixturevalue("address"))
        exec(compile(block, name, "exec"), namespace)
    printed = capsys.readouterr().out
    assert printed
    if any("What does the cow say?" in block for block in code):
        assert "The cow says moo." in printed


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
@pytest.mark.parametrize(
    "name", [name for name, text in TEXTS.items() if "\ncurl " in text and not is_translation(name)]
)
def test_curl_commands_are_answered(name: str, address: str) -> None:
    """A request that the server refuses."""
    for words in command_lines(TEXTS[name]):
        if words[0] == "curl":
            words = [word.replace(ADDRESS, address) for word in words]
            done = subprocess.run([*words, "--fail", "-sS"], capture_output=True, timeout=60)
            assert done.returncode == 0, done.stderr
            is_rendered = any(word.endswith("/render") for word in words)
            assert (b'"html"' if is_rendered else b'"choices"') in done.stdout


@pytest.mark.parametrize("name", [name for name, text in TEXTS.items() if python_commands(text)])
def test_commands_answer_help_and_know_their_flags(
    name: str, helps: dict[tuple[str, str], tuple[Any, str]]
) -> None:
    """A script, command or flag that was renamed or doesn't start."""
    for command in python_commands(TEXTS[name]):
        status, text = helps[command.target, command.subcommand]
        assert status == 0, f"{command}: {status}\n{text}"
        assert "usage" in text.lower(), f"{command}: {text}"
        for flag in command.flags:
            assert re.search(rf"{flag}\b", text), f"{command.target} has no {flag}"


def test_download_script_answers_help() -> None:
    """A download script that doesn't start."""
    done = subprocess.run(["bash", ROOT / "download.sh", "--help"], capture_output=True, timeout=60)
    assert done.returncode == 0
    assert b"Usage" in done.stdout


def test_moved_names_are_where_the_changelog_says(tiny: Llama) -> None:
    """A row of the changelog's table that sends readers to a name which doesn't exist."""
    rows = re.findall(r"^\| (`.*`) \| (`.*`) \|$", TEXTS["CHANGELOG.md"], re.M)
    assert len(rows) > 30
    for _, new in rows:
        for name in re.findall("`([^`]+)`", new):
            resolve(name, tiny)


@pytest.mark.parametrize("name", ["CHANGELOG.md", "docs/architecture.md"])
def test_metas_names_are_importable(name: str) -> None:
    """A name of Meta's modules that is promised and was moved away."""
    promised = re.findall(r"`(llama\.\w+)`\s+\(((?:`\w+`[,\s]*)+)\)", TEXTS[name])
    assert {module for module, _ in promised} == {
        "llama.generation",
        "llama.model",
        "llama.tokenizer",
    }
    for module, names in promised:
        for attribute in re.findall(r"\w+", names):
            assert hasattr(importlib.import_module(module), attribute), f"{module}.{attribute}"


def resolve(name: str, llama: Llama) -> object:
    """The module, class or function of a dotted name; ``Llama`` stands for a built one."""
    first, *rest = name.split(".")
    found: Any
    if first == "Llama":
        found = llama
    elif first == "Transformer":
        found = llama.model
    else:
        parts = [first]
        found = importlib.import_module(first)
        while rest:
            with contextlib.suppress(ModuleNotFoundError):
                found = importlib.import_module(".".join([*parts, rest[0]]))
                parts.append(rest.pop(0))
                continue
            break
    for attribute in rest:
        found = getattr(found, attribute)
    return found
