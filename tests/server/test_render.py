"""Markdown of anybody's text as HTML: what it may have in it, and how long it may take."""

import re
import time
from html import unescape
from html.parser import HTMLParser
from importlib.util import find_spec
from xml.etree.ElementTree import Element, SubElement

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

if not all(map(find_spec, ("markdown_it", "pygments", "latex2mathml"))):
    pytest.skip("the page's packages are not installed", allow_module_level=True)

from markdown_it.token import Token

from llama.server.page import formulas, render
from llama.server.page.render import LANGUAGES, render_markdown

# What the page's own style sheet and policy are made for.
TAGS = {
    *("p", "strong", "em", "s", "code", "pre", "span", "a", "br", "hr", "blockquote"),
    *("ul", "ol", "li", "h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td"),
    "div",
}
VALUES = {
    ("a", "href"): r"(https?://[^/]|mailto:[^/])[^\s\"<>]*",
    ("a", "title"): r"(?s).*",
    ("a", "rel"): "noopener noreferrer nofollow",
    ("a", "target"): "_blank",
    ("ol", "start"): r"\d+",
    ("th", "align"): "left|right|center",
    ("td", "align"): "left|right|center",
    ("code", "class"): r"language-[a-z0-9+#-]+",
    ("span", "class"): r"[a-z]{1,3}[0-9]?|wide",
    ("p", "class"): "plain",
    **{(tag, "dir"): "auto" for tag in ("p", "li", "h3", "h4", "h5", "h6", "th", "td")},
    ("div", "class"): "wide",
    ("div", "tabindex"): "0",
    ("span", "tabindex"): "0",
}


class Reader(HTMLParser):
    """Reads HTML as a browser does; any tag or attribute that isn't allowed is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS or tag in formulas.ELEMENTS, f"there is a <{tag}>"
        for name, value in attrs:
            allowed = VALUES.get((tag, name))
            if tag in formulas.ELEMENTS:
                allowed = formulas.ATTRIBUTES[name].pattern
            assert allowed is not None, f"<{tag}> has {name}"
            assert re.fullmatch(allowed, value or "", re.IGNORECASE), f"{name} is {value!r}"
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"there is a comment: {data!r}")

    handle_decl = handle_pi = unknown_decl = handle_comment


def read(markdown: str) -> str:
    """Return the text that a reader sees, of HTML that has nothing in it but what it may."""
    reader = Reader()
    reader.feed(render_markdown(markdown))
    reader.close()
    assert not reader.open, f"{reader.open} isn't closed"
    return reader.text


def test_what_people_write() -> None:
    """Answers are shown with the marks that they were written with."""
    html = render_markdown(
        "# Two\n\nIt is **strong**, *weak*, ~~wrong~~ and `code`:\n\n1. a\n2. b\n"
    )
    assert '<h3 dir="auto">Two</h3>' in html, "the page's own headings come first"
    for part in ("<strong>strong</strong>", "<em>weak</em>", "<s>wrong</s>", "<code>code</code>"):
        assert part in html
    assert '<ol>\n<li dir="auto">a</li>\n<li dir="auto">b</li>\n</ol>' in html
    table = render_markdown("|a|b|\n|:-|-:|\n|1|2|\n")
    for part in ('<th dir="auto" align="left">a</th>', '<td dir="auto" align="right">2</td>'):
        assert part in table
    assert "style" not in table, "the page's policy forbids styles"


def test_code_is_coloured() -> None:
    """Code in a known language has Pygments' classes, other code is shown as it is."""
    html = render_markdown("```python\ndef add(a):\n    return 'a<b'  # sum\n```\n")
    assert '<pre><code class="language-python"><span class="k">def</span> ' in html
    assert "a&lt;b" in html and '<span class="c1"># sum</span>' in html
    for info in ("", "unknown", "python<script>", '"><script>', "text"):
        assert "<pre><code>x &lt; y\n</code></pre>" in render_markdown(f"```{info}\nx < y\n```")
    assert "<pre><code>x &lt; y\n</code></pre>" in render_markdown("    x < y\n")


def test_what_is_wide_scrolls_alone() -> None:
    """A long line of code, a table or a formula makes the page wider than a phone, or is cut."""
    for text, shown in (
        ("```\nx\n```", '<div class="wide" tabindex="0"><pre><code>x\n</code></pre></div>\n'),
        ("|a|\n|-|\n", '<div class="wide" tabindex="0"><table>\n<thead>'),
        ("$$\nx\n$$", '<div class="wide" tabindex="0"><math display="block">'),
        (
            "It is $$x$$.",
            '<p dir="auto">It is <span class="wide" tabindex="0"><math display="block">',
        ),
    ):
        html = render_markdown(text)
        assert html.startswith(shown)
        assert read(text)
    assert "wide" not in render_markdown("`x` and $x$")


