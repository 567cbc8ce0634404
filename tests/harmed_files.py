"""Checkpoints' directories with a harm, for tests of the errors that these give."""

import io
import json
import os
import shutil
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama import Llama

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"
HTML = b"\n<!DOCTYPE html><html><title>Sign in</title></html>"
Q = "model.layers.0.self_attn.q_proj"


def write(path: Path, content: bytes | str | object) -> Path:
    """Write bytes, a text or an object as JSON; gives the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
    path.write_bytes(content)
    return path


def torch_file(path: Path, content: Any, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def config(path: Path, **values: Any) -> Path:
    found = json.loads((path / "config.json").read_text())
    write(path / "config.json", {**found, **values})
    return path


def without(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).unlink()
    return path


def packed(path: Path, kind: str) -> Path:
    """An archive of a checkpoint."""
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("model/config.json", "{}")
    else:
        with tarfile.open(path, "w:gz" if kind == "gz" else "w") as tar:
            tar.addfile(tarfile.TarInfo("model/config.json"), io.BytesIO())
    return path


def quantised(path: Path, name: str = "model.safetensors", **parts: torch.Tensor) -> Path:
    """A directory whose queries are stored in other parts than a weight."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    del tensors[f"{Q}.weight"]
    tensors |= {f"{Q}.{part}": tensor for part, tensor in parts.items()}
    save_file(tensors, path / name)
    return path


CODES, SCALES = torch.zeros(8, 64, dtype=torch.int32), torch.ones(1, 64)
GGML = struct.pack("<9I", 0x67676A74, 3, 32000, 4096, 256, 32, 32, 128, 2) + bytes(999)

LORA = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 4}
MISSING, WRONG = FileNotFoundError, ValueError


def refused(path: Path, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as error:
        Llama.build(path, device="cpu")
    assert type(error.value) is kind
    assert len(str(error.value)) < 700 and str(error.value).isprintable()


def cached(path: Path) -> Path:
    """As Hugging Face's cache lays a model out."""
    model = path.parent / "models--org--name"
    (model / "snapshots").mkdir(parents=True)
    write(model / "refs" / "main", "abc123")
    path.rename(model / "snapshots" / "abc123")
    return model


def indexed(path: Path, files: list[str], size: int = 0) -> Path:
    """Name the parts of a checkpoint in an index; the first of them exists."""
    (path / "model.safetensors").rename(path / files[0])
    weight_map = dict.fromkeys(load_file(path / files[0]), files[0])
    weight_map |= {f"x{i}": file for i, file in enumerate(files[1:])}
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write(path / "model.safetensors.index.json", index)
    return path


def parts(n: int) -> list[str]:
    return [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]


def cut(path: Path, size: int) -> Path:
    os.truncate(path, size)
    return path.parent


def emptied(path: Path, **files: Any) -> Path:
    """A directory of other files."""
    shutil.rmtree(path)
    path.mkdir()
    for name, content in files.items():
        write(path / name.replace("__", "."), content)
    return path


def nested(path: Path, *names: str) -> Path:
    """Checkpoints in directories of their own."""
    outer = path.parent / "outer"
    for name in names:
        shutil.copytree(path, outer / name)
    write(outer / "notes" / "readme.txt", "nothing")
    return outer


def unfinished_cache(path: Path) -> Path:
    """As ``hf download --local-dir`` leaves a download that was broken off."""
    without(path, "model.safetensors")
    write(path / ".cache" / "huggingface" / "download" / "abc.incomplete", b"1234")
    return path
