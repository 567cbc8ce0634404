"""``tokenizer.json``, the format of Hugging Face's library ``tokenizers``."""

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from itertools import count
from typing import Any

from llama.errors import need, printable
from llama.tokenizer import BaseTokenizer
from llama.tokenizers.added import AddedPiece, is_letter, set_flags
from llama.tokenizers.descriptions import Description

# GPT-2's characters for the 256 bytes (https://github.com/openai/gpt-2, src/encoder.py): those
# that are visible in Latin-1 stand for themselves, the others for characters from 256 on.
_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _VISIBLE]
BYTE_LEVEL = {chr(byte): byte for byte in _VISIBLE}
BYTE_LEVEL |= {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}
_NEVER = (0xC0, 0xC1, *range(0xF5, 0x100))  # the bytes that no UTF-8 has


@contextmanager
def _clear_errors(problem: str) -> Iterator[None]:
    """Raise ``ValueError`` for an error of the library, which raises no narrower one."""
    try:
        yield
    except BaseException as error:
        # A strange file can make it panic, which no Exception tells.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{problem}: {printable(str(error), 200)}") from error


class JsonTokenizer(BaseTokenizer):
    """A ``tokenizer.json`` with the interface of ``Tokenizer``."""

    def __init__(
        self,
        data: dict[str, Any],
        name: str,
        is_control: Callable[[str], bool],
        is_structure: Callable[[str], bool],
        vocab_size: int | None = None,
    ):
        """Make a tokenizer from a parsed ``tokenizer.json``.

        Args:
            data: the file's object.
            name: the file's name in errors.
            is_control: returns whether an added piece is a control piece although it isn't marked
                as one.
            is_structure: returns whether another added piece belongs to the structure of prompts:
                text never becomes it, but it is part of a decoded text.
            vocab_size: the number of ids that the model has; added pieces beyond are dropped.

        Raises:
            ImportError: the package ``tokenizers`` is missing.
            ValueError: the library can't read the data.
        """
        data = {**copy.deepcopy(data), "truncation": None, "padding": None}
        specs = data.get("added_tokens")
        if isinstance(specs, list):
            data["added_tokens"] = [spec for spec in specs if not _is_beyond(spec, vocab_size)]
        added = [spec for spec in data.get("added_tokens") or [] if isinstance(spec, dict)]
        own = _vocabulary(data)
        silent = set()  # control pieces, which have no text
        for spec in added:
            text = str(spec.get("content"))
            if (spec.get("special") or is_control(text)) and not (is_letter(text) and text in own):
                silent.add(text)
            spec["special"] = text in silent or is_structure(text)
        tokenizers = need("tokenizers")
        self._name = name
        with _clear_errors(f"{name} is no tokenizer.json"):
            self._whole = tokenizers.Tokenizer.from_str(json.dumps(data))
            self._continued = tokenizers.Tokenizer.from_str(json.dumps(without_prefix(data)))
        self._decoder = _steps(data.get("decoder"))
        vocabulary: dict[str, int] = self._whole.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ValueError(f"{name} has an empty vocabulary")
        _check_ids(added, own, vocabulary, name)
        self.n_words = max(vocabulary.values()) + 1
        self.control_ids = {
            spec["content"]: vocabulary[spec["content"]]
            for spec in added
            if spec["special"] and str(spec.get("content")) in vocabulary
        }
        self._verbatim = {vocabulary[t]: t for t in _verbatim(data) if t in vocabulary}
        self._silent_ids = {i for text, i in self.control_ids.items() if text in silent}
        self.bos_id = self.eos_id = self.pad_id = -1
        self.stop_ids = frozenset()
        # As with SentencePiece, except that "first" puts a space before the first text only.
        steps = _steps(data.get("pre_tokenizer"))
        self.spaced = all(step.get("prepend_scheme") != "first" for step in steps)
        with _clear_errors(f"{name} has a post-processor that fails"):
            first = _first_id(self._whole)
        self.add_bos = first in self.control_ids.values()
        if self.add_bos:
            self.bos_id = first
        set_flags(self, [AddedPiece.of(spec) for spec in added])
        # Prompts get their control ids otherwise (encode_parts): what the library sees is text.
        self._whole.encode_special_tokens = self._continued.encode_special_tokens = True

    def _to_ids(self, s: str, continued: bool) -> list[int]:
        model = self._continued if continued else self._whole
        with _clear_errors(f"{self._name} can't encode a text"):
            ids: list[int] = model.encode(s, add_special_tokens=False).ids
        return ids

    def _to_text(self, ids: list[int], continued: bool) -> str:
        shown = [i for i in ids if i not in self._silent_ids]
        text, begin = "", 0
        for end, i in enumerate(shown):
            if i in self._verbatim:
                text += self._shown(shown[begin:end], continued) + self._verbatim[i]
                begin, continued = end + 1, True
        return text + self._shown(shown[begin:], continued)

    def _shown(self, ids: list[int], continued: bool) -> str:
        model = self._continued if continued else self._whole
        with _clear_errors(f"{self._name} can't decode ids"):
            text: str = model.decode(ids, skip_special_tokens=False)
        return text

    def token_piece(self, t: int) -> str:
        """Return the vocabulary's entry for an id, as it is written there."""
        self._check_id(t)
        return self._whole.id_to_token(t) or ""

    def piece_bytes(self) -> list[bytes]:
        """Return the bytes that each piece adds to a text that has others before it.

        Raises:
            ValueError: the decoder makes the text in another way.
        """
        known = {"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip"}
        unknown = {str(step.get("type")) for step in self._decoder} - known
        if unknown or not self._decoder:
            found = ", ".join(sorted(unknown)) or "no decoder"
            raise ValueError(f"a piece's bytes aren't known with {found} in tokenizer.json")
        names = (self._whole.id_to_token(i) or "" for i in range(self.n_words))
        pieces = [_decoded(name, self._decoder) for name in names]
        for i, text in self._verbatim.items():
            pieces[i] = text.encode()
        return pieces


