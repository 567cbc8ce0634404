"""Directories handed over by mistake: each error says what it is and what to do."""

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
    cached,
    config,
    cut,
    emptied,
    indexed,
    nested,
    packed,
    parts,
    quantised,
    refused,
    torch_file,
    unfinished_cache,
    without,
    write,
)

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
        WRONG,
        r"self_attn\.q_proj\.scales is missing beside qweight",
    ),
    "AWQ": (
        lambda p: write(without(p, "model.safetensors") / "quant_config.json", {}).parent,
        MISSING,
        "has no weights: expected one of",
    ),
    **{
        method: (
            lambda p, method=method: config(p, quantization_config={"quant_method": method}),
            WRONG,
            f"quantised with {method}, a format that isn't read here: use the original weights",
        )
        for method in ("exl2", "aqlm", "quip", "torchao")
    },
    "tensors of GPTQ": (
        lambda p: quantised(p, qweight=CODES, g_idx=CODES[0].clone()),
        WRONG,
        "q_proj.scales is missing beside g_idx, qweight",
    ),
    "tensors of EXL2": (
        lambda p: quantised(p, "output.safetensors", q_invperm=CODES),
        WRONG,
        r"output\.safetensors is quantised with EXL2",
    ),
    "tensors of bitsandbytes": (
        lambda p: quantised(
            p, **{"weight.absmax": SCALES, "weight.quant_state.bitsandbytes__nf4": CODES.byte()}
        ),
        WRONG,
        r"bitsandbytes__nf4, which .*config.json describes, has the shape .*: expected \(any\)",
    ),
    "tensors of FP8": (
        lambda p: quantised(p, weight=SCALES.to(torch.float8_e4m3fn), weight_scale=SCALES),
        WRONG,
        r"q_proj\.weight_scale, which .*config.json describes, is for groups of 1 of 64 inputs",
    ),
    "packed tensors": (
        lambda p: quantised(p, weight_packed=CODES, weight_scale=SCALES),
        WRONG,
        r"config.json has config_groups None: expected",
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
    "several names": (
        lambda p: (
            shutil.copy(p / "model.safetensors", p / "b.safetensors")
            and (p / "model.safetensors").rename(p / "a.safetensors").parent
        ),
        MISSING,
        r"several weight files \(a.safetensors, b.safetensors\): give the path of one$",
    ),
    "another name without config": (
        lambda p: without(
            (p / "model.safetensors").rename(p / "llama.safetensors").parent, "config.json"
        ),
        MISSING,
        "has llama.safetensors, but not the config.json of a transformers model: download that too",
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
