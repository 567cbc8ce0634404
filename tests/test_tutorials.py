"""The tutorials run from their first cell to their last, and print what they show."""

import json
import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from processes import forked

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(p for p in (ROOT / "docs/tutorials").glob("*.md") if p.name != "index.md")
SECONDS = 60  # of a processor, for a tutorial

# Runs cells in one namespace, and writes what each of them printed, a line of JSON for each.
RUN = """
import contextlib, io, json, linecache, signal, sys
seconds, cells = json.load(sys.stdin)
signal.setitimer(signal.ITIMER_PROF, seconds)  # of a processor, then it is ended
namespace = {"__name__": "__main__"}
for number, cell in enumerate(cells, 1):
    name, printed = f"<cell {number}>", io.StringIO()
    linecache.cache[name] = len(cell), None, cell.splitlines(True), name
    with contextlib.redirect_stdout(printed):
        exec(compile(cell, name, "exec"), namespace)
    print(json.dumps(printed.getvalue()), flush=True)
"""


class Cell(NamedTuple):
    """A Python block of a page, and what it prints by the ``text`` block right behind it."""

    code: str
    output: str | None


def read_cells(text: str) -> list[Cell]:
    pattern = r"^```python\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?"
    return [Cell(code, output or None) for code, output in re.findall(pattern, text, re.M | re.S)]


def lacks(cell: Cell) -> list[str]:
    """The variables that a cell reads and that aren't set: what they name isn't there."""
    names = re.findall(r'os\.environ\["(LLAMA_\w+)"\]', cell.code)
    return [name for name in names if not os.environ.get(name)]


def check_output(cell: Cell, number: int, printed: str) -> None:
    """Compare what a cell printed with what its page shows, where … stands for anything."""
    if cell.output is not None:
        shown = re.escape(cell.output.strip()).replace("…", ".*?")
        if not re.fullmatch(shown, printed.strip(), re.S):
            pytest.fail(f"cell {number} printed\n\n{printed}\nbut the page shows\n\n{cell.output}")


def run(cells: Sequence[Cell], seconds: float = SECONDS) -> None:
    """Run cells in a process of their own, and check what they print."""
    given = json.dumps([seconds, [cell.code for cell in cells]])
    done = forked("-c", RUN, input=given, timeout=300, MPLBACKEND="Agg")
    outputs = [json.loads(line) for line in done.stdout.splitlines()]
    for number, (cell, printed) in enumerate(zip(cells, outputs, strict=False), 1):
        check_output(cell, number, printed)
    if done.returncode == -signal.SIGPROF:
        pytest.fail(f"the tutorial takes more than {seconds} s, and was in cell {len(outputs) + 1}")
    if done.returncode or len(outputs) < len(cells):
        failed = cells[len(outputs)].code if len(outputs) < len(cells) else ""
        pytest.fail(
            f"cell {len(outputs) + 1} ended with {done.returncode}:\n\n{failed}\n{done.stderr}"
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tutorial_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell that raises, prints something else than the page shows, or takes too long."""
    monkeypatch.chdir(tmp_path)
    cells = read_cells(page.read_text(encoding="utf-8"))
    missing = [lacks(cell) for cell in cells]
    n_runnable = next((i for i, names in enumerate(missing) if names), len(cells))
    assert cells
    if n_runnable:
        run(cells[:n_runnable])
    if n_runnable < len(cells):
        pytest.skip(f"{missing[n_runnable][0]} is not set: not run from cell {n_runnable + 1} on")


def test_index_names_every_tutorial() -> None:
    """A tutorial that readers of the overview never find, or one there that no longer exists."""
    text = (ROOT / "docs/tutorials/index.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\]\((\w+\.md)\)", text)) == [page.name for page in PAGES]


@pytest.mark.parametrize(
    ("code", "output", "message"),
    [
        ("x = 1\nraise KeyError('x')", None, r"cell 2 ended with 1(.|\n)*line 2(.|\n)*KeyError"),
        ("print('moo')", "buzz\n", "cell 2 printed\n\nmoo\n"),
        ("while True:\n    pass", None, "takes more than 0.3 s, and was in cell 2"),
    ],
)
def test_what_is_wrong_is_reported(code: str, output: str | None, message: str) -> None:
    """A tutorial that could be broken without a failing test."""
    with pytest.raises(pytest.fail.Exception, match=message):
        seconds = 0.3 if "while" in code else SECONDS
        run([Cell("print(1)", "…"), Cell(code, output)], seconds)


@pytest.mark.slow
def test_pages_are_notebooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells that a notebook would lack or have more of than the page, and a notebook that Jupyter
    can't run."""
    import jupytext
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebooks = {}
    for page in PAGES:
        notebooks[page.stem] = notebook = jupytext.read(page)
        cells = read_cells(page.read_text(encoding="utf-8"))
        code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
        assert code == [cell.code.strip("\n") for cell in cells], page.name
    resources = {"metadata": {"path": tmp_path}}
    client = NotebookClient(notebooks["memory"], kernel_name="python3", resources=resources)
    client.execute()
    ran = [cell for cell in client.nb.cells if cell.cell_type == "code"]
    cells = read_cells((ROOT / "docs/tutorials/memory.md").read_text(encoding="utf-8"))
    for number, (cell, expected) in enumerate(zip(ran, cells, strict=True), 1):
        printed = "".join(output.text for output in cell.outputs if output.name == "stdout")
        check_output(expected, number, printed)
