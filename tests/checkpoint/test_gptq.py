"""GPTQ's and AWQ's weights against the formula of these formats."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gptq_files import (
    awq_parts,
    gptq_parts,
    grouped,
    random_weight,
    write_config,
    write_quantized,
)
from harmed_files import refused
from safetensors.torch import load_file, save_file

from llama import Llama
from llama.checkpoint import open_checkpoint
from llama.checkpoint.base import Checkpoint, vocabulary_size
from llama.checkpoint.gptq import read_awq, read_gptq
from llama.checkpoint.packed import Packed
from llama.checkpoint.params import make_args
from llama.checkpoint.sharding import check_model_parallel_size
from llama.convert import convert

Q = "model.layers.0.self_attn.q_proj"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
PROMPT = torch.tensor([[1, 300, 17, 40, 41, 5]])


def weight_of(packed: Packed) -> torch.Tensor:
    """The dequantised weight, after a check that what is stored is what the form promises."""
    stored = packed.read()
    assert packed.form is not None
    assert {name: tensor.dtype for name, tensor in stored.items()} == packed.form.dtypes()
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    assert shapes == packed.form.shapes(*packed.shape)
    assert all(tensor.is_contiguous() for tensor in stored.values())
    return packed.form.dequantize(stored)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("group_size", "stored_size"), [(32, 32), (16, 16), (48, 16), (256, 128), (384, 0)]
)
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_weights_are_those_of_the_formula(
    version: int, symmetric: bool, bits: int, group_size: int, stored_size: int, act_order: bool
) -> None:
    """A failure means that a GPTQ model computes with other weights than its file has."""
    order = np.random.default_rng(1).permutation(384) if act_order else None
    groups = grouped(384, group_size, order)
    *numbers, weight = random_weight(64, 384, bits, groups, symmetric)
    parts = gptq_parts(*numbers, groups, bits, version)
    settings = {"checkpoint_format": "gptq_v2"} if version == 2 else {}
    packed = read_gptq(settings, {Q: parts}, "config.json")[Q]
    assert torch.equal(weight_of(packed), torch.from_numpy(weight))
    form = packed.form
    assert form is not None and (form.codes, form.has_zeros) == (f"int{bits}", not symmetric)
    is_row = stored_size == 0
    assert form.group_size == (128 if is_row and bits == 4 else stored_size)
    assert form.ordered == (act_order and not is_row)
    assert form.scale_dtype == (torch.float16 if symmetric else torch.float32)


def test_groups_without_g_idx_follow_one_another() -> None:
    """A failure means that files of the first tools, without g_idx, get other weights."""
    for size, n_inputs in ((32, 96), (64, 96), (-1, 96), (2**70, 96)):
        groups = grouped(n_inputs, size if 0 < size < n_inputs else n_inputs)
        *numbers, weight = random_weight(32, n_inputs, 4, groups, False)
        parts = gptq_parts(*numbers, groups, 4)
        del parts["g_idx"]
        packed = read_gptq({"group_size": size}, {Q: parts}, "config.json")[Q]
        assert torch.equal(weight_of(packed), torch.from_numpy(weight))
    *numbers, _ = random_weight(32, 96, 4, grouped(96, 32), False)
    parts = gptq_parts(*numbers, groups, 4) | {"qweight": torch.zeros(10, 32, dtype=torch.int32)}
    del parts["g_idx"]
    with pytest.raises(ValueError, match="3 groups, which don't divide its 80 inputs, and group_s"):
        read_gptq({"group_size": 64}, {Q: parts}, "config.json")


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("n_outputs", "n_inputs", "group_size"), [(40, 128, 32), (8, 256, 256)])
def test_awq_weights_are_those_of_the_formula(
    symmetric: bool, n_outputs: int, n_inputs: int, group_size: int, monkeypatch
) -> None:
    """A failure means that an AWQ model computes with other weights than its file has."""
    monkeypatch.setattr("llama.checkpoint.gptq._CHUNK", 1024)  # several, of which the last is short
    groups = grouped(n_inputs, group_size)
    *numbers, weight = random_weight(n_outputs, n_inputs, 4, groups, symmetric)
    packed = read_awq({}, {Q: awq_parts(*numbers)}, "config.json")[Q]
    assert torch.equal(weight_of(packed), torch.from_numpy(weight))
    assert packed.form is not None and packed.form.has_zeros == (not symmetric)


def test_chunks_of_ordered_codes_make_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure means that some outputs of a large weight with desc_act are wrong."""
    groups = grouped(64, 16, np.random.default_rng(2).permutation(64))
    *numbers, weight = random_weight(72, 64, 4, groups, False)
    monkeypatch.setattr("llama.checkpoint.gptq._CHUNK", 4 * 64 * 20)
    packed = read_gptq({}, {Q: gptq_parts(*numbers, groups, 4)}, "config.json")[Q]
    assert torch.equal(weight_of(packed), torch.from_numpy(weight))


