"""bitsandbytes' weights by its formula, and what is refused; the archive has its own files."""

import json
import logging
from typing import Any

import pytest
import torch

from llama.checkpoint import bitsandbytes
from llama.checkpoint.bitsandbytes import read_bitsandbytes

Q = "model.layers.0.self_attn.q_proj"
STATE = "weight.quant_state.bitsandbytes__nf4"


def json_tensor(value: object) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def four_bits(rows: int, inputs: int, block: int, nested: int = 0, **more: Any) -> dict[str, Any]:
    """A module's parts with random numbers."""
    torch.manual_seed(0)
    n_blocks = -(-rows * inputs // block)
    state = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": [rows, inputs]}
    parts = {
        "weight": torch.randint(256, (rows * inputs // 2, 1), dtype=torch.uint8),
        "weight.absmax": torch.rand(n_blocks),
        "weight.quant_map": torch.randn(16),
    }
    if nested:
        state |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": 0.25}
        parts["weight.absmax"] = torch.randint(256, (n_blocks,), dtype=torch.uint8)
        parts["weight.nested_absmax"] = torch.rand(-(-n_blocks // nested))
        parts["weight.nested_quant_map"] = torch.randn(256)
    return {**parts, STATE: json_tensor(state | more)}


def widened(parts: dict[str, Any], rows: int, inputs: int, block: int, nested: int) -> torch.Tensor:
    """The weight by the formula, number by number."""
    raw = parts["weight"].flatten().view(torch.uint8).long()
    codes = torch.stack((raw >> 4, raw & 15), dim=1).flatten()
    sizes = parts["weight.absmax"]
    if nested:
        outer = parts["weight.nested_absmax"][torch.arange(len(sizes)) // nested]
        sizes = parts["weight.nested_quant_map"][sizes.long()] * outer + 0.25
    numbers = parts["weight.quant_map"][codes] * sizes[torch.arange(len(codes)) // block]
    return numbers.view(rows, inputs)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "inputs", "block", "nested"),
    [(8, 64, 64, 0), (6, 52, 64, 0), (20, 64, 64, 8), (2, 8, 4096, 0), (9, 40, 2, 256)],
)
def test_weights_are_widened_by_the_formula(
    rows: int, inputs: int, block: int, nested: int, storage: torch.dtype, monkeypatch: Any
) -> None:
    """A failure means that pieces, last blocks or nested sizes give other weights."""
    monkeypatch.setattr(bitsandbytes, "_CHUNK", 70)  # several pieces
    parts = four_bits(rows, inputs, block, nested)
    expected = widened(parts, rows, inputs, block, nested)
    parts["weight"] = parts["weight"].view(-1).view(storage).view(-1, 1)
    read = read_bitsandbytes({}, {Q: parts}, "config.json")[Q]
    assert read.form is None and read.shape == (rows, inputs) and set(read.names) == set(parts)
    torch.testing.assert_close(read.read()["weight"], expected)


def test_plain_modules_stay_plain_and_memory_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """A failure means that widened weights surprise by their memory."""
    modules = {Q: four_bits(8, 64, 64), "lm_head": {"weight": torch.ones(2, 2)}}
    with caplog.at_level(logging.WARNING):
        assert read_bitsandbytes({}, modules, "config.json").keys() == {Q}
    assert "bitsandbytes nf4" in caplog.text and "they are widened, to 0.0 GB" in caplog.text
    caplog.clear()
    eight = {"weight": torch.ones(2, 4, dtype=torch.int8), "SCB": torch.ones(2)}
    assert read_bitsandbytes({}, {Q: eight}, "config.json")[Q].form is not None
    assert not caplog.text


BAD: list[tuple[dict[str, Any], str]] = [
    ({STATE: None}, "bitsandbytes__nf4 is missing beside weight, weight.absmax"),
    ({STATE: torch.tensor([123], dtype=torch.uint8)}, "bitsandbytes__nf4, which .* is no JSON"),
    ({STATE: torch.full((20_000,), 91, dtype=torch.uint8)}, "is no JSON"),
    ({STATE: json_tensor([1])}, r"says '\[1\]': expected quant_type nf4 or fp4, a shape"),
    ({STATE: json_tensor({"blocksize": 64, "shape": [8]})}, "expected quant_type"),
    ({STATE: json_tensor({"blocksize": 63, "shape": [8, 64]})}, "an even blocksize"),
    ({STATE: json_tensor({"blocksize": 64, "shape": [8, 10**40]})}, "expected quant_type"),
    (
        {STATE: json_tensor({"blocksize": 64, "shape": [8, 64], "nested_offset": float("nan")})},
        "a finite nested_offset",
    ),
    ({"weight": None}, "weight is missing beside"),
    ({"weight": torch.ones(9, 1).byte()}, "has 9 bytes for a weight of 8 by 64, which needs 256"),
    ({"weight": torch.ones(64, 1).int()}, "is torch.int32: need torch.uint8 or"),
    ({"weight.absmax": torch.ones(7)}, r"absmax.* has the shape \(7,\): expected \(8\)"),
    ({"weight.absmax": torch.ones(8).byte()}, "absmax.* is torch.uint8: need torch.float32"),
    ({"weight.quant_map": torch.ones(8)}, r"quant_map.* expected \(16\)"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_parts_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    """A failure means that a damaged file is read as other weights, or fails without a reason."""
    parts = four_bits(8, 64, 64) | changes
    parts = {name: tensor for name, tensor in parts.items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        read_bitsandbytes({}, {Q: parts}, "config.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SCB": None}, "SCB is missing beside weight"),
        ({"SCB": torch.ones(3)}, r"SCB.* has the shape \(3,\): expected \(2\)"),
        ({"weight_format": torch.tensor(1, dtype=torch.uint8)}, "weight_format 1, an order of one"),
    ],
)
def test_eight_bits_that_are_not_read(changes: dict[str, Any], message: str) -> None:
    """A failure means that LLM.int8's rows get other scales or another order of a GPU's."""
    parts = {"weight": torch.ones(2, 4, dtype=torch.int8), "SCB": torch.ones(2)} | changes
    parts = {name: tensor for name, tensor in parts.items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        read_bitsandbytes({}, {Q: parts}, "config.json")
