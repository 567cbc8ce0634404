"""The files of a checkpoint directory in Meta's layout: found, mapped and checked."""

import contextlib
import pickletools
import re
import zipfile
from pathlib import Path

import torch

from llama.args import read_params
from llama.errors import printable
from llama.layers.quantization import Int4, Scheme, scheme_of
from llama.weights import Checkpoint, Weights

# Published files carry these tables, which follow from the hyper-parameters.
_DERIVED = ("rope.freqs", "rotary_emb.inv_freq")
# How PyTorch's files began before they were zip archives: a pickled number.
_OLD_FORMAT = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"

# What the pickle of a state dictionary names; it takes about 100 bytes a tensor.
_HARMLESS = re.compile(
    r"collections OrderedDict|torch \w+Storage|torch._utils _rebuild_(tensor_v2|parameter)"
)
_LARGEST_PICKLE = 1_000_000
# A tensor takes four to six. Many more, in one another and hashed as a key, overflow the stack.
_MOST_TUPLES = 20_000

Tensors = dict[str, torch.Tensor]


def find_shards(ckpt_dir: Path) -> list[Path]:
    """The checkpoint's weight files in order.

    Raises:
        FileNotFoundError: the directory or its shards are missing.
    """
    if not ckpt_dir.is_dir():
        raise FileNotFoundError(f"no checkpoint directory at {ckpt_dir}: check ckpt_dir")
    shards = sorted(ckpt_dir.glob("consolidated.*.pth"))
    if not shards:
        raise FileNotFoundError(
            f"{ckpt_dir} has no weights: expected consolidated.00.pth, consolidated.01.pth, ..."
        )
    for number, path in enumerate(shards):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is no regular file: download it again")
        if path.name != f"consolidated.{number:02d}.pth":
            raise FileNotFoundError(
                f"{ckpt_dir} has {len(shards)} weight files but consolidated.{number:02d}.pth is "
                f"missing (found {path.name} in its place): download it again"
            )
    return shards


def find_tokenizer(ckpt_dir: Path) -> Path:
    """The checkpoint's tokenizer, beside it or, as in Llama 2's layout, one directory up.

    Raises:
        FileNotFoundError: there is none.
    """
    for directory in (ckpt_dir, ckpt_dir.resolve().parent):
        path = directory / "tokenizer.model"
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"no tokenizer.model in {ckpt_dir} or its parent: give its path as tokenizer_path"
    )


def open_shard(path: Path) -> Tensors:
    """Map a shard's tensors into memory; nothing is read until it is used.

    Raises:
        MemoryError: there is no address space left to map it.
        OSError: the file can't be read.
        ValueError: the file is no checkpoint.
    """
    path.open("rb").close()  # what can't be opened says so itself
    try:
        _check_archive(path)
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (MemoryError, _RefusedError):
        raise
    except Exception as error:
        if "unable to mmap" in str(error):
            raise MemoryError(f"{path} can't be mapped: no address space is left") from error
        raise ValueError(f"{path} {_what_is_wrong(path, error)}") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor)
        for name, tensor in dict.items(tensors)  # a pickle may give an OrderedDict other items
    ):
        raise ValueError(f"{path} is no checkpoint: expected a dictionary of named tensors")
    return {name: t for name, t in dict.items(tensors) if not name.endswith(_DERIVED)}


class _RefusedError(ValueError):
    """A file that only an attacker, or no weights, would look like."""


def _check_archive(path: Path) -> None:
    """Refuse an archive that would take more memory than its size, or that names foreign code.

    PyTorch's unpickler runs no foreign code with ``weights_only``, but it would unpack what is
    compressed, and make objects as large as a pickle tells it.
    """
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                part = printable(entry.filename)
                raise _RefusedError(f"{path} is refused: its part {part} is compressed")
            if not entry.filename.lower().endswith(".pkl"):  # PyTorch's search ignores case too
                continue
            if entry.file_size > _LARGEST_PICKLE:
                raise _RefusedError(f"{path} is refused: its pickle is far too large")
            tuples = 0
            for opcode, argument, _ in pickletools.genops(archive.read(entry)):
                tuples += opcode.name.startswith("TUPLE")
                if opcode.name in ("GLOBAL", "INST") and not _HARMLESS.fullmatch(str(argument)):
                    raise _RefusedError(
                        f"{path} is refused: its pickle names {printable(str(argument))}, which no "
                        "weights need and which could run foreign code"
                    )
            if tuples > _MOST_TUPLES:
                raise _RefusedError(f"{path} is refused: its pickle nests too deeply")


