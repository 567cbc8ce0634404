"""Files recognised by their first bytes and by the names of their tensors; no weight is read.

Everything here runs after a file couldn't be opened, or describes one that won't be.
"""

import io
import json
import pickletools
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llama.errors import printable

_AGAIN = "download it again"
_UNPACK = "unpack it and give the directory with the checkpoint"
_OLD_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"  # a pickled number, before zip archives
_MAX_PICKLE = 1 << 20  # bytes of a pickle that are searched for names
MAX_FILES = 200
"""The files of a directory that are looked into, at most."""

_MAX_HEADER = 100_000_000  # bytes, as in safetensors itself


class Kind(NamedTuple):
    """A kind of file, and a remedy, for the sentence "PATH is ``what``: ``remedy``"."""

    what: str
    remedy: str


POINTER = Kind(
    "a Git LFS pointer, a line of text in place of the file",
    "run git lfs pull in its folder, or download the file itself",
)
_WEB_PAGE = Kind("a web page", f"{_AGAIN}, perhaps with a new link or after accepting its licence")
_WEB_BEGINNINGS = (b"<html", b"<!doctype", b"<head")
_ANSWER = Kind(
    "a server's message in place of the file",
    f"{_AGAIN}, perhaps with a new link, or signed in and after accepting its licence",
)
_ANSWERS = (
    *(b"<?xml", b"<Error", b"Access to model", b"Entry not found", b"Repository not found"),
    *(b"Invalid username", b"Invalid credentials", b"Unauthorized"),
)

# The bytes that files begin with.
_MAGICS = {
    b"version https://git-lfs": POINTER,
    b"\x1f\x8b": Kind("a gzip archive", _UNPACK),
    b"7z\xbc\xaf\x27\x1c": Kind("a 7z archive", _UNPACK),
    b"Rar!": Kind("a RAR archive", _UNPACK),
    b"BZh": Kind("a bzip2 archive", _UNPACK),
    b"\xfd7zXZ\0": Kind("an xz archive", _UNPACK),
    b"\x28\xb5\x2f\xfd": Kind("a Zstandard archive", _UNPACK),
    b"\x89HDF": Kind("TensorFlow's or Keras' weights (HDF5)", "get the PyTorch ones (safetensors)"),
    b"d8:announce": Kind("a torrent, not the files themselves", "download these with a client"),
    b"\x93NUMPY": Kind("a NumPy array", "give a checkpoint's directory"),
}
# Little-endian numbers whose digits are these letters.
_GGML_MAGICS = {b"lmgg": "ggml", b"fmgg": "ggmf", b"tjgg": "ggjt", b"algg": "ggla"}

# The ends of names of tensors that quantised checkpoints have in place of weights.
_QUANTISED_PARTS = {
    "q_invperm": "EXL2",
    "trellis": "EXL3",
    "weight_packed": "compressed-tensors",
    "absmax": "bitsandbytes",
    "SCB": "bitsandbytes (8 bits)",
    "codebooks": "AQLM",
    "W_q": "HQQ",
}
_UNREAD = ("EXL2", "EXL3", "AQLM", "HQQ", "MLX")
# Keys of training checkpoints, the ones with the weights first.
_NESTED = ("state_dict", "model_state_dict", "model", "module", "optimizer", "optimizer_state_dict")
_NESTED_MORE = ("epoch", "global_step", "step", "iteration", "lr_scheduler", "args", "config")


def read_head(path: Path, size: int = 512) -> bytes:
    """Return a regular file's first bytes; none if it isn't one, or can't be read."""
    try:
        if not path.is_file():  # a FIFO would never end
            return b""
        with path.open("rb") as file:
            return file.read(size)
    except OSError:
        return b""


