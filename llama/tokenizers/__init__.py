"""A checkpoint's tokenizer and chat template, from the files next to its weights."""

import logging
import math
from collections.abc import Mapping
from typing import Any

from llama.errors import printable
from llama.tokenizer import DUMMY_PREFIX, BaseTokenizer, Tokenizer
from llama.tokenizers.added import set_flags
from llama.tokenizers.control import end_ids
from llama.tokenizers.descriptions import Description, describe
from llama.tokenizers.extended import ExtendedTokenizer, extended
from llama.tokenizers.files import (
    TEMPLATES,
    Files,
    chat_templates,
    name_of,
    read,
    read_json,
    with_template,
)
from llama.tokenizers.json_tokenizer import JsonTokenizer, n_pieces, with_pieces, without_prefix
from llama.tokenizers.tiktoken import TiktokenTokenizer, is_tiktoken, n_words

__all__ = ["TEMPLATES", "Files", "chat_templates", "load_tokenizer", "with_template"]

logger = logging.getLogger(__name__)


def load_tokenizer(
    files: Files, vocab_size: int | None = None, where: object = "this checkpoint"
) -> BaseTokenizer:
    """Load the tokenizer from ``tokenizer.model`` or ``tokenizer.json``.

    Of both it is the one whose pieces cover more of the embedding. If they cover the same, it is
    a ``tokenizer.model`` of SentencePiece's, but none of tiktoken's. A damaged one yields to the
    other, with a warning.

    Args:
        files: the files next to the weights.
        vocab_size: the number of ids that the model has; added pieces beyond them are dropped.
        where: the checkpoint's name in errors.

    Raises:
        FileNotFoundError: there is no tokenizer.
        ImportError: this kind of tokenizer needs a package that is missing.
        ValueError: a file is malformed.
    """
    if vocab_size is not None and vocab_size < 1:
        vocab_size = None
    if not files.keys() & {"tokenizer.model", "tokenizer.json"}:
        raise FileNotFoundError(
            f"no tokenizer.model or tokenizer.json in {where}: give the path of one as "
            "tokenizer_path"
        )
    description = describe(files, vocab_size)
    tokenizer: BaseTokenizer
    if _is_json(files, description, vocab_size):
        tokenizer = _from_json(files, description, vocab_size)
    elif is_tiktoken(read(files, "tokenizer.model")):
        tokenizer = _from_tiktoken(files, description, vocab_size)
    else:
        tokenizer = _from_model(files, description)
    _set_special_ids(tokenizer, description.roles, files)
    return tokenizer


def _is_json(files: Files, description: Description, vocab_size: int | None) -> bool:
    """Return whether the vocabulary is that of ``tokenizer.json``."""
    if "tokenizer.model" not in files or "tokenizer.json" not in files:
        return "tokenizer.json" in files
    name, proto = name_of(files, "tokenizer.model"), read(files, "tokenizer.model")
    has_ranks = is_tiktoken(proto)
    try:
        n_model = n_words(proto, name, vocab_size) if has_ranks else Tokenizer(name, proto).n_words
    except ValueError as error:
        logger.warning("%s: tokenizer.json beside it is read", error)
        return True

    def covered(n: int, takes_added: bool = True) -> float:
        while takes_added and n in description.added:
            n += 1
        return n if n <= (vocab_size or math.inf) else -n

    if covered(n_model) == vocab_size and not has_ranks:
        return False
    try:
        n_json = covered(n_pieces(read_json(files, "tokenizer.json"), vocab_size))
    except ValueError as error:
        logger.warning("%s: tokenizer.model beside it is read", error)
        return False
    own = covered(n_model, takes_added=not has_ranks)
    return n_json >= own if has_ranks else n_json > own


def _from_tiktoken(files: Files, description: Description, vocab_size: int | None) -> BaseTokenizer:
    name, proto = name_of(files, "tokenizer.model"), read(files, "tokenizer.model")
    tokenizer = TiktokenTokenizer(proto, name, vocab_size)
    unknown = [
        printable(piece.content)
        for piece in description.added.values()
        if piece.content not in tokenizer.control_ids
    ]
    if unknown:
        logger.warning(
            "%s, a file of tiktoken's, has no place for %d pieces that the files beside it add, as "
            "%s: give a tokenizer.json as tokenizer_path for them",
            *(name, len(unknown), unknown[0]),
        )
    if read_json(files, "tokenizer_config.json").get("add_bos_token") is False:
        tokenizer.add_bos = False
    return tokenizer


def _from_model(files: Files, description: Description) -> BaseTokenizer:
    config = read_json(files, "tokenizer_config.json")
    name, proto = name_of(files, "tokenizer.model"), read(files, "tokenizer.model")
    if isinstance(config.get("add_prefix_space"), bool):
        proto += DUMMY_PREFIX + bytes([config["add_prefix_space"]])
    tokenizer = extended(name, proto, description)
    set_flags(tokenizer, [*description.special.values(), *description.added.values()])
    # transformers' name for whether each text between control pieces begins with a space. Unless
    # it is given, versions differ about texts after added words.
    tokenizer.spaced = config.get("legacy") is not False
    if isinstance(tokenizer, ExtendedTokenizer):
        tokenizer.spaced_words = config.get("legacy") is True
    tokenizer.add_bos = config.get("add_bos_token") is not False
    return tokenizer


def _from_json(files: Files, description: Description, vocab_size: int | None) -> BaseTokenizer:
    config = read_json(files, "tokenizer_config.json")
    data = with_pieces(read_json(files, "tokenizer.json"), description)
    # transformers' other classes keep what tokenizer.json says.
    is_llama = "Llama" in str(config.get("tokenizer_class", "LlamaTokenizer"))
    if is_llama and config.get("add_prefix_space") is False:
        data = without_prefix(data)
    tokenizer = JsonTokenizer(
        data,
        name_of(files, "tokenizer.json"),
        description.is_control,
        description.is_structure,
        vocab_size,
    )
    if isinstance(config.get("add_bos_token"), bool):
        tokenizer.add_bos = config["add_bos_token"]
    return tokenizer


def _set_special_ids(tokenizer: BaseTokenizer, names: Mapping[str, str], files: Files) -> None:
    """Set the ids that begin, end and pad a sequence, and those that end an answer."""
    for role, name in names.items():
        if name in tokenizer.control_ids:
            setattr(tokenizer, f"{role}_id", tokenizer.control_ids[name])
        elif len(name) == 1 and role != "pad":
            # A letter that is part of texts, too; padding is put nowhere.
            ids = tokenizer.encode_infilling(name)
            setattr(tokenizer, f"{role}_id", ids[0] if len(ids) == 1 else -1)
    ends = _ids(tokenizer, read_json(files, "generation_config.json"))
    if tokenizer.eos_id < 0 and ends:
        tokenizer.eos_id = min(ends)
    config = read_json(files, "config.json")
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            # Of another tokenizer than the present one, such an id may be any word.
            ends |= _ids(tokenizer, part) & set(tokenizer.control_ids.values())
    tokenizer.stop_ids = end_ids(tokenizer, ends)
    tokenizer.add_bos = tokenizer.add_bos and tokenizer.bos_id >= 0


def _ids(tokenizer: BaseTokenizer, config: Mapping[str, Any]) -> set[int]:
    """Return the ids that a configuration says end a text."""
    ends = config.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    return {i for i in ends if type(i) is int and 0 <= i < tokenizer.n_words}
