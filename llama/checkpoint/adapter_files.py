"""The files of an adapter that PEFT wrote: its settings and its tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint.adapter_config import PROMPT_KINDS, read_config
from llama.checkpoint.tensor_files import check_plain, open_tensors
from llama.errors import printable

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter as it lies in a directory.

    Attributes:
        config: the settings (``read_config``).
        path: of the file of tensors, for errors.
        tensors: under PEFT's names, mapped.
    """

    config: Mapping[str, Any]
    path: Path
    tensors: Mapping[str, torch.Tensor]

    @property
    def has_prompt(self) -> bool:
        """True if the adapter puts virtual tokens in front of a prompt."""
        return self.config["peft_type"] in PROMPT_KINDS

    @property
    def classifies(self) -> bool:
        return self.config.get("task_type") == "SEQ_CLS"


def open_adapter(directory: Path) -> AdapterFiles:
    """Map an adapter.

    Args:
        directory: has ``adapter_config.json`` and ``adapter_model.safetensors`` or ``.bin``.

    Raises:
        FileNotFoundError: a file is missing.
        ImportError: the package ``safetensors`` is missing.
        ValueError: a file is damaged, or sets something that can't be honoured.
    """
    config = read_config(directory / "adapter_config.json")
    for name in _WEIGHTS:
        path = directory / name
        if path.is_file():
            tensors = open_tensors(path)
            check_plain(tensors, str(path))
            damaged = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
            if damaged:  # others in a batch would end with the first that uses it
                raise ValueError(
                    f"{printable(damaged[0])} in {path} holds an infinity or a NaN: the adapter's "
                    "training failed, or the file is damaged"
                )
            return AdapterFiles(config, path, tensors)
    raise FileNotFoundError(f"{directory} has no adapter weights: expected {' or '.join(_WEIGHTS)}")
