"""The documentation's figures of tokens in Korean, Chinese and Japanese are those measured."""

import sys
from pathlib import Path

from tiktoken_files import published

from llama import Tokenizer
from llama.engine.detokenizer import Detokenizer
from llama.tokenizers.tiktoken import TiktokenTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import tokenization

START = Path(__file__).resolve().parent.parent / "docs/index.md"


def test_the_start_page_has_the_table_that_is_printed(llama2_tokenizer: Tokenizer) -> None:
    """Figures of other sentences, or ids that have changed."""
    assert f"\n{tokenization.table(llama2_tokenizer)}\n" in START.read_text(encoding="utf-8")


def test_the_start_page_has_the_factors_of_llama_3() -> None:
    """Figures of other sentences, or ids that have changed."""
    tokenizer = TiktokenTokenizer(published().read_bytes(), "tokenizer.model")
    rows = tokenization.table(tokenizer).splitlines()[-3:]
    korean, chinese, japanese = (row.split(" | ")[4] for row in rows)
    assert f"{korean}, {chinese} and {japanese} times English" in START.read_text(encoding="utf-8")


def test_streams_of_all_languages_have_whole_characters(llama2_tokenizer: Tokenizer) -> None:
    """Parts of characters that readers see where the vocabulary has bytes only."""
    costs = []
    for texts in tokenization.sentences().values():
        costs.append(tokenization.cost(llama2_tokenizer, texts))
        for text in texts:
            stream = Detokenizer(llama2_tokenizer.decode)
            ids = llama2_tokenizer.encode(text, bos=False, eos=False)
            pieces = [*map(stream.push, ids), stream.flush()]
            assert "".join(pieces) == text
            assert not any("\ufffd" in piece for piece in pieces)
    assert [cost.byte_tokens > 0 for cost in costs] == [False, True, True, True]