def logits(path: Path) -> torch.Tensor:
    llama = Llama.build(path, device="cpu", dtype=torch.float32, max_seq_len=64, max_batch_size=1)
    with torch.inference_mode():
        return llama.model(PROMPT, 0)


# Directories as people have them: arguments of write_quantized, and other files.
DIRECTORIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "transformers": ({"settings": GPTQ}, {}),
    "second format": ({"settings": {**GPTQ, "checkpoint_format": "gptq_v2"}, "version": 2}, {}),
    "8 bits": ({"settings": {**GPTQ, "bits": 8}, "bits": 8}, {}),
    "act order": ({"settings": {**GPTQ, "desc_act": True}, "act_order": True}, {}),
    "AutoGPTQ": (
        {"settings": {}, "name": "gptq_model-4bit-32g.safetensors"},
        {"quantize_config.json": {"bits": 4, "group_size": 32, "desc_act": False}},
    ),
    "a name of its own": ({"settings": {}, "name": "vicuna-7b-4bit-32g.safetensors"}, {}),
    "AWQ": ({"settings": AWQ}, {}),
    "AutoAWQ": (
        {"settings": {"w_bit": 4}},
        {"quant_config.json": {"zero_point": True, "q_group_size": 32, "version": "GEMM"}},
    ),
    "AWQ without settings": ({"settings": {"w_bit": 4}}, {}),
}


@pytest.mark.parametrize("case", DIRECTORIES)
def test_a_directory_computes_with_its_dequantised_weights(
    case: str, saved: Path, tmp_path: Path
) -> None:
    """A failure means that quantised files as people have them don't load, or compute else."""
    options, files = DIRECTORIES[case]
    path = write_quantized(saved, tmp_path / "model", **options)
    for name, content in files.items():
        (path / name).write_text(json.dumps(content))
    torch.testing.assert_close(logits(path), logits(tmp_path / "plain"), atol=1e-3, rtol=1e-4)


def test_a_file_stands_for_its_directory(saved: Path, tmp_path: Path) -> None:
    """A failure means that one of several weight files can't be chosen by its path."""
    path = write_quantized(saved, tmp_path / "model", GPTQ, name="llama-4bit-32g.safetensors")
    expected = logits(tmp_path / "plain")
    shutil.copy(saved / "model.safetensors", path / "original.safetensors")
    with pytest.raises(FileNotFoundError, match=r"several weight files .*: give the path of one"):
        logits(path)
    found = logits(path / "llama-4bit-32g.safetensors")
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


def test_parts_of_a_name_of_their_own_are_one_model(saved: Path, tmp_path: Path) -> None:
    """A failure means that AutoGPTQ's models in several files don't load."""
    name = "gptq_model-4bit-32g.safetensors"
    path = write_quantized(saved, tmp_path / "model", GPTQ, name=name)
    tensors = load_file(path / name)
    (path / name).unlink()
    for number in (1, 2):
        part = {key: t for i, (key, t) in enumerate(tensors.items()) if i % 2 == number - 1}
        save_file(part, path / f"gptq_model-4bit-32g-0000{number}-of-00002.safetensors")
    torch.testing.assert_close(logits(path), logits(tmp_path / "plain"), atol=1e-3, rtol=1e-4)


