"""Objects of ``tokenizer.json`` files that tests make."""

import json
from functools import cache
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from llama import Tokenizer
from llama.chat.marks import Marks
from llama.generation import TINY
from llama.tokenizer import BaseTokenizer

LINES = [
    "The cat sat on the mat, and the dog ran after the ball: 1234 times!",
    "def main():\n    print('the cat')\n        return [x for x in range(10)]\n",
    "Ünïcödé, 日本語 and 😀 are the text of a test; the assistant and the user talk.",
] * 3

BEGIN, END, TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"

CONTROLS = [BEGIN, END, TURN]


# Added, but not marked as control pieces: of structure, of white space and a word.
THINK, INDENT, WORD = "<think>", "    ", "assistant"


def byte_level() -> dict[str, Any]:
    """Like Llama 3's: BPE of bytes, with control pieces after the vocabulary."""
    return json.loads(_byte_level())


@cache
def _byte_level() -> str:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(LINES, trainer)
    made.add_special_tokens([AddedToken(text, special=True) for text in CONTROLS])
    made.add_tokens([AddedToken(text, normalized=False) for text in (THINK, INDENT, WORD)])
    begin = (BEGIN, made.token_to_id(BEGIN))
    made.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[begin]
    )
    text: str = made.to_str()
    return text


def like_llama2(scheme: str, source: Tokenizer | None = None) -> dict[str, Any]:
    """A ``tokenizer.model``, the embedded one by default, as Llama 2's ``tokenizer.json`` is."""
    model = (source or Tokenizer(TINY / "tokenizer.model")).sp_model
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    # The most probable piece is merged first, which isn't always the order of the ids.
    for piece, i in sorted(vocab.items(), key=lambda item: -model.get_score(item[1])):
        if not (model.is_control(i) or model.is_byte(i) or model.is_unknown(i)):
            cuts = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
            known = [(vocab[a], vocab[b]) for a, b in cuts if a in vocab and b in vocab]
            merges += [[pieces[a], pieces[b]] for a, b in sorted(known)]
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    prepend = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    decoder = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": pieces[i], "special": True, **flags} for i in range(3)
        ],
        # Older files do with the normalizer what later ones do with the pre-tokenizer.
        "normalizer": prepend if scheme == "prepend" else None,
        "pre_tokenizer": None if scheme == "prepend" else metaspace,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoder[: 3 if scheme == "never" else 4]},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": merges,
        },
    }


def structure_ids(tokenizer: BaseTokenizer, text: str) -> list[int]:
    """The ids of a prompt's structure, where control pieces become their ids."""
    marks = Marks(tokenizer)
    return marks.encode(marks.mark(text))