def n_pieces(data: Mapping[str, Any], vocab_size: int | None) -> int:
    """Return the number of ids of a parsed ``tokenizer.json``, as far as it is well formed.

    Added pieces from the id ``vocab_size`` on don't count.
    """
    added = (spec.get("id") for spec in _specs(data) if not _is_beyond(spec, vocab_size))
    ids = [*_vocabulary(data).values(), *(i for i in added if isinstance(i, int))]
    return max(ids, default=-1) + 1


def with_pieces(data: Mapping[str, Any], description: Description) -> dict[str, Any]:
    """Return a parsed ``tokenizer.json`` with pieces that the files next to it add or describe.

    A piece of an id that the file gives to another one is left out. One that a file calls special
    is such, whatever the others say: else texts would become it.
    """
    vocabulary, specs = _vocabulary(data), _specs(data)
    known = {str(spec.get("content")) for spec in specs}
    taken = {*vocabulary.values(), *(i for s in specs if isinstance(i := s.get("id"), int))}
    described = {piece.content: piece for piece in description.described.values()}
    more = {i: piece for i, piece in description.added.items() if i not in taken}
    more |= {
        vocabulary[piece.content]: piece
        for piece in [*description.special.values(), *description.added.values()]
        if piece.content in vocabulary
    }
    new = [
        {"id": i, **asdict(piece)}
        for i, piece in sorted(more.items())
        if piece.content not in known
    ]
    if not new and not described:
        return dict(data)
    for spec in specs:
        if piece := described.get(str(spec.get("content"))):
            special = bool(spec.get("special")) or piece.special
            spec |= {**asdict(piece), "special": special}
    return {**data, "added_tokens": specs + new}


