"""``tokenizer.json``: the tokenizers of Hugging Face's library ``tokenizers``."""

import copy
import json
from collections.abc import Callable
from typing import Any

from llama.errors import printable
from llama.formats.extras import need
from llama.tokenizer import BaseTokenizer


class JsonTokenizer(BaseTokenizer):
    """A ``tokenizer.json`` behind the interface of ``Tokenizer``."""

    def __init__(
        self,
        data: dict[str, Any],
        name: str,
        is_control: Callable[[str], bool],
        is_structure: Callable[[str], bool],
        vocab_size: int | None = None,
    ):
        """Make a tokenizer of a parsed ``tokenizer.json``.

        Args:
            name: what errors call it.
            is_control: whether an added piece is a control piece although it isn't marked so.
            is_structure: whether an added piece that is none still belongs to the structure of
                prompts: text never becomes it, but a model that writes it writes text.
            vocab_size: how many ids the model knows; added pieces beyond them are dropped.

        Raises:
            ImportError: the package ``tokenizers`` is missing.
            ValueError: the library can't make a tokenizer of it.
        """
        data = {**copy.deepcopy(data), "truncation": None, "padding": None}
        given = data.get("added_tokens")
        if isinstance(given, list):
            data["added_tokens"] = [spec for spec in given if not _is_beyond(spec, vocab_size)]
        added = [spec for spec in data.get("added_tokens") or [] if isinstance(spec, dict)]
        silent = set()
        for spec in added:
            text = str(spec.get("content"))
            if spec.get("special") or is_control(text):
                silent.add(text)
            spec["special"] = text in silent or is_structure(text)
        tokenizers = need("tokenizers")
        try:
            self._whole = tokenizers.Tokenizer.from_str(json.dumps(data))
            self._continued = tokenizers.Tokenizer.from_str(json.dumps(_without_prefix(data)))
        except Exception as error:  # the library raises nothing more exact
            reason = printable(str(error), 200)
            raise ValueError(f"{name} is no tokenizer.json: {reason}") from error
        vocabulary: dict[str, int] = self._whole.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ValueError(f"{name} has an empty vocabulary")
        self.n_words = max(vocabulary.values()) + 1
        self.control_ids = {
            spec["content"]: vocabulary[spec["content"]]
            for spec in added
            if spec["special"] and str(spec.get("content")) in vocabulary
        }
        self._silent = {i for text, i in self.control_ids.items() if text in silent}
        self.bos_id = self.eos_id = self.pad_id = -1
        self.stop_ids = frozenset()
        # Like SentencePiece, but for one scheme: the space stands in front of the first text only.
        steps = _steps(data.get("pre_tokenizer"))
        self.spaced = all(step.get("prepend_scheme") != "first" for step in steps)
        begun: list[int] = self._whole.encode("").ids  # what the post-processor puts around a text
        self.add_bos = bool(begun) and begun[0] in self.control_ids.values()
        if self.add_bos:
            self.bos_id = begun[0]
        # From here on what reads like a control piece is text; those in a prompt are met before.
        self._whole.encode_special_tokens = self._continued.encode_special_tokens = True

    def _to_ids(self, s: str, continued: bool) -> list[int]:
        model = self._continued if continued else self._whole
        ids: list[int] = model.encode(s, add_special_tokens=False).ids
        return ids

    def _to_text(self, ids: list[int], continued: bool) -> str:
        model = self._continued if continued else self._whole
        heard = [i for i in ids if i not in self._silent]
        text: str = model.decode(heard, skip_special_tokens=False)
        return text

    def token_piece(self, t: int) -> str:
        """The vocabulary's entry for an id, as it is written there."""
        self._check_id(t)
        return self._whole.id_to_token(t) or ""


def _is_beyond(spec: object, vocab_size: int | None) -> bool:
    i = spec.get("id") if isinstance(spec, dict) else None
    return vocab_size is not None and isinstance(i, int) and i >= vocab_size


def _steps(part: object) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, of which there may be one or several."""
    if not isinstance(part, dict):
        return []
    for name in ("normalizers", "pretokenizers", "decoders"):
        if isinstance(part.get(name), list):
            return [step for inner in part[name] for step in _steps(inner)]
    return [part]


def _without_prefix(data: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer that puts no space in front of a text, and takes none away in decoding."""
    data = copy.deepcopy(data)
    for step in _steps(data.get("normalizer")):
        if step.get("type") == "Prepend":
            step["prepend"] = ""
    for part in ("pre_tokenizer", "decoder"):
        for step in _steps(data.get(part)):
            if step.get("type") == "Metaspace":
                step["prepend_scheme"] = "never"
            if step.get("type") == "ByteLevel":
                step["add_prefix_space"] = False
            if step.get("type") == "Strip":
                step["start"] = 0
    return data
