"""Weights in GPTQ's and AWQ's formats, packed in NumPy as the formats are defined."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Array = np.ndarray[Any, Any]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the outputs in an int32, from the lowest bits on


def pack_rows(numbers: Array, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Pack numbers, (n, m), along the first dimension into int32."""
    count = 32 // bits
    packed = np.zeros((len(numbers) // count, numbers.shape[1]), dtype=np.uint32)
    for place, which in enumerate(order or range(count)):
        packed |= numbers[which::count].astype(np.uint32) << np.uint32(bits * place)
    return torch.from_numpy(packed.view(np.int32).copy())


def random_weight(
    n_outputs: int, n_inputs: int, bits: int, groups: Array, symmetric: bool, seed: int = 0
) -> tuple[Array, Array, Array, Array]:
    """Codes (out, in), zero points and scales (n_groups, out), and the weight in float32."""
    rng = np.random.default_rng(seed)
    n_groups = int(groups.max()) + 1
    codes = rng.integers(0, 2**bits, (n_outputs, n_inputs))
    points = rng.integers(0, 2**bits, (n_groups, n_outputs))
    if symmetric:
        points[:] = 2 ** (bits - 1)
    scales = (rng.uniform(0.5, 1.5, (n_groups, n_outputs)) / 2**bits).astype(np.float16)
    weight = (codes - points[groups].T) * scales[groups].T.astype(np.float32)
    return codes, points, scales, weight.astype(np.float32)


def gptq_parts(
    codes: Array, points: Array, scales: Array, groups: Array, bits: int, version: int = 1
) -> dict[str, torch.Tensor]:
    """The tensors of a module; the first version stores zero points minus one."""
    stored = (points - (version == 1)) % 2**bits
    return {
        "qweight": pack_rows(codes.T, bits),
        "qzeros": pack_rows(stored.T, bits).T.contiguous(),
        "scales": torch.from_numpy(scales),
        "g_idx": torch.from_numpy(groups.astype(np.int32)),
    }


def awq_parts(codes: Array, points: Array, scales: Array) -> dict[str, torch.Tensor]:
    return {
        "qweight": pack_rows(codes, 4, AWQ_ORDER).T.contiguous(),
        "qzeros": pack_rows(points.T, 4, AWQ_ORDER).T.contiguous(),
        "scales": torch.from_numpy(scales),
    }


def grouped(n_inputs: int, group_size: int, order: Array | None = None) -> Array:
    """The group of each input; with an order, groups are of inputs in that order."""
    groups = np.arange(n_inputs) // group_size
    if order is not None:
        groups[order] = groups.copy()
    return groups


def write_quantized(
    source: Path,
    path: Path,
    settings: dict[str, Any],
    act_order: bool = False,
    name: str = "model.safetensors",
    bits: int = 4,
    group_size: int = 32,
    version: int = 1,
) -> Path:
    """Replace the weights in the layers of a Hugging Face directory by random quantised ones.

    A directory beside it, ``plain``, has the same weights in float32.
    """
    tensors = load_file(source / "model.safetensors")
    shutil.copytree(source, path.parent / "plain")
    shutil.copytree(source, path)
    (path / "model.safetensors").unlink()
    quantized = {key: tensor.half() for key, tensor in tensors.items()}
    plain = {key: tensor.float() for key, tensor in quantized.items()}
    rng = np.random.default_rng(0)
    widths = sorted({tensor.shape[-1] for tensor in tensors.values()})
    orders = {width: rng.permutation(width) for width in widths}
    for seed, key in enumerate(sorted(tensors)):
        if not key.endswith("proj.weight"):
            continue
        del quantized[key]
        n_outputs, n_inputs = tensors[key].shape
        groups = grouped(n_inputs, group_size, orders[n_inputs] if act_order else None)
        codes, points, scales, weight = random_weight(
            n_outputs, n_inputs, bits, groups, settings.get("sym", False), seed
        )
        if settings.get("quant_method") == "awq" or "w_bit" in settings:
            parts = awq_parts(codes, points, scales)
        else:
            parts = gptq_parts(codes, points, scales, groups, bits, version)
        module = key.removesuffix(".weight")
        quantized |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
        plain[key] = torch.from_numpy(weight)
    save_file(quantized, path / name)
    save_file(plain, path.parent / "plain" / "model.safetensors")
    write_config(path.parent / "plain", dtype="float32")
    if "quant_method" in settings:
        write_config(path, quantization_config=settings)
    return path


def write_config(path: Path, **values: Any) -> None:
    found = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**found, **values}))