@pytest.mark.parametrize("language", sorted(LANGUAGES))
def test_code_keeps_its_text(language: str) -> None:
    """A failure means that code which is copied from an answer isn't the answer's."""
    code = "\n\n  x = \"a\" # 'b'\n\tif (x) { y <- z; } /* c */\r$é{1..2} @f <b>&amp;</b>\n\n"
    html = render_markdown(f"```{language}\n{code}```\n")
    assert "<span" in html or language in ("diff", "patch", "console", "pycon"), "has no colour"
    shown = unescape(re.sub(r"<[^>]*>", "", html))
    assert shown == code.replace("\r", "\n") + "\n", "is another text"


@pytest.mark.parametrize(
    "text",
    [
        "<b>bold</b> <script>alert(1)</script> <img src=x onerror=alert(1)>",
        "<!-- hidden --> <?php ?> <![CDATA[x]]> <!DOCTYPE html>",
        "![alt](https://example.com/picture.png)",
        '![alt](https://example.com/picture.png "title")',
        "[link](javascript:alert(1))",
        "[link](JaVaScRiPt:alert(1)) [link](vbscript:x) [link](data:text/html,x)",
        "[link](//example.com) [link](/v1/models) [link](#top) [link](https:///x) [link](ftp://x)",
        "<javascript:alert(1)>",
        "It costs $5 or $6, $ 7 $ or $8.",
        r"$\href{javascript:alert(1)}{x}$",
        r"$\href{https://example.com}{x}$",
        r"$\style{position:fixed}{x}$ and $\class{big}{x}$",
        r"\(\frac{a\)",
        r"$\def\a{\b\b}\def\b{\c\c}\a$",
        r"$\newcommand{\a}{x}\a$",
        r"$\hspace{-5000em}x$",
    ],
)
def test_shown_as_typed(text: str) -> None:
    """Markup that isn't safe stays text, every character of it."""
    assert "<a " not in render_markdown(text), "there is a link"
    assert read(text).strip() == text


def test_html_in_blocks_is_text() -> None:
    """Blocks of HTML, which Markdown passes through, are text too."""
    for text in ("<div>x</div>", "<script>\nalert(1)\n</script>", "<style>\na {}\n</style>"):
        assert read(text).strip() == text


def test_links() -> None:
    """Links open elsewhere, tell the other page nothing, and can't steer this one."""
    html = render_markdown(
        '[a](https://example.com/?x=1&y="z" "t\'<") <mailto:a@b.c> [r]\n\n[r]: http://x'
    )
    assert html.count("<a ") == 3
    assert html.count('rel="noopener noreferrer nofollow" target="_blank"') == 3
    assert 'href="https://example.com/?x=1&amp;y=%22z%22"' in html and 'href="http://x"' in html


@pytest.mark.parametrize(
    ("text", "shown", "is_block"),
    [
        ("$x^2$", "<msup><mi>x</mi><mn>2</mn></msup>", False),
        (r"\(x_1\)", "<msub><mi>x</mi><mn>1</mn></msub>", False),
        ("It is $$x$$.", "<mi>x</mi>", True),
        (r"It is \[x\].", "<mi>x</mi>", True),
        ("$$\na\n= b\n- c\n\nd\n$$", "<mo>=</mo><mi>b</mi><mo>−</mo><mi>c</mi><mi>d</mi>", True),
        ("Then\n\\[\n# a\n\\]\nfollows.", "<mi>a</mi>", True),
        ("> $$\n> x\n> $$\n", "<mi>x</mi>", True),
        ("- one\n\n  \\[\n  x\n  \\]\n- two\n", "<mi>x</mi>", True),
        (r"$\text{<script>alert(1)</script>}$", "&lt;script&gt;alert(1)&lt;/script&gt;", False),
        (r"$a < b \le c$", "<mi>a</mi><mo>&lt;</mo><mi>b</mi><mo>≤</mo><mi>c</mi>", False),
        (r"$\begin{aligned}a&=b\\c&=d\end{aligned}$", "<mtr><mtd", False),
        (r"$\begin{pmatrix}1&2\\3&4\end{pmatrix}$", "<mtd><mn>1</mn></mtd>", False),
        (r"$\begin{cases}1&x>0\\0&x\le0\end{cases}$", "<mtable", False),
        (r"$\sum_{i=1}^{n}\frac{1}{\sqrt[3]{i}}$", "<mroot>", False),
        (r"$\hat{\mathbf{x}} \in \mathbb{R}^{d}\quad\color{red}{y}$", "ℝ", False),
        (r"$P(A\mid B)=\binom{n}{k}\,\left(\tfrac12\right)^{n}$", "<mfrac", False),
        (r"$\overbrace{a+b}^{c}\underset{x}{\operatorname*{arg\,max}}\;f'(x)$", "f", False),
        (r"$\lim_{x\to\infty}\int_0^x\mathrm{d}t\,\log t\neq\overline{z}$", "lim", False),
    ],
)
def test_formulas(text: str, shown: str, is_block: bool) -> None:
    """LaTeX as models write it is MathML, on lines of its own where it is displayed."""
    html = render_markdown(text)
    assert shown in html
    assert f'<math display="{"block" if is_block else "inline"}">' in html
    read(text)


