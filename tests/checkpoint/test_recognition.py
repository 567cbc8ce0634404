"""Paths handed over by mistake: each error says what it is and what to do, in one sentence."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harmed_files import (
    CODES,
    GGML,
    HTML,
    LORA,
    MISSING,
    POINTER,
    SCALES,
    WRONG,
    Q,
    config,
    emptied,
    packed,
    refused,
    torch_file,
    without,
    write,
)
from hf_files import make_hf
from safetensors.torch import save_file

from llama import Llama
from llama.checkpoint import apply_adapter, open_checkpoint
from llama.checkpoint.recognition import explain_path
from llama.generation import TINY

# A file that is given, and what its error says.
FILES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "pointer": ("model.gguf", lambda p: write(p, POINTER), "Git LFS pointer.*git lfs pull"),
    "web page": ("model.gguf", lambda p: write(p, HTML), "is a web page.*download it again"),
    "refusal": ("m.bin", lambda p: write(p, "<?xml?><Error>"), "a server's message .* new link"),
    "empty": ("m.gguf", lambda p: write(p, b""), "is empty: download it again"),
    "ggjt": ("x.bin", lambda p: write(p, GGML), r"GGML file \(ggjt, version 3\).*GGUF"),
    "ggml": ("x.bin", lambda p: write(p, b"lmgg" + GGML[4:]), r"GGML file \(ggml\).*before GGUF"),
    "ggmf": ("x", lambda p: write(p, b"fmgg" + GGML[4:]), r"GGML file \(ggmf, version 3\)"),
    "zip": ("m.zip", lambda p: packed(p, "zip"), "is a ZIP archive: unpack it"),
    "zip named bin": ("m.bin", lambda p: packed(p, "zip"), "is a ZIP archive: unpack it"),
    "tar": ("m.tar", lambda p: packed(p, "tar"), "is a tar archive: unpack it"),
    "tgz": ("m.tgz", lambda p: packed(p, "gz"), "is a gzip archive: unpack it"),
    "7z": ("m.7z", lambda p: write(p, b"7z\xbc\xaf\x27\x1c0"), "is a 7z archive: unpack it"),
    "rar": ("m.rar", lambda p: write(p, b"Rar!\x1a\x07"), "is a RAR archive: unpack it"),
    "HDF5": ("m.h5", lambda p: write(p, b"\x89HDF\r\n"), "TensorFlow's .*safetensors"),
    "torrent": ("m.torrent", lambda p: write(p, b"d8:announce9:"), "is a torrent"),
    "GPTQ-for-LLaMa": (
        "llama-7b-4bit.pt",
        lambda p: torch_file(p, {f"{Q}.qweight": CODES, f"{Q}.qzeros": CODES}),
        "is one file of a checkpoint, and what belongs to it isn't beside it",
    ),
    "GPTQ in an old file": (
        "llama-7b-4bit.pt",
        lambda p: torch_file(p, {f"{Q}.qweight": CODES, f"{Q}.g_idx": CODES}, legacy=True),
        "is in PyTorch's old format: torch.load it and torch.save it again",
    ),
    "GPTQ in safetensors": (
        "llama-7b-4bit-128g.safetensors",
        lambda p: save_file({f"{Q}.qweight": CODES, f"{Q}.g_idx": CODES[0].clone()}, p),
        "is one file of a checkpoint, and what belongs to it isn't beside it",
    ),
    "EXL2": (
        "output.safetensors",
        lambda p: save_file({f"{Q}.q_invperm": CODES}, p),
        "quantised with EXL2, a format that isn't read here: use the original weights",
    ),
    "training": (
        "last.ckpt",
        lambda p: torch_file(p, {"epoch": 3, "state_dict": {"w": torch.ones(1)}, "optimizer": {}}),
        "training checkpoint.*state_dict, optimizer, epoch.* 'state_dict' holds alone",
    ),
    "training of objects": (
        "last.pt",
        lambda p: torch_file(p, {"model": {"w": torch.ones(1)}, "args": Path("x")}),
        "training checkpoint.* 'model' holds alone",
    ),
    "adapter": (
        "adapter_model.safetensors",
        lambda p: save_file({"a": SCALES}, p),
        "is a file of an adapter: give the base's path, and .* as adapter=",
    ),
    "tokenizer": (
        "tokenizer.model",
        lambda p: shutil.copy(TINY / "tokenizer.model", p),
        "is a tokenizer alone: give it as tokenizer_path",
    ),
    "alone": (
        "model.safetensors",
        lambda p: save_file({"a": SCALES}, p),
        "is one file of a checkpoint, and what belongs to it isn't beside it: download all",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_is_named(case: str, tmp_path: Path) -> None:
    """A failure means that the wrong file gives an error which doesn't say what it is."""
    name, make, message = FILES[case]
    make(tmp_path / name)
    refused(tmp_path / name, ValueError, message)


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer_config.json", "model-00001-of-00002.safetensors"],
)
def test_one_file_of_a_checkpoint_names_its_directory(
    name: str, saved: Path, tmp_path: Path
) -> None:
    """A failure means that someone who gives a file has to guess that its directory is meant."""
    path = shutil.copytree(saved, tmp_path / "model")
    message = f"is one file of a checkpoint: give its directory, {path}$"
    if name.endswith(".safetensors"):
        shutil.copy(path / "model.safetensors", path / name)
    elif not (path / name).exists():
        write(path / name, {})
    refused(path / name, ValueError, message)


def test_metas_file_names_its_directory(checkpoint_dir) -> None:
    """A failure means that consolidated.00.pth in place of its directory isn't understood."""
    path = checkpoint_dir()
    refused(path / "consolidated.00.pth", ValueError, f"give its directory, {path}$")
    refused(path / "params.json", ValueError, f"give its directory, {path}$")


