"""Adapters of PEFT beside a model's weights: the logits are those of PEFT's own model."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_files import write_adapter
from peft.tuners.lora import LoraLayer
from peft_files import (
    BIASED,
    TIED,
    TOKENS,
    VARIANTS,
    expected_logits,
    make_reference,
    open_model,
    write_base,
)

from llama import Transformer
from llama.adapters import Adapter
from llama.checkpoint.adapters import read_adapter


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def adapted_logits(model: Transformer, adapter: Adapter) -> torch.Tensor:
    """The logits with an adapter that all rows have."""
    for name, change in adapter.changes.items():
        model.get_submodule(name).adapted = change
    try:
        return model(TOKENS, 0)
    finally:
        for name in adapter.changes:
            model.get_submodule(name).adapted = None


CASES: dict[str, tuple[dict[str, Any], dict[str, bool]]] = {
    **{name: (options, {}) for name, options in VARIANTS.items()},
    **{f"{name} tied": (options, {"tied": True}) for name, (options, _) in TIED.items()},
    **{f"{name} bias": (options, {"biased": kind}) for name, (options, kind) in BIASED.items()},
}


@pytest.mark.parametrize("case", CASES)
def test_logits_beside_the_weights_are_those_of_peft(case: str, tmp_path: Path) -> None:
    """A part that is dropped, out of order, scaled or divided wrongly changes the logits."""
    options, kind = CASES[case]
    reference = make_reference(**kind)
    model = open_model(write_base(reference, tmp_path / "base"))
    plain = model(TOKENS, 0)
    expected = write_adapter(reference, tmp_path / "adapter", options)
    adapter = read_adapter(tmp_path / "adapter", "a", model)
    assert (adapted_logits(model, adapter) - expected_logits(expected)).abs().max() < 1e-4
    assert torch.equal(model(TOKENS, 0), plain)


@pytest.mark.parametrize("case", ["all_linear", "dora", "embedding_and_output", "of_factors bias"])
def test_a_scale_is_that_of_peft(case: str, tmp_path: Path) -> None:
    """PEFT scales the low-rank product, also within DoRA's norms, and an added bias with it."""
    options, kind = CASES[case]
    reference = make_reference(**kind)
    model = open_model(write_base(reference, tmp_path / "base"))
    expected = write_adapter(reference, tmp_path / "adapter", options)
    for module in expected.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("default", 0.4)
    adapter = read_adapter(tmp_path / "adapter", "a", model, 0.4)
    assert (adapted_logits(model, adapter) - expected_logits(expected)).abs().max() < 1e-4