@pytest.mark.parametrize(
    ("tag", "attributes"), [("script", {}), ("mi", {"onclick": "x"}), ("mi", {"mathcolor": "a;b"})]
)
def test_what_a_library_may_make_one_day(
    monkeypatch: pytest.MonkeyPatch, tag: str, attributes: dict[str, str]
) -> None:
    """Only what is known is shown, whatever a later version makes of a formula."""

    def convert(latex: str, display: str) -> Element:
        math = Element("math", {"xmlns": "", "display": display})
        SubElement(math, tag, attributes).text = latex
        return math

    monkeypatch.setattr(formulas, "convert_to_element", convert)
    assert render_markdown("$x$") == '<p dir="auto">$x$</p>\n'


def test_dollars_and_code() -> None:
    """Code and money aren't formulas."""
    for text in (
        "`$x$`",
        "```\n$x$\n```",
        "    $x$",
        r"\$x\$",
        "US$5 and US$10",
        "$",
        "$$",
        "$$ $$",
    ):
        assert "<math" not in render_markdown(text), text
    assert render_markdown(r"It is \$5.") == '<p dir="auto">It is $5.</p>\n'


# Built of what the parsers react to.
_MARKS = r"""
< > </ <b <script> <!-- --> & &lt; &#60; " ' = \ [ ]( ) ![ [a] ]: <http: javascript:
https://a mailto: ``` ` * ** _ ~~ | $ $$ \( \) \[ \] { } ^
\text{ \href{ \style{ \class{ \color{ \frac \left( \right) \rule{ \raise
\begin{matrix} \end{matrix} \hspace{ \unicode{x3c} \verb| \mathbb{ \operatorname{ &#x3c;
\colorbox{ \tag{ \sqrt[ a b 0 1em 9999em style= é 😀
"""
_LINES = "\n |\n\n|\n- |\n> |\n1. |\n# |\n```|html\n|python\n| |    |\t|\r|\0|\u202e|\n\\[|:-"
PARTS = st.sampled_from([*_MARKS.split(), *_LINES.split("|"), "|", "\n|-|-|\n"])


@settings(max_examples=150, deadline=None)
@given(st.lists(PARTS | st.text(max_size=4), max_size=40).map("".join))
@example("<img src=x>\n\n$\\text{<img src=x>}$\n\n```html\n<img src=x>\n```\n")
def test_no_text_makes_other_html(text: str) -> None:
    """A failure is a way to put what one likes into the page of somebody else."""
    read(text)


@settings(max_examples=150, deadline=None)
@given(st.lists(PARTS | st.text(max_size=4), max_size=20).map("".join))
def test_no_formula_makes_other_html(latex: str) -> None:
    html = formulas.formula_html(latex, False)
    if html is not None:
        Reader().feed(html)


HUGE = {
    "brackets": "[" * 50_000,
    "pictures": "![" * 25_000,
    "links": "[a](" * 12_500,
    "stars": "*_" * 25_000,
    "backticks": " ".join("`" * n for n in range(300)),
    "quotations": "> " * 25_000,
    "lists": "".join("  " * n + "- a\n" for n in range(200)),
    "table": "|" + "a|" * 1000 + "\n|" + "-|" * 1000 + "\n" + "|a\n" * 20_000,
    "formulas": r"$\frac{a}{b}$ " * 3500,
    "braces": "$" + "{" * 990 + "}" * 990 + "$",
    "roots": "$" + r"\sqrt" * 390 + "$",
    "choices": "$" + r"\mathchoice{" * 100 + "$",
    "doubled": "$" + r"\sideset{}{}{" * 100 + "x" + "}" * 100 + "$",
    "expanded": "$" + "".join(map(r"\def\{0}{{\{1}\{1}}}".format, "abcdefgh", "bcdefghi")) + r"\a$",
    "dollars": "$$x\n" * 12_500,
    "code": "```python\n" + "x = '" * 3900 + "\n```",
    "lines": "```html\n" + "<a b='" * 160 + "\n```",
}


@pytest.mark.parametrize("name", HUGE)
def test_time_is_bounded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One text can't keep the server's processor; what takes too long is shown as it was typed."""
    monkeypatch.setattr(render, "MAX_SECONDS", 0.3)
    begin = time.thread_time()
    html = render_markdown(HUGE[name])
    assert time.thread_time() - begin < 3
    assert len(html) > 100


def test_lexers_take_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No line of code stops a lexer, which can't be interrupted within a line."""
    monkeypatch.setattr(render, "MAX_SECONDS", 0.05)
    lines = [
        (part * 1000)[:1000] for part in ("(", '"', "'\\", "/*", "<a ", "a.", "@{", "#", "$(", "0")
    ]
    for language in sorted(LANGUAGES):
        begin = time.thread_time()
        render_markdown(f"```{language}\n" + "\n".join(lines) + "\n```")
        assert time.thread_time() - begin < 2, language


def test_an_error_of_a_library_hides_no_text(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The text is shown as it was typed, and the log has the error without the text."""

    def fail(tokens: list[Token]) -> None:
        raise IndexError(tokens[1].content)

    monkeypatch.setattr(render, "_adapt", fail)
    shown = '<p class="plain" dir="auto">*secret* &lt;b&gt;</p>\n'
    assert render_markdown("*secret* <b>") == shown
    assert "IndexError" in caplog.text and "secret" not in caplog.text
