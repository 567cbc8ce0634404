"""Tiny quantised directories, which the formats' own packages have written.

tools/quantized_fixtures.py made the archive.
"""

import functools
import json
import tarfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

_ARCHIVE = Path(__file__).parent / "data" / "quantized.tar.xz"


@functools.cache
def _files() -> dict[str, bytes]:
    with tarfile.open(_ARCHIVE) as archive:
        members = {member.name: archive.extractfile(member) for member in archive.getmembers()}
        return {name: file.read() for name, file in members.items() if file}


def quantized_names() -> list[str]:
    return sorted({name.partition("/")[0] for name in _files()})


def quantized_directory(name: str, parent: Path) -> Path:
    """Write a directory of the archive below ``parent``."""
    directory = parent / name
    directory.mkdir()
    for path, content in _files().items():
        if path.startswith(f"{name}/"):
            (parent / path).write_bytes(content)
    return directory


def expected_logits(directory: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The token ids and the logits that transformers gives with the package's own weights."""
    expected = load_file(directory / "expected.safetensors")
    return expected["tokens"], expected["logits"]


def settings_and_modules(directory: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The settings of a directory, and its tensors by their modules and the rest of their names."""
    settings = json.loads((directory / "config.json").read_text())["quantization_config"]
    modules: dict[str, dict[str, Any]] = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        end = next(i for i, part in enumerate(name.split(".")) if part in _LAST) + 1
        module, part = ".".join(name.split(".")[:end]), ".".join(name.split(".")[end:])
        modules.setdefault(module, {})[part] = tensor
    return settings, modules


_LAST = {
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("input_layernorm", "post_attention_layernorm", "norm", "embed_tokens", "lm_head"),
}
