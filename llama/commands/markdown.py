"""An answer as Markdown in the terminal, by rich: each block once it is whole."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from markdown_it import MarkdownIt
from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.text import Text

_FENCE = re.compile(r" *(`{3,}|~{3,})")
_ITEM = re.compile(r"([-*+]|\d{1,9}[.)])\s")
# rich's own parser takes text in angle brackets for HTML, and drops it.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
_PARSER.disable("image")


@contextmanager
def markdown_writer(console: Console) -> Iterator[Callable[[str], None]]:
    """Yield a function that takes the next piece of an answer and shows what there is.

    Finished blocks are Markdown. The block that is being written is plain text, of which the last
    lines are shown that fit on the screen.
    """
    block, n_blocks = "", 0

    def show(text: str) -> None:
        nonlocal n_blocks
        if n_blocks:
            console.print()
        n_blocks += 1
        markdown = Markdown(text, justify="default", hyperlinks=False)
        markdown.parsed = _PARSER.parse(text)
        console.print(markdown)

    def write(piece: str) -> None:
        nonlocal block
        block += piece
        while end := block_end(block):
            show(block[:end])
            block = block[end:]
        lines = Text(block).wrap(console, console.width)
        live.update(Text("\n").join(lines[-max(1, console.height - 2) :]))

    with Live(console=console, transient=True) as live:
        yield write
    if block.strip():
        show(block)


def block_end(text: str) -> int:
    """Return the length of a text's first block, and 0 if it may go on.

    A block ends before the first line behind an empty one that is neither part of its code nor of
    its list.
    """
    position, fence, is_after_empty = 0, "", False
    is_list = _ITEM.match(text.lstrip()) is not None
    for line in text.splitlines(keepends=True):
        mark = _FENCE.match(line)
        is_empty = not line.strip()
        if fence:
            if mark and line.strip().startswith(fence):
                fence = ""
        else:
            # An item's number may not be whole yet.
            is_item = is_list and (_ITEM.match(line) is not None or not line.endswith("\n"))
            goes_on = is_empty or line[0].isspace() or is_item
            if is_after_empty and not goes_on and text[:position].strip():
                return position
            fence = mark[1] if mark else ""
        is_after_empty = is_empty and not fence
        position += len(line)
    return 0
