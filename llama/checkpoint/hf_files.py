"""The tensors in the weight files of a Hugging Face directory, by their modules."""

import logging
import re
from pathlib import Path

import torch

from llama.checkpoint.folders import Folder
from llama.checkpoint.hf_names import module_and_part
from llama.checkpoint.params import read_params
from llama.checkpoint.tensor_files import Tensors, check_stored, open_tensors, unwrapped
from llama.errors import printable

logger = logging.getLogger(__name__)

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# Derived from the hyper-parameters, or the scales of a key/value cache in eight bits.
_UNUSED = re.compile(r"(.+\.)?(rotary_emb\.inv_freq|self_attn\.([qkv]|kv)_(scale|zero_point))")


def open_modules(
    directory: Path, file: Path | None, classifies: bool
) -> dict[str, dict[str, torch.Tensor]]:
    """Map all tensors of a directory: by module, and by the rest of their names.

    Args:
        directory: that of the files.
        file: the weight file; None to look for one or more.
        classifies: whether the network is a classifier, which uses no ``lm_head``.

    Raises:
        FileNotFoundError: a file is missing.
        ImportError: the package ``safetensors`` is missing.
        ValueError: a file is damaged, or has tensors that no Llama has.
    """
    modules: dict[str, dict[str, torch.Tensor]] = {}
    stored: Tensors = {}  # under the files' own names
    for name, tensor in (open_tensors(file) if file else _open_weights(directory)).items():
        bare = unwrapped(name)
        if _UNUSED.fullmatch(bare) or (bare == "lm_head.weight" and classifies):
            continue
        found = module_and_part(bare)
        if found is None:
            raise ValueError(f"{directory} has the unexpected {printable(name)}")
        module, part = found
        parts = modules.setdefault(module, {})
        if part in parts:
            raise ValueError(
                f"{directory} holds {printable(f'{module}.{part}')} twice, under two names: one is "
                f"{printable(name)}"
            )
        parts[part] = stored[name] = tensor
    check_stored(stored, str(directory))
    return modules


def _open_weights(directory: Path) -> Tensors:
    """Map all tensors of a directory under Hugging Face's names.

    As transformers does, a single file comes before an index beside it, which is an older one's.
    """
    for name in _WEIGHTS:
        path, index = directory / name, directory / f"{name}.index.json"
        if path.is_file():
            if index.is_file():
                logger.warning("%s is ignored: %s beside it holds all weights", index, name)
            return open_tensors(path)
        if index.is_file():
            return _open_index(index)
    if files := Folder(directory).unusual_weights:
        return {name: tensor for file in files for name, tensor in open_tensors(file).items()}
    names = [file for name in _WEIGHTS for file in (name, f"{name}.index.json")]
    raise FileNotFoundError(
        f"{directory} has no weights: expected one of {', '.join(names)}; download them, or run "
        "git lfs pull in a clone"
    )


def _open_index(path: Path) -> Tensors:
    """Map all tensors of the files that an index names."""
    weight_map = read_params(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in weight_map.values()
    ):
        raise ValueError(f"{path} has no weight_map from tensors to files next to it")
    tensors: Tensors = {}
    existing = {entry.name for entry in path.parent.iterdir() if entry.is_file()}
    for file in sorted(set(weight_map.values())):
        if file not in existing:
            raise FileNotFoundError(f"{path} names {printable(file)}, which is missing")
        opened = open_tensors(path.parent / file)
        for name in (name for name, target in weight_map.items() if target == file):
            if name not in opened:
                raise ValueError(
                    f"{path} says that {printable(name)} is in {printable(file)}, but it isn't: "
                    "download both again"
                )
        tensors |= opened
    return tensors
