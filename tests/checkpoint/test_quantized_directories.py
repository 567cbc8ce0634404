"""Directories that the formats' own packages have quantised: logits, ranks and what is written."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_files import (
    expected_logits,
    quantized_directory,
    quantized_names,
    settings_and_modules,
)
from safetensors.torch import load_file, save_file

from llama import parallel
from llama.args import ModelArgs
from llama.checkpoint.base import Checkpoint, widened
from llama.checkpoint.hf import open_hf
from llama.checkpoint.hf_quantized import read_quantized
from llama.checkpoint.load import load
from llama.checkpoint.meta import open_meta
from llama.checkpoint.params import make_args
from llama.checkpoint.save import save_meta
from llama.checkpoint.sharding import check_model_parallel_size, split_dim

NAMES = quantized_names()
HARMED = ("model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj")


def args_of(checkpoint: Checkpoint) -> ModelArgs:
    return make_args(checkpoint.params, checkpoint.source, 32, 16, 1)


def logits_of(
    checkpoint: Checkpoint, tokens: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    parallel.initialize(torch.device("cpu"))
    model = load(checkpoint, args_of(checkpoint), torch.device("cpu"), dtype)
    return model(tokens[None], 0)[0].float()


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_package_that_wrote_the_weights(name: str, tmp_path: Path) -> None:
    """A failure means that a format's weights are read as other numbers than its package reads."""
    directory = quantized_directory(name, tmp_path)
    tokens, expected = expected_logits(directory)
    torch.testing.assert_close(logits_of(open_hf(directory), tokens), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_networks_in_bfloat16_are_close(name: str, tmp_path: Path) -> None:
    """A failure means that a half-precision network loses more than its own rounding."""
    directory = quantized_directory(name, tmp_path)
    tokens, expected = expected_logits(directory)
    error = logits_of(open_hf(directory), tokens, torch.bfloat16) - expected
    assert error.square().mean().sqrt() < 0.06 * expected.std()


@pytest.mark.parametrize("name", NAMES)
def test_a_converted_checkpoint_has_the_same_weights(name: str, tmp_path: Path) -> None:
    """A failure means that this library's own files lose a format's codes, scales or order."""
    checkpoint = open_hf(quantized_directory(name, tmp_path))
    save_meta(checkpoint, args_of(checkpoint), tmp_path / "own", dtype=torch.float32)
    own = open_meta(tmp_path / "own")
    assert own.forms == checkpoint.forms
    for key, tensor in checkpoint.parts[0].items():
        module, _, part = key.rpartition(".")
        dtypes = own.forms[module].dtypes() if module in own.forms else {}
        stored = own.parts[0][key]
        assert stored.dtype == dtypes.get(part, torch.float32)
        assert torch.equal(stored.float(), tensor.float())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "packed-4-ordered"])
def test_two_ranks_hold_the_halves_of_each_weight(name: str, tmp_path: Path) -> None:
    """A failure means that ranks get rows or groups of inputs that aren't theirs."""
    checkpoint = open_hf(quantized_directory(name, tmp_path))
    args = args_of(checkpoint)
    if args.kv_heads > 1:
        check_model_parallel_size(args, 2, checkpoint.forms)
    whole = widened(checkpoint, args)
    for module, form in checkpoint.forms.items():
        dim = split_dim(f"{module}.weight")
        halves = []
        for rank in range(2 if not module.endswith(("wk", "wv")) else 1):
            stored = {
                part: checkpoint.rank_part(f"{module}.{part}", args, rank, 2)
                for part in form.dtypes()
            }
            halves.append(form.dequantize(stored))
        expected = whole.parts[0][f"{module}.weight"]
        if len(halves) == 1 and args.kv_heads == 2:
            expected = expected[: len(expected) // 2]
        assert torch.equal(torch.cat(halves, dim), expected)


def test_scales_of_the_cache_are_ignored(tmp_path: Path) -> None:
    """A failure means that files with a rounded cache are refused for its scales."""
    directory = quantized_directory("float8-tensor", tmp_path)
    tensors = load_file(directory / "model.safetensors")
    for name in ("kv_scale", "k_scale", "v_scale"):
        tensors[f"model.layers.0.self_attn.{name}"] = torch.ones(1)
    save_file(tensors, directory / "model.safetensors")
    checkpoint = open_hf(directory)
    checkpoint.check(args_of(checkpoint))


def test_ordered_inputs_are_not_divided_among_ranks(tmp_path: Path) -> None:
    """A failure means that a rank multiplies its inputs by another rank's columns."""
    checkpoint = open_hf(quantized_directory("packed-4-ordered", tmp_path))
    check_model_parallel_size(args_of(checkpoint), 1, checkpoint.forms)
    with pytest.raises(ValueError, match=r"2 parts can't be made .* possible are 1$"):
        check_model_parallel_size(args_of(checkpoint), 2, checkpoint.forms)


def harmed(tensor: torch.Tensor) -> list[torch.Tensor | None]:
    """A tensor as damage or malice may leave it; None for a missing one."""
    flat = tensor.reshape(-1)
    odd: list[torch.Tensor | None] = [None, tensor[None], flat, tensor.double(), flat[:0]]
    odd += [torch.zeros(tensor.shape, dtype=torch.int64), tensor.bool(), torch.tensor(-1)]
    if tensor.dim():
        odd += [tensor[1:], torch.cat((tensor, tensor))]
    if not tensor.is_floating_point():
        odd += [tensor | (1 << (8 * tensor.itemsize - 2)), torch.zeros_like(tensor), ~tensor]
    return odd


@pytest.mark.parametrize("name", NAMES)
def test_harmed_parts_give_errors_or_weights_of_the_right_shape(name: str, tmp_path: Path) -> None:
    """A failure means that a damaged or malicious file crashes, or takes memory without bounds."""
    settings, modules = settings_and_modules(quantized_directory(name, tmp_path))
    modules = {module: modules[module] for module in HARMED}
    refused = 0
    for module, parts in modules.items():
        for part, tensor in parts.items():
            for odd in harmed(tensor):
                changed = {k: t for k, t in {**parts, part: odd}.items() if t is not None}
                try:
                    packed = read_quantized(settings, {**modules, module: changed}, "config.json")
                    for weight in packed.values():
                        stored = weight.read()
                        shapes = {key: tuple(t.shape) for key, t in stored.items()}
                        form = weight.form
                        expected = form.shapes(*weight.shape) if form else {"weight": weight.shape}
                        assert shapes == expected
                except ValueError as error:
                    refused += 1
                    assert str(error).isprintable() and len(str(error)) < 600
    assert refused > 20


@pytest.mark.parametrize("name", NAMES)
def test_odd_settings_give_errors_or_weights(name: str, tmp_path: Path) -> None:
    """A failure means that settings from a file end in a crash."""
    settings, modules = settings_and_modules(quantized_directory(name, tmp_path))
    modules = {module: modules[module] for module in HARMED}
    odd: list[Any] = [None, [], {}, "x", 0, -1, 1.5, True, [[1]], {"a": []}, 10**400, [10**9] * 2]

    def variants(value: Any) -> Iterator[Any]:
        yield from odd
        if isinstance(value, dict):
            for key, inner in value.items():
                for other in variants(inner):
                    yield {**value, key: other}

    for changed in variants(settings):
        if isinstance(changed, dict) and changed.get("quant_method") == settings["quant_method"]:
            try:
                for weight in read_quantized(changed, modules, "config.json").values():
                    weight.read()
            except ValueError as error:
                assert str(error).isprintable() and len(str(error)) < 600
