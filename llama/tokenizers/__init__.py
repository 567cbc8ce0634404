"""A checkpoint's tokenizer and chat template, from the files next to its weights."""

import logging
import math
import re
from collections.abc import Mapping
from typing import Any

from llama.tokenizer import BaseTokenizer, Tokenizer
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

__all__ = ["TEMPLATES", "Files", "chat_templates", "load_tokenizer", "with_template"]

logger = logging.getLogger(__name__)

# A field of SentencePiece's models, normalizer_spec (3) with its field add_dummy_prefix (3), which
# protobuf's rules merge into a model that it is appended to.
_DUMMY_PREFIX = b"\x1a\x02\x18"
# The first line of tiktoken's files.
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?(\n|\Z)")


def load_tokenizer(
    files: Files, vocab_size: int | None = None, where: object = "this checkpoint"
) -> BaseTokenizer:
    """Load the tokenizer from ``tokenizer.model`` or ``tokenizer.json``.

    Of both it is the one whose pieces cover more of the embedding, ``tokenizer.model`` if they
    cover the same.

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
    else:
        tokenizer = _from_model(files, description)
    _set_special_ids(tokenizer, description.roles, files)
    return tokenizer


def _is_json(files: Files, description: Description, vocab_size: int | None) -> bool:
    """Return whether the vocabulary is that of ``tokenizer.json``."""
    if "tokenizer.model" not in files or "tokenizer.json" not in files:
        return "tokenizer.json" in files
    proto = read(files, "tokenizer.model")
    if _TIKTOKEN.match(proto):
        return True
    try:
        n_words = Tokenizer(name_of(files, "tokenizer.model"), proto).n_words
    except ValueError as error:
        logger.warning("%s: tokenizer.json beside it is read", error)
        return True

    def covered(n: int) -> float:
        while n in description.added:
            n += 1
        return n if n <= (vocab_size or math.inf) else -n

    if covered(n_words) == vocab_size:
        return False
    n_json = n_pieces(read_json(files, "tokenizer.json"), vocab_size)
    return covered(n_json) > covered(n_words)


def _from_model(files: Files, description: Description) -> BaseTokenizer:
    config = read_json(files, "tokenizer_config.json")
    proto = read(files, "tokenizer.model")
    if isinstance(config.get("add_prefix_space"), bool):
        proto += _DUMMY_PREFIX + bytes([config["add_prefix_space"]])
    tokenizer = extended(name_of(files, "tokenizer.model"), proto, description)
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
    ids = _ids(tokenizer, read_json(files, "generation_config.json"))
    if tokenizer.eos_id < 0 and ids:
        tokenizer.eos_id = min(ids)
    config = read_json(files, "config.json")
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            # Of another tokenizer than the present one, such an id may be any word.
            ids |= _ids(tokenizer, part) & set(tokenizer.control_ids.values())
    tokenizer.stop_ids = end_ids(tokenizer, ids)
    tokenizer.add_bos = tokenizer.add_bos and tokenizer.bos_id >= 0


def _ids(tokenizer: BaseTokenizer, config: Mapping[str, Any]) -> set[int]:
    """Return the ids that a configuration says end a text."""
    ends = config.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    return {i for i in ends if type(i) is int and 0 <= i < tokenizer.n_words}