def opened(path: Path) -> tuple[Checkpoint, Any]:
    checkpoint = open_checkpoint(path)
    return checkpoint, make_args(checkpoint.params, "params", vocabulary_size(checkpoint))


def test_ranks_hold_parts_of_the_same_weights(saved: Path, tmp_path: Path) -> None:
    """A failure means that a quantised model computes something else on several ranks."""
    checkpoint, args = opened(write_quantized(saved, tmp_path / "model", GPTQ, group_size=16))
    for module, dim in (("attention.wq", 0), ("attention.wo", 1), ("feed_forward.w2", 1)):
        name = f"layers.1.{module}"
        form = checkpoint.forms[name]
        parts = [part for part in form.dtypes() if f"{name}.{part}" in checkpoint.parts[0]]
        whole = form.dequantize({part: checkpoint.parts[0][f"{name}.{part}"] for part in parts}, 1)
        halves = [
            form.dequantize(
                {part: checkpoint.rank_part(f"{name}.{part}", args, rank, 2) for part in parts}, 1
            )
            for rank in range(2)
        ]
        assert torch.equal(torch.cat(halves, dim), whole)


def test_act_order_fits_one_rank(saved: Path, tmp_path: Path) -> None:
    """A failure means that ranks share groups whose inputs lie on others, or aren't told so."""
    path = write_quantized(saved, tmp_path / "model", GPTQ, act_order=True)
    checkpoint, args = opened(path)
    check_model_parallel_size(args, 1, checkpoint.forms)
    with pytest.raises(ValueError, match=r"2 parts can't be made .*: possible are 1$"):
        check_model_parallel_size(args, 2, checkpoint.forms)
    orders = [checkpoint.parts[0][f"layers.0.attention.{m}.order"] for m in ("wq", "wk", "wv")]
    assert torch.equal(orders[0], orders[1]) and torch.equal(orders[0], orders[2])
    assert torch.equal(orders[0].sort().values, torch.arange(len(orders[0])).int())


def test_conversion_keeps_the_weights(saved: Path, tmp_path: Path) -> None:
    """A failure means that a quantised model changes when it is written in another format."""
    path = write_quantized(saved, tmp_path / "model", GPTQ, act_order=True)
    expected = logits(path)
    convert(str(path), str(tmp_path / "meta"), "meta")
    torch.testing.assert_close(logits(tmp_path / "meta"), expected)
    convert(str(path), str(tmp_path / "hf"), "hf", dtype="float32")
    torch.testing.assert_close(logits(tmp_path / "hf"), expected, atol=1e-3, rtol=1e-4)
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())


def test_a_quantised_output_is_used_beside_a_tied_embedding(saved: Path, tmp_path: Path) -> None:
    """A failure means that a quantised lm_head is ignored, or taken for the embedding."""
    path = write_quantized(saved, tmp_path / "model", GPTQ)
    tensors, plain = load_file(path / "model.safetensors"), tmp_path / "plain"
    n_outputs, n_inputs = tensors.pop("lm_head.weight").shape
    groups = grouped(n_inputs, 32)
    *numbers, weight = random_weight(n_outputs, n_inputs, 4, groups, False, 99)
    parts = gptq_parts(*numbers, groups, 4)
    tensors |= {f"lm_head.{part}": tensor for part, tensor in parts.items()}
    save_file(tensors, path / "model.safetensors")
    state = load_file(plain / "model.safetensors")
    save_file({**state, "lm_head.weight": torch.from_numpy(weight)}, plain / "model.safetensors")
    write_config(path, tie_word_embeddings=True)
    torch.testing.assert_close(logits(path), logits(plain), atol=1e-3, rtol=1e-4)


