"""compressed-tensors' and FP8's weights: packings, scales, targets, and what is refused."""

import logging
from typing import Any

import pytest
import torch

from llama.checkpoint.compressed import read_compressed
from llama.checkpoint.float8 import read_fp8
from llama.checkpoint.packed import Packed

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"


def group(*targets: str, **weights: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "group_size": 16, **weights}
    return {"targets": list(targets or ("Linear",)), "weights": weights}


def settings(*groups: dict[str, Any], **more: Any) -> dict[str, Any]:
    named = {f"group_{i}": each for i, each in enumerate(groups)}
    return {"format": "pack-quantized", "config_groups": named, **more}


def packed_bits(numbers: torch.Tensor, bits: int, per_word: int | None = None) -> torch.Tensor:
    """Each row's numbers in int32, by arithmetic of whole numbers of any size.

    They follow one another or, as in older files, per_word of them are in one.
    """
    rows = []
    for row in numbers.tolist():
        if per_word is None:
            total = sum(number << bits * i for i, number in enumerate(row))
            words = [total >> 32 * i & 0xFFFFFFFF for i in range(-(-len(row) * bits // 32))]
        else:
            parts = [row[i : i + per_word] for i in range(0, len(row), per_word)]
            words = [sum(n << bits * i for i, n in enumerate(part)) for part in parts]
        rows.append([word - (1 << 32) if word >> 31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


def parts_of(numbers: torch.Tensor, bits: int, per_word: int | None = None) -> dict[str, Any]:
    rows, inputs = numbers.shape
    return {
        "weight_packed": packed_bits(numbers, bits, per_word),
        "weight_shape": torch.tensor([rows, inputs]),
        "weight_scale": torch.rand(rows, inputs // 16) + 0.5,
    }


def weight_of(packed: Packed) -> torch.Tensor:
    stored = packed.read()
    assert packed.form is not None
    assert {n: tuple(t.shape) for n, t in stored.items()} == packed.form.shapes(*packed.shape)
    assert {n: t.dtype for n, t in stored.items()} == packed.form.dtypes()
    return packed.form.dequantize(stored)


@pytest.mark.parametrize("has_order", [False, True])
@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_of_any_number_of_bits(bits: int, is_old: bool, has_order: bool) -> None:
    """A failure means that weights of some number of bits are read as others."""
    torch.manual_seed(bits)
    numbers, points = torch.randint(1 << bits, (80, 96)), torch.randint(1 << bits, (80, 6))
    per_word = 32 // bits if is_old else None
    parts = parts_of(numbers, bits, per_word)
    parts["weight_zero_point"] = packed_bits(points.T, bits, per_word).T
    groups = torch.arange(96) // 16
    if has_order:
        groups = groups[torch.randperm(96)]
        parts["weight_g_idx"] = groups.int()
    read = read_compressed(settings(group(num_bits=bits)), {Q: parts}, "config.json")[Q]
    expected = (numbers - points[:, groups]) * parts["weight_scale"][:, groups]
    torch.testing.assert_close(weight_of(read), expected, rtol=1e-5, atol=3e-5)  # of values to 255
    assert read.form.codes == ("int4" if bits <= 4 else "int8")
    assert set(read.names) == set(parts)


def test_a_large_weight_is_unpacked_in_pieces() -> None:
    """A failure means that rows behind the first million of codes are lost or others."""
    numbers = torch.randint(8, (1200, 2048))
    parts = parts_of(numbers[:, :48], 3)
    parts |= {"weight_shape": torch.tensor([1200, 2048]), "weight_scale": torch.ones(1200, 1)}
    bits = (numbers.unsqueeze(2) >> torch.arange(3) & 1).view(1200, -1, 32)
    parts["weight_packed"] = (bits << torch.arange(32)).sum(2).to(torch.int32)
    read = read_compressed(settings(group(num_bits=3)), {Q: parts}, "config.json")[Q]
    assert read.form.group_size == 256  # whole rows of four bits have no kernel
    assert torch.equal(weight_of(read), (numbers - 4).float())


def test_zero_points_beside_scales_and_an_unset_order() -> None:
    """A failure means that files of older versions are refused, or read with wrong zeros."""
    parts = parts_of(torch.randint(16, (4, 32)), 4)
    unset = {"weight_g_idx": torch.full((32,), -1, dtype=torch.int32)}
    plain = read_compressed(settings(group()), {Q: parts | unset}, "config.json")[Q]
    assert not plain.form.has_zeros and not plain.form.ordered
    points = torch.randint(-8, 8, (4, 2), dtype=torch.int8)
    moved = read_compressed(
        settings(group(symmetric=False)), {Q: parts | {"weight_zero_point": points}}, "config.json"
    )[Q]
    shift = (points * parts["weight_scale"]).repeat_interleave(16, 1)
    torch.testing.assert_close(weight_of(moved), weight_of(plain) - shift)


@pytest.mark.parametrize(
    ("scales", "block", "stated"),
    [
        (torch.tensor(0.5), (40, 48), {}),
        (torch.rand(1), (40, 48), {}),
        (torch.rand(40), (1, 48), {}),
        (torch.rand(40, 1).bfloat16(), (1, 48), {"weight_block_size": [16, 32]}),
        (torch.rand(3, 2), (16, 32), {"weight_block_size": [16, 32]}),
        (torch.rand(5, 3), (8, 16), {}),
        (
            torch.tensor([[7], [127], [130]]).byte().expand(3, 2),
            (16, 32),
            {"weight_block_size": [16, 32]},
        ),
    ],
)
def test_scales_of_float8(scales: torch.Tensor, block: Any, stated: dict[str, Any]) -> None:
    """A failure means that rows or groups of an FP8 weight get another block's scale."""
    codes = torch.randn(40, 48).to(torch.float8_e4m3fn)
    parts = {"weight": codes, "weight_scale_inv": scales, "activation_scale": torch.tensor(1.0)}
    read = read_fp8(stated, {Q: parts}, "config.json")[Q]
    numbers = 2.0 ** (scales.float() - 127) if scales.dtype == torch.uint8 else scales.float()
    numbers = numbers.view(-(-40 // block[0]), -(-48 // block[1]))
    rows, columns = torch.arange(40) // block[0], torch.arange(48) // block[1]
    torch.testing.assert_close(weight_of(read), codes.float() * numbers[rows][:, columns])
    assert set(read.names) == set(parts)


def test_autofp8_and_plain_modules() -> None:
    """A failure means that AutoFP8's directories are refused, or plain weights taken for codes."""
    codes, one = torch.randn(4, 32).to(torch.float8_e4m3fn), torch.tensor([0.5])
    modules = {
        Q: {"weight": codes, "weight_scale": one, "input_scale": one, "output_scale": one},
        "lm_head": {"weight": torch.ones(4, 32)},
    }
    read = read_fp8({"activation_scheme": "static"}, modules, "config.json")
    assert read.keys() == {Q}
    assert torch.equal(weight_of(read[Q]), codes.float() / 2)


def test_the_most_exact_target_counts() -> None:
    """A failure means that mixed files are read with another group's number of bits."""
    up = Q.replace("self_attn.q_proj", "mlp.up_proj")
    groups = [
        group("Linear", num_bits=4),
        group("re:.*mlp\\.(up|down)_proj$", num_bits=8),
        group(DOWN, num_bits=3),
        {"targets": ["Linear"], "weights": None},
        group("Embedding", num_bits=2),
    ]
    bits = {Q: 4, up: 8, DOWN: 3, "model.embed_tokens": 2}
    modules = {m: parts_of(torch.randint(1 << n, (4, 32)), n) for m, n in bits.items()}
    read = read_compressed(settings(*groups), modules, "config.json")
    assert [read[m].kind for m in bits] == [f"compressed-tensors {n} bits" for n in bits.values()]


def test_a_cache_scheme_is_ignored_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """A failure means that nobody learns that the cache is not rounded as the file says."""
    parts = parts_of(torch.randint(16, (4, 32)), 4)
    with caplog.at_level(logging.WARNING):
        read_compressed(settings(group(), kv_cache_scheme={"num_bits": 8}), {Q: parts}, "c.json")
    assert "kv_cache_scheme" in caplog.text


SLOW = settings(group("re:(.*)*x"), group("re:.*y"))
BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    (settings(group(), format="nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized': pack-quan"),
    (settings({**group(), "format": "mxfp4-pack-quantized"}), "format 'mxfp4-pack-quantized'"),
    (settings(group(), sparsity_config={"format": "sparse-24-bitmask"}), "'sparse-24-bitmask'"),
    (settings(group(), transform_config={"config_groups": {}}), "inputs are rotated while"),
    ({"format": "pack-quantized"}, "config_groups None: expected an object of objects"),
    (settings({"targets": "Linear", "weights": {}}), "targets 'Linear' and weights {}: expected"),
    (settings(group("re:.*xx"), group("re:.*yy")), f"{Q} is quantised, but is no target"),
    (SLOW, "targets in config.json has the pattern .* could take forever"),
    (settings(group(num_bits=16)), "16 bits of type 'int': integers of up to 8 bits"),
    (settings(group(num_bits=4, type="float")), "4 bits of type 'float'"),
    (settings(group(group_size=8)), r"scale, which config.json .* the shape \(4, 2\) for a weight"),
    (settings(group(group_size=None, block_structure=[0, 1])), r"block_structure is \[0, 1\]"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_SETTINGS)
def test_settings_that_are_not_read(bad: dict[str, Any], message: str) -> None:
    """A failure means that weights are misread, or that an error doesn't say why not."""
    parts = parts_of(torch.randint(16, (4, 32)), 4)
    with pytest.raises(ValueError, match=message):
        read_compressed(bad, {Q: parts}, "config.json")


BAD_PARTS: list[tuple[dict[str, Any], str]] = [
    ({"weight_scale": None}, "weight_scale is missing beside weight_packed, weight_shape"),
    ({"weight_shape": torch.tensor([4, 64])}, r"weight_shape is \[4, 64\]: they don't fit"),
    ({"weight_shape": torch.tensor([4, -32])}, r"weight_shape is \[4, -32\]"),
    ({"weight_packed": torch.ones(4, 4)}, "weight_packed, .* is torch.float32: need torch.int32"),
    ({"weight_scale": torch.ones(4, 3)}, r"the shape \(4, 3\) for a weight of 4 by 32: expected"),
    ({"weight_scale": torch.ones(2, 2).int()}, "is torch.int32: need torch.float32 or"),
    ({"weight_zero_point": torch.ones(2, 2).int()}, "zero_point.* the shape .* don't fit together"),
    ({"weight_zero_point": torch.ones(3).char()}, r"zero_point.* the shape \(3,\): expected"),
    ({"weight_g_idx": torch.zeros(32).int()}, "weight_g_idx.* doesn't give each group 16 of 32"),
    ({"weight_scale": torch.ones(4, 4)}, "for groups of 8 of 32 inputs: multiples of 16 are read"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_PARTS)
def test_parts_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    """A failure means that a damaged file is read as other weights, or fails without a reason."""
    parts = parts_of(torch.randint(16, (4, 32)), 4) | changes
    parts = {name: tensor for name, tensor in parts.items() if tensor is not None}
    size = 8 if "groups of 8" in message else 16
    with pytest.raises(ValueError, match=message):
        read_compressed(settings(group(group_size=size)), {Q: parts}, "config.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"weight": torch.ones(4, 32).to(torch.float8_e5m2)},
            "is torch.float8_e5m2: need torch.fl",
        ),
        ({"weight_scale_inv": torch.ones(3, 2)}, "one for each block of 2 by 16; download"),
        ({"weight_scale_inv": None}, "weight_scale_inv is missing beside weight"),
    ],
)
def test_float8_that_does_not_fit(changes: dict[str, Any], message: str) -> None:
    """A failure means that FP8 weights are multiplied by other numbers than their scales."""
    parts = {"weight": torch.ones(4, 32).to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(1)}
    parts = {name: t for name, t in (parts | changes).items() if t is not None}
    with pytest.raises(ValueError, match=message):
        read_fp8({"weight_block_size": [2, 16]}, {Q: parts}, "config.json")