def test_a_training_checkpoint_of_metas_layout_is_named(checkpoint_dir) -> None:
    """A failure means that weights with an optimizer beside them are called damaged."""
    path = checkpoint_dir()
    file = path / "consolidated.00.pth"
    torch_file(file, {"model": torch.load(file), "optimizer": {"lr": 0.1}})
    refused(path, ValueError, "training checkpoint.* 'model' holds alone")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("meta-llama/Llama-2-7b", "hf download meta-llama/Llama-2-7b --local-dir Llama-2-7b"),
        ("https://huggingface.co/org/name", "is an address: .*hf download org/name"),
        ("https://example.org/x", "is an address: download the checkpoint's files"),
        ("/nowhere/at/all", "no checkpoint directory at /nowhere/at/all: check ckpt_dir$"),
    ],
)
def test_a_path_that_does_not_exist(path: str, message: str) -> None:
    """A failure means that a model's name on the hub is taken for a typing error."""
    refused(Path(path), FileNotFoundError, message)


def test_a_mistyped_path_is_completed(tmp_path: Path) -> None:
    """A failure means that a typing error has to be found by eye."""
    (tmp_path / "llama-2-7b-chat").mkdir()
    message = f"no checkpoint directory at .*: check the path; there is {tmp_path}/llama-2-7b-chat$"
    refused(tmp_path / "lama-2-7b-chat", FileNotFoundError, message)
    (tmp_path / "gone").symlink_to("nowhere")
    refused(tmp_path / "gone", FileNotFoundError, "gone is a link to nothing")


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda p: p / "gone", MISSING, "no adapter_config|no .*gone"),
        (
            lambda p: p,
            MISSING,
            "is a checkpoint, since it has no adapter_config.json: give that as",
        ),
        (lambda p: p / "model.safetensors", MISSING, "is a file: give the adapter's directory"),
        (lambda p: emptied(p, a=b""), MISSING, "is no adapter, since .* that PEFT wrote"),
        (
            lambda p: emptied(
                p, adapter_config__json=LORA | {"lora_alpha": 8}, adapter_model__safetensors=POINTER
            ),
            WRONG,
            "adapter_model.safetensors is a Git LFS pointer",
        ),
        (lambda p: Path("org/adapter"), MISSING, "no adapter at org/adapter: .*hf download org/ad"),
    ],
    ids=["gone", "checkpoint", "file", "other", "pointer", "hub"],
)
def test_what_is_no_adapter_is_named(
    make: Callable[[Path], Path], kind: type[Exception], message: str, saved: Path, tmp_path: Path
) -> None:
    """A failure means that a wrong adapter's path gives an error about a file inside it."""
    path = make(shutil.copytree(saved, tmp_path / "model"))
    with pytest.raises(kind, match=message):
        apply_adapter(open_checkpoint(TINY), path)


def test_a_checkpoint_that_opens_is_not_examined(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure means that sound checkpoints pay for the recognition of others."""

    def examined(path: Path) -> str:
        raise AssertionError(path)

    monkeypatch.setattr("llama.checkpoint.explain_path", examined)
    monkeypatch.setattr("llama.checkpoint.pretrained.explain_texts", examined)
    Llama.build(saved, device="cpu")


def test_another_fault_keeps_its_own_error(saved: Path, tmp_path: Path) -> None:
    """A failure means that leftovers beside sound weights hide why a checkpoint is refused."""
    path = shutil.copytree(saved, tmp_path / "model")
    write(path / "pytorch_model.bin", POINTER)
    write(path / "model-00001-of-00002.safetensors.incomplete", b"1")
    write(path / "model.onnx", b"1")
    config(path, hidden_act="gelu")
    assert explain_path(path) is None
    refused(path, ValueError, "the hidden_act 'gelu': expected 'silu'")


def test_a_plain_state_dict_is_no_training_checkpoint(saved: Path, tmp_path: Path) -> None:
    """A failure means that the modules' names beside weights hide why these are refused."""
    path = without(shutil.copytree(saved, tmp_path / "model"), "model.safetensors")
    model = make_hf()
    torch_file(path / "pytorch_model.bin", model.state_dict())
    config(path, hidden_act="gelu")
    refused(path, ValueError, "the hidden_act 'gelu': expected 'silu'")
    config(path, hidden_act="silu")
    model.register_buffer("args", torch.ones(1))  # a key of training checkpoints
    torch_file(path / "pytorch_model.bin", model.state_dict())
    refused(path, ValueError, "has the unexpected args")
    torch_file(path / "pytorch_model.bin", {"model": model.state_dict(), "optimizer": {}})
    refused(path, ValueError, "training checkpoint.* 'model' holds alone")


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_a_leftover_of_a_quantiser_hides_no_error(name: str, saved: Path, tmp_path: Path) -> None:
    """A failure means that plain weights are called quantised, by a file that lies beside them."""
    path = shutil.copytree(saved, tmp_path / "model")
    write(path / name, {"bits": 4})
    config(path, hidden_act="gelu")
    refused(path, ValueError, "the hidden_act 'gelu': expected 'silu'")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs")
def test_nothing_waits_for_a_fifo(saved: Path, tmp_path: Path) -> None:
    """A failure means that a special file in a directory hangs the program."""
    path = without(shutil.copytree(saved, tmp_path / "model"), "config.json", "model.safetensors")
    for name in ("config.json", "model.safetensors", "x.bin", "model.zip"):
        os.mkfifo(path / name)
    refused(path, FileNotFoundError, "is a tokenizer alone")
