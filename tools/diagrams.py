"""Draw the diagrams of docs/ as SVG.

    python tools/diagrams.py

They are the same on every machine, and a test compares them with the files.
"""

from collections.abc import Iterable
from html import escape
from pathlib import Path

import torch

from llama import Llama, cli
from llama.model import apply_rotary_emb

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"

INK, QUIET, PAPER = "#22262b", "#6b7280", "#ffffff"
BLUE, GREEN, ORANGE, GREY = "#cfe0fb", "#cdebd3", "#fbd9b5", "#eef0f3"
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:" + INK + "}"
    ".code{font-family:ui-monospace,monospace}"
    ".quiet{fill:" + QUIET + "}"
    ".head{font-weight:600}"
)


class Drawing:
    """An SVG file, shape after shape."""

    def __init__(self, width: int, height: int, title: str):
        self.width, self.height, self.title = width, height, title
        self.shapes: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, fill: str = GREY) -> None:
        self.shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" '
            f'fill="{fill}" stroke="{QUIET}"/>'
        )

    def text(
        self, x: float, y: float, words: str, anchor: str = "middle", kind: str = "plain"
    ) -> None:
        place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}"'
        self.shapes.append(f'<text {place} class="{kind}">{escape(words)}</text>')

    def upright(self, x: float, y: float, words: str) -> None:
        """Code that is read from the bottom to the top, and ends at a place."""
        place = f'text-anchor="end" transform="translate({x:g} {y:g}) rotate(-90)"'
        self.shapes.append(f'<text {place} class="code">{escape(words)}</text>')

    def shade(self, x: float, y: float, side: float, share: float) -> None:
        """A square that is the darker, the larger its share of 1, in tenths."""
        self.shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{side:g}" height="{side:g}" fill="#2563eb" '
            f'fill-opacity="{share:.1f}" stroke="{GREY}"/>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, arrow: bool = False) -> None:
        end = ' marker-end="url(#arrow)"' * arrow
        self.shapes.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{QUIET}"{end}/>'
        )

    def cells(
        self, x: float, y: float, labels: Iterable[str], fills: Iterable[str], width: float = 32
    ) -> None:
        """A row of boxes with a label in each."""
        for i, (label, fill) in enumerate(zip(labels, fills, strict=True)):
            self.box(x + i * width, y, width, 28, fill)
            self.text(x + (i + 0.5) * width, y + 18.5, label, kind="code")

    def svg(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.height}" '
            f'viewBox="0 0 {self.width} {self.height}" role="img">'
        )
        arrow = (
            '<marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z" fill="{QUIET}"/></marker>'
        )
        paper = f'<rect width="{self.width}" height="{self.height}" rx="6" fill="{PAPER}"/>'
        lines = [head, f"<title>{escape(self.title)}</title>", f"<style>{STYLE}</style>"]
        return "\n".join([*lines, f"<defs>{arrow}</defs>", paper, *self.shapes, "</svg>", ""])


def ragged_batch() -> Drawing:
    """The example of RaggedBatch's docstring: four tokens of two sequences, and what they read."""
    d = Drawing(660, 330, "A ragged batch and the slots of the cache that its tokens read")
    d.text(20, 30, "new tokens of one pass", "start", "head")
    d.cells(230, 12, "abcx", [BLUE, BLUE, BLUE, ORANGE])
    for y, name, values in ((48, "slots", "0003"), (76, "positions", "0127")):
        d.text(220, y + 18.5, name, "end", "quiet")
        d.cells(230, y, values, [PAPER] * 4)
    d.text(20, 142, "the cache of one layer", "start", "head")
    held = {0: "abc", 1: "", 2: "pqrst", 3: "stuvwyzx"}
    for slot, tokens in held.items():
        y = 154 + 34 * slot
        d.text(220, y + 18.5, f"slot {slot}", "end", "quiet")
        fills = {0: [BLUE] * 3, 2: [GREY] * 5, 3: [GREEN] * 7 + [ORANGE]}.get(slot, [])
        d.cells(230, y, tokens.ljust(10), [*fills, *[PAPER] * (10 - len(tokens))])
    d.text(640, 172.5, "read by a b c", "end")
    d.text(640, 206.5, "free", "end", "quiet")
    d.text(640, 274.5, "read by x", "end")
    d.text(230, 312, "positions 0, 1, 2 … up to max_seq_len", "start", "quiet")
    return d


