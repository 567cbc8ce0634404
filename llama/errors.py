"""Errors that code reacts to, and helpers for the messages of errors."""

import importlib
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

LARGEST = 2**31 - 1
"""Far above all numbers of a model, and far below an overflow in intermediate results."""


class PromptTooLong(ValueError):
    """A prompt has more tokens than the cache has positions for one sequence."""

    def __init__(self, index: int, n_tokens: int, max_seq_len: int, n_virtual: int = 0):
        virtual = f" behind its adapter's {n_virtual} virtual ones" if n_virtual else ""
        super().__init__(
            f"prompt {index} has {n_tokens} tokens{virtual}, more than max_seq_len={max_seq_len}: "
            "shorten it, or give Llama.build a larger max_seq_len"
        )
        self.n_tokens = n_tokens
        self.n_virtual = n_virtual
        self.max_seq_len = max_seq_len


class WrongForm(ValueError):
    """A ``response_format``, or the arguments of a tool, can't be compiled."""


class NotFinite(RuntimeError):
    """The network's output holds an infinity or a NaN."""

    def __init__(self) -> None:
        super().__init__(
            "the model's logits are not finite: its weights are damaged, or their range needs "
            "dtype=torch.float32"
        )


class RankLost(RuntimeError):
    """Another rank of the job has failed, has ended, or can't be reached."""


def short(value: object, length: int = 40) -> str:
    """Return the ``repr`` of a value, cut to a length."""
    if isinstance(value, int) and abs(value) > LARGEST:
        return "larger than any model's"  # Python refuses to print very large ones
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."


def printable(text: str, length: int = 80) -> str:
    """Return a text from a file as one printable line, cut to a length."""
    text = "".join(c if c.isprintable() else "?" for c in text[: length + 1])
    return text if len(text) <= length else f"{text[:length]}..."


def listed(texts: Sequence[str], limit: int = 5) -> str:
    """Return texts separated by commas; of many, the first ones and the number of the others."""
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more


def checked_list(values: Any, name: str) -> Any:
    """Return ``values``.

    Raises:
        TypeError: they aren't a list.
    """
    if isinstance(values, str | bytes | dict):
        raise TypeError(f"{name} is one {type(values).__name__}: give a list of them")
    if not isinstance(values, Iterable):
        raise TypeError(f"{name} is {values!r}: give a list")
    return values


# The packages on the index whose modules have another name.
_PACKAGES = {"google.protobuf": "protobuf", "sentencepiece.sentencepiece_model_pb2": "protobuf"}


def need(
    module: str, extra: str = "formats", purpose: str = "this checkpoint's format"
) -> ModuleType:
    """Import a module that is, or imports, a package of one of this library's extras.

    Raises:
        ImportError: the package isn't installed; says what needs it and how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = error.name if module.startswith("llama.") and error.name else module
        package = _PACKAGES.get(missing, missing.split(".")[0].replace("_", "-"))
        raise ImportError(
            f"{purpose} needs the package {package}: pip install 'llama[{extra}]' installs it"
        ) from error
