"""Tokens of the same sentences in English, Korean, Chinese and Japanese.

    python benchmarks/tokenization.py llama-2-7b-chat/tokenizer.model

reads the sentences of sentences.txt, everyday and technical ones. Each is encoded on its own,
without a begin of a sequence. Byte tokens hold a part of a character: of one that the vocabulary
lacks.
"""

from pathlib import Path
from typing import NamedTuple

from llama import cli
from llama.tokenizer import BaseTokenizer
from llama.tokenizers import load_tokenizer

LANGUAGES = ("English", "Korean", "Chinese", "Japanese")
SENTENCES = Path(__file__).parent / "sentences.txt"
HEAD = (
    "| language | characters a sentence | tokens a sentence | tokens a character "
    "| times English | byte tokens |\n|---|---|---|---|---|---|\n"
)


class Cost(NamedTuple):
    """Averages over the sentences of a language."""

    characters: float
    tokens: float
    byte_tokens: float


def sentences() -> dict[str, list[str]]:
    """Return the sentences by language; those at one index say the same."""
    groups = SENTENCES.read_text(encoding="utf-8").strip().split("\n\n")
    columns = zip(*(group.split("\n") for group in groups), strict=True)
    return {name: [*texts] for name, texts in zip(LANGUAGES, columns, strict=True)}


def cost(tokenizer: BaseTokenizer, texts: list[str]) -> Cost:
    ids = [i for text in texts for i in tokenizer.encode(text, bos=False, eos=False)]
    n_byte_tokens = sum("\ufffd" in tokenizer.decode([i]) for i in ids)
    return Cost(*(n / len(texts) for n in (sum(map(len, texts)), len(ids), n_byte_tokens)))


def table(tokenizer: BaseTokenizer) -> str:
    """Return a table with a row for each language."""
    costs = {name: cost(tokenizer, texts) for name, texts in sentences().items()}
    return HEAD + "\n".join(
        f"| {name} | {found.characters:.1f} | {found.tokens:.1f} "
        f"| {found.tokens / found.characters:.2f} "
        f"| {found.tokens / costs['English'].tokens:.2f} "
        f"| {100 * found.byte_tokens / found.tokens:.0f} % |"
        for name, found in costs.items()
    )


def main(path: str) -> None:
    """Print a tokenizer's table.

    Args:
        path: of a tokenizer.model or tokenizer.json.
    """
    file = Path(path)
    name = "tokenizer.json" if file.suffix == ".json" else "tokenizer.model"
    tokenizer = load_tokenizer({name: file}, where=file)
    print(f"{path}, {tokenizer.n_words:,} pieces\n\n{table(tokenizer)}")


if __name__ == "__main__":
    cli.run(main)
