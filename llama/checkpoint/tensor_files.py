"""Files of named tensors, PyTorch's and safetensors, mapped and checked before they are trusted."""

import logging
import pickletools
import re
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

from llama.checkpoint.file_kinds import (
    foreign_kind,
    missing_bytes,
    pickle_texts,
    read_head,
    training_kind,
)
from llama.errors import need, printable
from llama.layers.quantization import Form

logger = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]

# Published files carry these tables, which follow from the hyper-parameters.
_DERIVED = ("rope.freqs", "rotary_emb.inv_freq")

# The names in a state dictionary's pickle, which has about 100 bytes a tensor. Those of float8 name
# their dtype, as there is no storage of it.
_HARMLESS = re.compile(
    r"collections OrderedDict|torch(\.storage)? \w+Storage|torch float8_e4m3fn"
    r"|torch\._utils _rebuild_(tensor_v[23]|parameter)"
)
_MAX_PICKLE_BYTES = 1_000_000
# A tensor has four to six. Many more, in one another and hashed as a key, overflow the stack.
_MAX_TUPLES = 20_000


# Names that compilers and trainers put around the network's own, and those of whole models, such
# as Hugging Face's, which may hold one another.
_WRAPPERS = "_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module"
_WRAPPED = re.compile(rf"^(?:(?:{_WRAPPERS}|base_model|model)\.)+|(?<=\.)(?:(?:{_WRAPPERS})\.)+")


class _RefusedError(ValueError):
    """A file that looks like an attack, or like no weights at all."""


def open_tensors(path: Path) -> Tensors:
    """Map a ``.safetensors`` file or a PyTorch file.

    Raises:
        ImportError: the package ``safetensors`` is missing.
        ValueError: the file is damaged or isn't what its name says.
    """
    if path.suffix != ".safetensors":
        return open_shard(path)
    safetensors = need("safetensors")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} {_diagnosis(path, error)}") from error


def open_shard(path: Path) -> Tensors:
    """Map a PyTorch file's tensors, without derived rotary tables; nothing is read before its use.

    Raises:
        MemoryError: no address space is left to map it.
        OSError: the file can't be read.
        ValueError: the file is no checkpoint.
    """
    path.open("rb").close()  # raises the OSError of a file that can't be opened
    try:
        _check_archive(path)
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except MemoryError:
        raise
    except _RefusedError as error:
        if kind := training_kind(pickle_texts(path)):
            raise ValueError(f"{path} is {kind.what}: {kind.remedy}") from error
        raise
    except Exception as error:
        if "unable to mmap" in str(error):
            raise MemoryError(f"{path} can't be mapped: no address space is left") from error
        raise ValueError(f"{path} {_diagnosis(path, error)}") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor)
        for name, tensor in dict.items(tensors)  # a pickle may give an OrderedDict other items
    ):
        if kind := training_kind(pickle_texts(path)):
            raise ValueError(f"{path} is {kind.what}: {kind.remedy}")
        raise ValueError(f"{path} is no checkpoint: expected a dictionary of named tensors")
    return {name: t for name, t in dict.items(tensors) if not name.endswith(_DERIVED)}


def _check_archive(path: Path) -> None:
    """Refuse an archive that would need more memory than its size, or whose pickle names code.

    With ``weights_only`` PyTorch's unpickler runs no code of the file, but it would decompress its
    parts, and allocate objects as large as a pickle says.
    """
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                part = printable(entry.filename)
                raise _RefusedError(f"{path} is refused: its part {part} is compressed")
            if not entry.filename.lower().endswith(".pkl"):  # PyTorch's search ignores case too
                continue
            if entry.file_size > _MAX_PICKLE_BYTES:
                raise _RefusedError(f"{path} is refused: its pickle is far too large")
            tuples, marks, data = 0, 0, archive.read(entry)
            for opcode, argument, _ in pickletools.genops(data):
                tuples += opcode.name.startswith("TUPLE")
                marks += opcode.name == "MARK"
                if max(tuples, marks) > _MAX_TUPLES:
                    raise _RefusedError(f"{path} is refused: its pickle nests too deeply")
                if opcode.name in ("GLOBAL", "INST") and not _HARMLESS.fullmatch(str(argument)):
                    raise _RefusedError(
                        f"{path} is refused: its pickle names {printable(str(argument))}, which no "
                        "weights need and which could run any code"
                    )
            if not _calls_names_only(data):
                raise _RefusedError(
                    f"{path} is refused: its pickle calls a value, which no weights need and whose "
                    "numbers PyTorch would write into its error"
                )


