"""Biases that LoRA adapters train or bring, and trainers' own names of tensors."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from hf_files import write_adapter
from peft_files import BIASED, expected_logits, logits, make_reference, write_base
from safetensors.torch import save_file

from llama.checkpoint.lora import apply_adapter
from llama.checkpoint.meta import open_meta


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("variant", BIASED)
def test_biases_are_those_of_peft(variant: str, tmp_path: Path) -> None:
    """Trained or added biases that were dropped, or q's and k's out of order, change logits."""
    options, is_biased = BIASED[variant]
    reference = make_reference(biased=is_biased)
    base = open_meta(write_base(reference, tmp_path / "base"))
    assert (logits(base) - expected_logits(reference)).abs().max() < 1e-4
    model = write_adapter(reference, tmp_path / "adapter", options)
    merged = apply_adapter(base, tmp_path / "adapter")
    assert merged.params["attention_bias"]
    assert (logits(merged) - expected_logits(model)).abs().max() < 1e-4


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod."])
def test_raw_names_are_those_of_saved_adapters(wrapper: str, tmp_path: Path) -> None:
    """Trainers save a model's own names, with the adapter's and with wrappers' around them."""
    reference = make_reference(biased=True)
    base = open_meta(write_base(reference, tmp_path / "base"))
    directory = tmp_path / "adapter"
    options = {"target_modules": ["v_proj", "embed_tokens"], "use_dora": True}
    saved = {"modules_to_save": ["lm_head", "norm", "q_proj", "mlp"]}
    model = write_adapter(reference, directory, options | saved)
    parts = ("lora_", "modules_to_save", "original_module")
    raw = {
        wrapper + name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if any(part in name for part in parts)
    }
    if wrapper == "_orig_mod.":  # of the model that PEFT wrapped
        raw = {
            re.sub(r"_orig_mod\.(base_model\.model\.)", r"\1_orig_mod.", n): t
            for n, t in raw.items()
        }
    assert any(".modules_to_save.default.gate_proj.bias" in name for name in raw)
    save_file(raw, directory / "adapter_model.safetensors")
    merged = apply_adapter(base, directory)
    assert (logits(merged) - expected_logits(model)).abs().max() < 1e-4
