"""Quantised Hugging Face directories: which method made them, and the reader of its format."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llama.checkpoint.bitsandbytes import read_bitsandbytes
from llama.checkpoint.compressed import read_compressed
from llama.checkpoint.file_kinds import quantisation, quantised_kind
from llama.checkpoint.float8 import read_fp8
from llama.checkpoint.gptq import read_awq, read_gptq
from llama.checkpoint.packed import Modules, Packed
from llama.checkpoint.params import read_params
from llama.errors import short

logger = logging.getLogger(__name__)

Settings = Mapping[str, Any]
"""``quantization_config`` of a ``config.json``, or what stands for it."""

Reader = Callable[[Settings, Modules, str], dict[str, Packed]]
"""Returns the quantised weights by their modules, given the settings, the parts of all modules, of
which many are plain, and the file that the settings come from, for errors. Raises ValueError for
a variant that isn't read, or parts that don't fit together."""


def _read_auto_round(settings: Settings, modules: Modules, source: str) -> dict[str, Packed]:
    """Return auto-round's own weights, which lie as another method's."""
    packing = str(settings.get("packing_format", "auto_round:auto_gptq")).removeprefix("auto_round")
    if "awq" in packing:
        return read_awq({}, modules, source)
    if packing.startswith((":auto_gptq", ":gptq:")):
        return read_gptq({**settings, "format": "gptq"}, modules, source)
    if packing == "" or packing.startswith((":gptqmodel", ":exllama", ":triton")):
        return read_gptq({**settings, "format": "gptq_v2"}, modules, source)
    raise unread(f"auto-round in {packing.strip(':')}", source)


_READERS: Mapping[str, Reader] = {
    "gptq": read_gptq,
    "awq": read_awq,
    "compressed-tensors": read_compressed,
    "fp8": read_fp8,
    "fbgemm_fp8": read_fp8,
    "bitsandbytes": read_bitsandbytes,
    "auto-round": _read_auto_round,
    "intel/auto-round": _read_auto_round,
}

# Settings of older tools in files of their own, and their methods.
_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
# Methods by the names that ``quantisation`` gives tensors.
_METHODS = {"GPTQ": "gptq", "bitsandbytes (8 bits)": "bitsandbytes", "FP8": "fp8"}


def quantization_settings(config: Mapping[str, Any], directory: Path) -> Settings | None:
    """Return how a directory's weights are quantised; None if nothing says that they are.

    Args:
        config: its ``config.json``.
        directory: where older tools left settings of their own.

    Raises:
        ValueError: the settings can't be read, or name a method that isn't read.
    """
    source = str(directory / "config.json")
    for key in ("quantization_config", "compression_config"):  # the older one comes last
        settings = config.get(key)
        if settings and not isinstance(settings, dict):
            raise ValueError(f"{source} has {key} {short(settings)}: expected an object")
        if settings:
            method = settings.get("quant_method")
            if isinstance(method, str) and method.lower() not in _READERS:
                raise unread(method, source)
            return settings
    for name, method in _FILES.items():
        if (directory / name).is_file():
            return {**read_params(directory / name), "quant_method": method}
    return None


def unread(method: str, source: str) -> ValueError:
    """Return the error that a method's weights aren't read.

    Args:
        method: the method, and perhaps the variant of it.
        source: the file that names it.
    """
    kind = quantised_kind(method)
    return ValueError(f"{source} is of a model {kind.what}: {kind.remedy}")


def read_quantized(settings: Settings | None, modules: Modules, source: str) -> dict[str, Packed]:
    """Return a directory's quantised weights by their modules; the others are plain.

    Args:
        settings: see ``quantization_settings``.
        modules: the parts of all modules, by Hugging Face's names.
        source: the ``config.json``, for errors.

    Raises:
        ImportError: the format needs a package that isn't installed.
        ValueError: the format isn't read, or parts are missing or don't fit together.
    """
    method = _method(settings or {}, modules)
    if method not in (None, *_READERS):
        raise unread(str(method), source)
    packed = _READERS[method](settings or {}, modules, source) if method else {}
    if settings and not packed:
        logger.warning(
            "%s says how weights are quantised, but all are plain: they are used as they are",
            source,
        )
    return packed


def _method(settings: Settings, modules: Modules) -> str | None:
    """Return the method that settings name or, where they name none, tensors show."""
    method = settings.get("quant_method")
    if isinstance(method, str):
        return method.lower()
    dtypes = {
        f"{module}.{part}": "F8" if str(tensor.dtype).startswith("torch.float8") else ""
        for module, parts in modules.items()
        for part, tensor in parts.items()
    }
    found = quantisation(dtypes)
    if found != "GPTQ or AWQ":
        return found and _METHODS.get(found, found)
    # AWQ packs outputs, GPTQ inputs.
    shapes = [
        (parts["qweight"].shape[-1:], parts["scales"].shape[-1:])
        for parts in modules.values()
        if {"qweight", "scales"} <= parts.keys()
    ]
    return "gptq" if all(codes == scales for codes, scales in shapes) else "awq"