def foreign_kind(path: Path) -> Kind | None:
    """Return the kind of a file that is no weights, tokenizer or JSON at all, whatever its name."""
    head = read_head(path)
    if not head:
        return Kind("empty", _AGAIN) if path.is_file() and not path.stat().st_size else None
    for magic, kind in _MAGICS.items():
        if head.startswith(magic):
            return kind
    if head[:4] in _GGML_MAGICS:
        version = int.from_bytes(head[4:8], "little")
        name = _GGML_MAGICS[head[:4]]
        return Kind(
            f"a GGML file ({name}, version {version}) of llama.cpp from before GGUF"
            if name in ("ggmf", "ggjt")
            else f"a GGML file ({name}) of llama.cpp from before GGUF",
            "download the model as GGUF, or convert it with llama.cpp's "
            "convert_llama_ggml_to_gguf.py",
        )
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(_WEB_BEGINNINGS):
        return _WEB_PAGE
    if head.startswith(_ANSWERS):
        return _ANSWER
    if head[257:262] == b"ustar":
        return Kind("a tar archive", _UNPACK)
    if head[4:8] == b"TFL3":
        return Kind("a TensorFlow Lite model", "get the PyTorch weights (safetensors)")
    if head.startswith(b"PK"):
        return _archive_kind(path)
    if head.startswith(_OLD_TORCH):
        return Kind("in PyTorch's old format", "torch.load it and torch.save it again")
    return None


def _archive_kind(path: Path) -> Kind | None:
    """Return the kind of a zip archive; None for a whole one of PyTorch."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [entry.filename.lower() for entry in archive.infolist()]
    except Exception:  # a damaged archive can raise any error
        return None
    if any(name.endswith("data.pkl") for name in names):
        return None
    if names and all(name.endswith(".npy") for name in names):
        return Kind(
            "an archive of NumPy arrays, as of MLX", "get the PyTorch weights (safetensors)"
        )
    return Kind("a ZIP archive", _UNPACK)


def safetensors_header(path: Path) -> dict[str, Any] | None:
    """Return the header of a safetensors file by tensors' names; None if it isn't one."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 2 <= size <= min(_MAX_HEADER, path.stat().st_size):
                return None
            header = json.loads(file.read(size))
    except (OSError, ValueError, RecursionError):
        return None
    return header if isinstance(header, dict) else None


def missing_bytes(path: Path) -> str | None:
    """Return how much of a file is there, if its own header shows that its end is missing."""
    head = read_head(path)
    if head.startswith(b"PK"):
        try:
            is_whole = zipfile.is_zipfile(path)
        except zipfile.BadZipFile:  # its end is there, but damaged
            return None
        return None if is_whole else f"its end is missing after {path.stat().st_size:,} bytes"
    if path.suffix != ".safetensors" or len(head) < 8:
        return None
    begin, size = int.from_bytes(head[:8], "little") + 8, path.stat().st_size
    entries = (safetensors_header(path) or {}).values()
    places = [entry.get("data_offsets") for entry in entries if isinstance(entry, dict)]
    ends = [place[-1] for place in places if isinstance(place, list) and place]
    total = begin + max((end for end in ends if type(end) is int), default=0)
    if size < total < 1 << 50 and head[8:9] == b"{":
        return f"{size:,} of {total:,} bytes are there"
    return None


def _pickled_texts(data: bytes) -> Iterator[str]:
    """Yield the strings of a pickle without running it, as far as it can be parsed.

    Leaves out a state dictionary's ``_metadata``, whose keys are modules' names such as "model".
    """
    is_metadata = False
    try:
        for opcode, argument, _ in pickletools.genops(io.BytesIO(data)):
            if opcode.name == "BUILD":  # it gives a dictionary its attributes
                is_metadata = False
            elif "UNICODE" in opcode.name and isinstance(argument, str):
                is_metadata = is_metadata or argument == "_metadata"
                if not is_metadata:
                    yield argument
    except Exception:  # the end is cut off, or it is damaged
        return


