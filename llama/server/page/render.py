"""Markdown as HTML that is safe to show: text that may come from anybody.

HTML and images stay text, links lead to web pages and addresses alone, and nothing is fetched.
"""

import re
import time
from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline, image
from markdown_it.token import Token
from pygments.lexers import get_lexer_by_name
from pygments.token import STANDARD_TYPES, Text
from pygments.util import ClassNotFound

from llama.server.errors import log_failure
from llama.server.page.formulas import MAX_LENGTH, formula_html

MAX_SECONDS = 2.0  # for a text
PAUSE = 0.001  # seconds after each so many of work, in which the engine gets on
MAX_CODE = 20_000  # characters of a block of code that is coloured
MAX_LINE = 1000  # characters of a line in one
# Languages whose lexers take no more than a moment to begin, and for a line, whatever it has.
_NAMES = """
asm bash c c# c++ cmake console cpp cs csharp css dart diff docker dockerfile elixir erlang
fortran go golang graphql groovy haskell hs html ini java javascript js json kotlin
latex lua make makefile matlab nasm nix objective-c ocaml patch perl php powershell proto
protobuf ps1 py pycon python python3 r rb rs ruby rust scss sh shell sql swift tex
toml ts typescript vim xml yaml yml zig
"""
LANGUAGES = frozenset(_NAMES.split())
_CLASSES = {**STANDARD_TYPES, Text.Whitespace: ""}
_TEXTS = {f"{name}_open" for name in ("paragraph", "heading", "list_item", "th", "td")}
_LINK = re.compile(r"https?://[^/]|mailto:[^/]", re.IGNORECASE)
_ALIGNMENT = re.compile(r"text-align:(left|right|center)")
# How a formula begins and ends, and whether it stands in a line of its own.
_MARKS = (("$$", "$$", True), ("\\[", "\\]", True), ("\\(", "\\)", False), ("$", "$", False))


def render_markdown(text: str) -> str:
    """Return Markdown as HTML; a text that would take too long is shown as it was typed."""
    env = {"clock": _Clock()}
    try:
        tokens = _MARKDOWN.parse(text, env)
        _adapt(tokens)
        return str(_MARKDOWN.renderer.render(tokens, _MARKDOWN.options, env))
    except TimeoutError:
        pass
    except Exception as error:  # a defect of one of the libraries must not hide the text
        log_failure(error)
    return _as_typed(text)


class _Clock:
    """The time that a text may take; threads that wait for Python's lock don't wait for long."""

    def __init__(self) -> None:
        now = time.monotonic()
        self._deadline, self._next_pause = now + MAX_SECONDS, now + PAUSE

    def check(self) -> None:
        """Raise ``TimeoutError`` after the deadline; pause now and then."""
        now = time.monotonic()
        if now > self._deadline:
            raise TimeoutError
        if now > self._next_pause:
            time.sleep(PAUSE)
            self._next_pause = time.monotonic() + PAUSE


def _as_typed(text: str) -> str:
    return f'<p class="plain" dir="auto">{escape(text)}</p>\n'


def _wide(html: str, tag: str = "div") -> str:
    """Return HTML in an element that scrolls, by the keyboard too, where there is no room."""
    return f'<{tag} class="wide" tabindex="0">{html}</{tag}>'


def _adapt(tokens: Sequence[Token]) -> None:
    """Fit tokens into the page.

    Its own headings come first, it takes no inline styles, and texts run in their own direction.
    """
    for token in tokens:
        if token.type in _TEXTS:
            token.attrSet("dir", "auto")
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(int(token.tag[1]) + 2, 6)}"
        elif token.type in ("th_open", "td_open") and "style" in token.attrs:
            found = _ALIGNMENT.fullmatch(str(token.attrs.pop("style")))
            if found is not None:
                token.attrSet("align", found[1])
        for child in token.children or ():
            if child.type == "link_open":
                child.attrSet("rel", "noopener noreferrer nofollow")
                child.attrSet("target", "_blank")


# Rules of the parser.


def _in_time(state: StateInline | StateBlock, *_: Any) -> bool:
    """Raise ``TimeoutError`` after the deadline; match nothing."""
    state.env["clock"].check()
    return False


def _image(state: StateInline, silent: bool) -> bool:
    """Leave an image as it was typed."""
    start = state.pos
    if not image(state, True):
        return False
    if not silent:
        state.pending += state.src[start : state.pos]
    return True


def _formula(state: StateInline, silent: bool) -> bool:
    """Read a formula within a paragraph."""
    start, src = state.pos, state.src
    mark = next((mark for mark in _MARKS if src.startswith(mark[0], start)), None)
    if mark is None:
        return False
    first = start + len(mark[0])
    last = _end(src, first, min(state.posMax, first + MAX_LENGTH), mark[1])
    if last < 0:
        return False
    state.pos = last + len(mark[1])
    if not silent:
        html = formula_html(src[first:last], mark[2])
        if html is None:
            state.pending += src[start : state.pos]
        else:
            shown = _wide(html, "span") if mark[2] else html
            state.push("html_inline", "", 0).content = shown
    return True