def grouped_queries() -> Drawing:
    """Eight query heads and four key/value heads, as the embedded model has them."""
    d = Drawing(660, 210, "Grouped-query attention: two query heads read one key/value head")
    d.text(20, 40, "8 query heads", "start", "head")
    d.text(20, 132, "4 key/value heads", "start", "head")
    d.text(20, 186, "each, for every position:", "start", "quiet")
    for i in range(8):
        x = 190 + 56 * i
        d.box(x, 20, 44, 30, BLUE)
        d.text(x + 22, 39.5, f"q{i}", kind="code")
        d.line(x + 22, 50, 218 + 112 * (i // 2) + 22, 110, arrow=True)
    for i in range(4):
        x = 218 + 112 * i
        d.box(x, 112, 44, 30, GREEN)
        d.text(x + 22, 131.5, f"kv{i}", kind="code")
        d.cells(x - 10, 166, ("key", "value"), (GREEN, GREEN), 44)
    return d


def prefix_reuse() -> Drawing:
    """One slot of the cache over the turns of a chat."""
    d = Drawing(660, 250, "A slot of the cache over two turns of a chat")
    question, answer, next_question = ["how", "are", "you"], ["fine", "!"], ["and", "he"]
    rows = [
        ("prompt is read", [(question, BLUE)], "one pass, 3 tokens"),
        ("answer is decoded", [(question, GREEN), (answer, ORANGE)], "a pass for each token"),
        (
            "next turn",
            [([*question, *answer], GREEN), (next_question, BLUE)],
            "one pass, 2 tokens",
        ),
        ("another prompt", [(question, GREEN), (["old"], BLUE)], "one pass, 1 token"),
    ]
    for i, (name, parts, cost) in enumerate(rows):
        y = 20 + 50 * i
        d.text(20, y + 18.5, name, "start", "head")
        x = 170
        for labels, fill in parts:
            d.cells(x, y, labels, [fill] * len(labels), 44)
            x += 44 * len(labels)
        d.text(640, y + 18.5, cost, "end", "quiet")
    for x, fill, words in (
        (170, GREEN, "in the cache"),
        (290, BLUE, "read"),
        (370, ORANGE, "drawn"),
    ):
        d.box(x, 222, 14, 14, fill)
        d.text(x + 20, 234, words, "start", "quiet")
    return d


def draws() -> Drawing:
    """Inverse transform sampling with one number."""
    d = Drawing(660, 170, "A token is drawn by one number from the probabilities that are kept")
    left, width = 20, 620
    probabilities = (("moo", 0.5, GREEN), ("woof", 0.25, BLUE), ("buzz", 0.15, ORANGE))
    kept = sum(p for _, p, _ in probabilities)
    d.text(
        left, 26, "the tokens that top-k, top-p and min-p keep, one behind another", "start", "head"
    )
    x = float(left)
    for word, p, fill in probabilities:
        share = width * p / kept
        d.box(x, 40, share, 36, fill)
        d.text(x + share / 2, 62.5, f"{word}  {p}", kind="code")
        x += share
    target = left + width * 0.7
    d.line(target, 122, target, 80, arrow=True)
    d.text(target, 140, "0.7 of the whole: woof", kind="plain")
    d.text(left, 106, "a number in [0, 1), made of", "start", "quiet")
    d.text(left, 124, "the seed, the sequence's number", "start", "quiet")
    d.text(left, 142, "and the token's position", "start", "quiet")
    return d


def number_formats() -> Drawing:
    """The bits of the formats that weights and activations have."""
    d = Drawing(660, 290, "Bits of the number formats")
    formats = [
        ("float32", 1, 8, 23),
        ("bfloat16", 1, 8, 7),
        ("float16", 1, 5, 10),
        ("float8 e4m3", 1, 4, 3),
    ]
    cell = 15
    for i, (name, *parts) in enumerate(formats):
        y = 18 + 42 * i
        d.text(20, y + 18.5, name, "start", "code")
        x = 150
        for bits, fill in zip(parts, (ORANGE, BLUE, GREEN), strict=True):
            d.box(x, y, cell * bits, 28, fill)
            if bits > 1:
                d.text(x + cell * bits / 2, y + 18.5, str(bits))
            x += cell * bits
    for i, (name, bits, words) in enumerate(
        [
            ("int8", 8, "a code of 8 bits, and one scale for a row"),
            ("int4", 4, "a code of 4 bits, and a scale and zero for a group"),
        ]
    ):
        y = 186 + 36 * i
        d.text(20, y + 18.5, name, "start", "code")
        d.box(150, y, cell * bits, 28, GREEN)
        d.text(290, y + 18.5, words, "start", "quiet")
    for x, fill, words in ((150, ORANGE, "sign"), (220, BLUE, "exponent: the range"),
                           (380, GREEN, "the digits")):  # fmt: skip
        d.box(x, 264, 14, 14, fill)
        d.text(x + 20, 276, words, "start", "quiet")
    return d


@torch.inference_mode()
def inside() -> Drawing:
    """The cells of docs/tutorials/inside.md: a head's pattern, and the answer block by block."""
    llama = Llama.build(dtype=torch.float32, device="cpu")
    model, tokenizer = llama.model, llama.tokenizer
    dialog = [{"role": "user", "content": "What does the cow say?"}]
    begun = tokenizer.encode("The cow says", bos=False, eos=False)
    ids = llama.chat.prompt(tokenizer, dialog) + begun
    hidden = [model.tok_embeddings(torch.tensor(ids))]
    for block in model.layers:
        block.register_forward_hook(lambda block, args, out: hidden.append(out[: len(ids)]))
    answer = int(model(torch.tensor([ids]), 0)[0, -1].argmax())
    attention, head = model.layers[0].attention, 1
    x = model.layers[0].attention_norm(hidden[0])
    q = (x @ attention.wq.plain_weight().T).unflatten(1, (-1, attention.head_dim))
    q = apply_rotary_emb(q, model.freqs_cis[: len(ids)])[:, head]
    k = attention.cache.read(slice(0, 1), len(ids))[0][0, head // 2]
    later = torch.ones(len(ids), len(ids)).triu(1).bool()
    scores = q @ k.T / attention.head_dim**0.5
    pattern = scores.masked_fill(later, -torch.inf).softmax(-1)

    d = Drawing(660, 400, "Head 1 of the first block, and the answer's probability by block")
    d.text(20, 28, "head 1 of the first block: who looks where", "start", "head")
    side, left, top = 17, 76, 44
    for i, row in enumerate(pattern.tolist()):
        piece = tokenizer.token_piece(ids[i])
        d.text(left - 8, top + side * i + 13, piece, "end", "code")
        d.upright(left + side * i + 13, top + side * len(ids) + 8, piece)
        for j in range(i + 1):
            d.shade(left + side * j, top + side * i, side, row[j])
    d.text(390, 28, "probability of the answer", "start", "head")
    for n, h in enumerate(hidden):
        p = float(model.output_logits(h[-1:])[0].softmax(0)[answer])
        y = 54 + 40 * n
        d.text(470, y + 18.5, f"after block {n}" if n else "embedding", "end", "quiet")
        width = round(130 * p)  # whole, since machines round the last digits differently
        d.box(480, y, width, 28, BLUE)
        d.text(486 + width, y + 18.5, f"{p:.2f}", "start", "code")
    return d


DIAGRAMS = {
    "attention-batch.svg": ragged_batch,
    "attention-heads.svg": grouped_queries,
    "attention-reuse.svg": prefix_reuse,
    "exactness-draws.svg": draws,
    "inside.svg": inside,
    "numbers-formats.svg": number_formats,
}


def main(folder: str = str(IMAGES)) -> None:
    """Draw the documentation's diagrams.

    Args:
        folder: where they are written.
    """
    for name, draw in DIAGRAMS.items():
        (Path(folder) / name).write_text(draw().svg(), encoding="utf-8")
        print(Path(folder) / name)


if __name__ == "__main__":
    cli.run(main)
