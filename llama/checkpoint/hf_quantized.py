"""Quantised Hugging Face directories: which method made them, and the reader of its format."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llama.checkpoint.bitsandbytes import read_bitsandbytes
from llama.checkpoint.compressed import read_compressed
from llama.checkpoint.file_kinds import quantised_kind
from llama.checkpoint.float8 import read_fp8
from llama.checkpoint.gptq import read_awq, read_gptq
from llama.checkpoint.packed import Modules, Packed
from llama.checkpoint.params import read_params
from llama.errors import printable, short

logger = logging.getLogger(__name__)

Settings = Mapping[str, Any]
"""``quantization_config`` of a ``config.json``, or what stands for it."""

Reader = Callable[[Settings, Modules, str], dict[str, Packed]]
"""Returns the quantised weights by their modules, given the settings, the parts of all modules, of
which many are plain, and the file that the settings come from, for errors. Raises ValueError for
a variant that isn't read, or parts that don't fit together."""

_READERS: Mapping[str, Reader] = {
    "gptq": read_gptq,
    "awq": read_awq,
    "compressed-tensors": read_compressed,
    "fp8": read_fp8,
    "fbgemm_fp8": read_fp8,
    "bitsandbytes": read_bitsandbytes,
}

# Settings of older tools in files of their own, and their methods.
_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


def quantization_settings(config: Mapping[str, Any], directory: Path) -> Settings | None:
    """Return how a directory's weights are quantised, with their ``quant_method``; None if plain.

    Args:
        config: its ``config.json``.
        directory: where older tools left settings of their own.

    Raises:
        ValueError: the settings can't be read.
    """
    for key in ("quantization_config", "compression_config"):  # the older one comes last
        settings = config.get(key)
        if isinstance(settings, dict) and settings:
            return settings
        if settings:
            raise ValueError(
                f"{directory / 'config.json'} has {key} {short(settings)}: expected an object"
            )
    for name, method in _FILES.items():
        if (directory / name).is_file():
            return {**read_params(directory / name), "quant_method": method}
    return None


def read_quantized(settings: Settings, modules: Modules, source: str) -> dict[str, Packed]:
    """Return a directory's quantised weights by their modules; the others are plain.

    Args:
        settings: see ``quantization_settings``.
        modules: the parts of all modules, by Hugging Face's names.
        source: the file that the settings come from, for errors.

    Raises:
        ImportError: the format needs a package that isn't installed.
        ValueError: the format isn't read, or parts are missing or don't fit together.
    """
    method = _method(settings, modules)
    if method is None:
        raise ValueError(
            f"{source} has quantization settings without a quant_method: expected one of "
            f"{', '.join(_READERS)}; download it again"
        )
    reader = _READERS.get(method)
    if reader is None:
        kind = quantised_kind(method)
        raise ValueError(f"{source} is of a model {kind.what}: {kind.remedy}")
    packed = reader(settings, modules, source)
    if not packed:
        logger.warning(
            "%s says that the weights are quantised (%s), but all are plain: they are used as "
            "they are",
            *(source, printable(method)),
        )
    return packed


def _method(settings: Settings, modules: Modules) -> str | None:
    """Return the method that settings name or, where older tools named none, tensors show."""
    method = settings.get("quant_method")
    if isinstance(method, str):
        return method.lower()
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    parts = {name for each in modules.values() for name in each}
    return "gptq" if {"qweight", "g_idx"} <= parts else None