def pickle_texts(path: Path) -> list[str]:
    """Return the strings at the beginning of a PyTorch file's pickle, without running it."""
    if read_head(path).startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as archive:
                for entry in archive.infolist():
                    if entry.filename.lower().endswith("data.pkl"):
                        with archive.open(entry) as file:
                            return list(_pickled_texts(file.read(_MAX_PICKLE)))
        except Exception:  # a damaged archive can raise any error
            return []
    elif read_head(path).startswith(b"\x80"):  # several pickles: the last has the tensors
        data = read_head(path, _MAX_PICKLE)
        pickles = data.split(b"\x80\x02")
        return [text for piece in pickles for text in _pickled_texts(b"\x80\x02" + piece)]
    return []


def tensor_names(path: Path) -> dict[str, str]:
    """Return the names of a weight file's tensors and, in safetensors, their dtypes."""
    header = safetensors_header(path) if path.suffix == ".safetensors" else None
    if header is not None:
        return {
            name: str(entry.get("dtype")) if isinstance(entry, dict) else ""
            for name, entry in header.items()
            if name != "__metadata__"
        }
    return dict.fromkeys(pickle_texts(path), "")


def quantisation(names: dict[str, str]) -> str | None:
    """Return the method that quantised the tensors of these names and dtypes; None for no known."""
    ends = {name.rpartition(".")[2] for name in names}
    if "qweight" in ends:
        return "GPTQ" if "g_idx" in ends else "GPTQ or AWQ"
    if any(".quant_state.bitsandbytes" in name for name in names):
        return "bitsandbytes"
    for end, method in _QUANTISED_PARTS.items():
        if end in ends:
            return method
    if {"weight_scale", "weight_scale_inv"} & ends:
        is_fp8 = any(dtype.startswith("F8") for dtype in names.values())
        return "FP8" if is_fp8 else "compressed-tensors"
    if {"scales", "biases"} <= ends and "U32" in names.values():
        return "MLX"
    return None


def quantised_kind(method: str) -> Kind:
    """Return the kind of a checkpoint that a method quantised, in a format that isn't read."""
    return Kind(
        f"quantised with {printable(method)}, a format that isn't read here",
        "use the original weights, which quantize='int4' rounds while loading, or a GGUF file",
    )


def unread_kind(names: dict[str, str]) -> Kind | None:
    """Return the kind of tensors of these names and dtypes that a method quantised that isn't read.

    None for plain weights, and for methods of which the reader's error says more.
    """
    method = quantisation(names)
    return quantised_kind(method) if method in _UNREAD else None


def training_kind(texts: Iterable[str]) -> Kind | None:
    """Return the kind of a training checkpoint, by the strings of its pickle."""
    found = set(texts)
    keys = [key for key in (*_NESTED, *_NESTED_MORE) if key in found]
    if not keys or keys[0] not in _NESTED:
        return None
    inner = keys[0]
    return Kind(
        f"a training checkpoint, whose weights lie in an inner dictionary (it has "
        f"{', '.join(keys[:4])})",
        f"torch.load it with weights_only=True, and torch.save what its {inner!r} holds alone",
    )


def contents_kind(path: Path) -> Kind | None:
    """Return the kind of a weight file whose tensors aren't a network's plain weights."""
    names = tensor_names(path)
    if kind := unread_kind(names):
        return kind
    return None if path.suffix == ".safetensors" else training_kind(names)


def explain_heads(paths: Iterable[Path]) -> str | None:
    """Return which files begin as something else than weights or text."""
    kinds = [(path, foreign_kind(path)) for path in [*paths][:MAX_FILES]]
    wrong = [(path, kind) for path, kind in kinds if kind is not None]
    if not wrong:
        return None
    path, kind = wrong[0]
    same = sum(other == kind for _, other in wrong) - 1
    more = f", as {same} other file{'s are' if same > 1 else ' is'}" if same else ""
    return f"{path} is {kind.what}{more}: {kind.remedy}"