def _what_is_wrong(path: Path, error: Exception) -> str:
    """Why a file can't be read, in terms of the file."""
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        return "is empty: download it again"
    if b"<html" in head.lower() or b"<!doctype" in head.lower():
        return "is a web page, not a checkpoint: download it again, perhaps with a new link"
    if head.startswith(_OLD_FORMAT):
        return "is in PyTorch's old format: torch.load it and torch.save it again"
    if not head.startswith(b"PK"):
        return "is no checkpoint, which would be a zip archive: download it again"
    reason = printable((str(error).splitlines() or [type(error).__name__])[0], 200)
    return f"is damaged or no checkpoint ({reason}): download it again"


def open_meta(ckpt_dir: Path) -> Checkpoint:
    """Map a checkpoint in Meta's layout.

    Raises:
        FileNotFoundError: weight files or ``params.json`` are missing.
        ValueError: a file is no checkpoint.
    """
    paths = find_shards(ckpt_dir)
    params = read_params(ckpt_dir / "params.json")
    scheme = scheme_of(params, str(ckpt_dir / "params.json"))
    shards = [open_shard(path) for path in paths]
    for path, shard in zip(paths, shards, strict=True):
        check_plain(shard, str(path), scheme)
    embedding = shards[0].get("tok_embeddings.weight")
    first = shards[0].get("norm.weight") if scheme else embedding
    dtype = torch.float32 if first is None else first.dtype
    if embedding is not None and embedding.dim() == 2 and embedding.shape[1] > 0:
        dim = params.get("dim")
        if isinstance(scheme, Int4) and isinstance(dim, int):
            dim //= 2  # since a byte holds two
        total = dim // embedding.shape[1] if isinstance(dim, int) else 0
        if 64 >= total > len(paths) and total * embedding.shape[1] == dim:
            raise FileNotFoundError(
                f"{ckpt_dir} has {len(paths)} of {total} weight files: "
                f"consolidated.{len(paths):02d}.pth is missing"
            )
    names = [str(path) for path in paths]
    parts = [Weights.of(shard, mapped=True) for shard in shards]
    files: dict[str, Path | bytes] = dict(text_files(ckpt_dir))
    if "tokenizer.model" not in files and "tokenizer.json" not in files:
        with contextlib.suppress(FileNotFoundError):
            files["tokenizer.model"] = find_tokenizer(ckpt_dir)
    return Checkpoint(
        f"{ckpt_dir / 'params.json'}", params, parts, names, dtype, files, scheme=scheme
    )


# What lies beside weights and concerns text, by Hugging Face's names.
TEXT_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


def text_files(directory: Path) -> dict[str, Path]:
    """Those of ``TEXT_FILES`` that a directory has."""
    paths = {name: directory / name for name in TEXT_FILES}
    return {name: path for name, path in paths.items() if path.is_file()}


def check_plain(tensors: Tensors, name: str, scheme: Scheme | None = None) -> None:
    """Raise ``ValueError`` if a tensor isn't what weights are, or more than its file holds."""
    for key, tensor in tensors.items():
        plain = tensor.layout == torch.strided and tensor.device.type != "meta"
        module, _, part = key.rpartition(".")
        wanted = scheme.dtypes().get(part) if scheme and scheme.applies_to(module) else None
        if wanted is not None:
            if not (plain and tensor.dtype == wanted):
                raise ValueError(
                    f"{printable(key)} in {name} is {tensor.dtype} ({tensor.layout}, "
                    f"{tensor.device}), not a plain {wanted} tensor, as params.json says"
                )
        elif not (plain and tensor.is_floating_point()):
            raise ValueError(
                f"{printable(key)} in {name} is {tensor.dtype} ({tensor.layout}, "
                f"{tensor.device}), not a plain floating-point tensor"
            )
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"{printable(key)} in {name} repeats numbers that are stored once")
    # Names may share a storage, as tied weights do; many that do are an attack on the memory.
    storages = {
        storage.data_ptr(): storage.nbytes()
        for storage in (tensor.untyped_storage() for tensor in tensors.values())
    }
    size = sum(tensor.nbytes for tensor in tensors.values())
    if size > 2 * sum(storages.values()):
        raise ValueError(f"the tensors of {name} repeat numbers that are stored once")