def _end(src: str, first: int, limit: int, mark: str) -> int:
    """Return where a formula ends; -1 if it doesn't.

    A dollar is one of money unless its formula has no space at its edges, and no digit behind it.
    """
    last = src.find(mark, first, limit)
    if mark != "$":
        return last if src[first:last].strip() else -1
    if src[first : first + 1].isspace():
        return -1
    while last >= 0:
        is_escaped = src[last - 1] == "\\"
        if last > first and not is_escaped:
            is_money = src[last - 1].isspace() or src[last + 1 : last + 2].isdigit()
            return -1 if is_money else last
        last = src.find(mark, last + 1, limit)
    return -1


def _formula_block(state: StateBlock, first: int, end: int, silent: bool) -> bool:
    """Read a formula in lines of its own, in which nothing else is Markdown."""
    lines: list[str] = []
    mark = None
    for number in range(first, end):
        if state.sCount[number] < state.blkIndent and not state.isEmpty(number):
            return False  # the list that it is in has ended
        begin = state.bMarks[number] + state.tShift[number]
        line = state.src[begin : state.eMarks[number]].rstrip()
        mark = mark or next((m for m in _MARKS if m[2] and line.startswith(m[0])), None)
        lines.append(line)
        if mark is None or sum(map(len, lines)) > MAX_LENGTH:
            return False
        if line.endswith(mark[1]) and (len(lines) > 1 or len(line) > 4):
            break
    else:
        return False
    source = "\n".join(lines)
    latex = source[2:-2]
    if mark[1] in latex or not latex.strip():
        return False
    if not silent:
        html = formula_html(latex, True)
        token = state.push("html_block", "", 0)
        token.content = _as_typed(source) if html is None else f"{_wide(html)}\n"
        token.map = [first, number + 1]
        state.line = number + 1
    return True


# Rules of the renderer.


def _code(
    renderer: Any, tokens: Sequence[Token], index: int, options: Any, env: dict[str, Any]
) -> str:
    token = tokens[index]
    language = token.info.split(maxsplit=1)[0].lower() if token.info.strip() else ""
    if language not in LANGUAGES:
        return _wide(f"<pre><code>{escape(token.content)}</code></pre>") + "\n"
    code = "".join(_coloured(token.content, language, env["clock"]))
    return _wide(f'<pre><code class="language-{language}">{code}</code></pre>') + "\n"


def _table_open(*_: Any) -> str:
    return '<div class="wide" tabindex="0"><table>\n'


def _table_close(*_: Any) -> str:
    return "</table></div>\n"


def _coloured(code: str, language: str, clock: _Clock) -> Iterator[str]:
    """Yield code as HTML, in spans with Pygments' classes; as far as there is time for it."""
    n_done = 0
    if len(code) <= MAX_CODE and all(len(line) <= MAX_LINE for line in code.splitlines()):
        for kind, pieces in groupby(_lexed(code, language), key=lambda found: found[0]):
            text = "".join(piece for _, piece in pieces)
            n_done += len(text)
            yield f'<span class="{kind}">{escape(text)}</span>' if kind else escape(text)
            try:
                clock.check()
            except TimeoutError:
                break
    yield escape(code[n_done:])


def _lexed(code: str, language: str) -> Iterator[tuple[str, str]]:
    """Yield the tokens of code with their classes."""
    try:
        lexer = get_lexer_by_name(language)
    except ClassNotFound:  # in this version
        return
    for _, kind, text in lexer.get_tokens_unprocessed(code):
        while kind not in _CLASSES:
            kind = kind.parent
        yield _CLASSES[kind], text


def _make_parser() -> MarkdownIt:
    found = MarkdownIt("commonmark", {"html": False, "maxNesting": 30})
    found.enable(["table", "strikethrough"])
    found.validateLink = lambda url: _LINK.match(url) is not None  # type: ignore[method-assign]
    found.inline.ruler.at("image", _image)
    found.inline.ruler.before("escape", "formula", _formula)
    found.inline.ruler.before("text", "in_time", _in_time)
    chains: Any = {"alt": ["paragraph", "reference", "blockquote", "list"]}
    found.block.ruler.before("fence", "formula", _formula_block, chains)
    found.block.ruler.before("table", "in_time", _in_time, chains)
    found.add_render_rule("fence", _code)
    found.add_render_rule("code_block", _code)
    found.add_render_rule("table_open", _table_open)
    found.add_render_rule("table_close", _table_close)
    return found


_MARKDOWN = _make_parser()
