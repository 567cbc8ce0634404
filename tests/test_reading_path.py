"""The size of what a stranger reads: the files that docs/architecture.md lists, and the examples of
CONTRIBUTING.md."""

import ast
import io
import tokenize
from pathlib import Path

import llama

PACKAGE = Path(llama.__file__).parent
MODULES = ["generation", "model", "args", "tokenizer", "sampling", "parallel"]
SKIPPED = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE),
    *(tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER),
}


def code_lines(source: str) -> int:
    """The number of lines without blank ones, comments and docstrings."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        has_docstring = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        if isinstance(node, has_docstring) and ast.get_docstring(node) is not None:
            docstrings.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SKIPPED:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def test_what_is_counted() -> None:
    """A failure means that the limit is one of something else."""
    before = '"""Doc.\n\nMore."""\n\nx = 1  # why\n\n\n'
    function = 'def f():\n    """Doc."""\n    # a\n    return """a\nb"""\n'
    assert code_lines(before + function) == 4


def test_the_reading_path_stays_short() -> None:
    """A failure means that what an answer passes through takes more than one sitting to read."""
    files = [PACKAGE / f"{name}.py" for name in MODULES]
    files += [path for room in ("layers", "engine") for path in (PACKAGE / room).glob("*.py")]
    counts = {str(path.relative_to(PACKAGE)): code_lines(path.read_text()) for path in files}
    assert 2000 < sum(counts.values()) < 2750, counts


def test_examples_of_adding_take_fifty_lines() -> None:
    """A failure means that a checkpoint format, a kernel, a chat format or a sampler takes more to
    add than CONTRIBUTING.md promises, or that an example isn't named there."""
    root = Path(__file__).resolve().parent.parent
    examples = sorted((root / "tests" / "adding").glob("test_*.py"))
    contributing = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert len(examples) == 4
    for path in examples:
        assert code_lines(path.read_text(encoding="utf-8")) <= 50, path.name
        assert f"](tests/adding/{path.name})" in contributing, path.name
