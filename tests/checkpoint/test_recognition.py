"""Paths handed over by mistake: each error says what it is and what to do, in one sentence."""

import io
import json
import os
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_files import make_hf
from safetensors.torch import load_file, save_file

from llama import Llama
from llama.checkpoint import apply_adapter, open_checkpoint
from llama.checkpoint.recognition import explain_path
from llama.convert import convert
from llama.generation import TINY

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"
HTML = b"\n<!DOCTYPE html><html><title>Sign in</title></html>"
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model as a Hugging Face directory."""
    path = tmp_path_factory.mktemp("saved") / "model"
    convert(str(TINY), str(path), "hf")
    return path


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
        "quantised with GPTQ or AWQ.*original weights",
    ),
    "GPTQ in an old file": (
        "llama-7b-4bit.pt",
        lambda p: torch_file(p, {f"{Q}.qweight": CODES, f"{Q}.g_idx": CODES}, legacy=True),
        "is in PyTorch's old format: torch.load it and torch.save it again",
    ),
    "GPTQ in safetensors": (
        "llama-7b-4bit-128g.safetensors",
        lambda p: save_file({f"{Q}.qweight": CODES, f"{Q}.g_idx": CODES[0].clone()}, p),
        "quantised with GPTQ, a format",
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


LORA = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 4}
MISSING, WRONG = FileNotFoundError, ValueError

# A harm of a Hugging Face directory, and what its error says.
DIRECTORIES: dict[str, tuple[Callable[[Path], Path | object], type[Exception], str]] = {
    "pointer to weights": (
        lambda p: write(p / "model.safetensors", POINTER).parent,
        WRONG,
        r"model\.safetensors is a Git LFS pointer.*: run git lfs pull",
    ),
    "pointer to a tokenizer": (
        lambda p: write(p / "tokenizer.model", POINTER).parent,
        WRONG,
        r"tokenizer\.model is a Git LFS pointer",
    ),
    "pointer to a JSON tokenizer": (
        lambda p: write(without(p, "tokenizer.model") / "tokenizer.json", POINTER).parent,
        WRONG,
        r"tokenizer\.json is a Git LFS pointer",
    ),
    "pointers": (
        lambda p: [write(p / n, POINTER).parent for n in ("config.json", "model.safetensors")][-1],
        WRONG,
        "is a Git LFS pointer.*, as 1 other file is: run git",
    ),
    "pointer to a PyTorch file": (
        lambda p: write(without(p, "model.safetensors") / "pytorch_model.bin", POINTER).parent,
        WRONG,
        r"pytorch_model\.bin is a Git LFS pointer",
    ),
    "page in place of weights": (
        lambda p: write(p / "model.safetensors", HTML).parent,
        WRONG,
        r"model\.safetensors is a web page",
    ),
    "page in place of config": (
        lambda p: write(p / "config.json", HTML).parent,
        WRONG,
        r"config\.json is a web page",
    ),
    "AutoGPTQ": (
        lambda p: (
            write(
                quantised(p, "gptq_model-4bit-128g.safetensors", qweight=CODES)
                / "quantize_config.json",
                {"bits": 4},
            ).parent
        ),
        MISSING,
        r"quantised with AutoGPTQ \(quantize_config.json\), a format that isn't read",
    ),
    "AWQ": (
        lambda p: write(without(p, "model.safetensors") / "quant_config.json", {}).parent,
        MISSING,
        "quantised with AWQ",
    ),
    **{
        method: (
            lambda p, method=method: config(p, quantization_config={"quant_method": method}),
            WRONG,
            f"quantised with {method}, a format that isn't read here: use the original weights",
        )
        for method in ("gptq", "awq", "bitsandbytes", "compressed-tensors", "fp8", "exl2")
    },
    "tensors of GPTQ": (
        lambda p: quantised(p, qweight=CODES, g_idx=CODES[0].clone()),
        WRONG,
        "quantised with GPTQ, a",
    ),
    "tensors of EXL2": (
        lambda p: quantised(p, "output.safetensors", q_invperm=CODES),
        MISSING,
        r"output\.safetensors is quantised with EXL2",
    ),
    "tensors of bitsandbytes": (
        lambda p: quantised(
            p, **{"weight.absmax": SCALES, "weight.quant_state.bitsandbytes__nf4": CODES.byte()}
        ),
        WRONG,
        "quantised with bitsandbytes, a",
    ),
    "tensors of FP8": (
        lambda p: quantised(p, weight=SCALES.to(torch.float8_e4m3fn), weight_scale=SCALES),
        WRONG,
        "quantised with FP8, a",
    ),
    "packed tensors": (
        lambda p: quantised(p, weight_packed=CODES, weight_scale=SCALES),
        WRONG,
        "quantised with compressed-tensors, a",
    ),
    "another family": (
        lambda p: config(p, model_type="whisper", architectures=["WhisperForAudio"]),
        WRONG,
        "is of model_type 'whisper': expected 'llama', or 'mistral'.*; load this WhisperForAudio",
    ),
    "training": (
        lambda p: (
            torch_file(
                without(p, "model.safetensors") / "pytorch_model.bin", {"model": {"w": SCALES}}
            ).parent
        ),
        WRONG,
        "training checkpoint.* 'model' holds alone",
    ),
    "cut": (
        lambda p: cut(p / "model.safetensors", 99_999),
        WRONG,
        r"damaged or no safetensors file \(99,999 of 3,\d+,\d+ bytes are there\): download it",
    ),
    "cut PyTorch file": (
        lambda p: cut(
            torch_file(
                without(p, "model.safetensors") / "pytorch_model.bin", {"a": torch.ones(9999)}
            ),
            9999,
        ),
        WRONG,
        r"damaged or no checkpoint \(its end is missing after 9,999 bytes\): download it",
    ),
    "missing parts": (
        lambda p: indexed(p, parts(3)),
        MISSING,
        "index.json names model-00002-of-00003.safetensors, which is missing, as 1 more of 3 files",
    ),
    "no part": (
        lambda p: without(indexed(p, parts(2)), parts(2)[0]),
        MISSING,
        "names model-00001-of-00002.safetensors, which is missing, as 1 more of 2 files",
    ),
    "fewer bytes": (
        lambda p: indexed(config(p, hidden_act="gelu"), parts(1), 10**9),
        WRONG,
        "holds 3,[0-9,]+ of the 1,000,000,000 bytes of weights that model.safetensors.index.json",
    ),
    "parts without an index": (
        lambda p: without(indexed(p, parts(1)), "model.safetensors.index.json"),
        MISSING,
        "lacks model.safetensors.index.json, which names its 1 weight files",
    ),
    "some parts without an index": (
        lambda p: without(indexed(p, parts(4)), "model.safetensors.index.json"),
        MISSING,
        r"has 1 of 4 weight files model-\*: the download is unfinished",
    ),
    "broken link": (
        lambda p: (without(p, "model.safetensors") / "model.safetensors").symlink_to(
            "../../blobs/abc"
        ),
        MISSING,
        "model.safetensors as a link to nothing: the download is unfinished",
    ),
    "unfinished": (
        lambda p: write(without(p, "model.safetensors") / "model.safetensors.part", b"1").parent,
        MISSING,
        r"holds an unfinished download \(model\.safetensors\.part\): run the download again",
    ),
    "unfinished with a tool": (unfinished_cache, MISSING, r"unfinished download \(abc\.incomp"),
    "cache": (
        cached,
        MISSING,
        "of org/name in Hugging Face's cache: give the snapshot in it, .*snapshots/abc123$",
    ),
    "snapshots": (lambda p: cached(p) / "snapshots", MISSING, "folder of org/name .*/abc123$"),
    "unfinished cache": (
        lambda p: cached(without(p, "config.json")),
        MISSING,
        "where no snapshot is whole: run the download again",
    ),
    "tokenizer": (
        lambda p: without(p, "model.safetensors", "config.json"),
        MISSING,
        "is a tokenizer alone: give a directory with weights",
    ),
    "weights without config": (
        lambda p: without(p, "config.json"),
        MISSING,
        "has model.safetensors but no config.json: download that too",
    ),
    "adapter": (
        lambda p: emptied(p, adapter_config__json=LORA, adapter_model__safetensors=b"x"),
        MISSING,
        r"is an adapter \(LORA\) alone: .*, which is org/base, and this directory as adapter=",
    ),
    "clone": (
        lambda p: write(without(p, "model.safetensors") / ".git" / "HEAD", "x").parents[1],
        MISSING,
        "is a repository without weights: run git lfs pull",
    ),
    "archive": (
        lambda p: packed(emptied(p) / "model.zip", "zip").parent,
        MISSING,
        r"holds an archive \(model\.zip\): unpack it",
    ),
    "index.html": (lambda p: emptied(p, index__html=HTML), MISSING, "holds a web page, not a mod"),
    "empty": (emptied, MISSING, "is empty and has no weights: download"),
    "nested": (
        lambda p: nested(p, "llama-2-7b"),
        MISSING,
        r"holds a checkpoint in a directory of its own: give .*outer/llama-2-7b$",
    ),
    "several": (
        lambda p: nested(p, "a", "b"),
        MISSING,
        "several checkpoints: give one of .*a, .*b$",
    ),
    "diffusers": (lambda p: emptied(p, model_index__json={}), MISSING, "is a diffusers pipeline"),
    "TensorFlow": (lambda p: emptied(p, tf_model__h5=b"\x89HDF"), MISSING, "of TensorFlow weights"),
    "Flax": (lambda p: emptied(p, flax_model__msgpack=b"x"), MISSING, "of Flax weights .*get the"),
    "ONNX": (lambda p: emptied(p, model__onnx=b"x"), MISSING, r"is an ONNX model \(model.onnx\)"),
    "MLX": (lambda p: emptied(p, weights__npz=b"PK"), MISSING, "is a directory of MLX weights"),
    "DeepSpeed": (lambda p: emptied(p, zero_to_fp32__py="x"), MISSING, "run its zero_to_fp32.py"),
    "another name": (
        lambda p: (p / "model.safetensors").rename(p / "llama.safetensors").parent,
        MISSING,
        "under a name that isn't looked for, llama.safetensors: rename it to "
        "model.safetensors if it is all of a transformers model$",
    ),
    "GGML inside": (lambda p: emptied(p, x__bin=GGML), MISSING, r"x\.bin is a GGML file \(ggjt"),
}


@pytest.mark.parametrize("case", DIRECTORIES)
def test_a_directory_is_named(case: str, saved: Path, tmp_path: Path) -> None:
    """A failure means that a directory gives an error which doesn't say what it is."""
    harm, kind, message = DIRECTORIES[case]
    path = shutil.copytree(saved, tmp_path / "model")
    harmed = harm(path)
    refused(harmed if isinstance(harmed, Path) else path, kind, message)


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "config.json", "tokenizer_config.json"],
)
def test_one_file_of_a_checkpoint_names_its_directory(name: str, saved: Path) -> None:
    """A failure means that someone who gives a file has to guess that its directory is meant."""
    message = f"is one file of a checkpoint: give its directory, {saved}$"
    if not (saved / name).exists():
        write(saved / name, {})
    refused(saved / name, ValueError, message)


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