def test_biases_of_zeros_are_left_out(saved: Path, tmp_path: Path) -> None:
    """A failure means that the first tools' files, with a bias at each weight, don't load."""
    path = write_quantized(saved, tmp_path / "model", GPTQ)
    tensors = load_file(path / "model.safetensors")
    biases = {
        key.replace("scales", "bias"): torch.zeros(tensor.shape[1]).half()
        for key, tensor in tensors.items()
        if key.endswith("scales")
    }
    save_file(tensors | biases, path / "model.safetensors")
    torch.testing.assert_close(logits(path), logits(tmp_path / "plain"), atol=1e-3, rtol=1e-4)
    biases[f"{Q}.bias"][3] = 1
    save_file(tensors | biases, path / "model.safetensors")
    refused(path, ValueError, r"has the unexpected layers\.0\.attention\.wq\.bias")


def test_settings_beside_plain_weights_are_told(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A failure means that settings left beside plain weights stop them, or aren't mentioned."""
    path = shutil.copytree(saved, tmp_path / "model")
    write_config(path, quantization_config={"quant_method": "gptq", "bits": 4})
    with caplog.at_level(logging.WARNING):
        found = logits(path)
    assert "says how weights are quantised, but all are plain" in caplog.text
    assert torch.equal(found, logits(saved))


def test_half_precision_builds_have_scales_of_16_bits(saved: Path, tmp_path: Path) -> None:
    """A failure means that four bits take the memory of float32 scales where half would do."""
    path = write_quantized(saved, tmp_path / "model", GPTQ)
    checkpoint, _ = opened(path)
    assert checkpoint.dtype == torch.float16
    assert checkpoint.kinds["layers.0.attention.wq.weight"] == "GPTQ 4 bits"
    llama = Llama.build(path, device="cpu", dtype=torch.bfloat16, max_seq_len=64, max_batch_size=1)
    expected = logits(tmp_path / "plain")
    with torch.inference_mode():
        found = llama.model(PROMPT, 0).float()
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_plain_float32_weights_leave_the_others_in_half_precision(
    saved: Path, tmp_path: Path
) -> None:
    """A failure means that a quantised model is computed in float32 as its norms are."""
    path = write_quantized(saved, tmp_path / "model", GPTQ)
    tensors = load_file(path / "model.safetensors")
    wide = {key: t.float() if key.endswith(".weight") else t for key, t in tensors.items()}
    save_file(wide, path / "model.safetensors")
    write_config(path, dtype=None, torch_dtype=None)
    assert opened(path)[0].dtype == torch.float16
    write_config(path, dtype="bfloat16")
    assert opened(path)[0].dtype == torch.bfloat16


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], Any]:
    return lambda parts: {**parts, name: change(parts[name])}