def _calls_names_only(data: bytes) -> bool:
    """Return whether all that a pickle calls are its globals, as far as it is well-formed.

    Follows the stack of the unpickler, whose entries are True for globals. Storages aren't among
    them: they are named only, and one that is called would take memory.
    """
    stack: list[bool] = []
    marks: list[int] = []
    memo: dict[object, bool] = {}
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "MARK":
                marks.append(len(stack))
            elif opcode.name.endswith("PUT"):
                memo[argument] = stack[-1]
            elif opcode.name.endswith("GET"):
                stack.append(memo[argument])
            elif opcode.name in ("REDUCE", "NEWOBJ") and not stack[-2]:
                return False
            else:
                taken = [kind.name for kind in opcode.stack_before]
                if "mark" in taken:
                    del stack[marks.pop() :]
                    taken = taken[: taken.index("mark")]
                del stack[len(stack) - len(taken) :]
                called = opcode.name == "GLOBAL" and not str(argument).endswith("Storage")
                stack += [called] * len(opcode.stack_after)
    except (IndexError, KeyError):  # PyTorch finds the same, and says so
        pass
    return True


def _diagnosis(path: Path, error: Exception) -> str:
    """Return why a file can't be read and what to do, judging by its beginning."""
    if kind := foreign_kind(path):
        return f"is {kind.what}: {kind.remedy}"
    if path.suffix != ".safetensors" and not read_head(path).startswith(b"PK"):
        return "is no checkpoint, which would be a zip archive: download it again"
    expected = "safetensors file" if path.suffix == ".safetensors" else "checkpoint"
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    reason = missing_bytes(path) or printable(reason, 200)
    return f"is damaged or no {expected} ({reason}): download it again"


def unwrapped(name: str) -> str:
    """Return a tensor's name without those that ``torch.compile``, DDP, FSDP or PEFT put around it.

    Nor does it have the ``model.`` of Hugging Face's names.
    """
    return _WRAPPED.sub("", name)


def main_dtype(
    tensors: Mapping[str, torch.Tensor], source: str, stated: torch.dtype | None = None
) -> torch.dtype:
    """Return the dtype of a checkpoint's weights; a warning names those that it would round.

    Args:
        tensors: the weights that aren't quantised.
        source: the file that describes them, for the warning.
        stated: the dtype that it gives them, which counts where they are of several; None for
            that of most weights.
    """
    sizes: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        sizes[tensor.dtype] += tensor.numel()
    dtype = max(sizes, key=sizes.__getitem__, default=torch.float32)
    if stated is not None and len(sizes) > 1:
        dtype = stated
    wider = [n for n, t in tensors.items() if torch.promote_types(t.dtype, dtype) != dtype]
    if wider:
        logger.warning(
            "%s is of %s, but %d of %d weights are wider, such as %s in %s: a network in %s "
            "rounds them, and dtype=torch.float32 keeps them",
            *(source, dtype, len(wider), len(tensors), wider[0], tensors[wider[0]].dtype, dtype),
        )
    return dtype


def check_plain(tensors: Tensors, name: str, forms: Mapping[str, Form] | None = None) -> None:
    """Raise ``ValueError`` if tensors aren't plain weights, or are larger than their file.

    Args:
        tensors: a file's or a directory's tensors under Meta's names.
        name: the file's name in errors.
        forms: the forms of quantised weights by module, which decide their dtypes.
    """
    for key, tensor in tensors.items():
        plain = tensor.layout == torch.strided and tensor.device.type != "meta"
        module, _, part = key.rpartition(".")
        form = (forms or {}).get(module)
        dtype = form.dtypes().get(part) if form else None
        if dtype is not None:
            if not (plain and tensor.dtype == dtype):
                raise ValueError(
                    f"{printable(key)} in {name} is {tensor.dtype} ({tensor.layout}, "
                    f"{tensor.device}), not a plain {dtype} tensor, as params.json says"
                )
        elif not (plain and tensor.is_floating_point()):
            raise ValueError(
                f"{printable(key)} in {name} is {tensor.dtype} ({tensor.layout}, "
                f"{tensor.device}), not a plain floating-point tensor"
            )
    check_stored(tensors, name)


def check_stored(tensors: Tensors, name: str) -> None:
    """Raise ``ValueError`` if tensors aren't dense ones, or are larger than their file."""
    for key, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type == "meta":
            raise ValueError(
                f"{printable(key)} in {name} is {tensor.dtype} ({tensor.layout}, "
                f"{tensor.device}), not a plain tensor"
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
