"""The container of a GGUF file: metadata, and tensors as they are stored.

Source: https://github.com/ggml-org/ggml (docs/gguf.md)
"""

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint.gguf_codes import KINDS
from llama.errors import need, printable

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes of tensors that aren't quantised, by their type's name."""

_WIDENED = ["TQ1_0", "TQ2_0", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"]
_WIDENED += ["MXFP4", "NVFP4"]
SUPPORTED = [*PLAIN, *KINDS, *_WIDENED]
"""The names of the types that ``read`` converts."""

_CHUNK = 1 << 17  # weights that are dequantised at once: they fit a processor's cache

# The struct codes of numbers by their type's number in a file.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_NUMBERS[12] = "d"
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_MAX_ARRAY = 1 << 24  # far above any vocabulary or list of merges


@dataclass
class Stored:
    """A tensor as a file stores it: its type's name, its shape and its bytes."""

    kind: str
    shape: tuple[int, ...]
    raw: torch.Tensor  # uint8, shape (n_bytes,)


class _Reader:
    """Parse the beginning of a file, where nothing may be longer than the rest of the file."""

    def __init__(self, data: memoryview):
        self._data = data
        self.position = 0

    def take(self, size: int) -> memoryview:
        if size > len(self._data) - self.position:
            raise ValueError(f"{size:,} bytes are announced after {self.position:,}")
        self.position += size
        return self._data[self.position - size : self.position]

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        return str(self.take(self.number("Q")), "utf-8")

    def value(self) -> Any:
        kind = self.number("I")
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            value = self.number(_NUMBERS[kind])
            return _shortest(value) if kind == _FLOAT32 else value
        kind, count = self.number("I"), self.number("Q")
        if count > _MAX_ARRAY:
            raise ValueError(f"a list of {count:,} is announced")
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        layout = f"<{count}{_NUMBERS[kind]}"
        return list(struct.unpack(layout, self.take(struct.calcsize(layout))))


def _shortest(value: float) -> float:
    """Return a float32 as people write it: 1e-05 rather than 9.999999747378752e-06."""
    short = float(f"{value:.7g}")
    return short if struct.pack("<f", short) == struct.pack("<f", value) else value


def open_file(path: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """Map a file and return its metadata, and its tensors by name.

    Raises:
        ImportError: the package ``gguf`` isn't installed.
        MemoryError: no address space is left to map it.
        ValueError: it is no GGUF file, or damaged.
    """
    with path.open("rb") as file:
        head = file.read(8)
    if head[:4] != b"GGUF":
        raise ValueError(f"{path} is no GGUF file: it begins with {head[:4]!r}, not with b'GGUF'")
    version = int.from_bytes(head[4:], "little")
    if version not in (2, 3):
        kind = f"version {version}" if version < 1 << 16 else "for big-endian machines"
        raise ValueError(
            f"{path} is a GGUF file {kind}: expected version 2 or 3 for little-endian machines; "
            "convert the model again"
        )
    try:
        size = path.stat().st_size
        data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    except RuntimeError as error:
        raise MemoryError(f"{path} can't be mapped: no address space is left") from error
    try:
        return _parse(data)
    except (KeyError, UnicodeDecodeError, ValueError) as error:
        reason = f"no type has the number {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{path} ({size:,} bytes) is damaged or incomplete ({printable(reason, 200)}): "
            "download it again"
        ) from error


def _parse(data: torch.Tensor) -> tuple[dict[str, Any], dict[str, Stored]]:
    gguf = need("gguf")
    reader = _Reader(data.numpy().data)
    reader.take(8)  # magic and version
    n_tensors, n_values = reader.number("Q"), reader.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(n_values):
        key = reader.string()
        if key in metadata:
            raise ValueError(f"it has {key} twice")
        metadata[key] = reader.value()
    infos: dict[str, tuple[int, tuple[int, ...], int]] = {}  # type's number, shape, offset
    for _ in range(n_tensors):
        name, n_dims = reader.string(), reader.number("I")
        if name in infos or not 1 <= n_dims <= 4:
            raise ValueError(f"{name!r} has {n_dims} dimensions or is listed twice")
        shape = tuple(reader.number("Q") for _ in range(n_dims))[::-1]
        if not all(0 < size < 1 << 40 for size in shape):
            raise ValueError(f"{name!r} has the shape {shape}")
        infos[name] = (reader.number("I"), shape, reader.number("Q"))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r}, not a power of 2 from 8")
    begin = -(-reader.position // alignment) * alignment
    kinds = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}
    stored: dict[str, Stored] = {}
    for name, (number, shape, offset) in infos.items():
        kind = kinds.get(number, f"number {number}")
        if kind not in SUPPORTED:  # it can't be read, and its size may be unknown
            stored[name] = Stored(kind, shape, data[:0])
            continue
        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)]
        n_bytes = prod(shape) // block * block_bytes
        if shape[-1] % block or offset % alignment or begin + offset + n_bytes > len(data):
            raise ValueError(f"{name} of shape {shape} at {begin + offset:,} doesn't fit")
        stored[name] = Stored(kind, shape, data[begin + offset : begin + offset + n_bytes])
    if sum(tensor.raw.nbytes for tensor in stored.values()) > len(data):
        raise ValueError("its tensors overlap")
    return metadata, stored


def mapped(tensor: Stored) -> torch.Tensor:
    """Return the tensor as it is mapped; of a quantised one the bytes."""
    if tensor.kind in PLAIN:
        return tensor.raw.view(PLAIN[tensor.kind]).view(tensor.shape)
    return tensor.raw


def read(tensor: Stored) -> torch.Tensor:
    """Return the tensor as it is mapped, or dequantised to float32."""
    if tensor.kind in PLAIN:
        return mapped(tensor)
    gguf = need("gguf")
    kind = gguf.GGMLQuantizationType[tensor.kind]
    weight = torch.empty(prod(tensor.shape[:-1]), tensor.shape[-1])
    raw = tensor.raw.view(weight.shape[0], -1)
    step = max(1, _CHUNK // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        rows = gguf.quants.dequantize(raw[start : start + step].numpy(), kind)
        weight[start : start + step] = torch.from_numpy(rows)
    return weight.view(tensor.shape)
