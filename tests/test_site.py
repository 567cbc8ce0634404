"""The documentation's site has every page, in its place, and loads nothing from other hosts."""

import ast
import importlib
import importlib.util
import os
import posixpath
import re
import shutil
import subprocess
import sys
from collections import Counter
from html import unescape
from pathlib import Path

import pytest

import llama

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
START_PAGES = {"index.md": "English", "ko.md": "한국어", "zh.md": "简体中文", "ja.md": "日本語"}
FENCED = r"^```.*?^```$"


def test_navigation_names_every_page_once() -> None:
    """A page that readers of the site never find, or that stands in two places."""
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = re.findall(r"^ +- .*: (\S+\.md)$", config.partition("\nnav:\n")[2], re.M)
    assert sorted(named) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_reference_has_every_public_name() -> None:
    """A public name that was left out of the reference, or one there that no longer exists."""
    text = (DOCS / "reference.md").read_text(encoding="utf-8")
    names = re.findall(r"^::: ([\w.]+)$", text, re.M)
    assert {f"llama.{name}" for name in llama.__all__} <= set(names)
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def test_diagrams_are_what_the_script_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """A diagram that was edited by hand, that the script wasn't run for, or that no page shows."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    diagrams = importlib.import_module("diagrams").DIAGRAMS
    text = "".join(path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md"))
    for name, draw in diagrams.items():
        assert draw().svg() == (DOCS / "images" / name).read_text(encoding="utf-8"), name
        assert re.search(rf"\]\((\.\./)?images/{name}\)", text), name


def test_troubleshooting_quotes_messages_that_exist() -> None:
    """A message that was reworded, so that nobody who meets it finds it there."""
    texts = [(ROOT / "download.sh").read_text(encoding="utf-8")]
    for path in ROOT.glob("llama/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall("^> `(.*)`$", text, re.M)
    assert len(messages) > 25
    for message in messages:
        for words in filter(None, map(str.strip, message.split("…"))):
            assert any(words in each for each in texts), words


def test_what_is_written_twice_agrees() -> None:
    """A version or a requirement that was changed in setup.py alone."""
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    [version] = re.findall('version="(.*)"', setup)
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    [docs] = re.findall(r"^DOCS = \[(.*)\]$", setup, re.M)
    [installed] = re.findall(
        "pip install (.*)", (ROOT / ".github/workflows/docs.yml").read_text(encoding="utf-8")
    )
    assert installed.replace("'", "").split() == docs.replace('"', "").split(", ")


def sections(text: str) -> list[tuple[str, list[str]]]:
    """A page's headings, each with what its section has in any language: the heading's level,
    blocks of code, rows of tables, code in the text, links and numbers."""
    pieces = re.split(rf"({FENCED})|^(#+) ", text, flags=re.M | re.S)
    found: list[tuple[str, list[str]]] = []
    for block, level, prose in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        if level:
            found.append((prose.partition("\n")[0], [level]))
        parts = found[-1][1]
        parts += [block] if block else []
        parts += [f"a row of {row.count('|') - 1}" for row in re.findall(r"^\|.*", prose, re.M)]
        parts += [" ".join(code.split()) for code in re.findall("`[^`]+`", prose)]
        parts += re.findall(r"\]\([^)]+\)|https?:[^\s）)]+", prose)
        parts += re.findall(r"\d(?:[\d.,]*\d)?", prose)
    return found


@pytest.mark.parametrize("name", START_PAGES)
def test_start_pages_link_to_each_other(name: str) -> None:
    """A language that readers of another don't find."""
    links = [label if page == name else f"[{label}]({page})" for page, label in START_PAGES.items()]
    assert f"\n\n{' · '.join(links)}\n\n" in (DOCS / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", list(START_PAGES)[1:])
def test_start_pages_say_the_same(name: str) -> None:
    """A command, heading, link or figure of the English page that a translation doesn't have, or
    one that only the translation still has."""
    english, text = (
        re.sub("^.* · .*$", "", (DOCS / page).read_text(encoding="utf-8"), flags=re.M)
        for page in ("index.md", name)
    )
    expected, found = sections(english), sections(text)
    assert len(found) == len(expected), f"{name} has {len(found)} headings, not {len(expected)}"
    problems = []
    for (heading, ours), (_, theirs) in zip(expected, found, strict=True):
        missing = (Counter(ours) - Counter(theirs)).elements()
        more = (Counter(theirs) - Counter(ours)).elements()
        problems += [f"{name}, {heading}: lacks {part}" for part in missing]
        # A number may be a word in English.
        problems += [f"{name}, {heading}: has {part}" for part in more if not part[0].isdigit()]
    assert not problems, "\n".join(problems)
    assert re.findall(FENCED, text, re.M | re.S) == re.findall(FENCED, english, re.M | re.S)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The HTML of a strict build, by paths of files."""
    if importlib.util.find_spec("zensical") is None:
        pytest.skip("zensical is not installed: pip install -e '.[docs]'")
    root = tmp_path_factory.mktemp("site")
    for path in (ROOT / "mkdocs.yml", *ROOT.glob("*.md")):
        shutil.copy(path, root)
    shutil.copytree(DOCS, root / "docs")
    (root / "llama").symlink_to(ROOT / "llama")
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"],
        cwd=root,
        env={**os.environ, "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {
        path.relative_to(root / "site").as_posix(): path.read_text(encoding="utf-8")
        for path in (root / "site").rglob("*.html")
    }


@pytest.mark.slow
def test_site_loads_nothing_from_other_hosts(pages: dict[str, str]) -> None:
    """A font, script, style or picture that would tell another host who reads the site."""
    assert len(pages) > 10
    for name, html in pages.items():
        loaded = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?([^\"'\s>]+)", html)
        loaded += re.findall(r"<link\b[^>]*\bhref=[\"']?([^\"'\s>]+)", html)
        assert loaded, name
        assert not [url for url in loaded if re.match("(https?:)?//", url)], name


@pytest.mark.slow
def test_links_of_the_site_lead_somewhere(pages: dict[str, str]) -> None:
    """A link to a page or heading that the site doesn't have, in what a strict build doesn't see:
    included files and docstrings."""
    anchors = {name: set(re.findall(r'\bid="([^"]+)"', html)) for name, html in pages.items()}
    n_links = 0
    for name, html in pages.items():
        article = html.partition("<article")[2].partition("</article>")[0]
        for url in re.findall(r'<a\b[^>]*\bhref="([^"]+)"', article):
            if re.match("[a-z]+:", url):
                continue
            page, _, anchor = unescape(url).partition("#")
            page = posixpath.join(posixpath.dirname(name), page) if page else name
            page = posixpath.normpath(page)
            assert page in pages, f"{name}: {url}"
            assert not anchor or anchor in anchors[page], f"{name}: {url}"
            n_links += 1
    assert n_links > 50