def _specs(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return copies of the objects that describe added pieces."""
    specs = data.get("added_tokens")
    return [dict(s) for s in specs if isinstance(s, dict)] if isinstance(specs, list) else []


def _vocabulary(data: Mapping[str, Any]) -> dict[str, int]:
    """Return the ids of the pieces that weren't added."""
    model = data.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # Unigram's pieces, with their scores
        return {str(e[0]): i for i, e in enumerate(vocabulary) if isinstance(e, list) and e}
    ids = vocabulary.items() if isinstance(vocabulary, dict) else ()
    return {text: i for text, i in ids if isinstance(i, int)}


def _check_ids(
    specs: list[dict[str, Any]], own: Mapping[str, int], found: Mapping[str, int], name: str
) -> None:
    """Raise an error if the library, which counts on without gaps, gave a piece another id."""
    stated = {*own.values(), *(spec.get("id") for spec in specs)}
    gap = next(i for i in count() if i not in stated)
    for spec in specs:
        text, i = str(spec.get("content")), spec.get("id")
        # Pieces that the vocabulary has, too, keep its ids.
        if text not in own and isinstance(i, int) and i > gap and found.get(text, i) != i:
            raise ValueError(
                f"the piece {printable(text)} has the id {i}, but {found[text]} in {name} "
                "with the pieces before it: added_tokens.json or tokenizer_config.json lacks some"
            )


def _first_id(tokenizer: Any) -> int:
    """Return the id that a post-processor puts in front of a text; -1 for none."""
    if tokenizer.post_processor is None:
        return -1
    tokenizers = need("tokenizers")
    text = tokenizers.Tokenizer(tokenizers.models.WordLevel({"text": 0}, "text")).encode("text")
    processed = tokenizer.post_processor.process(text)
    is_special = processed.special_tokens_mask[:1] == [1]
    first: int = processed.ids[0] if is_special else -1
    return first


def _verbatim(data: Mapping[str, Any]) -> set[str]:
    """Return the added pieces whose letters a byte-level decoder would take for bytes."""
    if all(step.get("type") != "ByteLevel" for step in _steps(data.get("decoder"))):
        return set()
    texts = {spec["content"] for spec in _specs(data)}
    texts = {text for text in texts if BYTE_LEVEL.keys() >= set(text) and not text.isascii()}
    if texts.isdisjoint(vocabulary := _vocabulary(data)):
        return texts
    # A piece that the vocabulary has, too, may stand for bytes: for one that UTF-8 has, or for
    # several that are merged.
    bytes_too = {char for char, byte in BYTE_LEVEL.items() if byte not in _NEVER}
    bytes_too |= {"".join(pair).replace(" ", "") for pair in data["model"].get("merges") or ()}
    return texts - (bytes_too & vocabulary.keys())


def _is_beyond(spec: object, vocab_size: int | None) -> bool:
    i = spec.get("id") if isinstance(spec, dict) else None
    return vocab_size is not None and isinstance(i, int) and i >= vocab_size


def _steps(part: object) -> list[dict[str, Any]]:
    """Return the steps of a normalizer, pre-tokenizer or decoder, which may be a sequence."""
    if not isinstance(part, dict):
        return []
    for name in ("normalizers", "pretokenizers", "decoders"):
        if isinstance(part.get(name), list):
            return [step for inner in part[name] for step in _steps(inner)]
    return [part]


def _decoded(piece: str, decoder: list[dict[str, Any]]) -> bytes:
    """Return a piece's bytes, as the steps of a decoder make them."""
    for step in decoder:
        kind = step["type"]
        if kind == "ByteLevel" and BYTE_LEVEL.keys() >= set(piece):
            return bytes([BYTE_LEVEL[char] for char in piece])
        if kind == "ByteFallback" and (found := re.fullmatch("<0x([0-9A-F]{2})>", piece)):
            return bytes([int(found[1], 16)])
        if kind == "Metaspace":
            piece = piece.replace(step.get("replacement", "▁"), " ")
        if kind == "Replace" and isinstance(step.get("pattern"), dict):
            piece = piece.replace(step["pattern"].get("String") or "", step.get("content", ""))
    return piece.encode()


def without_prefix(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a ``tokenizer.json`` that adds no space to a text, and removes none in decoding."""
    copied: dict[str, Any] = copy.deepcopy(dict(data))
    for step in _steps(copied.get("normalizer")):
        if step.get("type") == "Prepend":
            step["prepend"] = ""
    for part in ("pre_tokenizer", "decoder"):
        for step in _steps(copied.get(part)):
            if step.get("type") == "Metaspace":
                step["prepend_scheme"] = "never"
            if step.get("type") == "ByteLevel":
                step["add_prefix_space"] = False
            if step.get("type") == "Strip":
                step["start"] = 0
    return copied