# What is changed in a module of 64 outputs and 128 inputs, settings, and what the error says.
HARMS: dict[str, tuple[Callable[[Any], Any], dict[str, Any], str]] = {
    "Marlin": (dict, {"checkpoint_format": "marlin"}, "format 'marlin'.*get its gptq or gptq_v2"),
    "AutoGPTQ's Marlin": (dict, {"is_marlin_format": True}, "format 'marlin'"),
    "another format": (dict, {"format": ["x"]}, "format "),
    "3 bits": (changed("qzeros", lambda t: t[:, :6]), {}, "has 3 bits by its 6 qzeros"),
    "codes of 8 bits": (changed("qzeros", lambda t: t.repeat(1, 2)), {}, r"g_idx.*expected \(64\)"),
    "no scales": (lambda parts: {"qweight": parts["qweight"]}, {}, "scales is missing beside qwei"),
    "no zeros": (lambda p: {k: p[k] for k in ("qweight", "scales")}, {}, "qzeros is missing"),
    "codes in int16": (changed("qweight", torch.Tensor.short), {}, "is torch.int16: need torch.in"),
    "scales of integers": (changed("scales", torch.Tensor.int), {}, "torch.int32: need torch.floa"),
    "no inputs": (changed("qweight", lambda t: t[:0]), {}, r"has the shape \(0, 64\): expected"),
    "fewer outputs": (changed("qweight", lambda t: t[:, :8]), {}, r"expected \(any, 64\)"),
    "fewer groups": (changed("qzeros", lambda t: t[:2]), {}, r"expected \(4, any\)"),
    "a negative group": (changed("g_idx", lambda t: t - 1), {}, "groups from -1 to 2: expected 0"),
    "a group too many": (changed("g_idx", lambda t: t + 1), {}, "groups from 1 to 4: expected 0"),
    "odd groups": (
        changed("g_idx", lambda t: torch.arange(128).int() // 33),
        {},
        "groups of inputs that 16 doesn't divide: groups of 16, 32, 64, 128 and multiples",
    ),
}


@pytest.mark.parametrize("case", HARMS)
def test_what_is_not_read_is_named(case: str) -> None:
    """A failure means that a damaged or foreign file is read as something, or isn't explained."""
    harm, settings, message = HARMS[case]
    groups = grouped(128, 32)
    *numbers, _ = random_weight(64, 128, 4, groups, False)
    parts = harm(gptq_parts(*numbers, groups, 4))
    with pytest.raises(ValueError, match=message) as error:
        read_gptq(settings, {Q: parts}, "config.json")
    assert str(error.value).isprintable() and len(str(error.value)) < 400


@pytest.mark.parametrize("version", ["gemv", "gemv_fast", "marlin", 3])
def test_other_orders_of_awq_are_refused(version: object) -> None:
    """A failure means that AWQ's weights in another order are read as if they were GEMM's."""
    with pytest.raises(ValueError, match=f"AWQ's format '?{version}'?: get its gemm files"):
        read_awq({"version": version}, {}, "config.json")


def test_awq_of_uneven_shapes_is_refused() -> None:
    """A failure means that damaged AWQ tensors raise an error of PyTorch's."""
    groups = grouped(128, 32)
    *numbers, _ = random_weight(64, 128, 4, groups, False)
    parts = awq_parts(*numbers)
    for name, tensor in (
        ("qweight", parts["qweight"][:, :4]),
        ("qweight", parts["qweight"][:33]),
        ("qzeros", parts["qzeros"][:1]),
        ("scales", parts["scales"][:, :60]),
    ):
        with pytest.raises(ValueError, match=r"download it again|expected"):
            read_awq({}, {Q: {**parts, name: tensor}}, "config.json")


DTYPES = [torch.int32, torch.int64, torch.uint8, torch.float16, torch.float32, torch.bool]


@pytest.mark.parametrize("read", [read_gptq, read_awq])
def test_damaged_parts_raise_value_errors(read: Callable[..., dict[str, Packed]]) -> None:
    """A failure means that a damaged file ends in an error of PyTorch's, or is read beyond it."""
    rng = np.random.default_rng(0)
    groups = grouped(128, 32)
    *numbers, _ = random_weight(64, 128, 4, groups, False)
    whole = gptq_parts(*numbers, groups, 4) if read is read_gptq else awq_parts(*numbers)
    n_read = 0
    for _ in range(300):
        parts = dict(whole)
        for name in rng.choice(list(parts), rng.integers(1, 3)):
            sizes = [int(rng.choice([0, 1, 2, 4, 8, 16, 64, 128])) for _ in range(rng.integers(4))]
            near = [*parts[name].shape[:-1], int(rng.choice([1, 8, 64, 128]))]
            dtype = parts[name].dtype if rng.random() < 0.7 else rng.choice(DTYPES)
            shape = near if rng.random() < 0.5 else sizes
            parts[name] = torch.randint(-9, 9, shape).to(dtype)
        try:
            weight_of(read({}, {Q: parts}, "config.json")[Q])
            n_read += 1
        except ValueError as error:
            assert str(error).isprintable()
    assert n_read < 60
